"""MCMAE: masked convolution and masked autoencoding on a hybrid convolution-transformer encoder.

Paper: "MCMAE: Masked Convolution Meets Masked Autoencoders", called ConvMAE in its code. Idea:
  1. three stages at strides 4, 8, 16: two of depthwise-convolution blocks, one of transformer ones;
  2. a mask is drawn at stage 3, which runs on the 25 % visible tokens alone, and upsampled to 1, 2;
  3. hidden positions are zeroed before each depthwise convolution: nothing leaks out of them, and
     with `--sparse`, the default, nothing but these convolutions computes them;
  4. the decoder reads all three stages, brought to one grid by strided convolutions and summed;
  5. afterwards the encoder has the feature pyramid that detection and segmentation want.

Paper -> code; what both leave open is a `NOTE paper unclear`, with a row in docs/decisions.md
  Sec. 2.2, Table 7  hybrid encoder            Encoder, ConvBlock
  Sec. 2.2           block-wise mask           make_mask, MCMAE.shown
  Sec. 2.2           masked convolution        masked_convolution
  Eq. 1              multi-scale decoder       MCMAE.predict
  Sec. 2.2           loss, as MAE's            MCMAE.loss
  Sec. 2.3           E1, E2, E3, E4            Encoder.forward_pyramid

  CPU:  python mcmae.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 mcmae.py --data data/imagenet
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Block, Normalize, fill, gather, init_weights, is_sincos, patchify
from common import pixel_picture, pixel_target, random_mask, resize_position, sincos_2d, split
from common import unpatchify
from engine import UserError, arg, cosine, decay_groups, divides, nearest, parse, require
from noise import MASK, uniform
from vit import ViT


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
    num_heads: int = arg(12, "Table 7: Ha, of stage 3", within="(0, inf)")
    kernel_size: int = arg(5, "of the depthwise convolutions; Table 5", choices=[5, 7, 9])
    mask_ratio: float = arg(0.75, "hidden, Sec. 2.2; Sec. 3.1's 25 % is visible", group="masking")
    masking: str = arg("block", "at stage 3, or 1; Table 5", ["block", "token"], group="masking")
    masked_conv: bool = arg(True, "hide positions from the depthwise convolutions; Table 5")
    multi_scale: bool = arg(True, "multi-scale decoder, Eq. 1; Table 6")
    sparse: bool | None = arg(None, "compute visible patches alone; on where that is exact")
    decoder_embed_dim: int = arg(512, "Sec. 3.1")
    decoder_depth: int = arg(8, "Sec. 3.1", within="[0, inf)")
    decoder_num_heads: int = arg(16, "public code; Sec. 3.1 has 12, which do not divide 512")
    norm_pix_loss: bool = arg(True, "per-patch normalised pixels; the published command")
    learned_position: bool = arg(False, "train stage 3's positions, as public fine-tuning does")
    init: str | None = arg(None, "the authors' weights, whole or the encoder, or ours", group="run")
    init_key: str | None = arg(None, "where they are in that file, e.g. model_ema", group="run")

    FREE = engine.Config.FREE + ("init", "init_key")

    def resolve(self) -> None:
        """Refuse what cannot work; UserError naming the field and values that work."""
        super().resolve()
        for name in ("embed_dims", "depths", "mlp_ratios"):
            words = getattr(self, name).split(",")
            ok = len(words) == 3 and all(w.strip().isdecimal() and int(w) for w in words)
            require((ok, name, f"must be three positive integers, e.g. {getattr(Config, name)}"))
        divides(self, "decoder_embed_dim", "decoder_num_heads")
        for name, n, k in (
            ("patch_size", self.patch_size, 4),  # stage 1 has a quarter of it
            ("embed_dims", self.sizes[0][2], self.num_heads),
            ("embed_dims", self.sizes[0][2], 4),  # positions
            ("decoder_embed_dim", self.decoder_embed_dim, 4),
        ):
            require((n % k == 0, name, f"{n} is not divisible by {k}; nearest: {nearest(n, k)}"))
        n, exact = self.num_positions, self.masking == "block" and self.masked_conv
        self.sparse = exact if self.sparse is None else self.sparse
        some = f"must hide some of {n} positions, not all: {1 / n:.6g} to {1 - 1 / n:.6g}"
        leaks = "needs --masking block and --masked-conv, or hidden positions matter: --no-sparse"
        require(
            (0 < self.num_visible < n, "mask_ratio", f"{self.mask_ratio} {some}"),
            (exact or not self.sparse, "sparse", leaks),
            (self.init or not self.init_key, "init_key", "is for --init, which is not given"),
        )

    @property
    def sizes(self) -> list[list[int]]:
        """Table 7: C1, C2, C3; L1, L2, L3; P1, P2, P3."""
        table = self.embed_dims, self.depths, self.mlp_ratios
        return [[int(n) for n in row.split(",")] for row in table]

    @property
    def num_positions(self) -> int:
        """Positions that a mask is drawn over: of stage 3 (196), or of stage 1 (3136)."""
        return (self.image_size // self.patch_size * (4 if self.masking == "token" else 1)) ** 2

    @property
    def num_visible(self) -> int:
        return round((1 - self.mask_ratio) * self.num_positions)  # 49 of 196, Sec. 2.2


# ---------------------------------------------------------------------------------------- masking


def make_mask(cfg: Config, batch: dict[str, Tensor], progress: Tensor) -> Tensor:
    """Hide positions at random: (B, L) bool of stage 3, or (B, 16L) of stage 1; True = hidden."""
    n = cfg.num_positions
    return random_mask(uniform(batch["seed"], n, MASK), n - cfg.num_visible)


# ------------------------------------------------------------------------------------------ model
# Tokens lie patch by patch, (B, V, k*k, C): V patches of stage 3's grid (h, w), in each k x k
# positions in raster order, k = 4, 2, 1 in stages 1, 2, 3. Only convolutions look beyond one.


def merge(x: Tensor, k: int) -> Tensor:
    """Join k x k neighbours inside each patch: (B, V, n, C) to (B, V, n/k², k*k*C)."""
    B, V, n, C = x.shape
    side = math.isqrt(n) // k
    return x.view(B, V, side, k, side, k, C).transpose(3, 4).reshape(B, V, side**2, k * k * C)


def strided(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolution of size k and stride k, linear in a patch: (B, V, n, C) to (B, V, n/k², C')."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (C', k*k*C)
    return F.linear(merge(x, conv.stride[0]), weight, conv.bias)


def masked_convolution(grid: tuple, k: int, ids: Tensor, visible: Tensor | None) -> Callable:
    """Depthwise convolution (Sec. 2.2) of tokens (B, V, k*k, C): onto a map of zeros, and back.

    The tokens are of patches `ids` (B, V) of the grid (h, w); `visible` (B, V, k*k, 1) bool are
    those that it sees, None = all.
    """
    B, H, W = len(ids), k * grid[0], k * grid[1]
    places = patchify(torch.arange(H * W, device=ids.device).view(1, 1, H, W), k)[0]  # (L, k*k)
    first = H * W * torch.arange(B, device=ids.device)  # place of each image
    rows = (places[ids] + first[:, None, None]).flatten()  # (B * V * k*k,)

    def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
        x = x if visible is None else x * visible
        if x.device.type == "cpu":  # its bf16 kernel takes twice as long for the weight's gradient
            x = x.to(conv.weight.dtype)
        tokens = x.reshape(-1, C := x.shape[-1])
        maps = x.new_zeros(B * H * W, C).index_copy_(0, rows, tokens).view(B, H, W, C)
        with torch.autocast("cpu", enabled=False):  # the bias waits until hidden rows are gone
            y = F.conv2d(maps.permute(0, 3, 1, 2), conv.weight, padding=conv.padding, groups=C)
        return y.permute(0, 2, 3, 1).reshape(-1, C).index_select(0, rows).view_as(x) + conv.bias

    return convolve


class Stem(nn.Module):
    """Into a stage: non-overlapping convolution, and as the public code LayerNorm, GELU."""

    def __init__(self, stride: int, in_dim: int, dim: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_dim, dim, stride, stride), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(strided(self.proj, x)))


class ConvBlock(nn.Module):
    """Transformer block with a depthwise convolution in the place of attention (Sec. 2.2)."""

    def __init__(self, dim: int, mlp_ratio: int, kernel_size: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        fc1, fc2 = nn.Conv2d(dim, dim * mlp_ratio, 1), nn.Conv2d(dim * mlp_ratio, dim, 1)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})

    def forward(self, x: Tensor, convolve: Callable, drop: Tensor | None = None) -> Tensor:
        """x (B, V, k*k, C); `drop` (2, B, 1, 1) scales the branches, None = 1."""
        y = strided(self.conv2, convolve(self.attn, strided(self.conv1, self.norm1(x))))
        x = x + (y if drop is None else drop[0, ..., None] * y)
        y = strided(self.mlp.fc2, F.gelu(strided(self.mlp.fc1, self.norm2(x))))
        return x + (y if drop is None else drop[1, ..., None] * y)


class Encoder(ViT):
    """Three stages at a quarter, a half, the whole of `patch_size` (Table 7); the last is a ViT."""

    trained_norm = False  # the norm is trained on E1 + E2 + E3

    def __init__(self, cfg: Config, image_size=None, trained_size=None, drop_path: float = 0.0):
        (C1, C2, C3), (L1, L2, L3), (P1, P2, P3) = cfg.sizes
        p, size = cfg.patch_size, image_size or (cfg.image_size, cfg.image_size)
        super(ViT, self).__init__(size, p, C3, L1 + L2 + L3, trained_size, drop_path)
        self.strides = (p // 4, p // 2, p, p * 2)
        self.patch_embed1 = Stem(p // 4, 3, C1)
        self.patch_embed2, self.patch_embed3 = Stem(2, C1, C2), Stem(2, C2, C3)
        self.patch_embed4 = nn.Linear(C3, C3)
        self.blocks1 = nn.ModuleList(ConvBlock(C1, P1, cfg.kernel_size) for _ in range(L1))
        self.blocks2 = nn.ModuleList(ConvBlock(C2, P2, cfg.kernel_size) for _ in range(L2))
        self.blocks3 = nn.ModuleList(Block(C3, cfg.num_heads, P3) for _ in range(L3))
        self.add_position()
        if cfg.learned_position:
            self.learn_position()
        self.norm = nn.LayerNorm(C3, eps=1e-6)
        self.fourth = nn.MaxPool2d(2)  # E4 of E3, Sec. 2.3

    blocks = property(lambda self: self.blocks3)  # a ViT's: what `layers` counts

    def stages(self, imgs: Tensor, shown: tuple = (None,) * 4, seed: Tensor | None = None) -> list:
        """Stages 1 and 2 and the way into stage 3.

        Args:
            imgs: (B, 3, H, W) float, normalised; H and W multiples of the patch size.
            shown: patches to compute, (B, V) int64; of these, (B, V, k*k, 1) bool, what stage 1's
                input shows, what convolutions see in stages 1 and 2; None: all.
            seed: (B,) int64 turns drop path on.
        Returns: E1 (B, V, 16, C1); E2 (B, V, 4, C2); stage 3's tokens (B, V, C3), with position.
        """
        (ids, input, see1, see2), grid = shown, self.grid_of(imgs)
        if ids is None:
            ids = torch.arange(grid[0] * grid[1], device=imgs.device).expand(len(imgs), -1)
        x = gather(patchify(imgs, self.patch_size), ids).unflatten(-1, (-1, 3))  # (B, V, p*p, 3)
        E1, convolve = self.patch_embed1(x), masked_convolution(grid, 4, ids, see1)
        E1, drop = E1 if input is None else E1 * input, iter(self.drops(seed))
        for block in self.blocks1:
            E1 = block(E1, convolve, next(drop))
        E2, convolve = self.patch_embed2(E1), masked_convolution(grid, 2, ids, see2)
        for block in self.blocks2:
            E2 = block(E2, convolve, next(drop))
        x = self.patch_embed4(self.patch_embed3(E2)).squeeze(2)
        return [E1, E2, x + self.position(*grid).flatten(0, -2)[ids]]

    def tokens(self, imgs: Tensor, seed: Tensor | None = None) -> Tensor:
        return self.stages(imgs, seed=seed)[2]

    def forward_pyramid(self, imgs: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """E1, E2, E3, E4 at `strides`, (B, C, h, w) each (Sec. 2.3); ValueError where none fits.

        E3 does not pass the norm, as in the public code: pre-training has it after the scales met.
        """
        h, w = grid = self.grid_of(imgs)
        if h % 2 or w % 2:
            raise ValueError(
                f"image size {[*imgs.shape[2:]]} is not divisible by {self.strides[3]}"
            )
        E1, E2, x = self.stages(imgs, seed=seed)
        (E3,) = self.run(x, seed=seed)
        maps = [unpatchify(E.flatten(2), k, grid) for E, k in ((E1, 4), (E2, 2), (E3, 1))]
        return [*maps, self.fourth(maps[2])]


def make_encoder(cfg: Config, **kwargs) -> Encoder:
    """The network that survives; kwargs as `vit.ViT`'s: image_size (H, W), drop_path, ..."""
    return Encoder(cfg, **kwargs)


def init_hybrid(model: nn.Module) -> None:
    """Initialise as the public code: as MAE, the last stem's weight too; torch's convolutions."""
    init_weights(model)
    nn.init.xavier_uniform_(getattr(model, "encoder", model).patch_embed3.proj.weight.flatten(1))


class MCMAE(nn.Module):
    """Encoder and multi-scale decoder; names as in the public code."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.normalize, self.encoder = cfg, Normalize(), make_encoder(cfg)
        (C1, C2, C3), D = cfg.sizes[0], cfg.decoder_embed_dim
        if cfg.multi_scale:
            self.stage1_output_decode = nn.Conv2d(C1, C3, 4, stride=4)
            self.stage2_output_decode = nn.Conv2d(C2, C3, 2, stride=2)
        self.decoder_embed = nn.Linear(C3, D)
        if cfg.masking == "block":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        position = sincos_2d(D, *self.encoder.grid)
        self.register_buffer("decoder_pos_embed", position, persistent=False)
        # NOTE paper unclear: decoder MLP ratio. 4, as MAE, in every size. The public code takes
        # stage 1's, which is 4 in B, the only size it has, and would be 8 in B*, L and H.
        self.decoder_blocks = nn.ModuleList(
            Block(D, cfg.decoder_num_heads) for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, 3 * cfg.patch_size**2)
        init_hybrid(self)

    def shown(self, mask: Tensor) -> tuple:
        """What stages 1 and 2 compute, and what they see of it, as `Encoder.stages` takes it."""
        if self.cfg.sparse:
            return split(mask, self.cfg.num_visible)[0], None, None, None
        if self.cfg.masking == "block":  # a patch is visible or hidden as a whole, Sec. 2.2
            input, stage1, stage2 = None, ~mask[..., None, None], ~mask[..., None, None]
        else:
            # NOTE paper unclear: input-token random masking. Each token of stage 1 is hidden on its
            # own; one of stage 2 where all four below it are; stage 3 keeps all its tokens.
            h, w = self.encoder.grid
            cells = patchify(mask.view(-1, 1, 4 * h, 4 * w), 4)  # (B, L, 16)
            input = stage1 = ~cells[..., None]
            stage2 = merge(stage1, 2).any(-1, keepdim=True)
        return (None, input, stage1, stage2) if self.cfg.masked_conv else (None, input, None, None)

    def predict(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Predict pixels of every patch, (B, L, p*p*3).

        Args:
            imgs: (B, 3, H, W) float, normalised.
            mask: as `make_mask` returns it, with exactly `cfg.num_visible` False a sample.
        """
        cfg, encoder = self.cfg, self.encoder
        E1, E2, x = encoder.stages(imgs, self.shown(mask))
        scales = [x]
        if cfg.multi_scale:
            scales.append(strided(self.stage1_output_decode, E1).squeeze(2))
            scales.append(strided(self.stage2_output_decode, E2).squeeze(2))
        if cfg.masking == "block":
            ids_keep, _, ids_restore = split(mask, cfg.num_visible)
            if not cfg.sparse:  # hidden patches end before stage 3
                scales = [gather(x, ids_keep) for x in scales]
        (E3,) = encoder.run(scales[0])
        x = encoder.norm(sum(scales[1:], E3))  # Eq. (1); one norm over the sum, as the public code
        x = self.decoder_embed(x)  # (B, V, D)
        if cfg.masking == "block":
            x = fill(x, self.mask_token, ids_restore)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def loss(self, pred: Tensor, imgs: Tensor, mask: Tensor) -> Tensor:
        """Squared error over hidden pixels, in fp32 (Sec. 2.2)."""
        p = self.cfg.patch_size
        error = (pred.float() - pixel_target(imgs, p, self.cfg.norm_pix_loss)).square()
        if self.cfg.masking == "token":  # by cells: (B, 16L, 3p*p/16)
            error = merge(error.unflatten(-1, (-1, 3)), p // 4).flatten(1, 2)
            mask = ~self.shown(mask)[1].flatten(1)
        return ((error.mean(-1) * mask).sum(1) / mask.sum(1)).mean()

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys), and logs, of which it has none."""
        imgs, mask = self.normalize(batch["rgb"]), make_mask(self.cfg, batch, progress)
        return self.loss(self.predict(imgs, mask), imgs, mask), {}


@torch.no_grad()
def evaluate(model: MCMAE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss on held-out images, beside that of a guess: each patch in its own mean, one grey."""
    imgs, mask = model.normalize(batch["rgb"]), make_mask(model.cfg, batch, None)
    target = pixel_target(imgs, model.cfg.patch_size, model.cfg.norm_pix_loss)
    flat = target.mean(-1, keepdim=True).expand_as(target)
    return {"loss": model(batch, None)[0], "loss_flat": model.loss(flat, imgs, mask)}


@torch.no_grad()
def reconstruct(model: MCMAE, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Images, what is hidden (B, h, w), and the prediction, as pictures.py draws them."""
    cfg, imgs = model.cfg, model.normalize(batch["rgb"])
    mask = make_mask(cfg, batch, None)
    pred = pixel_picture(model.predict(imgs, mask), imgs, cfg.patch_size, cfg.norm_pix_loss)
    side = math.isqrt(cfg.num_positions)
    return {"rgb": (batch["rgb"], mask.unflatten(1, (side, side)), model.normalize.undo(pred))}


def load_init(model: MCMAE, path: str | Path, key: str | None = None) -> str:
    """Start from weights with the public code's names; a report, or UserError and no change.

    The stages must be there; the norm, the fusion convolutions and the decoder may be absent, each
    as a whole. Fixed positions are the run's own; learned ones are resized to its grid.
    """
    state, report = engine.read_state(path, "--init", key)
    state = {k.removeprefix("encoder."): v for k, v in state.items()}
    learned, dim = model.cfg.learned_position, model.encoder.embed_dim
    for k in ("pos_embed", "decoder_pos_embed")[learned:]:
        if k in state and not is_sincos(state[k]):
            raise UserError(f"--init {path}: {k} was learned; --learned-position takes pos_embed")
    x = state.get("pos_embed", torch.empty(0))
    side = math.isqrt(x.numel() // dim)
    if learned and x.shape == (1, side**2, dim):
        state["pos_embed"] = resize_position(x.float(), (side, side), model.encoder.grid)
    own = {k.removeprefix("encoder.").split(".")[0] for k in model.state_dict()}
    whole = {k.split(".")[0] for k in state}
    whole |= {k for k in own if k.startswith(("patch_embed", "blocks"))}
    may_miss, may_stay = (lambda k, s=s: k.split(".")[0] not in s for s in (whole, own))
    return engine.load_weights(model, state, path, may_miss, may_stay, report)


def load_encoder(path: str | Path, **kwargs) -> Encoder:
    """The encoder of a checkpoint; kwargs: image_size (H, W) and drop_path."""
    cfg, state = engine.load_encoder(path, "mcmae", Config)
    size = (cfg.image_size, cfg.image_size)
    encoder = make_encoder(cfg, **{"trained_size": size, **kwargs})
    x, grid = state.get("pos_embed"), encoder.trained_grid  # in a state where it was learned
    if getattr(x, "shape", None) == (1, math.prod(grid), encoder.embed_dim):
        state["pos_embed"] = resize_position(x, grid, encoder.grid)
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------- presets, loop

PRESETS = {
    # Ours, for a laptop: 64 x 64 scenes at strides 2, 4, 8, three and a half minutes on two cores.
    "tiny": dict(
        image_size=64, patch_size=8, embed_dims="32,64,128", depths="1,1,3", num_heads=4,
        decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4, epochs=2, warmup_epochs=0.2,
        batch_size=32, base_lr=8e-3, data="shapes", val_epochs=1,
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


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, PRESETS, __doc__, argv)
    with engine.Run("mcmae", cfg) as run:
        mcmae = MCMAE(cfg)
        if cfg.init and run.checkpoint is None:
            run.say(f"init        {load_init(mcmae, cfg.init, cfg.init_key)}")
        model = run.place(mcmae)
        optimizer = torch.optim.AdamW(
            decay_groups(mcmae, cfg.weight_decay), lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True
        )
        for step in run.steps(model, optimizer, evaluate, reconstruct):
            for batch in step.micro_batches():  # rgb (B, 3, H, W) uint8, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(cosine(cfg, step))


if __name__ == "__main__":
    engine.command("mcmae", main)
