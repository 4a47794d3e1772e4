"""MCMAE: masked convolution and masked autoencoding on a hybrid convolution-transformer encoder.

Paper: "MCMAE: Masked Convolution Meets Masked Autoencoders", called ConvMAE in its code. Idea:
  1. three stages at strides 4, 8, 16: two of depthwise-convolution blocks, one of transformer ones;
  2. a mask is drawn at stage 3 and upsampled to stages 1 and 2: a token is visible or hidden as a
     whole, and stage 3 runs on the 25 % visible ones alone, as in MAE;
  3. hidden positions are zeroed before each depthwise convolution: nothing leaks out of them;
  4. the decoder reads all three stages, brought to one grid by strided convolutions and summed;
  5. afterwards the encoder has the feature pyramid that detection and segmentation want.

Paper -> code
  Sec. 2.2, Table 7  hybrid encoder            Encoder, ConvBlock
  Sec. 2.2           block-wise mask           MCMAE.make_mask, MCMAE.visible_maps
  Sec. 2.2           masked convolution        Dense.depthwise, Sparse.depthwise
  Eq. 1              multi-scale decoder       MCMAE.encode, MCMAE.predict
  Sec. 2.2           loss, as MAE's            MCMAE.loss
  Sec. 2.3           E1, E2, E3, E4            Encoder.forward_pyramid

Stages 1 and 2 run in one of two forms that agree to rounding (tests/test_mcmae.py). `Dense`
computes every position, as the paper tells it. `Sparse`, the default, leaves out what cannot reach
the loss: a hidden position is zeroed before each depthwise convolution and dropped before stage 3,
so all but that convolution runs on visible tokens alone, a quarter of the work.

Where paper and public code leave a point open a `NOTE paper unclear` stands; docs/decisions.md
lists them, and where the two differ.

  CPU:  python mcmae.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 mcmae.py --data data/imagenet
"""

import collections
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pictures
from common import (
    MASK, Attention, Block, Normalize, ViT, drop_path, gather, init_weights, is_sincos,
    patch_statistics, patchify, random_mask, sincos_2d, split, uniform, unpatchify,
)  # fmt: skip
from engine import UserError, arg


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source; `--model` presets change the size."""

    epochs: int = arg(1600, "Sec. 3.1")
    warmup_epochs: float = arg(40, "Sec. 3.1")
    batch_size: int = arg(1024, "Sec. 3.1; the global batch")
    base_lr: float = arg(1.5e-4, "Sec. 3.1; lr = base_lr * batch_size / 256")
    weight_decay: float = arg(0.05, "Sec. 3.1")
    beta2: float = arg(0.95, "AdamW; not given, MAE's")
    image_size: int = arg(224, "Table 7: E1, 56 x 56, is a quarter of it")
    crop_scale_min: float = arg(0.2, "'random cropping'; MAE's RandomResizedCrop (0.2, 1)")
    patch_size: int = arg(16, "stride of stage 3; stages 1 and 2 have a quarter and a half of it")
    embed_dims: str = arg("256,384,768", "Table 7: C1,C2,C3")
    depths: str = arg("2,2,11", "Table 7: L1,L2,L3")
    mlp_ratios: str = arg("4,4,4", "Table 7: P1,P2,P3")
    num_heads: int = arg(12, "Table 7: Ha, of stage 3")
    kernel_size: int = arg(5, "of the depthwise convolutions; Table 5", choices=[5, 7, 9])
    mask_ratio: float = arg(0.75, "hidden share, Sec. 2.2; Sec. 3.1's 25 % is the visible one")
    masking: str = arg("block", "drawn at stage 3, or token by token at stage 1; Table 5",
                       choices=["block", "token"])  # fmt: skip
    masked_conv: bool = arg(True, "hide positions from the depthwise convolutions; Table 5")
    multi_scale: bool = arg(True, "multi-scale decoder, Eq. 1; Table 6")
    sparse: bool | None = arg(None, "compute visible positions alone; on where that is exact: with "
                              "block masking and masked convolution")  # fmt: skip
    decoder_embed_dim: int = arg(512, "Sec. 3.1")
    decoder_depth: int = arg(8, "Sec. 3.1")
    decoder_num_heads: int = arg(16, "public code; Sec. 3.1 has 12, which do not divide 512")
    norm_pix_loss: bool = arg(True, "per-patch normalised pixels; the published command")
    learned_position: bool = arg(False, "train stage 3's positions, as public fine-tuning does")
    init: str | None = arg(None, "start from the authors' checkpoint, whole or the encoder alone")
    init_key: str | None = arg(None, "where in the file of --init the weights are, e.g. model_ema")

    FREE = (*engine.Config.FREE, "init", "init_key")  # a run that goes on does not read the file

    def resolve(self) -> None:
        """Fill in what depends on other fields, and refuse what cannot work.

        Errors: UserError naming the field and values that work.
        """
        super().resolve()
        width, decoder_width = triple(self, "embed_dims")[2], self.decoder_embed_dim
        triple(self, "depths"), triple(self, "mlp_ratios")
        for name, least in (("num_heads", 1), ("decoder_depth", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{engine.flag(name)} {value} must be {least} or more")
        for what, n, k, why in (
            ("--patch-size", self.patch_size, 4, "stage 1 has a quarter of it"),
            ("C3 of --embed-dims", width, self.num_heads, "--num-heads"),
            ("C3 of --embed-dims", width, 4, "position embedding"),
            ("--decoder-embed-dim", decoder_width, 4, "position embedding"),
        ):
            if n % k:
                near = f"{max(n // k, 1) * k} or {(n // k + 1) * k}"
                raise UserError(f"{what} {n} is not divisible by {k} ({why}); nearest: {near}")
        engine.divides(self, "decoder_embed_dim", "decoder_num_heads")
        n = self.num_positions
        if not 0 < self.mask_ratio < 1 or not 0 < self.num_visible < n:
            raise UserError(f"--mask-ratio {self.mask_ratio} must hide some of {n} positions and "
                            f"leave some: {1 / n:.3g} to {1 - 1 / n:.3g}")  # fmt: skip
        exact = self.masking == "block" and self.masked_conv
        if self.sparse and not exact:
            raise UserError("--sparse needs --masking block and --masked-conv: without them hidden "
                            "positions reach the loss; use --no-sparse")  # fmt: skip
        self.sparse = exact if self.sparse is None else self.sparse
        if self.init_key and not self.init:
            raise UserError("--init-key is for --init, which is not given")
        if self.init and not self.resume and not Path(self.init).is_file():
            raise UserError(f"--init {self.init}: no such file")

    @property
    def num_positions(self) -> int:
        """Positions that a mask is drawn over: of stage 3 (196), or of stage 1 (3136)."""
        return (self.image_size // self.patch_size * (4 if self.masking == "token" else 1)) ** 2

    @property
    def num_visible(self) -> int:
        """Positions left visible: 49 of 196 (Sec. 2.2)."""
        return round((1 - self.mask_ratio) * self.num_positions)


def triple(cfg: Config, name: str) -> list[int]:
    """Three positive integers, one a stage, from a field as Table 7 writes it: "256,384,768"."""
    words = [w.strip() for w in getattr(cfg, name).split(",")]
    if len(words) != 3 or not all(w.isdecimal() and int(w) for w in words):
        raise UserError(f"{engine.flag(name)} {getattr(cfg, name)!r} must be three positive "
                        f"integers, one a stage, e.g. {getattr(Config, name)}")  # fmt: skip
    return [int(w) for w in words]


# -------------------------------------------------------------------- two forms of stages 1 and 2
# Only convolutions look beyond a position; all else works on (..., C) and is written once. A form
# says how positions are laid out and how convolutions run on them. Patches are stage 3's positions,
# on a grid (h, w); stages 1, 2, 3 have k x k positions a patch, k = 4, 2, 1.


class Dense:
    """Every position, as the paper tells it: maps (B, H, W, C).

    Args:
        visible: {height H: (B, H, W, 1), 1 visible, 0 hidden} for masked convolution; {}: plain.
        ids_keep: (B, V) int64, patches that stage 3 keeps; None: all.
    """

    def __init__(self, visible: dict[int, Tensor] | None = None, ids_keep: Tensor | None = None):
        self.visible, self.ids_keep = visible or {}, ids_keep

    def pixels(self, imgs: Tensor, patch_size: int) -> Tensor:
        """Images (B, 3, H, W) in this form: (B, H, W, 3)."""
        return imgs.permute(0, 2, 3, 1).contiguous()

    def strided(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolution of stride k: (B, H, W, C) to (B, H/k, W/k, C')."""
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Masked depthwise convolution of (B, H, W, C)."""
        if self.visible:
            x = x * self.visible[x.shape[1]].to(x.dtype)  # Sec. 2.2
        return self.strided(conv, x)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens of stage 3, (B, V, C), from (B, h, w, C)."""
        x = x.flatten(1, 2)
        return x if self.ids_keep is None else gather(x, self.ids_keep)


class Sparse:
    """Visible patches alone: tokens (B, V, k*k, C), positions of a patch in raster order.

    A convolution whose stride is its size stays inside a patch and so is a linear layer. For the
    depthwise one the tokens go onto a map of zeros and come back.

    Args:
        grid: (h, w) of patches.
        ids_keep: (B, V) int64, the visible ones.
    """

    def __init__(self, grid: tuple[int, int], ids_keep: Tensor):
        self.grid, self.ids_keep = grid, ids_keep
        self.rows = {k: self.places(k) for k in (4, 2)}

    def places(self, k: int) -> Tensor:
        """Rows of the tokens in a batch of maps (B * k*h * k*w, C): (B * V * k*k,) int64."""
        (h, w), device = self.grid, self.ids_keep.device
        n = h * w * k * k
        rows = patchify(torch.arange(n, device=device).view(1, 1, h * k, w * k), k)[0]  # (L, k*k)
        first = n * torch.arange(len(self.ids_keep), device=device)  # of each image
        return (rows[self.ids_keep] + first[:, None, None]).flatten()

    def pixels(self, imgs: Tensor, patch_size: int) -> Tensor:
        """Images (B, 3, H, W) in this form: (B, V, p*p, 3)."""
        return gather(patchify(imgs, patch_size), self.ids_keep).unflatten(-1, (-1, 3))

    def strided(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolution of size k and stride k: (B, V, n, C) to (B, V, n/k², C')."""
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (C', k*k*C)
        return F.linear(merge(x, conv.stride[0]), weight, conv.bias)

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Masked depthwise convolution of (B, V, k*k, C)."""
        B, _, n, C = x.shape
        k = math.isqrt(n)
        size, rows = (self.grid[0] * k, self.grid[1] * k), self.rows[k]
        if x.device.type == "cpu":  # its bf16 kernel takes twice as long for the weight's gradient
            x = x.to(conv.weight.dtype)
        maps = x.new_zeros(B * size[0] * size[1], C).index_copy_(0, rows, x.reshape(-1, C))
        with torch.autocast("cpu", enabled=False):
            # Sec. 2.2; channels last in memory. The bias waits until hidden rows are gone.
            maps = maps.view(B, *size, C).permute(0, 3, 1, 2)
            y = F.conv2d(maps, conv.weight, padding=conv.padding, groups=C)
        return y.permute(0, 2, 3, 1).reshape(-1, C).index_select(0, rows).view_as(x) + conv.bias

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens of stage 3, (B, V, C), from (B, V, 1, C)."""
        return x.squeeze(2)


def merge(x: Tensor, k: int) -> Tensor:
    """Join k x k neighbours inside each patch: (B, V, n, C) to (B, V, n/k², k*k*C)."""
    B, V, n, C = x.shape
    side = math.isqrt(n) // k
    return x.view(B, V, side, k, side, k, C).transpose(3, 4).reshape(B, V, side**2, k * k * C)


# ------------------------------------------------------------------------------------------ model


class Stem(nn.Module):
    """Into a stage: non-overlapping convolution, and as the public code LayerNorm, GELU."""

    def __init__(self, stride: int, in_dim: int, dim: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_dim, dim, stride, stride), nn.LayerNorm(dim)

    def forward(self, x: Tensor, form: Dense | Sparse) -> Tensor:
        return F.gelu(self.norm(form.strided(self.proj, x)))


class Conv1x1(nn.Conv2d):
    """A linear layer on (..., C), stored as the public code does."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(in_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class ConvBlock(nn.Module):
    """Transformer block with a depthwise convolution in the place of attention (Sec. 2.2).

    It is called `attn`, as in the public code, whose checkpoints load; `conv1` and `conv2` stand
    where attention has its projections.
    """

    def __init__(self, dim: int, mlp_ratio: int, kernel_size: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv1, self.conv2 = Conv1x1(dim, dim), Conv1x1(dim, dim)
        self.attn = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        fc1, fc2 = Conv1x1(dim, dim * mlp_ratio), Conv1x1(dim * mlp_ratio, dim)
        self.mlp = nn.Sequential(collections.OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x: Tensor, form: Dense | Sparse, drop: Tensor | None = None) -> Tensor:
        """x (B, ., ., C) in its form; `drop` (2, B, 1, 1, 1) scales the branches, None = 1."""
        y = self.conv2(form.depthwise(self.attn, self.conv1(self.norm1(x))))
        x = x + (y if drop is None else drop[0] * y)
        y = self.mlp(self.norm2(x))
        return x + (y if drop is None else drop[1] * y)


class RelativeAttention(Attention):
    """Attention with a learned bias for each head and offset of two positions of a grid (h, w)."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]):
        super().__init__(dim, num_heads)
        self.grid = self.now = grid  # `now`: of the images at hand, set by Encoder.all_stages
        table = torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        at, w, index = torch.arange(x.shape[1], device=x.device), self.now[1], 0
        for n, axis in zip(self.grid, (at // w, at % w)):  # an offset beyond the grid: its largest
            index = index * (2 * n - 1) + (axis[:, None] - axis).clamp(1 - n, n - 1) + n - 1
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)  # (heads, L, L)
        q, k, v = self.heads(x)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))


def resize_position(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic resize of a position embedding (1, L, D) from one grid to another."""
    if old == new:
        return x
    maps = x.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, h, w)
    return F.interpolate(maps, new, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Three stages, at a quarter, a half and the whole of `patch_size` (Table 7).

    Args:
        image_size: (H, W) the position embedding is kept for; any other size works and costs
            computing it anew.
        trained_size: (H, W) that pre-training saw, as `common.ViT`; None: `image_size`.
        drop_path: the last block's rate, used when `seed` is given (fine-tuning).
        learned_position: whether `pos_embed` is a parameter, (1, L, C3).
        relative_bias, init_values, fourth: the public code's for segmentation: a bias for each
            offset in stage 3's attention; LayerScale there, None = none; how E4 comes from E3,
            "pool" (Sec. 2.3) or "conv", trained.
    """

    num_prefix = 0  # Sec. 2.2: no class token
    trained_norm, probe_layer = False, None  # the norm is trained on E1 + E2 + E3
    grid_of = ViT.grid_of  # of stage 3, where an encoder is a plain ViT

    def __init__(
        self, image_size: Sequence[int] = (224, 224), patch_size: int = 16,
        embed_dims: Sequence[int] = (256, 384, 768), depths: Sequence[int] = (2, 2, 11),
        mlp_ratios: Sequence[int] = (4, 4, 4), num_heads: int = 12, kernel_size: int = 5,
        drop_path: float = 0.0, trained_size: Sequence[int] | None = None,
        learned_position: bool = False, relative_bias: bool = False,
        init_values: float | None = None, fourth: str = "pool",
    ):  # fmt: skip
        super().__init__()
        (C1, C2, C3), (P1, P2, P3), (L1, L2, L3) = embed_dims, mlp_ratios, depths
        self.patch_size, self.embed_dim, self.drop_path = patch_size, C3, drop_path
        self.strides = (patch_size // 4, patch_size // 2, patch_size, patch_size * 2)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.trained_grid = tuple(n // patch_size for n in trained_size or image_size)
        self.patch_embed1 = Stem(patch_size // 4, 3, C1)
        self.patch_embed2, self.patch_embed3 = Stem(2, C1, C2), Stem(2, C2, C3)
        self.patch_embed4 = nn.Linear(C3, C3)
        self.blocks1 = nn.ModuleList(ConvBlock(C1, P1, kernel_size) for _ in range(L1))
        self.blocks2 = nn.ModuleList(ConvBlock(C2, P2, kernel_size) for _ in range(L2))
        self.blocks3 = nn.ModuleList(Block(C3, num_heads, P3, init_values) for _ in range(L3))
        self.relative_bias = relative_bias
        for block in self.blocks3 if relative_bias else ():
            block.attn = RelativeAttention(C3, num_heads, self.grid)
        position = sincos_2d(C3, *self.grid, self.trained_grid)
        if learned_position:
            self.pos_embed = nn.Parameter(position[None])
        else:
            self.register_buffer("pos_embed", position, persistent=False)
        self.norm = nn.LayerNorm(C3, eps=1e-6)
        self.fourth = nn.MaxPool2d(2) if fourth == "pool" else nn.Sequential(
            nn.Conv2d(C3, C3, 3, stride=2, padding=1), nn.BatchNorm2d(C3), nn.GELU()
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that `layers` counts: stage 3's."""
        return self.blocks3

    def position(self, h: int, w: int) -> Tensor:
        """Position embedding of a grid, (h*w, C3); learned ones are resized."""
        if isinstance(self.pos_embed, nn.Parameter):
            return resize_position(self.pos_embed, self.grid, (h, w))[0]
        return ViT.position(self, h, w)

    def stages(
        self, imgs: Tensor, form: Dense | Sparse, cells: Tensor | None = None, drop: Sequence = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stages 1 and 2 and the way into stage 3.

        Args:
            imgs: (B, 3, H, W) float, normalised; H and W multiples of the patch size.
            cells: (B, 4h, 4w, 1), 1 visible, 0 hidden before stage 1 (token masking, dense).
            drop: (2, B, 1, 1, 1) for each block; empty: nothing is dropped.
        Returns: E1, E2 in their form; tokens of stage 3 (B, V, C3), with position.
        """
        position = self.position(*self.grid_of(imgs))
        drop = iter(drop or [None] * (len(self.blocks1) + len(self.blocks2)))
        E1 = self.patch_embed1(form.pixels(imgs, self.patch_size), form)
        E1 = E1 if cells is None else E1 * cells
        for block in self.blocks1:
            E1 = block(E1, form, next(drop))
        E2 = self.patch_embed2(E1, form)
        for block in self.blocks2:
            E2 = block(E2, form, next(drop))
        x = form.tokens(self.patch_embed4(self.patch_embed3(E2, form)))
        return E1, E2, x + (position if form.ids_keep is None else position[form.ids_keep])

    def run(self, x: Tensor, drop: Sequence = ()) -> list[Tensor]:
        """Stage 3 on (B, K, C3), any K: the output of each block."""
        outputs = []
        for block, scale in zip(self.blocks3, drop or [None] * len(self.blocks3)):
            x = block(x, scale)
            outputs.append(x)
        return outputs

    def all_stages(self, imgs: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Fine-tuning: E1, E2 and the outputs of stage 3's blocks, everything visible."""
        for block in self.blocks3 if self.relative_bias else ():
            block.attn.now = self.grid_of(imgs)
        convs, drop = len(self.blocks1) + len(self.blocks2), []
        if seed is not None and self.drop_path > 0:
            drop = list(drop_path(seed, convs + len(self.blocks3), self.drop_path))  # (2, B, 1, 1)
        E1, E2, x = self.stages(imgs, Dense(), drop=[d[..., None] for d in drop[:convs]])
        return E1, E2, self.run(x, drop[convs:])

    def forward_features(
        self, imgs: Tensor, layers: Sequence[int] | None = None, seed: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Features of whole images.

        Args:
            imgs: (B, 3, H, W) float, normalised; H and W multiples of the patch size.
            layers: 1-based blocks of stage 3, outputs before the norm; None = the last, after it.
            seed: (B,) int64 turns drop path on.
        Returns: for each layer, (tokens (B, L, C3), prefix (B, 0, C3)).
        """
        outputs = self.all_stages(imgs, seed)[2]
        chosen = [self.norm(outputs[-1])] if layers is None else [outputs[i - 1] for i in layers]
        return [(x, x[:, :0]) for x in chosen]

    def forward_pyramid(self, imgs: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """E1, E2, E3, E4 at `strides`, (B, C, h, w) each; E4 is E3 max-pooled 2x2 (Sec. 2.3).

        E3 does not pass the norm, as in the public code: pre-training has it after the scales met.

        Errors: ValueError where the last stride, twice the patch size, does not divide H and W.
        """
        (H, W), stride = imgs.shape[-2:], self.strides[3]
        if H % stride or W % stride:
            raise ValueError(f"image size {H}x{W} is not divisible by the last stride, {stride}")
        E1, E2, (*_, x) = self.all_stages(imgs, seed)
        E3 = x.transpose(1, 2).unflatten(2, self.grid_of(imgs))
        return [E1.permute(0, 3, 1, 2), E2.permute(0, 3, 1, 2), E3, self.fourth(E3)]

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter for layer-wise decay: 0 up to stage 3, 1.. its blocks, then what
        follows. Public code, util/lr_decay.py.
        """
        last = len(self.blocks3) + 1

        def depth(name: str) -> int:
            if name.startswith("blocks3."):
                return int(name.split(".")[1]) + 1
            return last if name.startswith(("norm.", "fourth.")) else 0

        return {name: depth(name) for name, _ in self.named_parameters()}


def make_encoder(cfg: Config, **overrides) -> Encoder:
    """Encoder of a configuration; overrides: image_size (H, W) and others of `Encoder`."""
    kwargs = {k: triple(cfg, k) for k in ("embed_dims", "depths", "mlp_ratios")}
    same = ("patch_size", "num_heads", "kernel_size", "learned_position")
    kwargs |= {k: getattr(cfg, k) for k in same}
    return Encoder(**{"image_size": (cfg.image_size,) * 2, **kwargs, **overrides})


def init_hybrid(model: nn.Module) -> None:
    """Initialise as the public code: as MAE, the last stem's weight too; torch's convolutions."""
    init_weights(model)
    for name, p in model.named_parameters():
        if name.endswith("patch_embed3.proj.weight"):
            nn.init.xavier_uniform_(p.flatten(1))


class MCMAE(nn.Module):
    """Encoder, multi-scale decoder and loss; `model(batch, progress)` returns (loss, logs)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.grid = cfg, (cfg.image_size // cfg.patch_size,) * 2
        (C1, C2, C3), D = triple(cfg, "embed_dims"), cfg.decoder_embed_dim
        self.normalize = Normalize()
        self.encoder = make_encoder(cfg)
        if cfg.multi_scale:
            self.stage1_output_decode = nn.Conv2d(C1, C3, 4, stride=4)
            self.stage2_output_decode = nn.Conv2d(C2, C3, 2, stride=2)
        self.decoder_embed = nn.Linear(C3, D)
        if cfg.masking == "block":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("decoder_pos_embed", sincos_2d(D, *self.grid), persistent=False)
        # NOTE paper unclear: decoder MLP ratio. 4, as MAE, in every size. The public code takes
        # stage 1's, which is 4 in B, the only size it has, and would be 8 in B*, L and H.
        self.decoder_blocks = nn.ModuleList(
            Block(D, cfg.decoder_num_heads) for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, 3 * cfg.patch_size**2)
        init_hybrid(self)

    def make_mask(self, seed: Tensor) -> Tensor:
        """Mask from the samples' seeds: (B, L) bool over stage 3, or (B, 16L) over stage 1."""
        n = self.cfg.num_positions
        return random_mask(uniform(seed, n, MASK), n - self.cfg.num_visible)

    def visible_maps(self, mask: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """Masks of stages 1 and 2 as `Dense` takes them, keys 4h and 2h."""
        (h, w), visible = self.grid, (~mask).to(dtype)
        if self.cfg.masking == "block":  # upsampled by 4 and by 2, Sec. 2.2
            visible = visible.view(-1, 1, h, w)
            maps = [F.interpolate(visible, (k * h, k * w)) for k in (4, 2)]
        else:
            # NOTE paper unclear: input-token random masking. Each token of stage 1 is hidden on its
            # own; one of stage 2 where all four below it are; stage 3 keeps all its tokens.
            visible = visible.view(-1, 1, 4 * h, 4 * w)
            maps = [visible, F.max_pool2d(visible, 2)]
        return {v.shape[2]: v.permute(0, 2, 3, 1) for v in maps}

    def encode(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Latent of visible tokens in raster order, (B, V, C3); of all of them with token masking.

        Args:
            imgs: (B, 3, H, W) float, normalised.
            mask: as `make_mask` returns it, with exactly `cfg.num_visible` False a sample.
        """
        cfg, cells = self.cfg, None
        ids_keep = split(mask, cfg.num_visible)[0] if cfg.masking == "block" else None
        if cfg.sparse:
            form = Sparse(self.grid, ids_keep)
        else:
            maps = self.visible_maps(mask, imgs.dtype)
            cells = maps[4 * self.grid[0]] if cfg.masking == "token" else None
            form = Dense(maps if cfg.masked_conv else {}, ids_keep)
        E1, E2, x = self.encoder.stages(imgs, form, cells)
        x = self.encoder.run(x)[-1]  # E3
        if cfg.multi_scale:
            x = x + form.tokens(form.strided(self.stage1_output_decode, E1))  # Eq. (1)
            x = x + form.tokens(form.strided(self.stage2_output_decode, E2))  # Eq. (1)
        return self.encoder.norm(x)  # one norm over the sum, as the public code

    def predict(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Predict pixels of every patch: (B, L, p*p*3); arguments as `encode` takes them."""
        x = self.decoder_embed(self.encode(imgs, mask))  # Eq. (1): E_d
        if self.cfg.masking == "block":
            ids_restore = split(mask, self.cfg.num_visible)[2]
            hidden = self.mask_token.to(x.dtype).expand(len(x), mask.shape[1] - x.shape[1], -1)
            x = gather(torch.cat([x, hidden], dim=1), ids_restore)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def loss(self, pred: Tensor, imgs: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over a sample's hidden pixels, then samples, in fp32 (Sec. 2.2)."""
        target = patchify(imgs, self.cfg.patch_size)
        if self.cfg.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (pred.float() - target).square()  # (B, L, p*p*3)
        if self.cfg.masking == "token":  # by cells: (B, 16L, 3p*p/16), and the mask in their order
            error = merge(error.unflatten(-1, (-1, 3)), self.cfg.patch_size // 4).flatten(1, 2)
            mask = patchify(mask.view(-1, 1, 4 * self.grid[0], 4 * self.grid[1]), 4).flatten(1)
        return ((error.mean(-1) * mask).sum(1) / mask.sum(1)).mean()

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys) and logs; `progress` changes nothing here."""
        imgs, mask = self.normalize(batch["rgb"]), self.make_mask(batch["seed"])
        return self.loss(self.predict(imgs, mask), imgs, mask), {}


# ------------------------------------------------------------------------- looking at a model


def evaluate(model: MCMAE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, beside that of a guess that learns nothing: each patch in its own mean colour."""
    imgs, mask = model.normalize(batch["rgb"]), model.make_mask(batch["seed"])
    patches = patchify(imgs, model.cfg.patch_size)
    mean = 0 * patches if model.cfg.norm_pix_loss else patch_statistics(patches)[0]  # (B, L, 1)
    flat, pred = mean.expand_as(patches), model.predict(imgs, mask)
    return {"loss": model.loss(pred, imgs, mask), "loss_flat": model.loss(flat, imgs, mask)}


def preview(model: MCMAE, batch: dict[str, Tensor], path: Path, step: int) -> None:
    """Write a picture: images, what is visible of them, and the prediction of what is not."""
    cfg, rgb = model.cfg, batch["rgb"]
    imgs, mask = model.normalize(rgb), model.make_mask(batch["seed"])
    pred, note = model.predict(imgs, mask).float(), ""
    if cfg.norm_pix_loss:
        mean, std = patch_statistics(patchify(imgs, cfg.patch_size))
        pred, note = pred * std + mean, " (true patch mean, std)"
    pred = unpatchify(pred, cfg.patch_size, model.grid) * model.normalize.std + model.normalize.mean
    side = math.isqrt(mask.shape[1])
    hidden = F.interpolate(mask.view(-1, 1, side, side).float(), rgb.shape[-2:]).bool()
    columns = {"input = truth": rgb, "visible": rgb.masked_fill(hidden, 128)}
    columns[f"prediction{note}"] = (pred * 255).clamp(0, 255).byte().where(hidden, rgb)
    pictures.contact_sheet(columns, path, f"mcmae {cfg.model}, step {step}, {cfg.data} val")


# ------------------------------------------------------------------------------------ checkpoints


def load_init(model: MCMAE, path: str | Path, key: str | None = None) -> str:
    """Load a state dict with the public code's names: whole, or the encoder alone.

    The stages must be there and fit. The final norm, the fusion convolutions and the decoder may be
    absent, each as a whole, and keep their fresh weights. What the model has no part for is left
    out, and so are fixed position embeddings: a run computes those of its own grid and adapts to
    them. Learned ones are resized to it.

    Returns: a report of what was loaded, left out and missing.
    Errors: UserError listing what does not fit; then nothing was loaded.
    """
    state, note = engine.read_state(path, "--init", key)
    state = {k.removeprefix("encoder."): v for k, v in state.items()}
    x, learned = state.get("pos_embed"), model.cfg.learned_position
    if x is not None and not (learned or is_sincos(x)):
        raise UserError(f"--init {path}: pos_embed was trained; --learned-position takes it over")
    if "decoder_pos_embed" in state and not is_sincos(state["decoder_pos_embed"]):
        raise UserError(f"--init {path}: decoder_pos_embed was learned; here it is fixed")
    side = math.isqrt(x.shape[1]) if x is not None and x.ndim == 3 else 0
    if learned and side and side**2 == x.shape[1]:
        state["pos_embed"] = resize_position(x.float(), (side, side), model.grid)
    parts = ("patch_embed", "blocks")
    stages = {"patch_embed4", *(f"{part}{i}" for part in parts for i in (1, 2, 3))}
    own, found = ({k.removeprefix("encoder.").split(".")[0] for k in names}
                  for names in (model.state_dict(), state))  # fmt: skip
    whole = stages | found  # a part is there in full, or not at all
    report = engine.load_weights(
        model, state, path, may_miss=lambda k: k.split(".")[0] not in whole,
        may_stay=lambda k: k.split(".")[0] not in own,
    )  # fmt: skip
    return f"init        {report}" + (f"; {note}" if note else "")


def build(cfg: Config) -> MCMAE:
    """The model of a run, from --init where that is given and no checkpoint will be resumed."""
    model = MCMAE(cfg)
    if cfg.init and not (cfg.resume and (Path(cfg.output) / "last.pt").exists()):
        report = load_init(model, cfg.init, cfg.init_key)
        if os.environ.get("RANK", "0") == "0":
            print(report)
    return model


def load_encoder(path: str | Path, **overrides) -> Encoder:
    """Rebuild the encoder of a checkpoint.

    Args:
        path: a checkpoint that a run of this script wrote.
        overrides: image_size (H, W), drop_path and others, as `Encoder` takes them.
    Errors: UserError where the file is no such checkpoint.
    """
    cfg, state = engine.load_encoder(path, "mcmae", Config)
    size = (cfg.image_size,) * 2  # positions of another size refer to it
    encoder = make_encoder(cfg, **{"image_size": size, "trained_size": size, **overrides})
    if cfg.learned_position:
        state["pos_embed"] = resize_position(state["pos_embed"], encoder.trained_grid, encoder.grid)
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------------- presets

PRESETS = {
    # Ours, for a laptop: 64 x 64 scenes at strides 2, 4, 8, two minutes on two cores.
    "tiny": dict(
        image_size=64, patch_size=8, embed_dims="32,64,128", depths="1,1,3", num_heads=4,
        decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4, epochs=2, warmup_epochs=0.2,
        batch_size=64, base_lr=4e-3, data="shapes", val_epochs=1,
    ),
    # Table 7: MCMAE-S, -B, -B*, -L, -H.
    "small": dict(embed_dims="128,256,384", num_heads=6),
    "base": dict(),
    "base-star": dict(mlp_ratios="8,8,4"),
    "large": dict(embed_dims="384,768,1024", depths="2,2,23", mlp_ratios="8,8,4", num_heads=16,
                  micro_batch=64),
    "huge": dict(embed_dims="768,1024,1280", depths="2,2,31", mlp_ratios="8,8,4", num_heads=16,
                 micro_batch=32),
}  # fmt: skip


def main() -> None:
    engine.main("mcmae", Config, PRESETS, __doc__, build, evaluate=evaluate, preview=preview)


if __name__ == "__main__":
    main()
