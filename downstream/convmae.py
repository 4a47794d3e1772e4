"""MCMAE's encoder with what its public segmentation code adds to it.

    make_encoder(cfg, relative_bias=False, init_values=None, fourth="pool", **kwargs)

Without these options it is `mcmae.make_encoder`'s.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mcmae
from common import LayerScale
from downstream import public_vit


class RelativeAttention(public_vit.RelativeAttention):
    """Attention with a learned bias for each head and offset of two positions of a grid (h, w).

    As BEiT's, but without a class token, and an offset beyond the grid has the bias of the nearest.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]):
        super().__init__(dim, num_heads, grid)
        table = self.relative_position_bias_table[:-3]  # those of the class token come last
        self.relative_position_bias_table = nn.Parameter(table.detach().clone())

    def table(self, grid: Sequence[int]) -> Tensor:
        """The offsets between the patches of a grid (h, w): ((2h - 1)(2w - 1), heads)."""
        table, (_, width) = self.relative_position_bias_table, self.grid
        rows, cols = (
            torch.arange(1 - now, now, device=table.device).clamp(1 - n, n - 1) + n - 1
            for n, now in zip(self.grid, grid)
        )
        return table[(rows[:, None] * (2 * width - 1) + cols).flatten()]

    def bias(self) -> Tensor:
        """Bias of the grid `now`, (heads, L, L); rows are queries."""
        return public_vit.offsets(self.table(self.now), self.now)


class Encoder(mcmae.Encoder):
    """MCMAE's encoder with the public code's options for segmentation.

    Args:
        cfg: of `mcmae.Encoder`, as kwargs.
        relative_bias: stage 3's attention has a bias for each offset.
        init_values: where LayerScale starts in stage 3; None: there is none.
        fourth: how E4 comes from E3: "pool" (Sec. 2.3), or "conv", trained.
    """

    def __init__(
        self,
        cfg: mcmae.Config,
        relative_bias: bool = False,
        init_values: float | None = None,
        fourth: str = "pool",
        **kwargs,
    ):
        super().__init__(cfg, **kwargs)
        self.relative, dim = relative_bias, self.embed_dim
        for block in self.blocks:
            if relative_bias:
                block.attn = RelativeAttention(dim, cfg.num_heads, self.grid)
            if init_values:
                block.ls1, block.ls2 = LayerScale(dim, init_values), LayerScale(dim, init_values)
        if fourth == "conv":
            conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
            self.fourth = nn.Sequential(conv, nn.BatchNorm2d(dim), nn.GELU())

    def stages(self, imgs: Tensor, *args, **kwargs) -> list[Tensor]:
        """As the script's; biases are then of these images' grid."""
        for block in self.blocks if self.relative else ():
            block.attn.now = self.grid_of(imgs)
        return super().stages(imgs, *args, **kwargs)

    def layer_ids(self) -> dict[str, int]:
        """As the script's; what makes E4 is above stage 3."""
        last = len(self.blocks) + 1
        added = {f"fourth.{name}": last for name, _ in self.fourth.named_parameters()}
        return super().layer_ids() | added


def make_encoder(cfg: mcmae.Config, **kwargs) -> mcmae.Encoder:
    """MCMAE's encoder; kwargs: the options above, and those of `mcmae.make_encoder`."""
    options = {"relative_bias", "init_values", "fourth"}
    return (Encoder if kwargs.keys() & options else mcmae.make_encoder)(cfg, **kwargs)
