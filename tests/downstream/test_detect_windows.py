"""Attention inside windows: against a loop over windows, and against the encoders' own blocks."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.utils._python_dispatch import TorchDispatchMode

from common import Block
from downstream import encoders
from downstream import windows as windows_module
from downstream.public_vit import offsets
from downstream.windows import Biased, Windows, edges, everywhere, join, partition

pytestmark = pytest.mark.slow

GRIDS = [(8, 8), (6, 9), (5, 7)]


def blocks(depth=1, dim=16, heads=2):
    torch.manual_seed(0)
    found = [Block(dim, heads) for _ in range(depth)]
    for block in found:
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return found


class NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        return func(*args, **(kwargs or {}))


def test_offsets__are_worked_out_on_the_tables_device():
    with NoCopies():  # 64 x 64 patches: 128 MiB, which a step would wait for
        found = offsets(torch.empty(127**2, 12, device="meta"), (64, 64))
    assert found.shape == (12, 64**2, 64**2)


def bias_by_hand(table, window, a, b):
    """The bias of one head between places a and b (row, column) of a window."""
    return table[(a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1]


def naive(block, x, grid, window, shift, table=None):
    """A block on x (1, h*w, C), window by window, without any padding."""
    (h, w), out = grid, torch.zeros_like(x)
    attn, y = block.attn, block.norm1(x)
    rows = range(shift - window, h, window) if shift else range(0, h, window)
    cols = range(shift - window, w, window) if shift else range(0, w, window)
    for top in rows:
        for left in cols:
            places = [(r, c) for r in range(top, top + window) for c in range(left, left + window)]
            places = [(r, c) for r, c in places if 0 <= r < h and 0 <= c < w]
            at = torch.tensor([r * w + c for r, c in places])
            if not len(at):
                continue
            q, k, v = attn.heads(y[:, at])
            weights = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            if table is not None:
                pairs = [bias_by_hand(table, window, a, b) for a in places for b in places]
                weights = weights + torch.stack(pairs, 1).unflatten(1, weights.shape[-2:])
            mixed = softmax(weights, -1) @ v
            out[:, at] = attn.proj(mixed.transpose(1, 2).flatten(2))
    x = x + out
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_partition__join_undoes_it_and_cuts_where_a_loop_does(grid, shift):
    x = torch.arange(1.0, 1 + 2 * grid[0] * grid[1] * 3).reshape(2, -1, 3)
    windows = partition(x, grid, 3, shift)
    torch.testing.assert_close(join(windows, grid, 3, shift), x, rtol=0, atol=0)
    (top, bottom), (left, right) = (edges(n, 3, shift) for n in grid)
    assert all((n + sum(edges(n, 3, shift))) % 3 == 0 for n in grid)
    first = windows[0].reshape(3, 3, 3)[top:, left:]
    torch.testing.assert_close(first, x[0].reshape(*grid, 3)[: 3 - top, : 3 - left], rtol=0, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bias", [False, True])
def test_run__equals_a_loop_over_windows_plain_and_shifted(grid, bias):
    parts = blocks(3)
    windows = Windows(parts, grid, 4, everywhere=[2], shifted=True, bias=bias)
    table = torch.nn.init.normal_(windows.local_bias_table) if bias else None
    x = torch.randn(1, grid[0] * grid[1], 16)
    first, second, last = windows.run(parts, x, grid, [None] * 3, [1, 2])
    torch.testing.assert_close(first, naive(parts[0], x, grid, 4, 0, table))
    torch.testing.assert_close(second, parts[1](first))  # its bias is zero at the start
    torch.testing.assert_close(last, naive(parts[2], second, grid, 4, 2, table))
    assert windows.plan == [(True, 0), (False, 0), (True, 2)]


def test_run__one_window_as_large_as_the_map_is_global_attention():
    parts, x = blocks(2), torch.randn(2, 36, 16)
    wide, everywhere = Windows(parts, (6, 6), 6), Windows(parts, (6, 6), 0)
    scales = torch.rand(2, 2, 2, 1, 1)
    (a,), (b,) = (w.run(parts, x, (6, 6), scales) for w in (wide, everywhere))
    c = x
    for block, scale in zip(parts, scales):
        c = block(c, scale)
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(b, c)


def test_run__what_sticks_out_has_no_influence(monkeypatch):
    parts, x, grid = blocks(1), torch.randn(1, 35, 16), (5, 7)
    windows = Windows(parts, grid, 4)
    (before,) = windows.run(parts, x, grid, [None])
    real = torch.nn.functional.pad

    def garbage(y, pad, *args):
        return real(y, pad, value=1e3 if y.dtype != torch.bool else 0)

    monkeypatch.setattr(torch.nn.functional, "pad", garbage)
    (after,) = windows.run(parts, x, grid, [None])
    torch.testing.assert_close(before, after)


def test_global_bias__is_resized_to_another_map_and_learns():
    parts = blocks(1)
    windows = Windows(parts, (4, 4), 0, bias=True)
    assert windows.local_bias_table is None and windows.global_bias_table.shape == (49, 2)
    windows.run(parts, torch.randn(1, 24, 16), (4, 6), [None])[0].sum().backward()
    assert windows.global_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize("scores, parts", [(1, 24), (2 * 2 * 24 * 5, 5), (10**9, 1)])
def test_Biased__is_attention_with_the_bias_however_it_is_cut(monkeypatch, scores, parts):
    monkeypatch.setattr(windows_module, "SCORES", scores)
    given = [torch.randn(2, 2, 24, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    given.append(torch.randn(7 * 11, 2, dtype=torch.float64, requires_grad=True))
    found = Biased.apply(*given, (4, 6))
    want = scaled_dot_product_attention(*given[:3], attn_mask=offsets(given[3], (4, 6))[None])
    torch.testing.assert_close(found, want)
    weight = torch.randn_like(want)
    grads = (torch.autograd.grad((y * weight).sum(), given) for y in (found, want))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    assert len(Biased.parts(given[0])) == parts


def test_Biased__under_autocast_is_near_and_keeps_its_types():
    given = [torch.randn(1, 2, 24, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    given.append(torch.randn(7 * 11, 2, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        found = Biased.apply(*given, (4, 6))
    want = Biased.apply(*(x.detach().float() for x in given), (4, 6))
    torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(found.float().sum(), given)
    assert [x.dtype for x in (found, *grads)] == [torch.bfloat16] * 4 + [torch.float32]


def test_offsets__each_pair_has_the_row_of_its_offset():
    table = torch.arange(15.0)[:, None]  # 3 x 5 offsets of a grid (2, 3)
    found = offsets(table, (2, 3))[0]
    for a in range(6):
        for b in range(6):
            dy, dx = a // 3 - b // 3, a % 3 - b % 3
            assert found[a, b] == (dy + 1) * 5 + dx + 2
    assert torch.equal(offsets(table, (2, 3), slice(2, 5))[0], found[2:5])


def test_everywhere__numbers_quarters_and_none():
    assert everywhere("1,4,7,11", 11) == [1, 4, 7, 11] and everywhere("", 12) == []
    assert everywhere("quarters", 12) == [3, 6, 9, 12] == sorted(everywhere("quarters", 12))


def test_beit__its_own_bias_without_the_class_token():
    sizes = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, image_size=[32, 32])
    described = {"method": "beit", "config": {**sizes, "absolute": False, "relative": True}}
    encoder = encoders.build(described)
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(1, 16, 16)
    (found,) = Windows(encoder.blocks, (4, 4)).run(encoder.blocks, x, (4, 4), [None] * 2)
    for block in encoder.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.heads(y)
        weights = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + attn.bias()[:, 1:, 1:]
        x = x + attn.proj((softmax(weights, -1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(found, x)
