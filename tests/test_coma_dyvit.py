"""CoMA: masks, branches, the evaluation model, bad input."""

import itertools

import pytest
import torch

import coma_dyvit as cd
import data
import shapes
import engine
from data import UserError

SMALL = """--model tiny --dims 8-16-32-64 --heads 1-1-2-4 --blocks 1-1-1-1 --embed-dim 32
    --depth 2 --decoder-embed-dim 32 --decoder-depth 1""".split()


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
    """The loop's order of calls: forward and backward a micro-batch, before_step, optimizer."""
    optimizer = torch.optim.AdamW(engine.parameter_groups(model, 0.05), lr=1e-3)
    for step, a in itertools.product(range(steps), range(accum)):
        if seen is not None:
            seen.append((step, snapshot(model), snapshot(getattr(model, "evaluation", model))))
        loss, _ = model(make_batch(first=100 * step + a), torch.tensor(0.0))
        (loss / accum).backward()
        if a == accum - 1:
            model.before_step()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return snapshot(model)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("evaluation.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------ CoMA


@pytest.mark.parametrize("flags, visible, hidden", [
    ((), 6, 10), (("--backbone", "vit", "--patch-size", "8"), 25, 39),
    (("--method", "mae", "--backbone", "vit", "--patch-size", "8"), 16, 48),
])  # fmt: skip
def test_masks__complements_partition_the_patches(flags, visible, hidden):
    model = make(*flags)
    seen = []
    encode = cd.Autoencoder.encode
    for net in (model, getattr(model, "evaluation", model)):
        net.encode = lambda *a, net=net: (seen.append(a[1:]), encode(net, *a))[1]
    model(make_batch(), torch.tensor(0.0))
    model.complement(model.normalize(make_batch()["rgb"]), seen[0][0])
    (mask, first), (complement, second) = seen[0], seen[-1]
    assert ((~mask).sum(1) == visible).all() and ((~complement).sum(1) == hidden).all()
    both = torch.cat([first, second], dim=1).sort(1).values  # what the branches see, Eq. (1)
    assert torch.equal(both, torch.arange(visible + hidden).expand(4, -1))


def test_make_mask__is_drawn_from_the_sample_seed_alone():
    model = make()
    seed = torch.tensor([3, 9, 2**40 + 3, 3])
    masks = model.make_mask(seed)
    alone = torch.cat([model.make_mask(s[None]) for s in seed])
    assert torch.equal(masks, alone) and torch.equal(masks[0], masks[3])
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    steps = model.make_mask(torch.tensor([data.sample_seed(0, step, 5) for step in range(20)]))
    assert len(steps.unique(dim=0)) > 15


def test_loss__takes_each_patch_from_the_branch_that_did_not_see_it():
    model = make()
    mask = model.make_mask(torch.arange(4))
    target, other = torch.zeros(4, 16, 768), torch.ones(4, 16, 768)
    pred = 2 * other
    image = cd.assemble(pred, other, mask)
    for b, n in itertools.product(range(4), range(16)):
        assert (image[b, n] == (2.0 if mask[b, n] else 1.0)).all()
    total, logs = model.loss(pred, other, target, mask)
    assert float(total) == pytest.approx((10 * 4 + 6 * 1) / 16)
    assert (float(logs["loss_adaptive"]), float(logs["loss_evaluation"])) == (4.0, 1.0)
    total, _ = make("--method", "mae").loss(pred, other, target, mask)
    assert float(total) == pytest.approx(4.0)  # over hidden patches alone


@pytest.mark.parametrize("backbone", ["dyvit", "vit"])
def test_evaluation__frozen_trains_the_weights_of_none_and_shared_does_not(backbone):
    ends = {}
    for evaluation in ("frozen", "none", "common", "shared"):
        ends[evaluation] = train(make("--backbone", backbone, "--evaluation", evaluation), 20)
    assert same(ends["frozen"], ends["none"])
    assert not same(ends["frozen"], ends["shared"])
    assert not same(ends["frozen"], ends["common"]) and not same(ends["common"], ends["shared"])
    assert not same(ends["none"], snapshot(make("--backbone", backbone)))


def gradients(*flags):
    model = make(*flags)
    model(make_batch(), torch.tensor(0.0))[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backbone", ["dyvit", "vit"])
def test_evaluation__none_and_frozen_have_the_gradient_of_mae_at_the_same_ratio(backbone):
    """As printed, CoMA is MAE at 60 % with plain pixels: 10 of 16 patches are hidden here."""
    size = ("--backbone", backbone, "--mask-ratio", "0.6", "--patch-size", "16")
    none = gradients("--evaluation", "none", *size)
    assert same(none, gradients("--evaluation", "frozen", *size))
    mae = gradients("--method", "mae", "--no-norm-pix-loss", *size)
    for name, grad in none.items():
        torch.testing.assert_close(grad, mae[name] * 10 / 16, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["dyvit", "vit"])
def test_evaluation__common_teaches_the_encoder_in_one_branch_and_the_decoder_in_both(backbone):
    none, common, shared = (
        gradients("--backbone", backbone, "--evaluation", e) for e in ("none", "common", "shared")
    )
    after = ("decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "decoder_pred")
    for name, grad in common.items():
        # at the start the frozen encoder is ours, so the decoder's gradient is that of `shared`
        torch.testing.assert_close(grad, (shared if name.startswith(after) else none)[name])
        assert not torch.allclose(shared[name], none[name], rtol=1e-3), name
    model = make("--backbone", backbone, "--evaluation", "common")
    args = torch.ones(1, 3, 64, 64), model.make_mask(torch.ones(1).long())
    before = model.complement(*args)
    with torch.no_grad():
        model.encoder.norm.weight.zero_()  # a step's change
    assert torch.equal(model.complement(*args), before)  # seen a step later
    model.before_step()
    assert not torch.equal(model.complement(*args), before)


def test_before_step__evaluation_holds_the_weights_of_the_forward_pass_a_step_earlier():
    model, seen = make(), []
    train(model, 3, accum=2, seen=seen)
    ours = {step: weights for step, weights, _ in seen}
    for step, _, evaluation in seen:
        assert same(evaluation, ours[max(step - 1, 0)])
    assert not same(ours[1], ours[2])


def test_before_step__survives_a_checkpoint():
    model, twin = make(), make()
    train(model, 2)
    engine.load_weights(twin, model.state_dict(), "here")
    batch = make_batch(first=7)
    losses = [m(batch, torch.tensor(0.0))[1]["loss_evaluation"] for m in (model, twin)]
    assert torch.equal(*losses) and not same(snapshot(model), snapshot(model.evaluation))


def test_frozen__evaluation_model_has_no_gradient_and_no_optimizer_state():
    model = make()
    model(make_batch(), torch.tensor(0.0))[0].backward()
    trained = {id(p) for group in engine.parameter_groups(model, 0.05) for p in group["params"]}
    for p in model.evaluation.parameters():
        assert p.grad is None and not p.requires_grad and id(p) not in trained
    mask = model.make_mask(torch.zeros(1).long())
    assert not model.complement(torch.zeros(1, 3, 64, 64), mask).requires_grad


@pytest.mark.parametrize("flags", [
    (), ("--fusion", "sequential", "--decoder", "convnext"), ("--windows", "4,1"),
    ("--backbone", "vit", "--decoder", "convnext"), ("--method", "mae"), ("--evaluation", "shared"),
    ("--evaluation", "common"),
    ("--norm-pix-loss", "--stem-mask", "after"),
])  # fmt: skip
def test_forward__gradients_reach_every_trainable_parameter(flags):
    model = make(*flags)
    loss, logs = model(make_batch(), torch.tensor(0.0))
    loss.backward()
    assert not loss.isnan() and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, grad in trained.items() if grad is None or not grad.abs().sum() > 0] == []


def test_tiny__loss_falls_below_the_mean_colour():
    model = make("--evaluation", "none", "--dims", "16-32-64-128")
    scenes = shapes.ShapeScenes("train", 64, 4, ("rgb",))
    optimizer = torch.optim.AdamW(engine.parameter_groups(model, 0.05), lr=2e-3)
    first = cd.evaluate(model, data.collate([scenes[1, 10_000 + i] for i in range(64)]))["loss"]
    for step in range(100):
        batch = data.collate([scenes[0, 32 * step + i] for i in range(32)])
        model(batch, torch.tensor(0.0))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    logs = cd.evaluate(model.eval(), data.collate([scenes[1, 10_000 + i] for i in range(64)]))
    assert logs["loss"] < 0.9 * logs["loss_mean_colour"] and logs["loss"] < 0.55 * first


# ----------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("flags, words", [
    (("--patch-size", "12", "--image-size", "48"), "--patch-size 12 .* 8 or 16"),
    (("--image-size", "70"), "64 or 80"), (("--mask-ratio", "1.2"), "0.0625 to 0.938"),
    (("--mask-ratio", "0.99"), "leaves 0 of 16"), (("--windows", "8"), "4 or less"),
    (("--windows", "3,2"), "8, 4, 2, 1"), (("--windows", "a"), "positive numbers"),
    (("--dims", "8-16-32"), "four numbers"), (("--heads", "3-1-1-1"), "not divisible"),
    (("--dims", "6-16-32-64"), "divisible by 4"), (("--decoder-num-heads", "5"), "24|35"),
    (("--method", "mae", "--evaluation", "frozen"), "no second branch"),
    (("--decoder-depth", "0"), "above 0"), (("--backbone", "swin"), "dyvit"),
    (("--fusion", "x"), "printed"),
])  # fmt: skip
def test_config__refuses_what_cannot_work(flags, words):
    with pytest.raises(UserError, match=words):
        config(*flags)


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
    engine.save(tmp_path / "last.pt", checkpoint | {"method": "cfmae"})
    with pytest.raises(UserError, match="cfmae"):
        cd.load_encoder(tmp_path / "last.pt")


def test_preview__writes_both_branches(tmp_path):
    from PIL import Image

    for flags, columns in (((), 6), (("--method", "mae"), 3)):
        cd.preview(make(*flags).eval(), make_batch(2), tmp_path / "p.png", 0)
        assert Image.open(tmp_path / "p.png").width == columns * 196 + 4


def test_engine__calls_before_step_between_backward_and_optimizer(tmp_path):
    """After three steps the evaluation model has the weights of the third forward pass."""
    states = []
    for steps in ("2", "3"):
        out = tmp_path / steps
        cfg = config("--steps", steps, "--batch-size", "4", "--val-samples", "2", "--workers", "0",
                     "--device", "cpu", "--output", str(out))  # fmt: skip
        assert engine.train("coma_dyvit", cfg, engine.World(cfg), cd.CoMA) == 0
        states.append(engine.load(out / "last.pt", "coma_dyvit")["model"])
    second = {k: v for k, v in states[0].items() if not k.startswith("evaluation.")}
    assert same({k: states[1][f"evaluation.{k}"] for k in second}, second)
