"""CoMA: masks, branches, the evaluation model, bad input."""

import itertools
import json
from unittest import mock

import pytest
import torch

import coma_dyvit as cd
import common
import data
import shapes
import engine
import pictures
from data import UserError

SMALL = """--model tiny --no-norm-pix-loss --dims 8-16-32-64 --heads 1-1-2-4 --blocks 1-1-1-1
    --decoder-embed-dim 32 --decoder-depth 1""".split()


def config(*flags):
    return engine.parse(cd.Config, cd.PRESETS, "", [*SMALL, *flags])


def make(*flags):
    torch.manual_seed(0)
    return cd.CoMA(config(*flags))


def make_batch(B=4, first=0):
    g = torch.Generator().manual_seed(first)
    rgb = torch.randint(0, 256, (B, 3, 64, 64), dtype=torch.uint8, generator=g)
    return {"rgb": rgb, "seed": torch.arange(first, first + B)}


def train(model, steps, accum=1, seen=None):
    """The loop's order of calls: forward and backward a micro-batch, follow, optimizer."""
    optimizer = torch.optim.AdamW(engine.decay_groups(model, 0.05), lr=1e-3)
    for step, a in itertools.product(range(steps), range(accum)):
        if seen is not None:
            seen.append((step, snapshot(model), snapshot(model.evaluation or model)))
        loss, _ = model(make_batch(first=100 * step + a), torch.tensor(0.0))
        (loss / accum).backward()
        if a == accum - 1:
            model.follow()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return snapshot(model)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("evaluation.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------ CoMA


def make_mask(model, seed):
    return cd.make_mask(model.cfg, {"seed": seed}, None)


def test_masks__complements_partition_the_patches():
    model, seen = make(), []
    for net in (model, model.evaluation):
        embed = net.encoder.embed
        net.encoder.embed = lambda *a, embed=embed: (seen.append(a[1:]), embed(*a))[1]
    model(make_batch(), torch.tensor(0.0))
    (mask, first), (complement, second) = seen
    assert ((~mask).sum(1) == 6).all() and ((~complement).sum(1) == 10).all()
    both = torch.cat([first, second], dim=1).sort(1).values  # what the branches see, Eq. (1)
    assert torch.equal(both, torch.arange(16).expand(4, -1))


def test_make_mask__is_drawn_from_the_sample_seed_alone():
    model = make()
    seed = torch.tensor([3, 9, 2**40 + 3, 3])
    masks = make_mask(model, seed)
    alone = torch.cat([make_mask(model, s[None]) for s in seed])
    assert torch.equal(masks, alone) and torch.equal(masks[0], masks[3])
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    steps = make_mask(model, torch.tensor([data.sample_seed(0, step, 5) for step in range(20)]))
    assert len(steps.unique(dim=0)) > 15


def test_loss__takes_each_patch_from_the_branch_that_did_not_see_it():
    model = make()
    mask = make_mask(model, torch.arange(4))
    imgs, other = torch.zeros(4, 3, 64, 64), torch.ones(4, 16, 768)
    pred = 2 * other
    image = cd.assemble(pred, other, mask)
    for b, n in itertools.product(range(4), range(16)):
        assert (image[b, n] == (2.0 if mask[b, n] else 1.0)).all()
    total, logs = model.loss(pred, other, imgs, mask)
    assert float(total) == pytest.approx((10 * 4 + 6 * 1) / 16)
    assert (float(logs["loss_adaptive"]), float(logs["loss_evaluation"])) == (4.0, 1.0)
    total, logs = model.loss(pred, None, imgs, mask)
    assert float(total) == pytest.approx(10 * 4 / 16) and [*logs] == ["loss_adaptive"]


@pytest.mark.slow
def test_evaluation__frozen_trains_the_weights_of_none_and_shared_does_not():
    ends = {}
    for evaluation in ("frozen", "none", "common", "shared"):
        ends[evaluation] = train(make("--evaluation", evaluation), 20)
    assert same(ends["frozen"], ends["none"])
    assert not same(ends["frozen"], ends["shared"])
    assert not same(ends["frozen"], ends["common"]) and not same(ends["common"], ends["shared"])
    assert not same(ends["none"], snapshot(make()))


def gradients(*flags):
    model = make(*flags)
    model(make_batch(), torch.tensor(0.0))[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_evaluation__none_and_frozen_have_the_gradient_of_mae_at_the_same_ratio():
    """As printed, CoMA is MAE at 60 % with plain pixels: 10 of 16 patches are hidden here."""
    none = gradients("--evaluation", "none")
    assert same(none, gradients("--evaluation", "frozen"))
    model, batch = make("--evaluation", "none"), make_batch()
    imgs, mask = model.normalize(batch["rgb"]), make_mask(model, batch["seed"])
    hidden = (model.predict(imgs, mask, 6) - common.patchify(imgs, 16))[mask]
    hidden.square().mean().backward()  # MAE's: over hidden patches alone
    for name, p in model.named_parameters():
        torch.testing.assert_close(none[name], p.grad * 10 / 16, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("logging, terms", [
    (False, ["loss_adaptive"]),
    (True, ["loss_adaptive", "loss_evaluation", "loss_assembled"])])  # fmt: skip
def test_frozen__second_branch_runs_in_logged_steps_alone(logging, terms):
    model, batch = make(), make_batch()
    calls = []
    model.evaluation.encoder.norm.register_forward_hook(lambda *a: calls.append(1))
    loss, logs = model(batch, torch.tensor(0.0), logging)
    assert [*logs] == terms and len(calls) == logging
    loss.backward()
    none = make("--evaluation", "none")
    expected, _ = none(batch, torch.tensor(0.0), logging)
    expected.backward()
    assert torch.equal(loss, expected)  # what is minimised does not jump where a line is logged
    for p, q in zip(model.parameters(), none.parameters()):
        assert torch.equal(p.grad, q.grad)
    if logging:  # Eq. 3: patches that either branch predicted
        both = (10 * logs["loss_adaptive"] + 6 * logs["loss_evaluation"]) / 16
        torch.testing.assert_close(logs["loss_assembled"], both)
        torch.testing.assert_close(loss, 10 / 16 * logs["loss_adaptive"])


@pytest.mark.slow
def test_evaluation__common_teaches_the_encoder_in_one_branch_and_the_decoder_in_both():
    none, common, shared = (gradients("--evaluation", e) for e in ("none", "common", "shared"))
    after = ("decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "decoder_pred")
    for name, grad in common.items():
        # at the start the frozen encoder is ours, so the decoder's gradient is that of `shared`
        torch.testing.assert_close(grad, (shared if name.startswith(after) else none)[name])
        assert not torch.allclose(shared[name], none[name], rtol=1e-3), name
    model = make("--evaluation", "common")
    args = torch.ones(1, 3, 64, 64), make_mask(model, torch.ones(1).long())
    before = model.complement(*args)
    with torch.no_grad():
        model.encoder.norm.weight.zero_()  # a step's change
    assert torch.equal(model.complement(*args), before)  # seen a step later
    model.follow()
    assert not torch.equal(model.complement(*args), before)


@pytest.mark.slow
def test_follow__evaluation_holds_the_weights_of_the_forward_pass_a_step_earlier():
    model, seen = make(), []
    train(model, 3, accum=2, seen=seen)
    ours = {step: weights for step, weights, _ in seen}
    for step, _, evaluation in seen:
        assert same(evaluation, ours[max(step - 1, 0)])
    assert not same(ours[1], ours[2])


@pytest.mark.slow
def test_follow__survives_a_checkpoint():
    model, twin = make(), make()
    train(model, 2)
    engine.load_weights(twin, model.state_dict(), "here")
    batch = make_batch(first=7)
    losses = [m(batch, torch.tensor(0.0))[1]["loss_evaluation"] for m in (model, twin)]
    assert torch.equal(*losses) and not same(snapshot(model), snapshot(model.evaluation))


def test_frozen__evaluation_model_has_no_gradient_and_no_optimizer_state():
    model = make()
    model(make_batch(), torch.tensor(0.0))[0].backward()
    trained = {id(p) for group in engine.decay_groups(model, 0.05) for p in group["params"]}
    for p in model.evaluation.parameters():
        assert p.grad is None and not p.requires_grad and id(p) not in trained
    mask = make_mask(model, torch.zeros(1).long())
    assert not model.complement(torch.zeros(1, 3, 64, 64), mask).requires_grad


@torch.no_grad()
def test_predict__hidden_patches_are_told_apart_by_their_position():
    model = make("--evaluation", "none")
    mask = make_mask(model, torch.zeros(1).long())
    hidden = model.predict(torch.randn(1, 3, 64, 64), mask, 6)[mask]
    assert not torch.isclose(hidden[0], hidden[1:], rtol=1e-3).all(1).any()


@pytest.mark.parametrize("norm", ["--no-norm-pix-loss", "--norm-pix-loss"])
@torch.no_grad()
def test_evaluate__is_both_branches_of_the_current_weights_beside_a_guess(norm):
    model, batch = make(norm), make_batch()
    for p in model.evaluation.parameters():
        p.zero_()  # not what is evaluated
    imgs, mask = model.normalize(batch["rgb"]), make_mask(model, batch["seed"])
    patches = common.pixel_target(imgs, 16, "no-" not in norm)
    pred, other = model.predict(imgs, mask, 6), model.predict(imgs, ~mask, 10)
    guess = [patches[b, ~mask[b]].view(-1, 3).mean(0).repeat(256) for b in range(4)]
    guess = [(patches[b, mask[b]] - guess[b]).square().mean() for b in range(4)]
    found = cd.evaluate(model, batch)
    expected = torch.where(mask[..., None], pred, other)
    torch.testing.assert_close(found["loss"], (expected - patches).square().mean())
    torch.testing.assert_close(found["loss_mean_colour"], sum(guess) / 4)


def test_init__is_maes():
    model = make()
    assert model.mask_token.std() > 0.01
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_norm_pix_loss__is_what_is_compared_and_drawn(monkeypatch):
    model, batch = make("--norm-pix-loss"), make_batch()
    imgs, mask = model.normalize(batch["rgb"]), make_mask(model, batch["seed"])
    target = common.pixel_target(imgs, 16, True)
    assert model.loss(target, target, imgs, mask)[0] == 0
    monkeypatch.setattr(cd.CoMA, "predict", lambda *a: target)
    drawn = cd.reconstruct(model, batch)["assembled"]
    assert (drawn[2].int() - batch["rgb"].int()).abs().max() <= 1


@pytest.mark.slow
def test_tiny__loss_falls_below_the_mean_colour():
    model = make("--evaluation", "none", "--dims", "16-32-64-128")
    scenes = shapes.ShapeScenes("train", 64, 4, ("rgb",))
    optimizer = torch.optim.AdamW(engine.decay_groups(model, 0.05), lr=2e-3)
    first = cd.evaluate(model, data.collate([scenes[1, 10_000 + i] for i in range(64)]))["loss"]
    for step in range(60):
        batch = data.collate([scenes[0, 16 * step + i] for i in range(16)])
        model(batch, torch.tensor(0.0))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    logs = cd.evaluate(model.eval(), data.collate([scenes[1, 10_000 + i] for i in range(64)]))
    assert logs["loss"] < 0.95 * logs["loss_mean_colour"] and logs["loss"] < 0.6 * first


# ----------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("flags, words", [
    (("--patch-size", "12", "--image-size", "48"), "--patch-size 12 .* 8 or 16"),
    (("--image-size", "70"), "64 or 80"), (("--mask-ratio", "1.2"), "leaves 1 to 15"),
    (("--mask-ratio", "0.99"), "leaves 0 patches"), (("--windows", "8"), "4 or less"),
    (("--windows", "4,4"), "8, 4, 2, 1"), (("--windows", "8,8,4"), "8, 4, 2, 1"),
    (("--windows", "3,2"), "8, 4, 2, 1"), (("--windows", "a"), "8, 4, 2, 1"),
    (("--blocks", "1-0-1-1"), "--blocks 1-0-1-1: want four numbers"),
    (("--dims", "8-16-32"), "four numbers"), (("--heads", "3-1-1-1"), "not divisible"),
    (("--dims", "6-16-32-64"), "divisible by 4"), (("--decoder-num-heads", "5"), "24|35"),
    (("--decoder-depth", "0"), "above 0"), (("--decoder", "x"), "convnext"),
    (("--decoder-embed-dim", "6", "--decoder-num-heads", "1"), "divisible by 4"),
])  # fmt: skip
def test_config__refuses_what_cannot_work(flags, words):
    with pytest.raises(UserError, match=words):
        config(*flags)


def test_num_visible__of_100_patches_is_ten():
    cfg = config("--image-size", "160", "--mask-ratio", "0.9")
    assert cfg.num_visible == 10  # (1 - 0.9) * 100 is a little less


def test_load_encoder__rebuilds_what_was_saved(tmp_path):
    model = make()
    train(model, 1)
    checkpoint = {"format": engine.FORMAT, "method": "coma_dyvit", "step": 1, "window": {}}
    checkpoint |= {"config": vars(model.cfg), "model": model.state_dict(), "optimizer": {}}
    engine.save(tmp_path / "last.pt", checkpoint)
    encoder = cd.load_encoder(tmp_path / "last.pt", image_size=(96, 64), drop_path=0.1)
    assert same(encoder.state_dict(), model.encoder.state_dict()) and encoder.grid == (6, 4)
    assert encoder.trained_grid == (4, 4)  # which positions of other sizes refer to
    imgs = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(encoder.embed(imgs), model.encoder.embed(imgs))
    assert torch.equal(cd.load_encoder(tmp_path / "last.pt").pos_embed, model.encoder.pos_embed)


def test_reconstruct__shows_what_each_branch_sees_predicts_and_both_assembled():
    model, batch = make().eval(), make_batch(2)
    found = cd.reconstruct(model, batch)
    mask = make_mask(model, batch["seed"]).view(2, 4, 4)
    (_, first, a), (_, second, b), (truth, none, whole) = found.values()
    assert torch.equal(first, mask) and torch.equal(second, ~mask) and none is None
    assert torch.equal(truth, batch["rgb"])
    cells = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    assert torch.equal(whole, torch.where(cells, a, b)) and not torch.equal(a, b)  # Eq. (2)
    columns = pictures.columns(found)
    assert len(columns) == 8 and all(x.shape == (2, 3, 64, 64) for x in columns.values())


def run(out, steps, *flags):
    words = f"--steps {steps} --batch-size 4 --val-samples 2 --workers 0 --device cpu --output"
    cd.main([*SMALL, *words.split(), str(out), *flags])
    return engine.load(out / "last.pt", "coma_dyvit")["model"]


@pytest.mark.slow
def test_main__follows_between_backward_and_optimizer(tmp_path):
    """After three steps the evaluation model has the weights of the third forward pass."""
    torch.set_num_threads(1)
    states = [run(tmp_path / str(steps), steps) for steps in (2, 3)]
    second = {k: v for k, v in states[0].items() if not k.startswith("evaluation.")}
    assert same({k: states[1][f"evaluation.{k}"] for k in second}, second)
    assert (tmp_path / "2" / "preview-0000002.png").exists()


@pytest.mark.slow
def test_main__resumes_and_logs_the_frozen_branch(tmp_path):
    torch.set_num_threads(1)
    flags, calls = ("--micro-batch", "2", "--log-every", "2", "--precision", "fp32"), []
    branch = cd.CoMA.complement
    spy = lambda *args: calls.append(torch.is_grad_enabled()) or branch(*args)  # noqa: E731
    with mock.patch.object(cd.CoMA, "complement", spy):
        whole = run(tmp_path / "whole", 4, *flags)
    assert sum(calls) == 4  # a logged step's two micro-batches, of two steps
    run(tmp_path / "parts", 3, *flags)
    assert same(whole, run(tmp_path / "parts", 4, *flags, "--resume"))
    lines = [json.loads(x) for x in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    logged = [x for x in lines if "lr" in x]
    assert [x["step"] for x in logged] == [2, 4]
    for x in logged:  # of two steps; the second branch's terms are the second step's
        assert x["loss"] == pytest.approx(10 / 16 * x["loss_adaptive"], rel=1e-5)
        assert x["loss_assembled"] > x["loss"] and x["loss_evaluation"] > 0


@pytest.mark.slow
def test_load_init__an_exported_encoder_starts_a_run_and_a_resumed_run_does_not_need_it(tmp_path):
    flags = "--data shapes --model tiny --device cpu --precision fp32 --workers 0 --batch-size 4"
    flags, seen = [*flags.split(), "--val-samples", "2", "--output"], []
    cd.main([*flags, str(tmp_path / "a"), "--steps", "1"])
    source = engine.load(tmp_path / "a/last.pt", "coma_dyvit")["model"]
    alone = {k: v for k, v in source.items() if k.startswith("encoder.")}
    torch.save({"model": alone}, tmp_path / "encoder.pth")
    model = cd.CoMA(engine.parse(cd.Config, cd.PRESETS, "", ["--model", "tiny"]))
    report = cd.load_init(model, tmp_path / "encoder.pth")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in alone.items())
    assert "left out: nothing; missing, so fresh: " in report and "fusion" in report
    run = [*flags, str(tmp_path / "b"), "--init", str(tmp_path / "encoder.pth")]
    with mock.patch.object(engine.Run, "steps", lambda run, model, *_: seen.append(model) or ()):
        cd.main([*flags, str(tmp_path / "c"), "--init", str(tmp_path / "encoder.pth")])
    assert same(snapshot(seen[0]), snapshot(seen[0].evaluation))  # it starts so, too
    cd.main([*run, "--steps", "1"])
    (tmp_path / "encoder.pth").unlink()
    cd.main([*run, "--steps", "2", "--resume"])
    cd.main([*flags, str(tmp_path / "b"), "--steps", "3", "--resume"])  # --init is not named again
    torch.save({k: v for k, v in alone.items() if "stem" not in k}, tmp_path / "less.pth")
    with pytest.raises(UserError, match="missing stem.weight"):
        cd.load_init(model, tmp_path / "less.pth")
    del source["fusion.1.proj.bias"]
    torch.save(source, tmp_path / "less.pth")
    with pytest.raises(UserError, match="missing fusion.1.proj.bias"):
        cd.load_init(model, tmp_path / "less.pth")
