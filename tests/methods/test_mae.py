"""mae.py: the public implementation's tensors and files, its sizes, what is hidden, and its run."""

import json
import pickle
from pathlib import Path

import mae
import pytest
import torch
from torch.testing import assert_close

import common
import data
import engine
from data import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "mae_tiny.pt"
TINY = "--model tiny --image-size 32 --embed-dim 32 --depth 2 --decoder-embed-dim 16"


def config(*flags: str) -> mae.Config:
    return engine.parse(mae.Config, mae.PRESETS, "", [*TINY.split(), *flags])


@pytest.fixture
def golden():
    return torch.load(GOLDEN, weights_only=True)


def golden_model() -> mae.MAE:
    flags = """--image-size 64 --patch-size 8 --depth 3 --num-heads 4 --decoder-embed-dim 24
        --decoder-depth 2 --decoder-num-heads 4"""
    return mae.MAE(config(*flags.split()))


def test_mae__equals_the_public_implementation(golden, tmp_path, monkeypatch):
    torch.save({"model": golden["state_dict"]}, tmp_path / "mae.pth")
    model = golden_model()
    mae.load_init(model, tmp_path / "mae.pth")
    mask = common.random_mask(golden["noise"], 48)
    assert torch.equal(mask, golden["mask"].bool()) and model.cfg.num_visible == 16
    monkeypatch.setattr(mae, "make_mask", lambda cfg, batch, progress: mask)
    latent = []
    model.encoder.norm.register_forward_hook(lambda m, x, y: latent.append(y))
    loss, _ = model({"rgb": golden["rgb"], "seed": torch.arange(2)}, torch.tensor(0.0))
    ids_keep, _, _ = common.split(mask, 16)
    at = 1 + golden["ids_restore"].gather(1, ids_keep)  # theirs are shuffled
    for ours, theirs in (
        (latent[0][:, 1:], common.gather(golden["latent"], at)),
        (latent[0][:, 0], golden["latent"][:, 0]),
        (model.predict(model.normalize(golden["rgb"]), mask), golden["pred"]),
        (loss, golden["loss"]),
    ):
        assert_close(ours, theirs, atol=1e-5, rtol=0)
    loss.backward()
    norms = {n.removeprefix("encoder."): p.grad.norm() for n, p in model.named_parameters()}
    assert norms.keys() == golden["grad_norms"].keys() - {"pos_embed", "decoder_pos_embed"}
    for name, norm in norms.items():
        assert_close(norm, golden["grad_norms"][name], atol=1e-5, rtol=1e-4)


def test_load_init__reports_and_refuses(golden, tmp_path):
    def load(state):
        torch.save(state, tmp_path / "x.pth")
        return mae.load_init(golden_model(), tmp_path / "x.pth")

    state = golden["state_dict"]
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask"))}
    report = load({"model": encoder | {"head.bias": torch.ones(3)}})
    assert "41 tensors loaded" in report
    assert "left out: pos_embed, head; missing, so fresh: mask_token, decoder_embed (2)" in report
    for bad, words in (
        ({k: v for k, v in state.items() if k != "norm.bias"}, "missing norm.bias"),
        (state | {"pos_embed": state["pos_embed"] + 0.1}, "pos_embed was learned"),
        ({"encoder.pos_embed": state["pos_embed"] + 0.1}, "pos_embed was learned"),  # ours, tuned
        ({k: v for k, v in state.items() if k != "decoder_norm.bias"}, "missing decoder_norm.bias"),
        (state | {"blocks.3.norm1.bias": torch.zeros(32)}, "unexpected blocks.3.norm1.bias"),
        (state | {"norm.bias": torch.zeros(5)}, "norm.bias has shape"),
        ([1, 2], "holds no state dict"),
    ):
        with pytest.raises(UserError, match=words):
            load(bad)
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(UserError, match="read safely"):
        mae.load_init(golden_model(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="no such file"):
        mae.load_init(golden_model(), tmp_path / "absent.pth")


def test_load_init__finds_wrapped_weights_and_safetensors(golden, tmp_path):
    state = golden["state_dict"]
    ema = {k: v + 1 if k == "norm.bias" else v for k, v in state.items()}
    torch.save({"model": state, "model_ema": ema}, tmp_path / "both.pth")
    model = golden_model()
    assert "model taken, not model_ema" in mae.load_init(model, tmp_path / "both.pth")
    assert torch.equal(model.encoder.norm.bias, state["norm.bias"])
    header, body = {}, b""
    for k, v in state.items():
        raw = v.contiguous().numpy().tobytes()
        header[k] = {"dtype": "F32", "shape": list(v.shape)}
        header[k]["data_offsets"] = [len(body), len(body) + len(raw)]
        body += raw
    header = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    model = golden_model()
    mae.load_init(model, path)
    assert torch.equal(model.decoder_pred.weight, state["decoder_pred.weight"])


@pytest.mark.slow
def test_main__reads_init_where_a_run_starts_and_not_where_it_goes_on(tmp_path):
    torch.set_num_threads(1)
    flags = f"""{TINY} --batch-size 4 --val-samples 2 --workers 0 --device cpu --precision fp32
        --init {tmp_path / "source.pt"} --output""".split()
    source = mae.MAE(config())
    torch.save({"ema": source.state_dict()}, tmp_path / "source.pt")
    with pytest.raises(UserError, match="--init"):  # which of them is not said
        mae.main([*flags, str(tmp_path / "x"), "--steps", "1"])
    torch.save(source.state_dict(), tmp_path / "source.pt")
    mae.main([*flags, str(tmp_path / "run"), "--steps", "1", "--base-lr", "1e-12"])
    model = engine.load(tmp_path / "run" / "last.pt", "mae")["model"]
    for k, v in source.state_dict().items():  # a step at a rate of nothing
        assert_close(model[k], v, atol=1e-6, rtol=1e-6)
    (tmp_path / "source.pt").unlink()
    more = ("--steps", "2", "--base-lr", "1e-12", "--resume")
    mae.main([*flags, str(tmp_path / "run"), *more])
    with pytest.raises(UserError, match="no such file"):  # it is, where a run starts afresh
        mae.main([*flags, str(tmp_path / "new"), *more])


# numel of models_mae.mae_vit_{base,large,huge}_patch* of facebookresearch/mae: its parameters, less
# pos_embed and decoder_pos_embed, which are fixed; million: the encoder's
@pytest.mark.parametrize("preset, size, trained, million, patches, visible", [
    ("base", (768, 12, 12, 16), 111_655_680, 85.65, 196, 49),
    ("large", (1024, 24, 16, 16), 329_239_296, 303.10, 196, 49),
    ("huge", (1280, 32, 16, 14), 656_613_964, 630.43, 256, 64)])  # fmt: skip
def test_presets__are_the_papers_models(preset, size, trained, million, patches, visible):
    cfg = engine.parse(mae.Config, mae.PRESETS, "", ["--model", preset])
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads, cfg.patch_size) == size
    with torch.device("meta"):
        model = mae.MAE(cfg)
    assert sum(p.numel() for p in model.parameters()) == trained
    encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    assert encoder == pytest.approx(million, abs=0.01)
    assert [b.attn.num_heads for b in model.decoder_blocks] == [16] * 8
    assert (cfg.num_patches, cfg.num_visible) == (patches, visible)
    assert (cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads) == (512, 8, 16)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size, cfg.base_lr) == (800, 40, 4096, 1.5e-4)
    assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.min_lr) == (0.05, 0.9, 0.95, 0.0)
    assert (cfg.mask_ratio, cfg.norm_pix_loss, cfg.crop_scale_min) == (0.75, True, 0.2)
    cfg = config("--mask-ratio", "0.9", "--image-size", "80", "--patch-size", "8")
    assert cfg.num_visible == 10  # of 100: (1 - 0.9) * 100 is a little less


@pytest.mark.parametrize("flags, words", [
    ("--mask-ratio 0.99", "--mask-ratio 0.99 leaves 0 visible"),
    ("--mask-ratio 1", "--mask-ratio 1.0 is outside"),
    ("--embed-dim 30 --num-heads 3", "--embed-dim 30 is not divisible by 4"),
    ("--num-heads 5", "--embed-dim 32 .* nearest that work: 30 or 35"),
    ("--depth 0", "--depth 0 must be above 0")])  # fmt: skip
def test_config__refuses_and_names_the_field(flags, words):
    with pytest.raises(UserError, match=words):
        config(*flags.split())


def batch_of(n: int, cfg: mae.Config) -> dict:
    scenes = data.open_dataset("shapes", "train", cfg.image_size, cfg.patch_size, ("rgb",),
                               (0.2, 1.0), True, 0)  # fmt: skip
    return data.collate([scenes[0, i] for i in range(n)])


def test_predict__hidden_pixels_change_nothing_and_gradients_reach_everything():
    torch.manual_seed(0)
    model, batch = mae.MAE(config("--patch-size", "8")), None
    batch = batch_of(3, model.cfg)
    mask = mae.make_mask(model.cfg, batch, None)
    assert (~mask).sum(1).tolist() == [4, 4, 4]
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = batch["rgb"].where(~hidden, 255 - batch["rgb"])
    before, after = (model.predict(model.normalize(x), mask) for x in (batch["rgb"], other))
    assert torch.equal(before, after)
    loss, logs = model(batch, torch.tensor(0.0))
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters()) and not logs


def test_loss__is_the_mean_over_hidden_pixels_of_normalised_patches():
    model = mae.MAE(config("--patch-size", "8"))
    batch = batch_of(2, model.cfg)
    imgs, mask = model.normalize(batch["rgb"]), mae.make_mask(model.cfg, batch, None)
    pred, errors = torch.randn(2, 16, 192), []
    for b in range(2):
        for n in range(16):
            if mask[b, n]:
                patch = imgs[b, :, n // 4 * 8 : n // 4 * 8 + 8, n % 4 * 8 : n % 4 * 8 + 8]
                target = patch.permute(1, 2, 0).flatten()
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append((pred[b, n] - target).square().mean())
    assert_close(model.loss(pred, imgs, mask), torch.stack(errors).mean())


def test_evaluate__plain_pixels_beside_each_patch_s_mean():
    model = mae.MAE(config("--patch-size", "8", "--no-norm-pix-loss"))
    batch = batch_of(2, model.cfg)
    found, mask = mae.evaluate(model, batch), mae.make_mask(model.cfg, batch, None)
    patches = common.patchify(model.normalize(batch["rgb"]), 8)
    spread = patches.var(-1, unbiased=False)[mask].mean()
    assert_close(found["loss_flat"], spread, rtol=1e-4, atol=0)
    assert_close(found["loss"], model(batch, torch.tensor(0.0))[0].detach())
    found = mae.evaluate(mae.MAE(config("--patch-size", "8")), batch)  # unit variance, unbiased
    assert_close(found["loss_flat"], torch.tensor(1 - 1 / 192), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", ["--norm-pix-loss", "--no-norm-pix-loss"])
def test_reconstruct__draws_a_perfect_prediction_as_the_truth(norm, monkeypatch):
    model = mae.MAE(config("--patch-size", "8", norm))
    batch = batch_of(2, model.cfg)
    target = common.pixel_target(model.normalize(batch["rgb"]), 8, "no-" not in norm)
    monkeypatch.setattr(model, "predict", lambda *_: target)
    ((truth, hidden, pred),) = mae.reconstruct(model, batch).values()
    assert truth is batch["rgb"] and (pred.int() - truth.int()).abs().max() <= 1
    assert torch.equal(hidden, mae.make_mask(model.cfg, batch, None).view(2, 4, 4))


def test_init__is_the_public_code_s():
    """models_mae.py: Xavier-uniform layers without biases, tokens N(0, 0.02)."""
    torch.manual_seed(0)
    model = mae.MAE(config("--decoder-embed-dim", "64"))
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Linear):
            bound = (6 / sum(m.weight.shape)) ** 0.5
            assert 0.95 * bound < m.weight.abs().max() <= bound and not m.bias.any(), name
    for token in (model.mask_token, model.encoder.cls_token):
        assert 0.01 < token.std() < 0.03


@pytest.mark.slow
def test_main__learns_resumes_and_leaves_a_picture(tmp_path, capsys):
    torch.set_num_threads(1)
    flags = "--data shapes --model tiny --image-size 32 --embed-dim 32 --device cpu --workers 0"
    flags += " --precision fp32 --batch-size 16 --val-samples 32 --log-every 5 --base-lr 0.02"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mae.main([*flags.split(), "--steps", "40", "--output", str(whole)])
    mae.main([*flags.split(), "--steps", "17", "--output", str(parts)])
    mae.main([*flags.split(), "--steps", "40", "--output", str(parts), "--resume"])
    a, b = (engine.load(p / "last.pt", "mae") for p in (whole, parts))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    (parts / "preview-0000040.png").unlink()  # as if killed after the last save
    for drawn, said in ((True, "finished: step 40"), (False, "finished already: ")):
        mae.main([*flags.split(), "--steps", "40", "--output", str(parts), "--resume"])
        assert (parts / "preview-0000040.png").exists() and said in (out := capsys.readouterr().out)
        assert ("preview" in out.split()) == drawn
    lines = [json.loads(x) for x in (whole / "log.jsonl").read_text().splitlines()]
    val = [x["val"] for x in lines if "val" in x]
    assert val[-1]["loss"] < 0.97 * val[0]["loss"]
    encoder = mae.load_encoder(whole / "last.pt", image_size=(64, 64))
    assert encoder.trained_grid == (4, 4) and encoder.grid == (8, 8)
