"""MCMAE's model: the public code's tensors, two forms of one network, leaks, masks, loss."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import engine
import mcmae
from common import gather, patchify, split, unpatchify
from data import collate
from shapes import ShapeScenes

MINI = (
    "--model tiny --embed-dims 8,12,16 --depths 2,1,2 --num-heads 2 --decoder-embed-dim 16 "
    "--decoder-num-heads 2 --decoder-depth 1"
)


def parse(line: str) -> mcmae.Config:
    return engine.parse(mcmae.Config, mcmae.PRESETS, "", line.split())


def build(line: str = "") -> mcmae.MCMAE:
    """A small model whose biases and norms are not at their neutral start."""
    torch.manual_seed(0)
    model = mcmae.MCMAE(parse(f"{MINI} {line}"))
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, p.mean().item(), 0.2)
    return model


def masked(model: mcmae.MCMAE, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images and the mask of a batch."""
    return model.normalize(batch["rgb"]), mcmae.make_mask(model.cfg, batch, None)


def encode(model: nn.Module, imgs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the decoder is given, (B, V, C3); of clips (B, V*t, C3)."""
    latent = []
    hook = model.encoder.norm.register_forward_hook(lambda m, x, y: latent.append(y))
    model.predict(imgs, mask)
    hook.remove()
    return latent[0]


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    scenes = ShapeScenes("train", 64, 2, ("rgb",))
    return collate([scenes[0, i] for i in range(3)])


# ------------------------------------------------------------------------- against the public code


@pytest.mark.parametrize("form", ["--sparse", "--no-sparse"])
def test_mcmae__reproduces_the_public_code(form, tmp_path):
    golden = torch.load(Path(__file__).parents[1] / "golden/convmae_tiny.pt", weights_only=True)
    torch.save(golden["state_dict"], tmp_path / "public.pth")
    model = mcmae.MCMAE(parse(
        "--embed-dims 16,24,32 --depths 2,1,2 --num-heads 4 --decoder-embed-dim 24 "
        f"--decoder-depth 2 --decoder-num-heads 4 {form}"
    ))  # fmt: skip
    mcmae.load_init(model, tmp_path / "public.pth")
    imgs, mask = model.normalize(golden["rgb"]), golden["mask"]
    # Their visible tokens lie in the order of the noise, ours in raster order.
    order = golden["ids_restore"].gather(1, split(mask, 49)[0])
    pred = model.predict(imgs, mask)
    loss = model.loss(pred, imgs, mask)
    loss.backward()
    assert_close(encode(model, imgs, mask), gather(golden["latent"], order), atol=1e-5, rtol=1e-5)
    assert_close(pred[:, :: golden["pred_every"]], golden["pred"], atol=1e-5, rtol=1e-5)
    assert_close(loss, golden["loss"], atol=1e-5, rtol=1e-5)
    norms = {k.removeprefix("encoder."): p.grad.norm() for k, p in model.named_parameters()}
    assert norms.keys() == golden["grad_norms"].keys()
    assert_close(norms, golden["grad_norms"], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------- two forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("line", ["", "--kernel-size 9", "--no-multi-scale --mask-ratio 0.9"])
@pytest.mark.slow
def test_sparse__equals_dense_in_outputs_and_gradients(batch, line, dtype):
    results = []
    for form in ("--sparse", "--no-sparse"):
        model = build(f"{line} {form}").to(dtype)
        imgs, mask = masked(model, batch)
        imgs = imgs.to(dtype)
        latent = encode(model, imgs, mask)
        # fp64 all the way: the loss itself is taken in fp32
        (model.predict(imgs, mask).square().mean() + latent.sin().mean()).backward()
        results.append((latent, {k: p.grad for k, p in model.named_parameters()}))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    scale = max(g.abs().max().item() for g in results[1][1].values())
    assert_close(results[0][0], results[1][0], atol=tolerance, rtol=tolerance)
    assert_close(results[0][1], results[1][1], atol=tolerance * scale, rtol=tolerance)


def test_sparse__all_visible_is_the_form_for_fine_tuning():
    encoder, imgs = build().encoder.double(), torch.randn(2, 3, 32, 64, dtype=torch.float64)
    ids = torch.stack([torch.arange(32), torch.arange(31, -1, -1)])  # 4 x 8 patches, one reversed
    E1, E2, x = encoder.stages(imgs, (ids, None, None, None))
    maps = encoder.forward_pyramid(imgs)
    whole = encoder.run(encoder.tokens(imgs), [1, 2])
    assert_close(encoder.run(x, [1, 2]), [gather(t, ids) for t in whole])
    for tokens, full, k in ((E1, maps[0], 4), (E2, maps[1], 2)):
        assert_close(tokens.flatten(2), gather(patchify(full, k), ids))


def test_masked_convolution__equals_naive_loop():
    B, (h, w), k, C, K = 2, (3, 2), 2, 3, 5
    conv = nn.Conv2d(C, C, K, padding=K // 2, groups=C)
    ids = torch.tensor([[0, 3], [2, 5]])
    x = torch.randn(B, 2, k * k, C)
    at = {  # (image, row, column) -> (patch, position) of visible tokens
        (b, ids[b, v].item() // w * k + i // k, ids[b, v].item() % w * k + i % k): (v, i)
        for b in range(B) for v in range(2) for i in range(k * k)
    }  # fmt: skip
    expected = torch.empty_like(x)
    for (b, row, col), (v, i) in at.items():
        for c in range(C):
            total = conv.bias[c].item()
            for dr in range(K):
                for dc in range(K):
                    seen = at.get((b, row + dr - K // 2, col + dc - K // 2))
                    if seen:
                        total += (conv.weight[c, 0, dr, dc] * x[b, seen[0], seen[1], c]).item()
            expected[b, v, i, c] = total
    found = mcmae.masked_convolution((h, w), k, ids, None)(conv, x)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # as a patch that is there, of which nothing is seen
    every = torch.arange(h * w).expand(B, -1)
    seen = torch.zeros(B, h * w, 1, 1, dtype=torch.bool).scatter_(1, ids[..., None, None], True)
    full = torch.randn(B, h * w, k * k, C).scatter(1, ids[..., None, None].expand_as(x), x)
    found = mcmae.masked_convolution((h, w), k, every, seen)(conv, full)
    assert_close(gather(found.flatten(2), ids).view_as(x), expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------- masks and leaks


def hidden_pixels(model: mcmae.MCMAE, mask: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool."""
    side = math.isqrt(mask.shape[1])
    size = (model.cfg.image_size,) * 2
    return F.interpolate(mask.view(-1, 1, side, side).float(), size, mode="nearest").bool()


@pytest.mark.parametrize("line, leaks", [
    ("--sparse", False), ("--no-sparse", False), ("--kernel-size 9", False),
    ("--kernel-size 9 --no-sparse", False), ("--no-masked-conv", True), ("--masking token", False),
    ("--masking token --no-masked-conv", False),
])  # fmt: skip
def test_predict__hidden_pixels_reach_it_only_without_masked_convolution(batch, line, leaks):
    model = build(line)
    imgs, mask = masked(model, batch)
    other = torch.where(hidden_pixels(model, mask), 5 * torch.randn_like(imgs), imgs)
    assert torch.equal(encode(model, other, mask), encode(model, imgs, mask)) != leaks
    visible = torch.where(hidden_pixels(model, mask), imgs, imgs + 0.1)
    assert not torch.equal(encode(model, visible, mask), encode(model, imgs, mask))


def test_make_mask__counts_and_upsampling():
    seed = torch.arange(50) * 7919
    for line, positions, visible in (
        ("--model base", 196, 49), ("--model tiny", 64, 16), ("--masking token", 3136, 784),
        ("--mask-ratio 0.6", 196, 78), ("--mask-ratio 0.9", 196, 20),  # of 78.4 and 19.6
    ):  # fmt: skip
        with torch.device("meta"):
            model = mcmae.MCMAE(parse(f"{line} --no-sparse"))
        mask = mcmae.make_mask(model.cfg, {"seed": seed}, None)
        assert mask.shape == (50, positions) and ((~mask).sum(1) == visible).all()
        alone = mcmae.make_mask(model.cfg, {"seed": seed[7:8]}, None)
        assert torch.equal(alone, mask[7:8])  # whatever the batch
        assert len(mask.unique(dim=0)) == 50
        h = model.encoder.grid[0]
        ids, input, *shown = model.shown(mask)
        assert ids is None and (input is shown[0]) == (model.cfg.masking == "token")
        for k, tokens in zip((4, 2), shown):
            tokens = tokens.expand(50, h * h, k * k, 1).flatten(2)
            covered = unpatchify(tokens, k, (h, h)).view(50, h, k, h, k)
            if model.cfg.masking == "block":  # a patch is visible or hidden as a whole
                expected = (~mask).view(50, h, 1, h, 1).expand_as(covered)
            else:  # hidden where all cells below are
                cells = (~mask).view(50, k * h, 4 // k, k * h, 4 // k)
                expected = cells.any(4).any(2).view_as(covered)
            assert torch.equal(covered, expected)


@pytest.mark.parametrize("line", ["", "--no-norm-pix-loss", "--masking token"])
def test_loss__equals_naive_loop(batch, line):
    model = build(line)
    (imgs, mask), p = masked(model, batch), 8
    imgs = imgs.double()
    hidden = hidden_pixels(model, mask)[:, 0]
    pred, losses = torch.randn(3, 64, p * p * 3), []
    for b in range(3):
        total, count = 0.0, 0
        for l in range(64):
            rows, cols = slice(l // 8 * p, l // 8 * p + p), slice(l % 8 * p, l % 8 * p + p)
            target = imgs[b, :, rows, cols]
            if model.cfg.norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            error = (pred[b, l].view(p, p, 3).permute(2, 0, 1) - target) ** 2  # (3, p, p)
            total += error[:, hidden[b, rows, cols]].sum().item()
            count += 3 * hidden[b, rows, cols].sum().item()
        losses.append(total / count)
    expected = torch.tensor(sum(losses) / 3)
    assert_close(model.loss(pred, imgs.float(), mask).detach(), expected, atol=1e-5, rtol=1e-5)


def test_loss__is_taken_in_fp32(batch):
    model = build()
    imgs, mask = masked(model, batch)
    pred = torch.randn(3, 64, 192).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(pred, imgs, mask)
    assert low.dtype == torch.float32 and torch.equal(low, model.loss(pred.float(), imgs, mask))


# ----------------------------------------------------------------------------------- first weights


@pytest.mark.slow
def test_init_hybrid__as_the_public_code():
    """models_convmae.py: Xavier for linear layers and the weight of the last stem; every other
    convolution as torch makes it, U(-1, 1) / sqrt(inputs), bias too; the mask token N(0, 0.02).
    """
    torch.manual_seed(0)
    model = mcmae.MCMAE(parse("--embed-dims 64,96,128 --depths 1,1,1 --num-heads 4"))
    for name, m in model.named_modules():
        if isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all() and (m.bias == 0).all()
        if not isinstance(m, nn.Conv2d | nn.Linear):
            continue
        n_out, n_in = m.weight.flatten(1).shape
        xavier = isinstance(m, nn.Linear) or name == "encoder.patch_embed3.proj"
        bound = math.sqrt(6 / (n_in + n_out)) if xavier else n_in**-0.5
        assert 0.97 * bound < m.weight.abs().max() <= bound, name
        assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        if isinstance(m, nn.Linear):
            assert (m.bias == 0).all(), name
        else:
            assert 0.8 * n_in**-0.5 < m.bias.abs().max() <= n_in**-0.5, name
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.15)


# --------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training__tiny_preset_learns():
    """Invariant 6: in 60 steps of 16 scenes the loss falls below 0.65 of where it began, and below
    that of each hidden patch in its own mean, a grey.
    """
    cfg, scenes = parse("--model tiny"), ShapeScenes("train", 64, 2, ("rgb",))
    torch.manual_seed(0)
    model, losses = mcmae.MCMAE(cfg), []
    optimizer = torch.optim.AdamW(engine.decay_groups(model, 0.05), lr=2e-3, betas=(0.9, 0.95))
    for step in range(60):
        batch = collate([scenes[0, 16 * step + i] for i in range(16)])
        loss, _ = model(batch, torch.tensor(step / 60))
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        flat = mcmae.evaluate(model, batch)["loss_flat"].item()
    assert sum(losses[-5:]) / 5 < min(0.65 * losses[0], 0.97 * flat)
