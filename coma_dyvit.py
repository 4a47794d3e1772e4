"""CoMA: complementary masked autoencoders; DyViT: a hierarchical transformer with dynamic windows.

Paper: "CoMA: Complementary Masking and Hierarchical Dynamic Multi-Window Self-Attention in a
Unified Pre-training Framework". Idea:
  1. a random mask hides 60 % of an image's patches, its complement the other 40 %;
  2. the adaptive model sees the first rest, the evaluation model the second, and each predicts what
     it does not see, so that every patch is predicted exactly once a step;
  3. the evaluation model is frozen: it holds the adaptive model's weights of one step earlier;
  4. the encoder, DyViT, works at strides 4, 8, 16, 32; hidden patches leave it after its stem;
  5. where tokens are many, they attend to summaries of windows of several sizes in each patch.

Equation -> code
  Eq. 1          complementary masks       CoMA.forward, CoMA.complement
  Eq. 2          assembled image           assemble
  Eq. 3          its error                 CoMA.loss
  Eq. 4          frozen evaluation model   CoMA.before_step
  Eq. 5          stages' sizes             DyViT.run
  Eq. 6          Positional Downsampling   PositionalDownsampling.forward
  Eqs. 7, 9, 10  DM-MSA                    WindowAttention.forward
  Eq. 8          windows of a stage        DyViT.__init__
  Fig. 2         masking frequency         masking_frequency
  Tables 1-4     sizes; MAE; ViT           PRESETS; --method mae; --backbone vit

What CoMA adds is a choice of reading, `--evaluation`. Eqs. 2, 3 are sums over patches, each of one
branch, and the evaluation branch is frozen. So CoMA as printed is MAE at 60 % with plain pixels,
weight for weight; its gradient is MAE's times hidden / all patches, 30/49.
  frozen   the paper's text: the second branch changes the loss in the log, nothing else
  none     without that branch: the same weights at less cost
  common   a frozen encoder, one decoder that both branches train ("passed to *the* decoder")
  shared   both branches learn
common and shared are ahead of none after as many steps, none after as long (docs/ablations.md).
Where the paper is silent a `NOTE paper unclear` stands; docs/decisions.md lists them.

  CPU:  python coma_dyvit.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 coma_dyvit.py --data data/imagenet --epochs 300
  MAE:  torchrun --nproc_per_node=8 coma_dyvit.py --data data/imagenet --model mae-large
"""

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
    MASK, Block, Mlp, Normalize, PatchEmbed, ViT, attend, drop_path, gather, init_weights,
    is_sincos, patch_statistics, patchify, random_mask, sincos_2d, split, uniform, unpatchify,
)  # fmt: skip
from data import sample_seed
from engine import UserError, arg

SIDES = (8, 4, 2, 1)  # p_i of Eq. (5): tokens along a patch's side in the four stages


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source; `--model` presets change the size."""

    method: str = arg("coma", "coma, or plain MAE to compare with (Tables 2, 4)", ["coma", "mae"])
    backbone: str = arg("dyvit", "dyvit, or vit (Table 4)", ["dyvit", "vit"])
    evaluation: str | None = arg(
        None, "second branch: frozen (Eq. 4), none (same weights, cheaper), common (frozen "
        "encoder, one decoder), shared (learns too); default: frozen; mae: none",
        ["frozen", "none", "common", "shared"],
    )  # fmt: skip
    init: str | None = arg(None, "weights to start from: a public MAE's file, or one of ours")
    init_key: str | None = arg(None, "where in that file they are, e.g. model_ema")
    epochs: int = arg(300, "Table 2 (300 or 800)")
    # NOTE paper unclear: learning rate, weight decay, warm-up, crop, decoder width. MAE's.
    warmup_epochs: float = arg(40, "not given; MAE's")
    batch_size: int = arg(4096, "Implementation Details; the global batch")
    base_lr: float = arg(1.5e-4, "not given; MAE's; lr = base_lr * batch_size / 256")
    weight_decay: float = arg(0.05, "not given; MAE's")
    beta1: float = arg(0.9, "not given; MAE's")
    beta2: float = arg(0.95, "not given; MAE's")
    crop_scale_min: float = arg(0.2, "not given; MAE's RandomResizedCrop (0.2, 1)")
    image_size: int = arg(224, "Table 2")
    patch_size: int | None = arg(None, "default: 32 (Implementation Details); vit: 16")
    mask_ratio: float | None = arg(None, "Fig. 5; default: 0.6; mae on vit: MAE's 0.75")
    norm_pix_loss: bool | None = arg(None, "by patch; default: off (Eq. 3); mae on vit: on")
    dims: str = arg("112-224-448-896", "DyViT: Table 1, #Channels")
    blocks: str = arg("2-3-16-3", "DyViT: Table 1, #Blocks")
    heads: str = arg("2-4-8-16", "DyViT: Table 1, #Heads")
    windows: str = arg("8,4,2", "DyViT: the set of k (Eq. 8), those up to a stage's side; 8,4 has "
                       "Table 2's FLOPs")  # fmt: skip
    stem_mask: str = arg(
        "before", "DyViT: hide pixels before the stem, whose kernel looks into the next patch; or "
        "tokens after it, as printed", ["before", "after"],
    )  # fmt: skip
    fusion: str = arg(
        "printed", "DyViT: Eq. 6 with the printed kernels, each to one token a patch, or with its "
        "recursion and stride 2", ["printed", "sequential"],
    )  # fmt: skip
    embed_dim: int = arg(768, "ViT: ViT-B (Table 4)")
    depth: int = arg(12, "ViT: ViT-B")
    num_heads: int = arg(12, "ViT: ViT-B")
    decoder: str = arg("vit", "Fig. 5, Decoder Depth", ["vit", "convnext"])
    decoder_depth: int = arg(8, "Fig. 5, Decoder Depth")
    decoder_embed_dim: int = arg(512, "not given; MAE's")
    decoder_num_heads: int = arg(16, "not given; MAE's")

    FREE = (*engine.Config.FREE, "init", "init_key")  # a run goes on without the file

    def resolve(self) -> None:
        """Fill in what depends on other fields, and refuse what cannot work.

        Errors: UserError naming the field and values that work.
        """
        mae_itself = (self.method, self.backbone) == ("mae", "vit")
        defaults = {
            "patch_size": 32 if self.backbone == "dyvit" else 16,
            "mask_ratio": 0.75 if mae_itself else 0.6,
            "norm_pix_loss": mae_itself,
            "evaluation": "none" if self.method == "mae" else "frozen",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().resolve()
        if self.method == "mae" and self.evaluation != "none":
            raise UserError(f"--evaluation {self.evaluation}: --method mae has no second branch")
        N = self.num_patches
        if not 0 < self.mask_ratio < 1 or not 1 <= self.num_visible < N:
            raise UserError(
                f"--mask-ratio {self.mask_ratio} leaves {self.num_visible} of {N} patches; one "
                f"must stay and one be hidden: {1 / N:.3g} to {1 - 1 / N:.3g} work"
            )
        if self.decoder_depth < 1:
            raise UserError(f"--decoder-depth {self.decoder_depth} must be above 0; 8 in the paper")
        engine.divides(self, "decoder_embed_dim", "decoder_num_heads")
        widths = {"--decoder-embed-dim": self.decoder_embed_dim}
        if self.backbone == "vit":
            engine.divides(self, "embed_dim", "num_heads")
            widths["--embed-dim"] = self.embed_dim
        else:
            dims, blocks, heads = (numbers(self, name) for name in ("dims", "blocks", "heads"))
            widths["--dims"], kernels = dims[0], numbers(self, "windows", ",")
            if {len(dims), len(blocks), len(heads)} != {len(SIDES)}:
                raise UserError("--dims, --blocks, --heads: four numbers each, as 96-192-384-768")
            if any(d % h for d, h in zip(dims, heads)):
                raise UserError(f"--dims {self.dims} is not divisible by --heads {self.heads}")
            if any(SIDES[0] % k for k in kernels) or min(kernels) > SIDES[1]:
                raise UserError(
                    f"--windows {self.windows}: kernels are of 8, 4, 2, 1 (Eq. 8), and one is 4 or "
                    f"less, the patch's side in stage 2; try 8,4,2"
                )
            if self.patch_size % SIDES[0]:  # the stem's stride is an eighth of it
                near = max(self.patch_size // 8 * 8, 8)
                raise UserError(f"--patch-size {self.patch_size} is not divisible by 8, as DyViT "
                                f"needs; nearest that work: {near} or {near + 8}")  # fmt: skip
        for name, width in widths.items():
            if width % 4:
                raise UserError(f"{name} {width} is not divisible by 4, as positions need")

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """Patches that the adaptive model sees: 19 of 49; the evaluation model sees the others."""
        # NOTE paper unclear: 60 % of 49 patches. They are 29.4; MAE's rounding hides 30.
        return int(self.num_patches * (1 - self.mask_ratio) + 1e-6)


def numbers(cfg: Config, name: str, separator: str = "-") -> tuple[int, ...]:
    """Read a field such as "2-4-8-16"; UserError where it is no list of positive integers."""
    parts = getattr(cfg, name).split(separator)
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise UserError(f"{engine.flag(name)} {getattr(cfg, name)}: want positive numbers joined "
                        f"by '{separator}', as {getattr(Config, name)}")  # fmt: skip
    return tuple(int(p) for p in parts)


# ---------------------------------------------------------------------------------------- masking


def masking_frequency(cfg: Config, iterations: int = 1600, seed: int = 0) -> dict[str, Tensor]:
    """Count how often each patch is hidden, and how often it teaches (Figure 2).

    Args:
        cfg: a run's settings: image and patch size, mask ratio, evaluation branch.
        iterations: how often one image is met; Figure 2 has 1,600.
    Returns: three maps (h, w) int64. `random`: hidden by the adaptive mask, as in MAE;
        `complementary`: hidden in either branch, the paper's count, which is flat by construction;
        `gradient`: hidden in a branch that learns, which is `random` unless the branches share.
    """
    seeds = torch.tensor([sample_seed(seed, step, 0) for step in range(iterations)])
    N, h = cfg.num_patches, cfg.image_size // cfg.patch_size
    mask = random_mask(uniform(seeds, N, MASK), N - cfg.num_visible)
    first, second = mask.sum(0), (~mask).sum(0)
    # NOTE paper unclear: the flat map. Fig. 2 counts both branches; what teaches is `gradient`.
    taught = first + second if cfg.evaluation in ("common", "shared") else first
    maps = {"random": first, "complementary": first + second, "gradient": taught}
    return {name: counts.view(h, h) for name, counts in maps.items()}


def assemble(pred: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Join two branches' predictions: each patch from the branch that did not see it (Eq. 2).

    Args:
        pred, other: (B, N, n), of the adaptive and of the evaluation model.
        mask: (B, N) bool, True = hidden from the adaptive model and visible to the other.
    Returns: (B, N, n) float32.
    """
    return torch.where(mask[..., None], pred.float(), other.float())  # Eq. (2)


# ------------------------------------------------------------------------------------------ DyViT
# Tokens lie patch by patch: (B, V * s * s, C), V patches of s x s tokens in raster order. So hidden
# patches are just absent, and what happens inside patches is a reshape for any V and image size.


def cut(x: Tensor, side: int, k: int) -> Tensor:
    """Cut tokens (B, V*side^2, C) into k x k windows in each patch: (B, V*(side/k)^2, k*k*C)."""
    x = x.unflatten(1, (-1, side // k, k, side // k, k)).transpose(3, 4)
    return x.reshape(len(x), -1, k * k * x.shape[-1])


def max_pool(x: Tensor, side: int) -> Tensor:
    """2 x 2 max pooling inside each patch: (B, V*side^2, C) to (B, V*side^2/4, C)."""
    # A view and `amax`: the backward pass of torch's max_pool2d is not deterministic on CUDA.
    return x.unflatten(1, (-1, 2, side // 2, 2)).amax((2, 4)).flatten(1, 2)


class WindowAttention(nn.Module):
    """Dynamic multi-window self-attention, DM-MSA (Eqs. 7-10).

    Every token asks; what answers are summaries of k x k windows inside the patches, of all
    patches, for each k of a set. One attention for each k, summed.

    Args:
        side: tokens along a patch's side.
        windows: the set of k; each divides `side`.
    """

    def __init__(self, dim: int, num_heads: int, side: int, windows: Sequence[int]):
        super().__init__()
        self.num_heads, self.side = num_heads, side
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # NOTE paper unclear: convolution in DM-MSA. Depthwise, one Conv_k for K and V as Eq. (9)
        # writes it: that gives Table 2's 35 M and 70 M. No bias: softmax would not see the keys',
        # and the values' is `proj`'s.
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, k, stride=k, groups=dim, bias=False) for k in windows
        )
        self.counts = [side // k for k in windows]  # windows along a patch's side
        inside = []  # for each k: does position p (of side^2) lie in window w (of n^2)?
        for k, n in zip(windows, self.counts):
            at = torch.arange(side) // k
            inside.append((at[:, None] * n + at).view(-1, 1) == torch.arange(n * n))
        self.register_buffer("inside", torch.cat(inside, dim=1), persistent=False)

    def kernel(self) -> Tensor:
        """All Conv_k as one matrix a channel: (C, side^2 positions, windows of all k)."""
        columns = []
        for conv, n in zip(self.convs, self.counts):
            weight = conv.weight[:, 0].tile(1, n, n).flatten(1)  # (C, side^2)
            columns.append(weight[:, :, None].expand(-1, -1, n * n))
        return torch.cat(columns, dim=2) * self.inside

    def forward(self, x: Tensor) -> Tensor:
        """x (B, V*side*side, C) to the same shape."""
        B, L, C = x.shape
        q, kv = self.qkv(x).split([C, 2 * C], dim=-1)  # Eq. (7)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, d)
        # Conv_k has stride k, so it is a weighted sum over each window and never leaves the patch.
        # One product over the positions p of a patch does it for all k, for K and V (m).
        kv = kv.reshape(-1, self.side**2, 2, C)  # (B*V, p, m, C)
        kv = torch.einsum("npmc,cpw->nwmc", kv, self.kernel())  # (B*V, windows, 2, C)
        attended = []
        for part in kv.split([n * n for n in self.counts], dim=1):
            part = part.contiguous().view(B, -1, 2, self.num_heads, C // self.num_heads)
            k, v = part.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, V * windows, d) each
            attended.append(attend(q, k, v))  # Eq. (9)
        x = sum(attended[1:], attended[0])
        return self.proj(x.transpose(1, 2).flatten(2))  # Eq. (10)


class WindowBlock(Block):
    """Transformer block with DM-MSA."""

    def __init__(self, dim: int, num_heads: int, side: int, windows: Sequence[int]):
        super().__init__(dim, num_heads)
        self.attn = WindowAttention(dim, num_heads, side, windows)


class DyViT(nn.Module):
    """Hierarchical encoder that survives pre-training; Table 1, Fig. 4a.

    Args:
        image_size: (H, W) the position embedding is kept for; any other size works.
        trained_size: (H, W) that pre-training saw, as `common.ViT`; None: `image_size`.
        patch_size: side of what is hidden as one; the stem's stride is an eighth of it.
        dims, depths, num_heads: of the four stages.
        windows: the set of k; stages 1 and 2 take those up to their side.
        stem_mask: "before" or "after", see `embed`.
        drop_path: the last block's rate, used when `seed` is given.
    """

    num_prefix = 0
    trained_norm, probe_layer = False, None  # the norm is trained on the fused stages

    def __init__(
        self, image_size: Sequence[int] = (224, 224), patch_size: int = 32,
        dims: Sequence[int] = (112, 224, 448, 896), depths: Sequence[int] = (2, 3, 16, 3),
        num_heads: Sequence[int] = (2, 4, 8, 16), windows: Sequence[int] = (8, 4, 2),
        stem_mask: str = "before", drop_path: float = 0.0,
        trained_size: Sequence[int] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.patch_size, self.stem_mask, self.drop_path = patch_size, stem_mask, drop_path
        self.dims, self.depths, self.embed_dim = tuple(dims), tuple(depths), dims[-1]
        self.strides = tuple(patch_size // side for side in SIDES)  # 4, 8, 16, 32
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.trained_grid = tuple(n // patch_size for n in trained_size or image_size)
        s = self.strides[0]
        self.stem = nn.Conv2d(3, dims[0], 2 * s - 1, stride=s, padding=s - 1)  # 7 x 7, stride 4
        self.register_buffer("pos_embed", self.sincos(*self.grid), persistent=False)
        self.stages = nn.ModuleList()
        for side, dim, depth, heads in zip(SIDES, dims, depths, num_heads):
            # NOTE paper unclear: the set of k. Eq. (8) admits 8, 4, 2, 1, but 1 is full attention
            # over 3136 tokens, no sparse sampling. DyViT-B has 13.7 GMAC without it, 19.1 with it;
            # 8, 4 alone 12.4, Table 2's 12. Table 2 does not say what it counts, Eq. (8) does.
            fitting = [k for k in windows if k <= side]  # Eq. (8)
            windowed = side > 2  # stages 1, 2; the others attend globally
            self.stages.append(nn.ModuleList(
                WindowBlock(dim, heads, side, fitting) if windowed else Block(dim, heads)
                for _ in range(depth)
            ))  # fmt: skip
        # NOTE paper unclear: channels between stages. A linear layer after the pooling.
        self.downsample = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)

    def sincos(self, h: int, w: int) -> Tensor:
        """Fixed position embedding of the stem's grid, by patch: (h*w, 64 * C)."""
        # NOTE paper unclear: position embedding. "Reinserted" for other sizes; fixed here, and
        # other sizes take their coordinates from the grid that was trained.
        trained = [n * SIDES[0] for n in self.trained_grid]
        x = sincos_2d(self.dims[0], h * SIDES[0], w * SIDES[0], trained).T
        return patchify(x.unflatten(1, (h * SIDES[0], w * SIDES[0]))[None], SIDES[0])[0]

    def position(self, h: int, w: int) -> Tensor:
        return self.pos_embed if (h, w) == self.grid else self.sincos(h, w).to(self.pos_embed)

    grid_of = ViT.grid_of

    def embed(
        self, imgs: Tensor, mask: Tensor | None = None, ids_keep: Tensor | None = None
    ) -> Tensor:
        """Normalised images (B, 3, H, W) to stage 1's tokens (B, V*64, C); no mask: all patches."""
        (h, w), p = self.grid_of(imgs), self.patch_size
        position = self.position(h, w)
        # NOTE paper unclear: the 7 x 7 stem. Masks apply after it, so hidden pixels get into
        # visible tokens next to them. "before" blanks them first, as Hiera; "after" is the text.
        if mask is not None and self.stem_mask == "before":
            cells = imgs.unflatten(3, (w, p)).unflatten(2, (h, p))  # (B, 3, h, p, w, p)
            imgs = cells.masked_fill(mask.view(-1, 1, h, 1, w, 1), 0).view_as(imgs)
        x = patchify(self.stem(imgs), SIDES[0])  # (B, N, 64 * C)
        if mask is not None:
            x, position = gather(x, ids_keep), position[ids_keep]
        return (x + position).unflatten(2, (SIDES[0] ** 2, -1)).flatten(1, 2)

    def run(
        self, x: Tensor, layers: Sequence[int] = (), seed: Tensor | None = None
    ) -> tuple[list[Tensor], dict[int, tuple[Tensor, int]]]:
        """Run the stages on tokens (B, V*64, C).

        Returns: the stages' outputs X_i (B, V * side^2, C_i) of Eq. (5); for each of `layers`
            (1-based blocks), its output and side.
        """
        scales = [None] * sum(self.depths)
        if seed is not None and self.drop_path > 0:
            scales = drop_path(seed, sum(self.depths), self.drop_path)
        stages, outputs, n = [], {}, 0
        for i, (side, blocks) in enumerate(zip(SIDES, self.stages)):
            if i > 0:
                x = self.downsample[i - 1](max_pool(x, SIDES[i - 1]))
            for block in blocks:
                x = block(x, scales[n])
                n += 1
                if n in layers:
                    outputs[n] = x, side
            stages.append(x)  # Eq. (5)
        return stages, outputs

    def to_map(self, x: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
        """Tokens of all patches (B, h*w*side^2, C) as a map (B, C, h*side, w*side)."""
        return unpatchify(cut(x, side, side), side, grid)

    def forward_features(
        self, imgs: Tensor, layers: Sequence[int] | None = None, seed: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Features of whole images.

        Args:
            imgs: (B, 3, H, W) float, normalised; H and W multiples of the patch size.
            layers: 1-based blocks, outputs before the final norm; None = the last, after it.
            seed: (B,) int64 turns drop path on.
        Returns: for each layer, (tokens (B, L, C) in raster order of its stage's map, an empty
            prefix).
        """
        stages, outputs = self.run(self.embed(imgs), layers or (), seed)
        chosen = [(self.norm(stages[-1]), 1)] if layers is None else [outputs[n] for n in layers]
        maps = [self.to_map(x, side, self.grid_of(imgs)) for x, side in chosen]
        return [(m.flatten(2).transpose(1, 2), m.new_empty(len(m), 0, m.shape[1])) for m in maps]

    def forward_pyramid(self, imgs: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """The stages' outputs as maps (B, C_i, H / stride, W / stride), before the final norm."""
        stages, _ = self.run(self.embed(imgs), seed=seed)
        return [self.to_map(x, side, self.grid_of(imgs)) for x, side in zip(stages, SIDES)]

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter: 0 stem, 1.. blocks (with the pooling before), last the norm."""
        first = [sum(self.depths[:i]) + 1 for i in range(len(SIDES))]

        def depth(name: str) -> int:
            part, *rest = name.split(".")
            if part == "stages":
                return first[int(rest[0])] + int(rest[1])
            if part == "downsample":
                return first[int(rest[0]) + 1]
            return sum(self.depths) + 1 if part == "norm" else 0

        return {name: depth(name) for name, _ in self.named_parameters()}


class PositionalDownsampling(nn.Module):
    """Fuse the four stages into one token a patch (Eq. 6); pre-training only.

    Convolutions of kernel = stride inside patches, so each is a projection of windows.
    """

    # NOTE paper unclear: Positional Downsampling. Kernel and stride 2^(4-i) on Y_{i-1} (Eq. 6) do
    # not give X_{i+1}'s grid. "printed": kernels 8, 4, 2 on X_1, X_2, X_3, each to one token a
    # patch, summed onto X_4. "sequential": the recursion with stride 2. One norm, after.

    def __init__(self, dims: Sequence[int], mode: str):
        super().__init__()
        self.sequential = mode == "sequential"
        if self.sequential:
            self.convs = nn.ModuleList(PatchEmbed(2, a, b) for a, b in zip(dims, dims[1:]))
        else:
            self.convs = nn.ModuleList(PatchEmbed(k, a, dims[-1]) for k, a in zip(SIDES[:3], dims))

    def forward(self, stages: list[Tensor]) -> Tensor:
        """X_1..X_4, (B, V * side^2, C_i) each, to (B, V, C_4)."""
        if self.sequential:
            y = stages[0]
            for conv, x, side in zip(self.convs, stages[1:], SIDES):
                y = conv(cut(y, side, 2)) + x  # Eq. (6)
            return y
        fused = (conv(cut(x, k, k)) for conv, x, k in zip(self.convs, stages, SIDES))
        return sum(fused, stages[3])  # Eq. (6)


# ------------------------------------------------------------------------------------ pre-training


def make_encoder(cfg: Config, **kwargs) -> nn.Module:
    """The backbone of a run; kwargs: image_size (H, W) and drop_path."""
    if cfg.backbone == "vit":
        sizes = dict(embed_dim=cfg.embed_dim, depth=cfg.depth, num_heads=cfg.num_heads)
        return ViT(patch_size=cfg.patch_size, **sizes, **kwargs)
    dims, depths, heads = (numbers(cfg, name) for name in ("dims", "blocks", "heads"))
    sizes = dict(dims=dims, depths=depths, num_heads=heads, windows=numbers(cfg, "windows", ","))
    return DyViT(patch_size=cfg.patch_size, stem_mask=cfg.stem_mask, **sizes, **kwargs)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7 convolution on the patch grid, then an MLP (the decoder of Fig. 5)."""

    # NOTE paper unclear: layer scale of the ConvNeXt decoder. ConvNeXt has 1e-6; none, as in its
    # own masked autoencoder: at the start it would cut the encoder off from the gradient.

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, h*w, D) to the same shape."""
        y = self.dwconv(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        return x + self.mlp(self.norm(y))


class Autoencoder(nn.Module):
    """Encoder of visible patches and decoder of all, on either backbone; names as in MAE."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, D = cfg, cfg.decoder_embed_dim
        grid = (cfg.image_size // cfg.patch_size,) * 2
        self.encoder = make_encoder(cfg, image_size=(cfg.image_size,) * 2)
        if cfg.backbone == "dyvit":
            self.fusion = PositionalDownsampling(self.encoder.dims, cfg.fusion)
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("decoder_pos_embed", sincos_2d(D, *grid), persistent=False)
        self.decoder_blocks = nn.ModuleList(
            ConvNeXtBlock(D, grid) if cfg.decoder == "convnext" else Block(D, cfg.decoder_num_heads)
            for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, 3 * cfg.patch_size**2)

    def encode(self, imgs: Tensor, mask: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode visible patches, after the final norm: (B, P + V, D), P prefix tokens (ViT: 1)."""
        encoder = self.encoder
        if self.cfg.backbone == "dyvit":
            stages, _ = encoder.run(encoder.embed(imgs, mask, ids_keep))
            return encoder.norm(self.fusion(stages))
        patches = gather(patchify(imgs, encoder.patch_size), ids_keep)
        x = encoder.patch_embed(patches) + encoder.pos_embed[ids_keep]  # (B, V, D)
        (x,) = encoder.run(encoder.add_prefix(x))
        return encoder.norm(x)

    def predict(self, imgs: Tensor, mask: Tensor, num_visible: int) -> Tensor:
        """Predict all patches from the visible ones.

        Args:
            imgs: (B, 3, H, W) float, normalised.
            mask: (B, N) bool, True = hidden, with exactly `num_visible` False a sample.
        Returns: (B, N, p*p*3).
        """
        ids_keep, _, ids_restore = split(mask, num_visible)
        return self.decode(self.encode(imgs, mask, ids_keep), ids_restore)

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict all patches (B, N, p*p*3) from what `encode` returns of the visible ones."""
        x, P, N = self.decoder_embed(latent), self.encoder.num_prefix, ids_restore.shape[1]
        prefix, x = x[:, :P], x[:, P:]
        hidden = self.mask_token.to(x.dtype).expand(len(x), N - x.shape[1], -1)
        x = gather(torch.cat([x, hidden], dim=1), ids_restore) + self.decoder_pos_embed
        if self.cfg.decoder == "vit":  # a convolution has no place for the class token
            x = torch.cat([prefix, x], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, -N:]))


class CoMA(Autoencoder):
    """The adaptive model, which this is, and the evaluation model; or plain MAE.

    `model(batch, progress)` returns (loss, logs). Between the last backward pass of a step and the
    optimizer, the loop calls `before_step`.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.normalize = Normalize()
        init_weights(self)
        if cfg.init and not (cfg.resume and (Path(cfg.output) / "last.pt").exists()):
            report = load_init(self, cfg.init, cfg.init_key)
            if int(os.environ.get("RANK", 0)) == 0:
                print(report, flush=True)
        if cfg.evaluation in ("frozen", "common"):
            evaluation = Autoencoder(cfg).requires_grad_(False)
            evaluation.load_state_dict(self.state_dict())
            self.evaluation = evaluation  # in the checkpoint, not in the optimizer

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the evaluation model the weights that the optimizer is about to change (Eq. 4).

        One fused copy on the device. In step t the evaluation model so holds the weights with which
        step t - 1 ran forward, in all micro-batches and on all ranks; in step 0 the same as ours.
        """
        if self.cfg.evaluation in ("frozen", "common"):
            names = dict(self.named_parameters())
            ours = [names[name] for name, _ in self.evaluation.named_parameters()]
            torch._foreach_copy_(list(self.evaluation.parameters()), ours)  # Eq. (4)

    def make_mask(self, seed: Tensor) -> Tensor:
        """Mask of the adaptive model from the samples' seeds: (B,) to (B, N) bool."""
        N = self.cfg.num_patches
        return random_mask(uniform(seed, N, MASK), N - self.cfg.num_visible)

    def complement(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Predict from the patches that `mask` hides: (B, N, p*p*3)."""
        # NOTE paper unclear: the frozen branch. It gives no gradient, so it teaches nothing, unless
        # "the decoder" that its features go to is the one that learns.
        encoder = self.evaluation if self.cfg.evaluation in ("frozen", "common") else self
        decoder = self.evaluation if self.cfg.evaluation == "frozen" else self
        complement = ~mask  # Eq. (1)
        ids_keep, _, ids_restore = split(complement, self.cfg.num_patches - self.cfg.num_visible)
        return decoder.decode(encoder.encode(imgs, complement, ids_keep), ids_restore)

    def target(self, imgs: Tensor) -> Tensor:
        """What is predicted: patches (B, N, p*p*3), normalised one by one with `norm_pix_loss`."""
        target = patchify(imgs, self.cfg.patch_size)
        if self.cfg.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return target

    def loss(
        self, pred: Tensor, other: Tensor | None, target: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error, in fp32: of the assembled image (Eq. 3); for MAE over hidden patches.

        Args:
            pred, other: (B, N, p*p*3) of the two branches. Without `other` the patches that it
                would predict count as errors of 0: the gradient is the same.
            target: (B, N, p*p*3); mask: (B, N) bool, hidden from `pred`.
        """
        # NOTE paper unclear: norm of the loss. Eq. (3) is a sum; a mean over all pixels is the same
        # up to a factor.
        image = assemble(pred, target if other is None else other, mask)
        error = (image - target).square().mean(-1)  # (B, N)
        hidden = self.cfg.num_patches - self.cfg.num_visible
        logs = {"loss_adaptive": error.where(mask, 0).sum(1).mean() / hidden}
        if other is not None:
            logs["loss_evaluation"] = error.where(~mask, 0).sum(1).mean() / self.cfg.num_visible
        total = error.mean()  # Eq. (3)
        if self.cfg.method == "mae":  # not the log's own tensor, which torch.compile would detach
            total = error.where(mask, 0).mean() * (self.cfg.num_patches / hidden)
        return total, {k: v.detach() for k, v in logs.items()}

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys), and logs; `progress` is not needed."""
        imgs, mask = self.normalize(batch["rgb"]), self.make_mask(batch["seed"])
        pred = self.predict(imgs, mask, self.cfg.num_visible)  # Eq. (1): X^M
        other = None if self.cfg.evaluation == "none" else self.complement(imgs, mask)
        return self.loss(pred, other, self.target(imgs), mask)


def load_init(model: Autoencoder, path: str | Path, key: str | None = None) -> str:
    """Start from a public MAE file or from one of ours: whole, or the encoder alone.

    Args:
        path: a file as `engine.read_state` takes it; no code in it is run.
        key: where in it the weights are; None: where public code puts them.
    Returns: a report of what was loaded, left out, and missing.
    Errors: UserError, and nothing is loaded.
    """
    state, note = engine.read_state(path, "--init", key)
    for k in ("pos_embed", "decoder_pos_embed"):
        if k in state and not is_sincos(state[k]):
            raise UserError(f"--init {path}: {k} was learned, as fine-tuning does it, and is fixed "
                            "here: start from a pre-trained file (downstream.classify --init takes "
                            "this one)")  # fmt: skip
    own = {k.split(".")[0] for k in model.encoder.state_dict()}  # to be there whole, no more
    report = engine.load_weights(
        model, state, path, lambda k: k.startswith(("fusion.", "decoder_", "mask_token")),
        lambda k: k.split(".")[0] not in own,
    )  # fmt: skip
    return "; ".join(filter(None, ["init        " + report, note]))


# ------------------------------------------------------------------------------- looking at a model


@torch.no_grad()
def evaluate(model: CoMA, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reconstruction error on held-out images (Fig. 5, middle), beside a guess that learns nothing.

    Both branches run with the current weights whatever `--evaluation` is, so that runs compare:
    `loss_adaptive` sees 40 % and predicts 60 %, `loss_evaluation` the reverse, `loss` is Eq. (3),
    or MAE's. The guess, `loss_mean_colour`, is the mean colour of the visible patches.
    """
    cfg, imgs, mask = model.cfg, model.normalize(batch["rgb"]), model.make_mask(batch["seed"])
    pred, target = model.predict(imgs, mask, cfg.num_visible), model.target(imgs)
    other = model.predict(imgs, ~mask, cfg.num_patches - cfg.num_visible)
    total, logs = model.loss(pred, other, target, mask)
    colours = target.unflatten(-1, (-1, 3)).mean(2).masked_fill(mask[..., None], 0)  # (B, N, 3)
    guess = (colours.sum(1, keepdim=True) / cfg.num_visible).repeat(1, 1, cfg.patch_size**2)
    error = (guess - target).square().mean(-1)
    guessed = error.where(mask, 0).sum(1).mean() / (cfg.num_patches - cfg.num_visible)
    return {"loss": total, **logs, "loss_mean_colour": guessed}


def preview(model: CoMA, batch: dict[str, Tensor], path: Path, step: int) -> None:
    """Write a picture: what each branch sees and predicts, and the assembled image (Eq. 2)."""
    cfg, grid = model.cfg, (model.cfg.image_size // model.cfg.patch_size,) * 2
    imgs, mask = model.normalize(batch["rgb"]), model.make_mask(batch["seed"])
    mean, std = patch_statistics(patchify(imgs, cfg.patch_size))

    def picture(patches: Tensor) -> Tensor:
        if cfg.norm_pix_loss:
            patches = patches * std + mean
        x = unpatchify(patches, cfg.patch_size, grid) * model.normalize.std + model.normalize.mean
        return (x * 255).round().clamp(0, 255).byte()

    def visible(hidden: Tensor) -> Tensor:
        cells = F.interpolate(hidden.view(-1, 1, *grid).float(), batch["rgb"].shape[-2:])
        return batch["rgb"].masked_fill(cells.bool(), 128)

    pred = model.predict(imgs, mask, cfg.num_visible).float()
    target = model.target(imgs)
    columns = {"input": batch["rgb"], "adaptive sees": visible(mask)}
    columns["adaptive predicts"] = picture(assemble(pred, target, mask))
    note = ", true patch mean, std" if cfg.norm_pix_loss else ""
    if cfg.method == "coma":
        other = model.complement(imgs, mask).float()
        columns |= {"evaluation sees": visible(~mask)}
        columns |= {"evaluation predicts": picture(assemble(target, other, mask))}
        columns |= {"assembled: predictions alone": picture(assemble(pred, other, mask))}
    caption = f"{cfg.method} on {cfg.backbone} {cfg.model}, step {step}, {cfg.data} val{note}"
    pictures.contact_sheet(columns, path, caption)


def load_encoder(path: str | Path, **overrides) -> nn.Module:
    """Rebuild the encoder of a checkpoint.

    Args:
        path: a checkpoint that a run of this script wrote.
        overrides: image_size (H, W) and drop_path.
    Errors: UserError where the file is no such checkpoint.
    """
    cfg, state = engine.load_encoder(path, "coma_dyvit", Config)
    size = (cfg.image_size,) * 2  # positions of another size refer to it
    encoder = make_encoder(cfg, **{"image_size": size, "trained_size": size, **overrides})
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------------- presets

MAE = dict(method="mae", backbone="vit", epochs=800, val_epochs=1)
PRESETS = {
    # Ours, for a laptop: 64 x 64 scenes of 16 patches, stem of stride 2; two minutes on two cores.
    "tiny": dict(
        image_size=64, patch_size=16, dims="16-32-64-128", blocks="1-1-2-1", heads="1-2-4-8",
        embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=96, decoder_depth=2,
        decoder_num_heads=4, epochs=2, warmup_epochs=0.1, batch_size=64, base_lr=4e-3,
        data="shapes", val_epochs=1,
    ),
    # Table 1, DyViT-S; ViT-S.
    "small": dict(
        dims="96-192-384-768", blocks="1-2-11-2", heads="2-4-8-16", embed_dim=384, num_heads=6,
        micro_batch=256, val_epochs=1,
    ),
    "base": dict(val_epochs=1),  # Table 1, DyViT-B; ViT-B
    # Plain MAE as its public code has it: models_mae.py, PRETRAIN.md (64 images a GPU).
    "mae-base": MAE,
    "mae-large": {**MAE, "embed_dim": 1024, "depth": 24, "num_heads": 16, "micro_batch": 64},
    "mae-huge": {**MAE, "embed_dim": 1280, "depth": 32, "num_heads": 16, "micro_batch": 64,
                 "patch_size": 14},
}  # fmt: skip


def main() -> None:
    engine.main("coma_dyvit", Config, PRESETS, __doc__, CoMA, evaluate=evaluate, preview=preview)


if __name__ == "__main__":
    main()
