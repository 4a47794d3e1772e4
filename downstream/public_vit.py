"""A ViT that computes what public ones do: MAE's, timm's, transformers', BEiT.

PublicViT         learned positions, BEiT's bias, or both
places, offsets   a learned bias of each offset, as a matrix of a grid
resize_table      that bias on another grid
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Attention
from vit import ViT

TABLE = "relative_position_bias_table"


def places(
    grid: Sequence[int], rows: slice = slice(None), device: torch.device | None = None
) -> Tensor:
    """Which offset each of L tokens of a grid (h, w) has from each other, (L, L): its place among
    (2h - 1)(2w - 1), in the order of BEiT, Swin and the public detection code of MCMAE.

    Args: `rows`: queries, of the L.
    """
    (h, w), at = grid, torch.arange(grid[0] * grid[1], device=device)
    dy, dx = (a[rows, None] - a for a in (at // w, at % w))
    return (dy + h - 1) * (2 * w - 1) + dx + w - 1


def offsets(table: Tensor, grid: Sequence[int], rows: slice = slice(None)) -> Tensor:
    """Bias (heads, L, L) of a grid from a table (offsets, heads) in the order of `places`."""
    return F.embedding(places(grid, rows, table.device), table).permute(2, 0, 1)


class RelativeAttention(Attention):
    """Attention with BEiT's bias: a learned number for each head and offset between two tokens.

    Its table has a row for each of the (2h - 1)(2w - 1) offsets on the grid it is kept for, then
    class to patch, patch to class, class to class.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]):
        super().__init__(dim, num_heads)
        self.grid = self.now = grid  # `now`: of the images at hand, set by PublicViT.embed
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def table(self, grid: Sequence[int]) -> Tensor:
        """The offsets between the patches of a grid (h, w): ((2h - 1)(2w - 1), heads)."""
        return resize_table(self.relative_position_bias_table, self.grid, grid)[:-3]

    def bias(self) -> Tensor:
        """Bias of the grid `now`, (heads, 1 + L, 1 + L); rows are queries, class token first."""
        table = resize_table(self.relative_position_bias_table, self.grid, self.now)
        index = F.pad(places(self.now, device=table.device), (1, 0, 1, 0))
        index[0], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1
        return table[index].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias().to(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        q, k, _ = self.heads(x)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.bias()).softmax(-1)


@functools.cache
def spread(old: int, new: int) -> Tensor:
    """Weights (2 new - 1, 2 old - 1) that give offsets on `new` patches from those on `old`.

    BEiT's transfer lets the known offsets stand at 0, 1, 1 + q, 1 + q + q^2, ... with the q that
    spreads them over the new range, so that near patches keep what they have learned. Between them
    it is linear (timm; BEiT's own is cubic).
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    at = [(1 - q**k) / (1 - q) for k in range(old)]
    at = torch.tensor([-x for x in at[:0:-1]] + at)  # where the old offsets stand
    if old == 1:
        return torch.ones(2 * new - 1, 1)
    x = torch.arange(1.0 - new, new).clamp(at[0], at[-1])
    right = torch.searchsorted(at, x).clamp(min=1)
    t = ((x - at[right - 1]) / (at[right] - at[right - 1]))[:, None]
    one_hot = torch.eye(len(at))
    return (1 - t) * one_hot[right - 1] + t * one_hot[right]


def resize_table(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Resize a table of relative positions (rows, heads) from one grid to another, see `spread`.

    The rows of the class token, where it has any, come last and stay.
    """
    if tuple(old) == tuple(new):
        return table
    rows, cols = (spread(a, b).to(table) for a, b in zip(old, new))
    n = rows.shape[1] * cols.shape[1]
    offsets = table[:n].T.reshape(-1, rows.shape[1], cols.shape[1])
    return torch.cat([(rows @ offsets @ cols.T).flatten(1).T, table[n:]])


class PublicViT(ViT):
    """ViT with a learned position embedding (`absolute`), BEiT's bias (`relative`), or both.

    Prefix tokens have no position: what a public `pos_embed` has for them is added to the tokens
    when it is read, which is the same.
    """

    def __init__(
        self, absolute: bool = True, relative: bool = False, norm_eps: float = 1e-6, **kwargs
    ):
        super().__init__(**kwargs)
        for m in self.modules():
            if isinstance(m, nn.LayerNorm):
                m.eps = norm_eps
        self.learn_position()
        if not absolute:
            self.pos_embed = None
        self.relative = relative
        for block in self.blocks if relative else ():
            block.attn = RelativeAttention(self.embed_dim, block.attn.num_heads, self.grid)

    def position(self, h: int, w: int) -> Tensor | float:
        """Position embedding of a grid, (1, h*w, D)."""
        return 0.0 if self.pos_embed is None else super().position(h, w)

    def embed(self, imgs: Tensor) -> Tensor:
        for block in self.blocks if self.relative else ():
            block.attn.now = self.grid_of(imgs)
        return super().embed(imgs)
