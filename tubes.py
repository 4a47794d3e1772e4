"""Clips as tubes of cubes, and depthwise 3-D convolutions over all of them or over visible ones.

    cut, paste          clips (B, T, 3, H, W) to tubes of cubes of pixels, and back
    cube_statistics     what a cube's pixels are normalised by
    merge, pick         neighbours inside each patch; some of the tubes
    all_tubes           the convolution as it is defined
    visible_tubes       the same where all other tubes are zero, without computing these

Tokens lie tube by tube, (B, V, t, k*k, C): V tubes of the grid (h, w), t steps in time, at each
k x k positions in raster order. A tube is a patch over all frames; a cube is a step of it.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import gather


def cut(imgs: Tensor, p: int, c: int) -> Tensor:
    """Cut clips (B, T, 3, H, W) into tubes of cubes of pixels: (B, h*w, t, p*p, c*3)."""
    B, T, _, H, W = imgs.shape
    x = imgs.reshape(B, T // c, c, 3, H // p, p, W // p, p).permute(0, 4, 6, 1, 5, 7, 2, 3)
    return x.reshape(B, H * W // p**2, T // c, p * p, c * 3)


def paste(x: Tensor, p: int, c: int, grid: Sequence[int]) -> Tensor:
    """Undo `cut`, on a grid (t, h, w) of cubes."""
    t, h, w = grid
    x = x.reshape(-1, h, w, t, p, p, c, 3).permute(0, 3, 6, 7, 1, 4, 2, 5)
    return x.reshape(-1, t * c, 3, h * p, w * p)


def cube_statistics(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of each cube (B, L, t, p*p, c*3), (B, L, t, 1, c*3) each.

    As VideoMAE has them: 1e-6 is added to the unbiased deviation.
    """
    x = cubes.unflatten(-1, (-1, 3)).flatten(3, 4)  # (B, L, t, p*p*c, 3)
    mean, std = x.mean(3, keepdim=True), x.var(3, keepdim=True).sqrt() + 1e-6
    return tuple(s.repeat(1, 1, 1, 1, cubes.shape[-1] // 3) for s in (mean, std))


def merge(x: Tensor, k: int) -> Tensor:
    """Join k x k neighbours inside each patch: (..., n, C) to (..., n/k², k*k*C)."""
    side = math.isqrt(x.shape[-2]) // k
    x = x.unflatten(-2, (side, k, side, k)).transpose(-4, -3)
    return x.flatten(-3).flatten(-3, -2)


def pick(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tubes: (B, L, ...) and ids (B, V) give (B, V, ...)."""
    return gather(x.flatten(2), ids).unflatten(2, x.shape[2:])


def all_tubes(grid: Sequence[int], k: int, visible: Tensor | None) -> Callable:
    """Depthwise 3-D convolution (Sec. 2.4) of all tokens (B, L, t, k*k, C), as it is defined.

    Those that are not `visible` (B, L, 1, 1, 1) bool are zero to it; None: all are seen. It runs as
    a sum over shifts in time of 2-D convolutions, whose kernels are much faster.
    """
    t, h, w = grid

    def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
        (B, *_, C), K, x = x.shape, conv.kernel_size[0], x if visible is None else x * visible
        maps = x.view(B, h, w, t, k, k, C).permute(0, 3, 6, 1, 4, 2, 5)
        maps = F.pad(maps.reshape(B, t, C, h * k, w * k), (0,) * 6 + (K // 2,) * 2)
        y = 0
        for shift in range(K):
            frames = maps[:, shift : shift + t].flatten(0, 1)
            frames = frames.contiguous(memory_format=torch.channels_last)
            y = y + F.conv2d(frames, conv.weight[:, :, shift], padding=K // 2, groups=C)
        y = y.view(B, t, C, h, k, w, k).permute(0, 3, 5, 1, 4, 6, 2)
        return y.reshape(B, h * w, t, k * k, C) + conv.bias

    return convolve


def visible_tubes(grid: Sequence[int], k: int, K: int, ids: Tensor) -> Callable:
    """The same of the tubes `ids` (B, V) alone, (B, V, t, k*k, C), all others being zero.

    Each tube fetches the s x s positions around it, s = k + K - 1, from the visible ones: a tenth
    of the outputs, and no map of zeros. Of these small windows a channel's kernel is a matrix
    (s*s, K * k*k), K shifts in time of k*k outputs, so that one matrix product convolves them all.
    """
    (B, V), (_, h, w), s, W = ids.shape, grid, k + K - 1, grid[2] * k + K - 1
    device, n = ids.device, V * k * k
    corner = ids // w * (k * W) + ids % w * k  # of each window in the map with its border
    places = [
        (torch.arange(m, device=device)[:, None] * W + torch.arange(m, device=device)).flatten()
        for m in (k, s)
    ]
    own, around = (corner[..., None] + at for at in places)  # (B, V, k*k), (B, V, s*s)
    own = own.flatten(1) + (W + 1) * (K // 2)
    token = torch.full((B, (h * k + K - 1) * W), n, device=device)  # n: nothing there
    token.scatter_(1, own, torch.arange(n, device=device).expand(B, -1))
    rows = token.gather(1, around.flatten(1)) + (n + 1) * torch.arange(B, device=device)[:, None]
    tap = torch.arange(s, device=device)[:, None] - torch.arange(k, device=device)  # (s, k)
    tap = (tap == torch.arange(K, device=device)[:, None, None]).float()  # (K, s, k)
    join = torch.einsum("air,bjc->abijrc", tap, tap).reshape(K * K, s * s, k * k)

    def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
        t, C = x.shape[2], x.shape[-1]
        x = F.pad(x.transpose(2, 3).reshape(B, n, t * C), (0, 0, 0, 1))  # and a row of zeros
        x = x.flatten(0, 1).index_select(0, rows.flatten()).view(B * V, s * s, t, C)
        kernel = conv.weight.view(C, K, K * K)
        kernel = torch.einsum("cda,aio->cido", kernel, join.to(kernel.dtype)).flatten(2)
        y = x.permute(3, 0, 2, 1).reshape(C, B * V * t, s * s) @ kernel  # (C, B*V*t, K * k*k)
        y = F.pad(y.view(C, B * V, t, K, k * k), (0, 0, 0, 0, K // 2, K // 2))
        y = sum(y[:, :, shift : shift + t, shift] for shift in range(K))
        return y.permute(1, 2, 3, 0).reshape(B, V, t, k * k, C) + conv.bias

    return convolve
