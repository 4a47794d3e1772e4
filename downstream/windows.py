"""Attention inside windows, for the blocks of a plain ViT (or MCMAE's third stage) at 1024 pixels.

    partition, join     a map to windows and back; where windows stick out, which tokens are real
    offsets             a learned bias of each offset, as a matrix of a grid
    Windows             runs blocks of `common.Block`'s form; some of them attend globally

Windows are a way to run blocks, not part of an encoder: its weights and names stay as pre-training
left them. Prefix tokens (class, proxies) are left out, as ViTDet does: they belong to no window.
"""

from collections.abc import Sequence

import engine  # noqa: F401 - before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.public_vit import RelativeAttention, resize_table


def edges(length: int, window: int, shift: int) -> tuple[int, int]:
    """How many tokens windows stick out of a side, before and after it."""
    before = (window - shift) % window
    return before, -(before + length) % window


def partition(x: Tensor, grid: Sequence[int], window: int, shift: int = 0) -> Tensor:
    """Cut tokens (B, h*w, C) into windows (B * n, window², C); what sticks out is 0.

    Args: `shift`: of the windows' corners, in tokens. Swin rolls the map and masks what does not
        belong together; windows that stick out of it have the same tokens.
    """
    (top, bottom), (left, right) = (edges(n, window, shift) for n in grid)
    x = F.pad(x.unflatten(1, tuple(grid)), (0, 0, left, right, top, bottom))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, n, k, m, k, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join(x: Tensor, grid: Sequence[int], window: int, shift: int = 0) -> Tensor:
    """Undo `partition`: (B * n, window², C) to (B, h*w, C)."""
    (h, w), ends = grid, [edges(n, window, shift) for n in grid]
    rows, cols = ((n + sum(e)) // window for n, e in zip(grid, ends))
    x = x.unflatten(0, (-1, rows, cols)).unflatten(3, (window, window)).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)  # (B, rows * k, cols * k, C)
    (top, _), (left, _) = ends
    return x[:, top : top + h, left : left + w].flatten(1, 2)


def offsets(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Bias (heads, L, L) of a grid (h, w) from a row for each of (2h - 1)(2w - 1) offsets.

    The same order of rows as BEiT, Swin and the public detection code of MCMAE.
    """
    (h, w), at = grid, torch.arange(grid[0] * grid[1], device=table.device)
    dy, dx = (a[:, None] - a for a in (at // w, at % w))
    return table[(dy + h - 1) * (2 * w - 1) + dx + w - 1].permute(2, 0, 1)


class Windows(nn.Module):
    """Runs blocks on the tokens of a map, most of them inside windows.

    Args:
        blocks: those that it will run; read here, kept by their encoder.
        grid: (h, w) of the map that the global bias is for.
        window: tokens along a window's side; 0: every block attends globally.
        everywhere: blocks, 1-based, that attend globally all the same.
        shifted: every other windowed block has its windows half a window further (Swin).
        bias: learn a bias of each offset, zero at first, one table for all windowed blocks and one
            for all global ones (MCMAE Sec. 2.3). BEiT's own biases are used in any case.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], grid: Sequence[int], window: int = 0,
        everywhere: Sequence[int] = (), shifted: bool = False, bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.window, self.plan, count = window, [], 0
        for i in range(1, len(blocks) + 1):
            inside = window and i not in everywhere
            self.plan.append((bool(inside), window // 2 if inside and shifted and count % 2 else 0))
            count += bool(inside)
        self.grid, heads = tuple(grid), blocks[0].attn.num_heads
        for name, kind, (h, w) in (("local", True, (window, window)), ("global", False, grid)):
            found = bias and any(inside == kind for inside, _ in self.plan)
            table = torch.zeros((2 * h - 1) * (2 * w - 1), heads) if found else None
            self.register_parameter(f"{name}_bias_table", nn.Parameter(table) if found else None)

    def bias(self, inside: bool, grid: Sequence[int]) -> Tensor | None:
        """The shared bias (heads, L, L) of windowed or of global blocks, if they have one."""
        table = self.local_bias_table if inside else self.global_bias_table
        if table is None:
            return None
        if inside:
            return offsets(table, (self.window,) * 2)
        return offsets(resize_table(table, self.grid, grid), grid)

    def attend(self, attn: nn.Module, x: Tensor, bias: Tensor | None, real: Tensor) -> Tensor:
        """Attention of x (B, L, C) with a bias (heads, L, L), to keys that are `real` (B, L).

        `real` None: all. A masked key has no weight, so nothing leaks out of what sticks out.
        """
        q, k, v = attn.heads(x)
        bias = None if bias is None else bias.to(q.dtype).expand(len(x), -1, -1, -1)
        if real is not None:
            hidden = torch.zeros_like(real, dtype=q.dtype).masked_fill(~real, -torch.inf)
            bias = hidden[:, None, None] + (0 if bias is None else bias)  # (B, 1 or heads, L, L)
            bias = bias.expand(-1, -1, x.shape[1], -1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return attn.proj(x.transpose(1, 2).flatten(2))

    def mix(self, attn: nn.Module, x: Tensor, grid: Sequence[int], step: int, shared: dict):
        """Attention of one block on x (B, h*w, C), inside windows or not; `shared` biases."""
        inside, shift = self.plan[step]
        size = (self.window,) * 2 if inside else tuple(grid)
        bias = shared[inside]
        if isinstance(attn, RelativeAttention):  # BEiT's; rows of the class token come last
            table = resize_table(attn.relative_position_bias_table, attn.grid, size)
            own = offsets(table, size)
            bias = own if bias is None else own + bias
        if not inside:
            return self.attend(attn, x, bias, None)
        real = None
        if any(n for side in grid for n in edges(side, self.window, shift)):
            ones = torch.ones(len(x), x.shape[1], 1, dtype=torch.bool, device=x.device)
            real = partition(ones, grid, self.window, shift)[..., 0]
        x = self.attend(attn, partition(x, grid, self.window, shift), bias, real)
        return join(x, grid, self.window, shift)

    def run(
        self, blocks: Sequence[nn.Module], x: Tensor, grid: Sequence[int], scales: Sequence,
        layers: Sequence[int] = (),
    ) -> list[Tensor]:  # fmt: skip
        """As `vit.ViT.run`, without prefix tokens.

        Args:
            blocks: of `common.Block`'s form, as the constructor saw them.
            x: (B, h*w, C), of a map (h, w) = `grid`.
            scales: of each block's branches, (2, B, 1, 1) or None (drop path).
            layers: 1-based blocks whose outputs are wanted, too.
        Returns: the outputs after `layers`, then the last.
        """
        shared, outputs = {inside: self.bias(inside, grid) for inside in (True, False)}, {}
        for i, (block, drop) in enumerate(zip(blocks, scales)):
            y = block.ls1(self.mix(block.attn, block.norm1(x), grid, i, shared))
            x = x + (y if drop is None else drop[0] * y)
            y = block.ls2(block.mlp(block.norm2(x)))
            x = x + (y if drop is None else drop[1] * y)
            if i + 1 in layers:
                outputs[i + 1] = x
        return [outputs[i] for i in layers] + [x]
