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
  Eq. 4          frozen evaluation model   CoMA.follow, main
  Eq. 5          stages' sizes             DyViT.run
  Eq. 6          Positional Downsampling   CoMA.fuse
  Eqs. 7, 9, 10  DM-MSA                    WindowAttention.forward
  Eq. 8          windows of a stage        DyViT.__init__

Eqs. 2, 3 are sums over patches, each of one branch, and the evaluation branch is frozen. So CoMA as
printed is MAE at 60 % with plain pixels: as means, its gradient is MAE's times 30/49, the share of
hidden patches, to which AdamW is all but blind. What CoMA adds is a reading, `--evaluation`:
  frozen   the paper's text. The second branch teaches nothing and runs in logged steps alone:
           `loss` is what is minimised, `loss_assembled` Eq. 3, `loss_evaluation` that branch
  none     without it: the same weights
  common   a frozen encoder, one decoder that both branches train ("passed to *the* decoder")
  shared   both branches learn (what that brings: docs/results.md, coma-masks)

  CPU:  python coma_dyvit.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 coma_dyvit.py --data data/imagenet --epochs 300
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from common import Block, Mlp, Normalize, PatchEmbed, attend, fill, gather, init_weights
from common import patchify, pixel_picture, pixel_target, random_mask, sincos_2d, split, unpatchify
from engine import arg, cosine, decay_groups, divides, nearest, parse, require
from noise import MASK, uniform
from vit import Encoder

SIDES = (8, 4, 2, 1)  # p_i of Eq. (5): tokens along a patch's side in the four stages
Ints, Seed = Sequence[int], Tensor | None


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source; `--model` presets change the size."""

    epochs: int = arg(300, "Table 2 (300 or 800)")
    # NOTE paper unclear: learning rate, betas, decay, warm-up, crop, decoder, first weights. MAE's.
    batch_size: int = arg(4096, "Implementation Details; the global batch")
    image_size: int = arg(224, "Table 2")
    patch_size: int = arg(32, "Implementation Details")
    mask_ratio: float = arg(0.6, "Fig. 5", group="masking")
    evaluation: str = arg("frozen", "see above", ["frozen", "none", "common", "shared"])
    stem_mask: str = arg("before", "hide pixels, or tokens after the stem", ["before", "after"])
    dims: str = arg("112-224-448-896", "Table 1, #Channels")
    blocks: str = arg("2-3-16-3", "Table 1, #Blocks")
    heads: str = arg("2-4-8-16", "Table 1, #Heads")
    windows: str = arg("8,4,2", "k of Eq. 8, in a stage those up to its side; 8,4: Table 2's FLOPs")
    decoder: str = arg("vit", "Fig. 5, Decoder Depth", ["vit", "convnext"])
    decoder_depth: int = arg(8, "Fig. 5, Decoder Depth", within="(0, inf)")
    decoder_embed_dim: int = arg(512, "not given; MAE's")
    decoder_num_heads: int = arg(16, "not given; MAE's")
    init: str | None = arg(None, "weights to start from: ours, or an exported encoder", group="run")

    FREE = engine.Config.FREE + ("init",)
    norm_pix_loss: bool = arg(False, "Eq. 3 has plain pixels")

    def resolve(self) -> None:
        """Refuse what cannot work; UserError naming the field and values that work."""
        super().resolve()
        divides(self, "decoder_embed_dim", "decoder_num_heads")
        for name in ("dims", "blocks", "heads"):
            ok = re.fullmatch(r"[1-9]\d*(-[1-9]\d*){3}", x := getattr(self, name))
            require((ok, name, f"{x}: want four numbers, as 96-192-384-768"))
        dims, heads, x = numbers(self.dims), numbers(self.heads), self.windows
        fit, ok = not any(d % h for d, h in zip(dims, heads)), r"(?!.*(\d).*\1)(8,)*[124](,[1248])*"
        p, V, N = self.patch_size, self.num_visible, self.num_patches
        require(
            (fit, "dims", f"{self.dims} is not divisible by --heads {self.heads}"),
            (re.fullmatch(ok, x), "windows", f"{x}: want some of 8, 4, 2, 1, one 4 or less: 8,4,2"),
            (p % 8 == 0, "patch_size", f"{p} is not divisible by 8; nearest: {nearest(p, 8)}"),
            (0 < V < N, "mask_ratio", f"leaves {V} patches; use one that leaves 1 to {N - 1}"),
        )
        for name, n in ("dims", dims[0]), ("decoder_embed_dim", self.decoder_embed_dim):
            require((n % 4 == 0, name, f"{n} is not divisible by 4, as positions need"))

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """Patches that the adaptive model sees: 19 of 49; the evaluation model sees the others."""
        # NOTE paper unclear: 60 % of 49 patches. They are 29.4; MAE's rounding hides 30.
        return int(self.num_patches * (1 - self.mask_ratio) + 1e-6)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.split("[-,]", text))


# ---------------------------------------------------------------------------------------- masking


def make_mask(cfg: Config, batch: dict[str, Tensor], progress: Tensor) -> Tensor:
    """The adaptive model's mask: (B, N) bool, True = hidden; `progress` changes nothing here."""
    noise = uniform(batch["seed"], cfg.num_patches, MASK)
    return random_mask(noise, cfg.num_patches - cfg.num_visible)


def assemble(pred: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Each patch (B, N, n) from the branch that did not see it; `mask` is hidden from `pred`."""
    return torch.where(mask[..., None], pred.float(), other.float())  # Eq. (2)


# ------------------------------------------------------------------------------------------ DyViT
# Tokens lie patch by patch: (B, V * s * s, C), V patches of s x s tokens in raster order. So hidden
# patches are just absent, and what happens inside patches is a reshape for any V and image size.


def cut(x: Tensor, side: int, k: int) -> Tensor:
    """Cut tokens (B, V*side^2, C) into k x k windows in each patch: (B, V*(side/k)^2, k*k*C)."""
    x = x.unflatten(1, (-1, side // k, k, side // k, k)).transpose(3, 4)
    return x.reshape(len(x), -1, k * k * x.shape[-1])


class WindowAttention(nn.Module):
    """DM-MSA: tokens attend to summaries of k x k windows of all patches, once for each k."""

    def __init__(self, dim: int, num_heads: int, side: int, windows: Sequence[int]):
        super().__init__()
        self.num_heads, self.side = num_heads, side  # tokens along a patch's side
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # NOTE paper unclear: convolution in DM-MSA. Depthwise, one Conv_k for K and V as Eq. (9)
        # writes it: that gives Table 2's 35 M and 70 M. No bias: softmax would not see the keys',
        # and the values' is `proj`'s.
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, k, stride=k, groups=dim, bias=False) for k in windows
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, V*side*side, C) to the same shape."""
        C, heads, attended = x.shape[2], self.num_heads, 0.0
        q, kv = self.qkv(x).split([C, 2 * C], dim=2)  # Eq. (7)
        q = q.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, heads, L, d)
        for conv in self.convs:  # stride k: a weighted sum over each window, inside its patch
            k = conv.kernel_size[0]
            weight = conv.weight.flatten(1).T.repeat(1, 2).to(kv.dtype)  # (k*k, 2C)
            summary = (cut(kv, self.side, k).unflatten(2, weight.shape) * weight).sum(2)
            summary = summary.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
            attended = attended + attend(q, *summary)  # Eq. (9)
        return self.proj(attended.transpose(1, 2).flatten(2))  # Eq. (10)


class DyViT(Encoder):
    """Hierarchical encoder that survives pre-training (Table 1, Fig. 4a); used as `vit.ViT`."""

    trained_norm = False  # the norm is trained on the fused stages

    def __init__(self, cfg: Config, image_size: Ints, **kwargs):
        dims, depths, num_heads = map(numbers, (cfg.dims, cfg.blocks, cfg.heads))
        super().__init__(image_size, cfg.patch_size, dims[-1], sum(depths), **kwargs)
        self.dims, self.depths, self.stem_mask = dims, depths, cfg.stem_mask
        self.strides = tuple(cfg.patch_size // side for side in SIDES)  # 4, 8, 16, 32
        s = self.strides[0]
        self.stem = nn.Conv2d(3, dims[0], 2 * s - 1, stride=s, padding=s - 1)  # 7 x 7, stride 4
        self.register_buffer("pos_embed", self.position(*self.grid), persistent=False)
        self.stages = nn.ModuleList(nn.ModuleList() for _ in SIDES)
        for blocks, side, dim, depth, heads in zip(self.stages, SIDES, dims, depths, num_heads):
            # NOTE paper unclear: the set of k. Eq. (8) admits 8, 4, 2, 1, but 1 is full attention
            # over 3136 tokens, no sparse sampling. DyViT-B has 13.7 GMAC without it, 18.9 with it;
            # 8, 4 alone 12.4, Table 2's 12, which does not say what it counts.
            windows = [k for k in numbers(cfg.windows) if k <= side]  # Eq. (8)
            for _ in range(depth):
                blocks.append(Block(dim, heads))
                if side > 2:  # stages 1, 2; the others attend globally
                    blocks[-1].attn = WindowAttention(dim, heads, side, windows)
        # NOTE paper unclear: channels between stages. A linear layer after the pooling.
        self.downsample = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)

    def position(self, h: int, w: int) -> Tensor:
        """Fixed position embedding of the stem's map, (C, 8h, 8w)."""
        # NOTE paper unclear: position embedding. "Reinserted" for other sizes; fixed here, and
        # other sizes take their coordinates from the grid that was trained.
        h, w, *trained = (n * SIDES[0] for n in (h, w, *self.trained_grid))
        return sincos_2d(self.dims[0], h, w, trained).T.unflatten(1, (h, w))

    def embed(self, imgs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Normalised images (B, 3, H, W) to stage 1's tokens (B, V*64, C); no mask: all patches."""
        (h, w), p = self.grid_of(imgs), self.patch_size
        # NOTE paper unclear: the 7 x 7 stem. Masks apply after it, so hidden pixels get into
        # visible tokens next to them. "before" blanks them first, as Hiera; "after" is the text.
        if mask is not None and self.stem_mask == "before":
            cells = imgs.unflatten(3, (w, p)).unflatten(2, (h, p))  # (B, 3, h, p, w, p)
            imgs = cells.masked_fill(mask.view(-1, 1, h, 1, w, 1), 0).view_as(imgs)
        position = self.pos_embed if (h, w) == self.grid else self.position(h, w).to(self.pos_embed)
        x = patchify(self.stem(imgs) + position, SIDES[0])  # (B, N, 64 * C)
        x = x if keep is None else gather(x, keep)
        return x.unflatten(2, (SIDES[0] ** 2, -1)).flatten(1, 2)

    def run(self, x: Tensor, layers: Ints = (), seed: Seed = None) -> list[Tensor]:
        """Tokens (B, V*64, C) to the outputs (B, V*side^2, C_i) of `layers`, from 1, or the X_i."""
        layers, scales, outputs = layers or [*accumulate(self.depths)], iter(self.drops(seed)), {}
        for i, blocks in enumerate(self.stages):
            if i > 0:  # 2 x 2 max pooling inside each patch
                x = self.downsample[i - 1](cut(x, SIDES[i - 1], 2).unflatten(2, (4, -1)).amax(2))
            for n, block in enumerate(blocks, start=sum(self.depths[:i]) + 1):
                x = block(x, next(scales))
                if n in layers:
                    outputs[n] = x  # Eq. (5)
        return [outputs[n] for n in layers]

    def forward_pyramid(self, imgs: Tensor, seed: Seed = None, layers: Ints = ()) -> list[Tensor]:
        """Outputs as `run` chooses them, as maps (B, C_i, H / stride, W / stride)."""
        (h, w), maps = self.grid_of(imgs), []
        for x in self.run(self.embed(imgs), layers, seed):
            side = math.isqrt(x.shape[1] // (h * w))
            maps.append(unpatchify(cut(x, side, side), side, (h, w)))
        return maps

    def forward_features(self, imgs: Tensor, layers: Ints | None = None, seed: Seed = None) -> list:
        """Features as `vit.ViT`'s: tokens in raster order of their stage's map, no prefix."""
        chosen = [self.depth] if layers is None else layers
        self.check_layers(chosen)
        tokens = [x.flatten(2).transpose(1, 2) for x in self.forward_pyramid(imgs, seed, chosen)]
        tokens = [self.norm(tokens[0])] if layers is None else tokens
        return [(x, x[:, :0]) for x in tokens]

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter: 0 stem, 1.. blocks (with the pooling before), last the norm."""
        first = [n + 1 for n in accumulate((0, *self.depths))]
        parts = [(self.stem, 0), (self.norm, first[-1]), *zip(self.downsample, first[1:])]
        parts += [(b, n + j) for blocks, n in zip(self.stages, first) for j, b in enumerate(blocks)]
        ids = {id(p): n for part, n in parts for p in part.parameters()}
        return {name: ids[id(p)] for name, p in self.named_parameters()}


# ------------------------------------------------------------------------------------------- CoMA


def make_encoder(cfg: Config, **kwargs) -> DyViT:
    """The network that survives; kwargs as DyViT's."""
    return DyViT(cfg, **{"image_size": (cfg.image_size,) * 2, **kwargs})


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


class CoMA(nn.Module):
    """The adaptive model, and in it the evaluation model; names as in MAE."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, D = cfg, cfg.decoder_embed_dim
        self.normalize, self.encoder = Normalize(), make_encoder(cfg)
        # NOTE paper unclear: Positional Downsampling. Kernel and stride 2^(4-i) on Y_{i-1} (Eq. 6)
        # do not give X_{i+1}'s grid. The printed kernels 8, 4, 2, each to one token a patch.
        dims, grid = self.encoder.dims, self.encoder.grid
        self.fusion = nn.ModuleList(PatchEmbed(k, n, dims[-1]) for k, n in zip(SIDES[:3], dims))
        self.decoder_embed = nn.Linear(dims[-1], D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("decoder_pos_embed", sincos_2d(D, *grid), persistent=False)
        self.decoder_blocks = nn.ModuleList(
            Block(D, cfg.decoder_num_heads) if cfg.decoder == "vit" else ConvNeXtBlock(D, grid)
            for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, 3 * cfg.patch_size**2)
        init_weights(self)
        frozen = cfg.evaluation in ("frozen", "common")  # in checkpoints, not in the optimizer
        self.evaluation = copy.deepcopy(self).requires_grad_(False) if frozen else None

    @torch.no_grad()
    def follow(self) -> None:
        """Give the evaluation model the weights that the optimizer is about to change (Eq. 4)."""
        if self.evaluation is not None:
            theirs, ours = list(self.evaluation.parameters()), list(self.parameters())
            torch._foreach_copy_(theirs, ours[: len(theirs)])  # Eq. (4); ours come first

    def fuse(self, stages: list[Tensor]) -> Tensor:
        """X_1..X_4, (B, V*side^2, C_i) each, to one token a patch, (B, V, C_4)."""
        fused = (conv(cut(x, k, k)) for conv, x, k in zip(self.fusion, stages, SIDES))
        return sum(fused, stages[3])  # Eq. (6)

    def predict(self, imgs: Tensor, mask: Tensor, num_visible: int, by=None) -> Tensor:
        """Predict all patches (B, N, p*p*3) from the visible ones.

        Args:
            imgs: (B, 3, H, W) float, normalised.
            mask: (B, N) bool, True = hidden, with exactly `num_visible` False a sample.
            by: the CoMA whose encoder sees them; None: this one.
        """
        (ids_keep, _, ids_restore), by = split(mask, num_visible), by or self
        stages = by.encoder.run(by.encoder.embed(imgs, mask, ids_keep))
        x = self.decoder_embed(by.encoder.norm(by.fuse(stages)))  # (B, V, D)
        # NOTE paper unclear: hidden patches in the decoder. "Empty", "noise"; MAE's mask token.
        x = fill(x, self.mask_token, ids_restore) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def complement(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Predict from the patches that `mask` hides: (B, N, p*p*3)."""
        # NOTE paper unclear: the frozen branch. It gives no gradient, so it teaches nothing, unless
        # "the decoder" that its features go to is the one that learns.
        decoder = self.evaluation if self.cfg.evaluation == "frozen" else self
        V = self.cfg.num_patches - self.cfg.num_visible
        return decoder.predict(imgs, ~mask, V, self.evaluation)  # Eq. (1)

    def loss(self, pred: Tensor, other: Tensor | None, imgs: Tensor, mask: Tensor) -> tuple:
        """Squared error of the assembled image, and its mean over each branch's patches, in fp32.

        Without `other` the patches that it would predict count as errors of 0: for `pred`
        (B, N, p*p*3), from which `mask` (B, N) was hidden, the gradient is the same.
        """
        # NOTE paper unclear: norm of the loss. Eq. (3) is a sum; a mean is that up to a factor.
        target = pixel_target(imgs, self.cfg.patch_size, self.cfg.norm_pix_loss)
        image = assemble(pred, target if other is None else other, mask)
        error = (image - target).square().mean(-1)  # (B, N)
        branches = {"loss_adaptive": mask} | ({} if other is None else {"loss_evaluation": ~mask})
        logs = {k: ((error * m).sum(1) / m.sum(1)).mean().detach() for k, m in branches.items()}
        return error.mean(), logs  # Eq. (3)

    def forward(self, batch: dict, progress: Tensor, logging: bool = True) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py), and logs: all if `logging`, or those that cost nothing."""
        imgs, mask = self.normalize(batch["rgb"]), make_mask(self.cfg, batch, progress)
        pred = self.predict(imgs, mask, self.cfg.num_visible)  # Eq. (1): X^M
        if self.cfg.evaluation in ("common", "shared"):
            return self.loss(pred, self.complement(imgs, mask), imgs, mask)
        loss, logs = self.loss(pred, None, imgs, mask)
        if self.cfg.evaluation == "frozen" and logging:
            whole, logs = self.loss(pred.detach(), self.complement(imgs, mask), imgs, mask)
            logs["loss_assembled"] = whole
        return loss, logs


@torch.no_grad()
def evaluate(model: CoMA, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eq. (3) on held-out images, by branch, and what the mean colour of visible patches gets.

    Both branches run with the current weights, whatever `--evaluation` is, so that runs compare.
    """
    cfg, imgs, mask = model.cfg, model.normalize(batch["rgb"]), make_mask(model.cfg, batch, None)
    V, N, p = cfg.num_visible, cfg.num_patches, cfg.patch_size
    pred, other = model.predict(imgs, mask, V), model.predict(imgs, ~mask, N - V)
    loss, logs = model.loss(pred, other, imgs, mask)
    seen = (pixel_target(imgs, p, cfg.norm_pix_loss) * ~mask[..., None]).unflatten(2, (-1, 3))
    colour = seen.mean(2).sum(1, keepdim=True) / V  # (B, 1, 3)
    _, flat = model.loss(colour.repeat(1, N, p * p), None, imgs, mask)
    return {"loss": loss, **logs, "loss_mean_colour": flat["loss_adaptive"]}


@torch.no_grad()
def reconstruct(model: CoMA, batch: dict[str, Tensor]) -> dict[str, tuple]:
    """What each branch sees and predicts, and the assembled image (Eq. 2), for pictures.py."""
    cfg, imgs, mask = model.cfg, model.normalize(batch["rgb"]), make_mask(model.cfg, batch, None)
    pred, other = model.predict(imgs, mask, cfg.num_visible), model.complement(imgs, mask)
    hidden, whole, found = mask.unflatten(1, model.encoder.grid), assemble(pred, other, mask), {}
    cells = {"adaptive": (hidden, pred), "evaluation": (~hidden, other), "assembled": (None, whole)}
    for name, (where, x) in cells.items():
        picture = pixel_picture(x, imgs, cfg.patch_size, cfg.norm_pix_loss)
        found[name] = batch["rgb"], where, model.normalize.undo(picture)
    return found


def load_init(model: CoMA, path: str | Path) -> str:
    """Start from our weights; a report, or UserError and nothing is loaded."""
    state, report = engine.read_state(path, "--init")
    # A file of the encoder alone is whole, too; one with a part of a part is not.
    there = {k.split(".")[0] for k in state} | {"stem", "stages", "downsample", "norm"}
    rules = lambda k: k.split(".")[0] not in there, lambda k: not k.startswith("stages.")
    return engine.load_weights(model, state, path, *rules, report)


def load_encoder(path: str | Path, **kwargs) -> DyViT:
    """The encoder of a checkpoint; kwargs: image_size (H, W) and drop_path."""
    cfg, state = engine.load_encoder(path, "coma_dyvit", Config)
    encoder = make_encoder(cfg, **{"trained_size": (cfg.image_size,) * 2, **kwargs})
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------- presets, loop

PRESETS = {
    # Ours, for a laptop: 16 patches, stem of stride 2; normalised pixels: docs/decisions.md.
    "tiny": dict(
        image_size=64, patch_size=16, dims="16-32-64-128", blocks="1-1-2-1", heads="1-2-4-8",
        decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=4, epochs=2, warmup_epochs=0.1,
        batch_size=32, base_lr=8e-3, norm_pix_loss=True, data="shapes", val_epochs=1,
    ),
    "small": dict(  # Table 1, DyViT-S
        dims="96-192-384-768", blocks="1-2-11-2", micro_batch=256, val_epochs=1),
    "base": dict(val_epochs=1),  # Table 1, DyViT-B
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, PRESETS, __doc__, argv)
    with engine.Run("coma_dyvit", cfg) as run:
        coma = CoMA(cfg)
        if cfg.init and run.checkpoint is None:
            run.say(f"init        {load_init(coma, cfg.init)}")
            coma.follow()
        model = run.place(coma)
        optimizer = torch.optim.AdamW(
            decay_groups(coma, cfg.weight_decay), lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True
        )
        for step in run.steps(model, optimizer, evaluate, reconstruct):
            for batch in step.micro_batches():  # rgb (B, 3, H, W) uint8, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress, step.logging)
                step.backward(loss, logs)
            coma.follow()  # Eq. (4)
            step.update(cosine(cfg, step))


if __name__ == "__main__":
    engine.command("coma_dyvit", main)
