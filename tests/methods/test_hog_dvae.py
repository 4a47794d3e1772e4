"""Targets of SemanticMIM: HOG, DALL-E's encoder, its second view, and BEiT's colour jitter."""

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

import common
import noise
import semanticmim
import targets
from data import UserError

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return torch.load(GOLDEN / name, weights_only=True)


# -------------------------------------------------------------------------------------------- HOG


def naive_hog(img, patch_size):
    """HOG of one image (3, H, W) float64, pixel by pixel, (L, 108)."""
    _, H, W = img.shape
    cell, half = patch_size // 2, (patch_size - 1) / 2
    kernel = [[math.exp(-((i - half) ** 2 + (j - half) ** 2) / (2 * (patch_size / 2) ** 2))
               for j in range(patch_size)] for i in range(patch_size)]  # fmt: skip

    def at(c, y, x):  # mirrored about the border pixels
        y, x = (abs(v) if v < n else 2 * (n - 1) - v for v, n in ((y, H), (x, W)))
        return float(img[c, y, x])

    sides = ((-1, 1), (0, 2), (1, 1))
    hist = torch.zeros(3, 9, H // cell, W // cell, dtype=torch.float64)
    for c in range(3):
        for y in range(H):
            for x in range(W):
                gx = sum(k * (at(c, y + d, x - 1) - at(c, y + d, x + 1)) for d, k in sides)
                gy = sum(k * (at(c, y - 1, x + d) - at(c, y + 1, x + d)) for d, k in sides)
                angle = math.degrees(math.atan2(gx, gy)) % 180
                weight = kernel[y % patch_size][x % patch_size]
                hist[c, int(angle // 20), y // cell, x // cell] += weight * math.hypot(gx, gy)
    hist /= hist.norm(dim=1, keepdim=True)
    rows = [hist[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
            for i in range(H // patch_size) for j in range(W // patch_size)]  # fmt: skip
    return torch.stack(rows)


def test_hog__matches_maskfeats_tensors():
    g = golden("hog.pt")
    hog = targets.HOG(16, 224)(common.Normalize()(g["rgb"]))
    assert hog.shape == (2, 196, 108)
    torch.testing.assert_close(hog[:, :: g["every"]], g["hog"], atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(targets.HOG(16, 224)(common.Normalize()(g["rgb"])), hog)


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.slow
def test_hog__matches_a_loop_over_pixels(patch_size):
    imgs = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hog = targets.HOG(patch_size, 32)(imgs)
    torch.testing.assert_close(hog[0].double(), naive_hog(imgs[0], patch_size), atol=1e-5, rtol=0)


def test_sobel__equals_the_convolution_bit_for_bit():
    imgs = common.Normalize()(golden("hog.pt")["rgb"])
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(3, 1, 3, 3).contiguous()
    padded = F.pad(imgs, (1, 1, 1, 1), mode="reflect")
    gx, gy = targets.sobel(imgs)
    assert torch.equal(gx, F.conv2d(padded, kernel, groups=3))
    assert torch.equal(gy, F.conv2d(padded, kernel.transpose(2, 3).contiguous(), groups=3))


def test_draw_hog__draws_edges_along_edges():
    stripes = torch.arange(32.0).mul(0.7).sin()[:, None].expand(32, 32).expand(1, 3, -1, -1)
    for imgs, along in ((stripes, 3), (stripes.transpose(2, 3), 2)):
        hog = targets.HOG(8, 32)(imgs)
        picture = targets.draw_hog(hog, (4, 4))
        assert picture.shape == (1, 1, 96, 96) and 0 <= picture.min() and picture.max() <= 1
        profile = picture.mean(along).flatten()
        assert profile.std() > 3 * picture.mean(5 - along).flatten().std()
    hog = torch.zeros(1, 6, 3, 9, 2, 2)
    hog[:, 5, ..., 1, 0] = 1  # the last patch of 2 x 3, its lower left cell
    rows, cols = targets.draw_hog(hog.flatten(2), (2, 3))[0, 0].nonzero().T
    assert {*(rows // 12).tolist()} == {3} and {*(cols // 12).tolist()} == {4}


# ------------------------------------------------------------------------------------------ codes


def tokenizer(image_size=112, grid=14):
    return targets.Tokenizer(golden("dalle_encoder.pt")["state_dict"], image_size, grid)


def test_tokenizer__matches_dalles_encoder():
    g = golden("dalle_encoder.pt")
    logits = tokenizer().logits(g["input"].float() / 255)
    torch.testing.assert_close(logits, g["logits"], atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(1), g["logits"].argmax(1))


def test_tokenizer__codes_in_raster_order_after_dalles_mapping():
    model, rgb = tokenizer(), golden("dalle_encoder.pt")["input"]
    logits = model.logits(0.1 + 0.8 * rgb.float() / 255)
    expected = [[int(x[:, i, j].argmax()) for i in range(14) for j in range(14)] for x in logits]
    codes = model(rgb)
    assert codes.tolist() == expected and codes.unique().numel() > 1


def test_tokenizer__follows_the_steps_precision(monkeypatch):
    state, rgb = golden("dalle_encoder.pt")["state_dict"], golden("hog.pt")["rgb"][..., :32, :32]
    conv, seen = F.conv2d, []

    def spy(*args, **kwargs):
        y = conv(*args, **kwargs)
        seen.append(y.dtype)
        return y

    monkeypatch.setattr(F, "conv2d", spy)
    for precision, step, inner in (
        ("auto", False, torch.float32), ("auto", True, torch.bfloat16),
        ("fp32", True, torch.float32), ("bf16", False, torch.bfloat16),
    ):  # fmt: skip
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=step):
            targets.Tokenizer(state, 32, 4, precision)(rgb)
        assert set(seen[:-1]) == {inner} and seen[-1] == torch.float32  # logits: OpenAI's module


@pytest.mark.slow
def test_tokenizer__bf16_changes_7_of_392_codes():
    """Of random weights, which are near a tie: 2 of their 64 codes take all patches."""
    g, kinds = golden("dalle_encoder.pt"), ("fp32", "bf16")
    fp32, bf16 = (targets.Tokenizer(g["state_dict"], 112, 14, k)(g["input"]) for k in kinds)
    assert fp32.numel() == 392 and 0 < (bf16 != fp32).sum() <= 12  # kernels round differently


def test_tokenizer__resizes_in_fp32_whatever_the_step_does(monkeypatch):
    model, rgb, seen = tokenizer(224, 14), golden("hog.pt")["rgb"], []
    rgb[..., :101], rgb[..., 101:] = 0, 255  # Lanczos overshoots at an edge
    monkeypatch.setattr(model, "logits", lambda x: seen.append(x) or x)
    model(rgb)
    with torch.autocast("cpu", torch.bfloat16):
        model(rgb)
    assert torch.equal(*seen) and seen[0].dtype == torch.float32
    levels = (seen[0] - 0.1) / 0.8 * 255
    assert (levels - levels.round().clamp(0, 255)).abs().max() < 1e-3  # whole ones, 0 to 255


def test_random_state__has_dalles_shape_and_spreads_its_codes(tmp_path):
    state = targets.random_state()
    released = {k for k in golden("dalle_encoder.pt")["state_dict"] if "block_2" not in k}
    assert set(state) == released  # one block a group in place of two
    again = targets.random_state()
    assert all(torch.equal(v, again[k]) for k, v in state.items())  # no checkpoint has it
    model = targets.load_tokenizer("random", 64, 8)
    codes = model(golden("hog.pt")["rgb"][..., :64, :64])
    assert model.num_codes == 512 and codes.shape == (2, 64)
    assert codes.unique().numel() > 16  # not standardised, 4 of them take all 128 patches


@pytest.mark.parametrize("sizes", [(224, 112), (64, 64), (96, 112)])
def test_lanczos__matches_pillow(sizes):
    n_in, n_out = sizes
    rgb = golden("hog.pt")["rgb"][0, :, :n_in, :n_in]
    matrix = targets.lanczos(n_in, n_out)
    ours = (matrix @ rgb.float() @ matrix.T).round().clamp(0, 255)
    image = Image.fromarray(rgb.permute(1, 2, 0).numpy())
    image = image.resize((n_out, n_out), Image.Resampling.LANCZOS)
    assert np.abs(ours.permute(1, 2, 0).numpy() - np.asarray(image, np.float32)).max() <= 1


def test_load_tokenizer__takes_what_it_can_use(tmp_path):
    g = golden("dalle_encoder.pt")
    torch.save(g["state_dict"], tmp_path / "t.pt")
    model = targets.load_tokenizer(tmp_path / "t.pt", 112, 14)
    torch.testing.assert_close(model.logits(g["input"] / 255), g["logits"], atol=1e-4, rtol=0)
    torch.save({"state_dict": g["state_dict"]}, tmp_path / "t.pt")
    wrapped = targets.load_tokenizer(tmp_path / "t.pt", 112, 14)
    assert torch.equal(wrapped(g["input"]), model(g["input"]))
    assert not model.state_dict() and not list(model.parameters())  # frozen, in no checkpoint


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_load_tokenizer__refuses_everything_else(tmp_path):
    state, path = golden("dalle_encoder.pt")["state_dict"], tmp_path / "t.pt"
    name = "blocks.group_3.block_2.res_path.conv_2.w"
    bad = [
        {k: v for k, v in state.items() if k != name},
        state | {name: torch.zeros(3, 3, 3, 3)},
        state | {"blocks.more.w": torch.zeros(1)},
        {"model": 3},
        [1, 2],
        {},
    ]
    for content in bad:
        torch.save(content, path)
        with pytest.raises(UserError, match="not a DALL-E encoder's state dict") as e:
            targets.load_tokenizer(path, 112, 14)
        assert "\n" not in str(e.value)
    fired = tmp_path / "fired"
    torch.save(state, path)
    cut = path.read_bytes()[:-100]
    for content in (pickle.dumps(Bomb(fired)), bytes(range(256)) * 9, cut):
        path.write_bytes(content)
        with pytest.raises(UserError, match="read safely"):
            targets.load_tokenizer(path, 112, 14)
    assert not fired.exists()
    with pytest.raises(UserError, match="damaged"):
        targets.load_tokenizer(path, 112, 14)
    with pytest.raises(UserError, match="no such file"):
        targets.load_tokenizer(tmp_path / "none.pth", 112, 14)


class Conv(torch.nn.Module):
    """OpenAI's: a weight called w and a bias called b."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(w), torch.nn.Parameter(b)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_load_tokenizer__says_how_to_use_openais_pickled_module(zipped, tmp_path, monkeypatch):
    state, module = golden("dalle_encoder.pt")["state_dict"], torch.nn.Module()
    for name in (k[:-2] for k in state if k.endswith(".w")):
        at = module
        for part in (parts := name.split("."))[:-1]:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.add_module(parts[-1], Conv(state[f"{name}.w"], state[f"{name}.b"]))
    monkeypatch.chdir(tmp_path)
    torch.save(module, "encoder.pkl", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="OpenAI's encoder.pkl.*https://.*dalle_encoder.pth") as e:
        targets.load_tokenizer("encoder.pkl", 112, 14)
    assert "\n" not in str(e.value)
    exec(re.search('python -c "(.*)"', str(e.value))[1])  # the line that it gives
    g = golden("dalle_encoder.pt")
    model = targets.load_tokenizer("dalle_encoder.pth", 112, 14)
    torch.testing.assert_close(model.logits(g["input"] / 255), g["logits"], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------ jitter


def test_color_jitter__is_torchvisions_in_a_random_order():
    rgb = golden("hog.pt")["rgb"][:, :, :48, :40].repeat(12, 1, 1, 1)
    seed = torch.arange(24) * 7919
    ours = semanticmim.color_jitter(rgb, seed, 0.4)
    u = noise.uniform(seed, 6, noise.AUGMENT)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    orders = set()
    for image, result, v in zip(rgb, ours, u.tolist()):
        order = sorted(range(3), key=lambda k: v[3 + k])
        orders.add(tuple(order))
        x = image.float() / 255
        for k in order:
            x = adjust[k](x, 0.6 + 0.8 * v[k])
        assert (result - (x * 255)).abs().max() <= 0.51
    assert len(orders) == 6
    assert torch.equal(semanticmim.color_jitter(rgb, seed, 0.0), rgb)
    assert torch.equal(semanticmim.color_jitter(rgb[5:9], seed[5:9], 0.4), ours[5:9])
