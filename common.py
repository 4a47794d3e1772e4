"""Vision-transformer parts that the method scripts share and that no paper here contributes.

    masks      random_mask, split, fill      mask (B, L) bool, True = masked; its index tensors
    patches    patchify, unpatchify, Normalize, pixel_target, sincos_2d
    blocks     Mlp, Attention, CrossAttention, Block, PatchEmbed     parameter names as in timm

vit.py puts them together to the encoder that survives pre-training.

Axes: B batch, L tokens, P prefix tokens, D width, C H W image, h w grid, p patch.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noise import DROP_PATH, uniform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------ masks


def random_mask(noise: Tensor, num_masked: int) -> Tensor:
    """Hide the `num_masked` patches with the largest noise (MAE's random masking).

    Args:
        noise: (B, L) float.
        num_masked: patches to hide a sample, 0..L.
    Returns: (B, L) bool, True = masked.
    """
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return rank >= noise.shape[1] - num_masked


def split(mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a mask into index tensors, both halves in raster order, without a sort.

    Args:
        mask: (B, L) bool with exactly `num_visible` False a row.
        num_visible: V.
    Returns: ids_keep (B, V); ids_mask (B, L - V); ids_restore (B, L), where token l of the image
        stands in the sequence [visible, masked]. All int64.
    """
    visible_rank, masked_rank = (~mask).cumsum(1) - 1, mask.cumsum(1) - 1 + num_visible
    ids_restore = torch.where(mask, masked_rank, visible_rank)
    position = torch.arange(mask.shape[1], device=mask.device).expand_as(ids_restore)
    order = torch.empty_like(ids_restore).scatter_(1, ids_restore, position)
    return order[:, :num_visible], order[:, num_visible:], ids_restore


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens: x (B, L, D) and ids (B, K) give (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def fill(x: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    """Put a mask token where a patch is hidden: (B, V, D) to (B, L, D) in raster order."""
    B, L = ids_restore.shape
    hidden = mask_token.to(x.dtype).expand(B, L - x.shape[1], -1)
    return gather(torch.cat([x, hidden], dim=1), ids_restore)


# ---------------------------------------------------------------------------------------- patches


class Normalize(nn.Module):
    """Map (B, 3, H, W) uint8 to float32 by a mean and standard deviation of [0, 1] pixels."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        mean, std = torch.tensor(mean), torch.tensor(std)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        return (rgb / 255 - self.mean) / self.std

    def undo(self, imgs: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to uint8."""
        return ((imgs.float() * self.std + self.mean) * 255).round().clamp(0, 255).byte()


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into (B, h*w, p*p*C), numbers of a patch in MAE's (p, p, C) order."""
    B, C, H, W = imgs.shape
    p, h, w = patch_size, H // patch_size, W // patch_size
    x = imgs.reshape(B, C, h, p, w, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    return x.reshape(B, h * w, p * p * C)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Undo `patchify`: (B, h*w, p*p*C) on a grid (h, w) to (B, C, H, W)."""
    (B, _, n), (h, w), p = patches.shape, grid, patch_size
    x = patches.reshape(B, h, w, p, p, n // p**2).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return x.reshape(B, -1, h * p, w * p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (B, L, 1) each, as MAE's `norm_pix_loss`."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def pixel_target(imgs: Tensor, patch_size: int, norm_pix_loss: bool) -> Tensor:
    """What MAE predicts: patches (B, L, p*p*3), each by itself normalised with `norm_pix_loss`."""
    target = patchify(imgs, patch_size)
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    return target


def pixel_picture(pred: Tensor, imgs: Tensor, patch_size: int, norm_pix_loss: bool) -> Tensor:
    """Predicted patches (B, L, p*p*3) as normalised images (B, 3, H, W), see `Normalize.undo`.

    With `norm_pix_loss` a prediction has no mean and deviation; they are the true patch's.
    """
    pred, (h, w) = pred.float(), (n // patch_size for n in imgs.shape[-2:])
    if norm_pix_loss:
        mean, std = patch_statistics(patchify(imgs, patch_size))
        pred = pred * std + mean
    return unpatchify(pred, patch_size, (h, w))


def sincos_2d(dim: int, h: int, w: int, trained: Sequence[int] | None = None) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, (h*w, dim) float32, equal to MAE's.

    The first half of the width encodes the column, the second the row; each half is sines, then
    cosines, of position / 10000^(i / (dim/4)).

    Args:
        dim: a multiple of 4.
        h, w: the grid.
        trained: the grid (h0, w0) that the encoder was trained on. Another one is laid over it,
            patch i of n at (i + 1/2) * n0/n - 1/2, so that no patch has a coordinate that training
            never had: what a bicubic resize of the embedding does, within 1.4 % at 768.
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    h0, w0 = trained or (h, w)
    rows, cols = torch.meshgrid(
        (torch.arange(h, dtype=torch.float64) + 0.5) * (h0 / h) - 0.5,
        (torch.arange(w, dtype=torch.float64) + 0.5) * (w0 / w) - 0.5,
        indexing="ij",
    )
    angles = [axis.reshape(-1, 1) * omega for axis in (cols, rows)]  # (h*w, dim/4) each
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def is_sincos(x: Tensor) -> bool:
    """Whether x (1, L, D), or (1, 1 + L, D) with a class token, is that embedding of a square."""
    side = math.isqrt(x.shape[1]) if x.ndim == 3 else 0
    if not side or x.shape[0] != 1 or x.shape[1] - side**2 not in (0, 1) or x.shape[2] % 4:
        return False
    fixed = sincos_2d(x.shape[2], side, side)
    near = 1e-2 if x.dtype == torch.bfloat16 else 1e-3
    return torch.allclose(x[0, -(side**2) :].float(), fixed, atol=near)


def resize_position(x: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Bicubic resize of a learned position embedding (1, L, D) from one grid (h, w) to another."""
    if tuple(old) == tuple(new):
        return x
    maps = x.unflatten(1, tuple(old)).permute(0, 3, 1, 2)  # (1, D, h, w)
    maps = F.interpolate(maps, tuple(new), mode="bicubic", antialias=True)
    return maps.flatten(2).transpose(1, 2)


# ----------------------------------------------------------------------------------------- blocks


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q (B, heads, L, d), k and v (B, heads, M, d) give q's shape.

    torch's kernel, except in bf16 on a CPU, where that one takes 2 to 3 times as long as the three
    steps written out, which two matrix products dominate.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention; `qkv` is one projection, as in timm."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, D // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, heads, L, d)

    def forward(self, x: Tensor) -> Tensor:
        x = attend(*self.heads(x))
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """The attention matrix itself, (B, heads, L, L); rows (queries) sum to one."""
        q, k, _ = self.heads(x)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)


class CrossAttention(nn.Module):
    """Multi-head attention from x (B, L, D) to context (B, M, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, _, D = x.shape
        q = self.q(x).reshape(B, -1, self.num_heads, D // self.num_heads).transpose(1, 2)
        kv = self.kv(context).reshape(B, -1, 2, self.num_heads, D // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, M, d) each
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A learned factor for each channel, started at `init_values`."""

    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, init_values: float | None = None
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, int(dim * mlp_ratio))
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """x (B, L, D); `drop` (2, B, 1, 1) scales the branches (see `drop_path`), None = 1."""
        y = self.ls1(self.attn(self.norm1(x)))
        x = x + (y if drop is None else drop[0] * y)
        y = self.ls2(self.mlp(self.norm2(x)))
        return x + (y if drop is None else drop[1] * y)


def drop_path(seed: Tensor, depth: int, rate: float, stream: int = DROP_PATH) -> Tensor:
    """Stochastic depth from the samples' seeds; a block's two branches are drawn apart, as timm's.

    Args:
        seed: (B,) int64.
        depth: number of blocks; the drop probability grows linearly from 0 to `rate`.
        stream: of the noise; another one for a second stack.
    Returns: (depth, 2, B, 1, 1) float32: 0 where dropped, 1 / keep probability elsewhere.
    """
    p = torch.linspace(0, rate, depth, device=seed.device).repeat_interleave(2)
    keep = uniform(seed, 2 * depth, stream) >= p  # (B, 2 * depth)
    return (keep / (1 - p)).T.unflatten(0, (depth, 2))[..., None, None]


class PatchEmbed(nn.Module):
    """Linear projection of patches, stored as the convolution timm and MAE have (`proj`)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches (B, K, p*p*C) in `patchify`'s order: any K, e.g. visible ones alone."""
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def init_weights(model: nn.Module) -> None:
    """Initialise as MAE: Xavier-uniform layers, unit norms, tokens N(0, 0.02), zero biases.

    In MAE's code the patch embedding's bias alone is torch's, uniform.
    """
    for m in model.modules():
        if isinstance(m, PatchEmbed):
            nn.init.xavier_uniform_(m.proj.weight.flatten(1))  # as the linear layer it is
            nn.init.zeros_(m.proj.bias)
        elif isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    for name, p in model.named_parameters():
        if name.endswith(("_token", "_tokens", "task_embed")):
            nn.init.normal_(p, std=0.02)
