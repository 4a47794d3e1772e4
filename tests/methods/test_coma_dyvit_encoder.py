"""DyViT: DM-MSA and Positional Downsampling against naive loops, stem, encoder contract."""

import math

import pytest
import torch
import torch.nn.functional as F

import coma_dyvit as cd
import common
import engine
from common import split


def dyvit(**kwargs):
    torch.manual_seed(0)
    cfg = cd.Config(patch_size=16, dims="8-16-24-32", blocks="1-2-2-1", heads="1-2-2-4")
    for name in ("patch_size", "stem_mask"):
        setattr(cfg, name, kwargs.pop(name, getattr(cfg, name)))
    return cd.make_encoder(cfg, **{"image_size": (64, 64), **kwargs}).eval()


def on_map(x, side, h, w):
    """Tokens patch by patch (B, h*w*side^2, C) to a map (B, C, h*side, w*side), one by one."""
    image = torch.empty(len(x), x.shape[2], h * side, w * side)
    for n in range(x.shape[1]):
        patch, at = divmod(n, side**2)
        row, column = patch // w * side + at // side, patch % w * side + at % side
        image[:, :, row, column] = x[:, n]
    return image


@pytest.mark.parametrize("side, windows, V", [(8, (8, 4, 2), 2), (4, (4, 2), 5), (4, (2, 1), 2)])
@pytest.mark.slow
def test_window_attention__equals_a_loop_over_patches_windows_and_heads(side, windows, V):
    torch.manual_seed(1)
    C, heads, d = 8, 2, 4
    attn = cd.WindowAttention(C, heads, side, windows).double()
    x = torch.randn(2, V * side**2, C, dtype=torch.double)
    expected = torch.zeros_like(x)
    for b in range(2):
        weights = zip(attn.qkv.weight.split(C), attn.qkv.bias.split(C))
        Q, K, V_ = (x[b] @ w.T + c for w, c in weights)
        for conv in attn.convs:
            k = conv.kernel_size[0]
            keys, values = [], []
            for patch in range(V):
                for i in range(0, side, k):
                    for j in range(0, side, k):
                        key, value = torch.zeros(2, C, dtype=torch.double)
                        for di in range(k):
                            for dj in range(k):
                                at = patch * side**2 + (i + di) * side + j + dj
                                key = key + conv.weight[:, 0, di, dj] * K[at]
                                value = value + conv.weight[:, 0, di, dj] * V_[at]
                        keys.append(key)
                        values.append(value)
            for head in range(heads):
                own = slice(head * d, head * d + d)
                for n in range(len(x[b])):
                    score = torch.stack([Q[n, own] @ key[own] for key in keys]) / math.sqrt(d)
                    weight = score.softmax(0)
                    expected[b, n, own] += sum(w * v[own] for w, v in zip(weight, values))
    torch.testing.assert_close(attn(x), attn.proj(expected))


@pytest.mark.parametrize("side, windows", [(8, (8, 4, 2)), (4, (4, 2))])
def test_window_attention__summaries_stay_inside_their_patch(side, windows, monkeypatch):
    """Summaries of a patch do not move when other patches change; and are the convolution's."""
    attn, seen = cd.WindowAttention(4, 1, side, windows), []
    monkeypatch.setattr(cd, "attend", lambda q, k, v: (seen.append((k, v)), q)[1])
    x = torch.randn(1, 3 * side**2, 4)
    other = x.clone()
    other[:, : side**2] += 1
    attn(x), attn(other)
    values = attn.qkv(x)[..., 8:].view(3, side, side, 4).permute(0, 3, 1, 2)
    for conv, (k, v), (k_other, v_other) in zip(attn.convs, seen, seen[len(windows) :]):
        for a, b in (k, k_other), (v, v_other):
            a, b = a.view(3, -1, 4), b.view(3, -1, 4)  # by patch
            assert torch.equal(a[1:], b[1:]) and not torch.isclose(a[0], b[0]).all(1).any()
        torch.testing.assert_close(v.view(3, -1, 4), conv(values).flatten(2).transpose(1, 2))


def test_window_attention__crosses_patches():
    attn = cd.WindowAttention(8, 2, 4, (4, 2))
    x = torch.randn(1, 48, 8)
    other = x.clone()
    other[:, 32:] += torch.randn(1, 16, 8)
    assert not torch.isclose(attn(x)[:, :32], attn(other)[:, :32]).all(-1).any()


def test_run__pools_as_the_whole_map():
    encoder, pooled = dyvit(), []
    for layer in encoder.downsample:
        layer.register_forward_pre_hook(lambda m, args: pooled.append(args[0]))
    stages = encoder.run(torch.randn(2, 6 * 64, 8))
    for x, y, side in zip(stages, pooled, (8, 4, 2)):
        assert torch.equal(on_map(y, side // 2, 2, 3), F.max_pool2d(on_map(x, side, 2, 3), 2))


def test_fuse__equals_strided_convolutions():
    flags = "--dims 4-8-8-12 --blocks 1-1-1-1 --heads 1-1-1-1 --decoder-depth 1"
    model = cd.CoMA(engine.parse(cd.Config, cd.PRESETS, "", ["--model", "tiny", *flags.split()]))
    dims, h, w = (4, 8, 8, 12), 2, 3
    stages = [torch.randn(2, h * w * s * s, c) for s, c in zip((8, 4, 2, 1), dims)]
    maps = [on_map(x, s, h, w) for x, s in zip(stages, (8, 4, 2, 1))]
    assert [c.proj.kernel_size[0] for c in model.fusion] == [8, 4, 2]
    expected = maps[3] + sum(conv.proj(x) for conv, x in zip(model.fusion, maps))
    torch.testing.assert_close(model.fuse(stages), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("patch_size", [32, 16, 8])
@pytest.mark.parametrize("stem_mask", ["before", "after"])
def test_embed__of_visible_patches_is_that_of_the_whole_image(patch_size, stem_mask):
    encoder = dyvit(patch_size=patch_size, stem_mask=stem_mask, image_size=(64, 96))
    h, w, p = 64 // patch_size, 96 // patch_size, patch_size
    imgs, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, h * w, dtype=torch.bool)
    mask[0, : h * w // 2], mask[1, 1 : 1 + h * w // 2] = True, True
    ids_keep, _, _ = split(mask, h * w - h * w // 2)
    x = encoder.embed(imgs, mask, ids_keep)
    if stem_mask == "before":
        imgs = imgs * ~mask.view(2, 1, h, w).repeat_interleave(p, 2).repeat_interleave(p, 3)
    whole = encoder.embed(imgs).view(2, h * w, 64, 8)
    expected = torch.stack([whole[b, ids_keep[b]].flatten(0, 1) for b in range(2)])
    torch.testing.assert_close(x, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stem_mask, leaks", [("before", False), ("after", True)])
def test_encode__hidden_pixels_reach_visible_tokens_only_with_stem_mask_after(stem_mask, leaks):
    encoder = dyvit(stem_mask=stem_mask)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 3, 5, 10, 15]] = True
    ids_keep, _, _ = split(mask, 11)
    imgs = torch.randn(1, 3, 64, 64)
    hidden = mask.view(1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = imgs.masked_fill(hidden, 3.0)
    a, b = (encoder.run(encoder.embed(x, mask, ids_keep)) for x in (imgs, changed))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) != leaks


def test_run__visible_patches_alone_is_what_enters_the_stages():
    encoder = dyvit()
    stages = encoder.run(torch.randn(2, 5 * 64, 8))
    shapes = [(2, 320, 8), (2, 80, 16), (2, 20, 24), (2, 5, 32)]  # Eq. (5)
    assert [tuple(x.shape) for x in stages] == shapes


def test_forward_pyramid__any_size_that_the_patch_size_divides():
    encoder = dyvit(patch_size=32)
    assert encoder.strides == (4, 8, 16, 32)
    for H, W in ((64, 64), (96, 160), (32, 64)):
        imgs = torch.randn(1, 3, H, W)
        shapes = [tuple(x.shape) for x in encoder.forward_pyramid(imgs)]
        sizes = zip((8, 16, 24, 32), (4, 8, 16, 32))
        assert shapes == [(1, c, H // s, W // s) for c, s in sizes]
    with pytest.raises(ValueError, match="not divisible"):
        encoder.forward_pyramid(torch.randn(1, 3, 64, 80))
    half = encoder.bfloat16().forward_pyramid(torch.randn(1, 3, 32, 64, dtype=torch.bfloat16))
    assert {x.dtype for x in half} == {torch.bfloat16}


def test_forward_pyramid__maps_lie_as_the_image():
    """A bright spot moves every stage's map where it is, most of all."""
    encoder = dyvit(image_size=(64, 128))
    imgs = torch.zeros(1, 3, 64, 128)
    spot = imgs.clone()
    spot[..., 16, 96] = 9  # a pixel that one token of the stem sees
    pyramids = encoder.forward_pyramid(imgs), encoder.forward_pyramid(spot)
    for a, b, s in zip(*pyramids, encoder.strides):
        change = (a - b).square().sum(1)[0]
        assert divmod(int(change.argmax()), change.shape[1]) == (16 // s, 96 // s)


def test_forward_features__are_the_pyramid_in_raster_order():
    encoder, imgs = dyvit(), torch.randn(2, 3, 64, 32)
    pyramid = [x.flatten(2).transpose(1, 2) for x in encoder.forward_pyramid(imgs)]
    features = encoder.forward_features(imgs, layers=[1, 3, 5, 6])  # the last blocks of the stages
    for (tokens, prefix), x in zip(features, pyramid):
        assert torch.equal(tokens, x) and prefix.shape == (2, 0, x.shape[2])
    ((last, _),) = encoder.forward_features(imgs)
    assert torch.equal(last, encoder.norm(pyramid[-1]))


def test_drop_path__needs_seeds_and_drops_whole_branches():
    encoder, imgs, seed = dyvit(drop_path=0.5), torch.randn(2, 3, 64, 64), torch.tensor([3, 4])
    run = [encoder.forward_features(imgs, seed=s)[0][0] for s in (None, seed, seed)]
    plain, dropped, again = run
    assert torch.equal(dropped, again) and not torch.isclose(plain, dropped).any(-1).any()
    single = encoder.forward_features(imgs[1:], seed=seed[1:])[0][0]
    torch.testing.assert_close(single, dropped[1:])


def test_drop_path__each_block_has_its_own_draw():
    """Blocks one by one, over all stages, each with its own row of `common.drop_path`."""
    encoder, seed = dyvit(drop_path=0.9), torch.arange(8)
    imgs = torch.randn(8, 3, 64, 64)
    scales = common.drop_path(seed, 6, 0.9)  # 1 + 2 + 2 + 1 blocks
    x, n = encoder.embed(imgs), 0
    for i, blocks in enumerate(encoder.stages):
        if i > 0:
            side = cd.SIDES[i - 1]
            pooled = F.max_pool2d(on_map(x, side, 4, 4), 2)  # and back, patch by patch
            pooled = common.patchify(pooled, side // 2).unflatten(2, (-1, x.shape[2]))
            x = encoder.downsample[i - 1](pooled.flatten(1, 2))
        for block in blocks:
            x, n = block(x, scales[n]), n + 1
    torch.testing.assert_close(encoder.run(encoder.embed(imgs), seed=seed)[-1], x)
    assert len({tuple(s.flatten().tolist()) for s in scales}) == 6  # no two blocks alike


@pytest.mark.parametrize("h, w, h0, w0", [(4, 4, 4, 4), (8, 8, 7, 7), (2, 3, 7, 7), (3, 5, 2, 4)])
@pytest.mark.slow
def test_position__lies_on_each_token_of_each_patch_by_the_trained_grid(h, w, h0, w0):
    """Each token of the stem, by hand: sines, cosines of its column and row on the trained grid."""
    encoder = dyvit(image_size=(16 * h, 16 * w), trained_size=(16 * h0, 16 * w0))
    for p in encoder.stem.parameters():
        torch.nn.init.zeros_(p)  # nothing but positions enters stage 1
    tokens = encoder.embed(torch.randn(1, 3, 16 * h, 16 * w))[0]
    for n in range(h * w * 64):
        patch, at = divmod(n, 64)
        row, column = patch // w * 8 + at // 8, patch % w * 8 + at % 8
        y, x = (row + 0.5) * h0 / h - 0.5, (column + 0.5) * w0 / w - 0.5
        angles = [x, x * 10000**-0.5, y, y * 10000**-0.5]
        expected = [f(a) for i in (0, 2) for f in (math.sin, math.cos) for a in angles[i : i + 2]]
        assert tokens[n].tolist() == pytest.approx(expected, abs=1e-5), (row, column)
    seen = torch.arange(h * w)[None, ::2]  # visible patches keep their own
    mask = torch.ones(1, h * w, dtype=torch.bool).scatter(1, seen, False)
    some = encoder.embed(torch.randn(1, 3, 16 * h, 16 * w), mask, seen)
    assert torch.equal(some[0], tokens.view(h * w, 64, 8)[seen[0]].flatten(0, 1))


def test_position__another_image_size_refers_to_the_grid_of_this_one():
    encoder = dyvit(image_size=(64, 64))
    twin = dyvit(image_size=(96, 128), trained_size=(64, 64))
    imgs = torch.randn(1, 3, 96, 128)
    assert torch.equal(encoder.embed(imgs), twin.embed(imgs))
    assert encoder.position(6, 8).shape == (8, 48, 64) and twin.trained_grid == (4, 4)
    fixed = common.sincos_2d(8, 32, 32).T.unflatten(1, (32, 32))  # nothing moves at its own size
    assert torch.equal(encoder.pos_embed, fixed)


def test_convnext_block__is_a_residual_around_convolution_norm_and_mlp():
    torch.manual_seed(0)
    block, x = cd.ConvNeXtBlock(4, (2, 3)), torch.randn(2, 6, 4)
    weight, bias = block.dwconv.weight, block.dwconv.bias
    for b in range(2):
        for n in range(6):
            y = bias.clone()
            for m in range(6):  # 7 x 7 reaches all of a 2 x 3 grid
                di, dj = m // 3 - n // 3, m % 3 - n % 3
                y = y + weight[:, 0, 3 + di, 3 + dj] * x[b, m]
            expected = x[b, n] + block.mlp(F.layer_norm(y, (4,), eps=1e-6))
            torch.testing.assert_close(block(x)[b, n], expected)


def test_layer_ids__grow_with_depth():
    encoder = dyvit()
    ids = encoder.layer_ids()
    assert ids.keys() == {n for n, _ in encoder.named_parameters()}
    assert (ids["stem.weight"], ids["stages.0.0.norm1.bias"], ids["norm.bias"]) == (0, 1, 7)
    assert ids["stages.2.1.attn.qkv.weight"] == 5 and ids["stages.2.0.mlp.fc1.bias"] == 4
    assert ids["downsample.1.weight"] == 4
    assert sorted(set(ids.values())) == list(range(8))


def test_bf16__runs_and_stays_near():
    encoder, imgs = dyvit(), torch.randn(2, 3, 64, 64)
    plain = encoder.forward_features(imgs)[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (encoder.forward_features(imgs)[0][0] - plain).abs().max() < 0.1
