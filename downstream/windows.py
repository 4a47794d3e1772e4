"""Attention inside windows, for the blocks of a plain ViT (or MCMAE's third stage) at 1024 pixels.

    partition, join     a map to windows and back; where windows stick out, which tokens are real
    Biased              attention with a learned bias of each offset, on a CPU
    everywhere          which blocks attend globally, as a flag names them
    Windows             runs blocks of `common.Block`'s form; some of them attend globally
    pyramid             an encoder's maps, its blocks run so; what they do not depend on, frozen

Windows are a way to run blocks, not part of an encoder: its weights and names stay as pre-training
left them. Prefix tokens (class, proxies) are left out, as ViTDet does: they belong to no window.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcmae
from common import unpatchify
from downstream.public_vit import RelativeAttention, offsets, places, resize_table
from engine import require

SCORES = 2**22  # of queries and keys that a CPU holds at a time where a bias is added to them


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


class Biased(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v, queries in parts; nothing is kept of the scores.

    torch's CPU kernel writes them out where a bias is trained, and keeps them: 12 heads of
    4096 x 4096. Here the backward pass computes them again.
    """

    @staticmethod
    def parts(q: Tensor) -> list[slice]:
        n = max(1, SCORES // (q.shape[0] * q.shape[1] * q.shape[2]))
        return [slice(i, i + n) for i in range(0, q.shape[2], n)]

    @staticmethod
    def weights(q: Tensor, k: Tensor, table: Tensor, grid: Sequence[int], rows: slice) -> Tensor:
        scores = q[:, :, rows] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        return (scores + offsets(table, grid, rows)).softmax(-1)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: Sequence[int]):
        """q, k, v (B, heads, L, d), of a grid (h, w); table (offsets, heads)."""
        ctx.save_for_backward(q, k, v, table)
        ctx.grid, out = tuple(grid), torch.empty_like(q)
        with torch.autocast("cpu", enabled=False):
            for rows in Biased.parts(q):
                out[:, :, rows] = Biased.weights(q, k, table, grid, rows).to(v.dtype) @ v
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, table = ctx.saved_tensors
        dq, dk, dv, d_table = (torch.zeros_like(x) for x in ctx.saved_tensors)
        for rows in Biased.parts(q):
            p, g = Biased.weights(q, k, table, ctx.grid, rows), grad[:, :, rows]
            dv += p.to(g.dtype).transpose(-2, -1) @ g
            ds = (g @ v.transpose(-2, -1)).to(p.dtype)
            ds = p * (ds - (ds * p).sum(-1, keepdim=True))  # of the scores, (B, heads, n, L)
            d_table.index_add_(0, places(ctx.grid, rows).flatten(), ds.sum(0).flatten(1).T)
            ds = (ds * q.shape[-1] ** -0.5).to(q.dtype)
            dq[:, :, rows] = ds @ k
            dk += ds.transpose(-2, -1) @ q[:, :, rows]
        return dq, dk, dv, d_table, None


def everywhere(words: str, depth: int) -> list[int]:
    """Blocks that attend globally, 1-based, of so many: "1,4,7,11", or "quarters", the last of
    each. Errors: UserError.
    """
    names = words.split(",") if words else []
    if words == "quarters":
        names = [str(max(1, round(k * depth / 4))) for k in (1, 2, 3, 4)]
    found = [int(w) for w in names if w.strip().isdecimal()]
    ok = len(found) == len(names) and all(1 <= n <= depth for n in found)
    usual = f"{words}: want blocks from 1 to {depth}, as 1,4,7,11, or quarters"
    require((ok, "everywhere", usual))
    return found


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

    def shared(self, inside: bool, grid: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """What windowed or what global blocks share: the table of their offsets, if they have one,
        and its matrix (heads, L, L), except where `Biased` goes without.
        """
        table = self.local_bias_table if inside else self.global_bias_table
        if table is None:
            return None, None
        if inside:
            return table, offsets(table, (self.window,) * 2)
        table = resize_table(table, self.grid, grid)
        return table, None if table.device.type == "cpu" else offsets(table, grid)

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
        table, bias = shared[inside]
        if isinstance(attn, RelativeAttention):
            own = attn.table(size)
            table, bias = own if table is None else own + table, None
        if table is not None and not inside and x.device.type == "cpu":
            x = Biased.apply(*attn.heads(x), table, size)
            return attn.proj(x.transpose(1, 2).flatten(2))
        if table is not None and bias is None:
            bias = offsets(table, size)
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
        shared, outputs = {inside: self.shared(inside, grid) for inside in (True, False)}, {}
        for i, (block, drop) in enumerate(zip(blocks, scales)):
            y = block.ls1(self.mix(block.attn, block.norm1(x), grid, i, shared))
            x = x + (y if drop is None else drop[0] * y)
            y = block.ls2(block.mlp(block.norm2(x)))
            x = x + (y if drop is None else drop[1] * y)
            if i + 1 in layers:
                outputs[i + 1] = x
        return [outputs[i] for i in layers] + [x]


def freeze_unseen(encoder: nn.Module, windows: Windows | None, last: bool = False) -> list[int]:
    """Freeze what the maps do not depend on, as DDP waits for every gradient.

    Args: as `pyramid`.
    Returns: channels of the maps.
    """
    parts = nn.ModuleList([encoder, windows])
    shapes = copy.deepcopy(parts).to("meta").eval()  # computes shapes alone
    imgs = torch.zeros(1, 3, *(n * encoder.patch_size for n in encoder.grid), device="meta")
    maps, params = pyramid(shapes[0], imgs, shapes[1], last=last), list(shapes.parameters())
    grads = torch.autograd.grad(sum(m.sum() for m in maps), params, allow_unused=True)
    for p, grad in zip(parts.parameters(), grads):
        p.requires_grad_(grad is not None)
    return [m.shape[1] for m in maps]


def pyramid(
    encoder: nn.Module, imgs: Tensor, windows: Windows | None, seed: Tensor | None = None,
    last: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Maps of an encoder (B, C, h, w), as its `forward_pyramid`, its blocks run by `windows`.

    Args:
        imgs: (B, 3, H, W), normalised.
        windows: None: as the encoder itself runs them.
        seed: (B,) int64 turns drop path on.
        last: of a plain encoder the last map alone, not four.
    """
    if windows is None:
        return encoder.forward_pyramid(imgs, seed=seed)
    grid, scales = encoder.grid_of(imgs), encoder.drops(seed)[-len(encoder.blocks) :]
    if isinstance(encoder, mcmae.Encoder):  # windows are stage 3's (Sec. 2.3)
        *early, x = encoder.stages(imgs, seed=seed)
        (x,) = windows.run(encoder.blocks, x, grid, scales)
        maps = [unpatchify(E.flatten(2), k, grid) for E, k in zip((*early, x), (4, 2, 1))]
        return [*maps, encoder.fourth(maps[2])]
    fractions = () if last else (1 / 3, 1 / 2, 2 / 3)  # as ViT.forward_pyramid
    layers = [max(1, round(len(encoder.blocks) * f)) for f in fractions]
    found = windows.run(encoder.blocks, encoder.embed(imgs), grid, scales, layers)
    return [x.transpose(1, 2).unflatten(2, grid) for x in found]
