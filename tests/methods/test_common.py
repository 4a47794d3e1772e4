"""noise.py, and common.py's masks, patches and blocks against golden values and naive loops."""

import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import common
import noise
from common import Attention, Block, CrossAttention, PatchEmbed, drop_path, gather, init_weights
from common import patchify, random_mask, split, unpatchify
from noise import AUGMENT, DROP_PATH, MASK, STREAMS, uniform
from vit import ViT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------- noise


def test_uniform__golden_values():
    seed = torch.tensor([0, 1, 2**40 + 7, 2**63 - 1])
    assert (uniform(seed, 3, MASK) * 2**24).tolist() == [
        [12399773, 15103745, 1440887],
        [706627, 6900869, 15988493],
        [15585861, 10073583, 3548367],
        [6268365, 955271, 12151175],
    ]
    assert (uniform(seed[2:3], 3, DROP_PATH) * 2**24).tolist() == [[15386175, 3859833, 10880585]]


def test_uniform__open_interval(monkeypatch):
    for h, expected in [(0, 2.0**-24), (2**32 - 1, 1 - 2.0**-24)]:  # extreme hashes
        monkeypatch.setattr(noise, "_mix", lambda x, h=h: torch.full_like(x, h))
        u = uniform(torch.tensor([3]), 1, MASK)
        assert u.dtype == torch.float32 and 0 < u.item() < 1 and u.item() == expected


def test_uniform__depends_on_seed_stream_and_position_alone():
    seed = torch.arange(50) * 7919 + 2**35
    u = uniform(seed, 40, MASK)
    assert torch.equal(uniform(seed, 90, MASK)[:, :40], u)  # a longer draw continues it ...
    for stream in STREAMS:  # ... and a draw of another stream shares nothing with it
        if stream != MASK:
            assert torch.isin(uniform(seed, 90, stream), u).float().mean() < 0.01
    assert torch.equal(uniform(seed[[31, 4]], 40, MASK), u[[31, 4]])  # of the batch around it


@pytest.mark.slow
@pytest.mark.parametrize("base", [0, 2**32 - 500, 2**62])
def test_uniform__is_uniform_and_uncorrelated(base):
    u = uniform(base + torch.arange(1000), 1001, MASK).double()  # 1e6 draws; bounds are 5 sigma
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / 1e6)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / 1e6)
    far = uniform((base ^ 2**40) + torch.arange(1000), 1001, MASK).double()  # the seed's upper half
    other = uniform(base + torch.arange(1000), 1001, AUGMENT).double()
    for a, b in [(u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, far), (u, other)]:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / 1e3
    count = torch.histc(u, 256, 0, 1)
    chi2 = ((count - u.numel() / 256) ** 2 / (u.numel() / 256)).sum()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.slow
def test_uniform__compiled_equals_eager():
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    seed = torch.tensor([0, 5, 2**33 + 1, 2**63 - 1])
    compiled = torch.compile(lambda s: uniform(s, 588, MASK))
    assert torch.equal(compiled(seed), uniform(seed, 588, MASK))


# -------------------------------------------------------------------------------- masks, patches


def test_random_mask__hides_the_largest_exactly_with_ties():
    noise = torch.rand(6, 30, generator=torch.Generator().manual_seed(0))
    noise[0], noise[1, ::2] = 0.5, 0.25
    for n in (0, 1, 13, 29, 30):
        mask = random_mask(noise, n)
        for row, got in zip(noise.tolist(), mask.tolist()):
            last = sorted(range(30), key=lambda i: (row[i], i))[30 - n :]
            assert [i for i in range(30) if got[i]] == sorted(last)


def test_split__equals_naive_loop_and_round_trips():
    x = torch.randn(5, 20, 3)
    for V in (0, 1, 7, 20):
        mask = random_mask(torch.rand(5, 20), 20 - V)
        ids_keep, ids_mask, ids_restore = split(mask, V)
        assert ids_keep.tolist() == [[i for i in range(20) if not row[i]] for row in mask.tolist()]
        assert ids_mask.tolist() == [[i for i in range(20) if row[i]] for row in mask.tolist()]
        both = torch.cat([gather(x, ids_keep), gather(x, ids_mask)], 1)
        assert torch.equal(gather(both, ids_restore), x)


def test_patchify__order_and_round_trip():
    imgs = torch.randn(2, 3, 8, 20)
    patches = patchify(imgs, 4)
    assert patches.shape == (2, 10, 48)
    for row in range(2):
        for col in range(5):
            numbers = [
                imgs[:, c, 4 * row + y, 4 * col + x]
                for y in range(4) for x in range(4) for c in range(3)
            ]  # fmt: skip
            assert torch.equal(patches[:, 5 * row + col], torch.stack(numbers, 1))
    assert torch.equal(unpatchify(patches, 4, (2, 5)), imgs)


def test_patch_embed__equals_its_convolution():
    embed, imgs = PatchEmbed(4, 3, 10), torch.randn(2, 3, 8, 20)
    expected = embed.proj(imgs).flatten(2).transpose(1, 2)
    for some in (range(10), [7, 2]):  # all patches, or visible ones alone
        got = embed(patchify(imgs, 4)[:, some])
        assert_close(got, expected[:, some], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- blocks


def naive_attention(q, k, v, heads):
    """One query of one head of one sample at a time."""
    out, d = torch.zeros_like(q), q.shape[-1] // heads
    for b in range(len(q)):
        for i in range(heads):
            part = slice(i * d, (i + 1) * d)
            for query in range(q.shape[1]):
                scores = [q[b, query, part] @ k[b, j, part] / d**0.5 for j in range(k.shape[1])]
                weights = torch.stack(scores).exp()
                out[b, query, part] = (weights / weights.sum()) @ v[b, :, part]
    return out


def test_attention__equals_naive_softmax_and_its_weights():
    attn, x = Attention(12, 3), torch.randn(2, 5, 12)
    q, k, v = attn.qkv(x).split(12, -1)
    expected = attn.proj(naive_attention(q, k, v, 3))
    assert_close(attn(x), expected, rtol=1e-4, atol=1e-5)
    weights = attn.weights(x)
    assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    mixed = (weights @ v.reshape(2, 5, 3, 4).transpose(1, 2)).transpose(1, 2).reshape(2, 5, 12)
    assert_close(attn.proj(mixed), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention__equals_naive_softmax():
    attn, x, context = CrossAttention(12, 3), torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    k, v = attn.kv(context).split(12, -1)
    expected = attn.proj(naive_attention(attn.q(x), k, v, 3))
    assert_close(attn(x, context), expected, rtol=1e-4, atol=1e-5)


def test_drop_path__rates_scale_and_a_draw_for_each_branch():
    scale = drop_path(torch.arange(20000), 5, 0.4)
    assert scale.shape == (5, 2, 20000, 1, 1)
    for i, p in enumerate([0, 0.1, 0.2, 0.3, 0.4]):
        for column in scale[i].flatten(1):
            assert abs((column == 0).double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / 20000)
            assert_close(column[column > 0], torch.full_like(column[column > 0], 1 / (1 - p)))
    zero = (scale == 0).flatten(2)
    for a, b, p in ((zero[3, 0], zero[4, 0], 0.12), (zero[4, 0], zero[4, 1], 0.16)):
        both = (a & b).double().mean()  # blocks, and branches, drop independently
        assert abs(both - p) < 5 * math.sqrt(p * (1 - p) / 20000)
    block, x = Block(8, 2), torch.randn(2, 3, 8)
    drop = torch.tensor([[0.0, 1.25], [0.0, 0.5]])[..., None, None]
    y = x + drop[0] * block.attn(block.norm1(x))
    assert_close(block(x, drop), y + drop[1] * block.mlp(block.norm2(y)))
    assert torch.equal(block(x, drop)[0], x[0])


def test_init_weights__bounds_of_mae():
    torch.manual_seed(0)
    model = ViT((32, 32), 8, 96, 2, 4, reg_tokens=2)
    with torch.no_grad():
        model.norm.weight.fill_(3), model.blocks[0].attn.qkv.bias.fill_(3)
    init_weights(model)
    fans = {"patch_embed.proj": (192, 96), "blocks.1.attn.qkv": (96, 288)}  # qkv as one matrix
    for name, (fan_in, fan_out) in fans.items():
        weight, bound = model.get_submodule(name).weight, math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / bound * 3**0.5 - 1) < 0.03
    for name, p in model.named_parameters():
        if name.endswith("_token"):
            assert 0.01 < p.std() < 0.03
        elif p.ndim == 1:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("M", [9, 4])
def test_attend__bf16_on_a_cpu_is_what_fp32_gives(M):
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16().requires_grad_() for n in (9, M, M))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    ours, wanted = common.attend(q, k, v), F.scaled_dot_product_attention(*exact)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - wanted).abs().max() < 0.02
    weight = torch.randn_like(wanted)
    (ours * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip((q, k, v), exact):
        assert (a.grad.float() - b.grad).norm() < 0.02 * b.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_sincos__of_files_in_half_precision_too(dtype):
    table = common.sincos_2d(32, 6, 6)[None].to(dtype)
    assert common.is_sincos(table) and common.is_sincos(torch.cat([table[:, :1] * 0, table], 1))
    assert not common.is_sincos(table + 0.03 * torch.randn(table.shape).to(dtype))
    assert not common.is_sincos(table[:, :0]) and not common.is_sincos(table[0])
