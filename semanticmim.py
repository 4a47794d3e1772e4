"""SemanticMIM: masked image modelling through proxy tokens, on MaskFeat and on BEiT targets.

Paper: "SemanticMIM: Marring Masked Image Modeling with Semantics Compression for General Visual
Representation" (under review). Idea:
  1. in plain MIM [MASK] tokens attend to [IMG] tokens and copy their neighbours;
  2. here [IMG] and a few [PROXY] tokens run through a ViT that never sees [MASK]: compression;
  3. beside each layer a second block lets [MASK] read the [PROXY] tokens of that layer, and other
     [MASK] tokens, never [IMG]: reconstruction;
  4. the target of a hidden patch is its HOG (MaskFeat) or its code by DALL-E's tokenizer (BEiT);
  5. the second stack is thrown away; a ViT with proxies in place of a class token stays.

Equation -> code
  Eq. 1    loss on [MASK] tokens            SemanticMIM.loss
  Eq. 2    plain MIM, --proxies 0           SemanticMIM.tokens
  Eq. 3    [IMG], [PROXY]: compression      SemanticMIM.tokens
  Eq. 4    [MASK]: reconstruction           ReconstructionBlock.forward
  Table 2  recipes of both targets          RECIPES
  Fig. 5   number of proxies                --proxies N
  Fig. 6   share of hidden patches          --mask-ratio R
  Figs. 7-9, 13, 14  attention              Encoder.attention

Where the paper and its public code contradict each other a `NOTE paper unclear` stands.

  CPU:       python semanticmim.py --data shapes --model tiny
  MaskFeat:  torchrun --nproc_per_node=8 semanticmim.py --data data/imagenet
  BEiT:      torchrun --nproc_per_node=8 semanticmim.py --data data/imagenet --model base-beit
             --tokenizer dalle_encoder.pth
  Baseline:  the same with --proxies 0: one class token, 40 % hidden

dalle_encoder.pth, 74 tensors, is where the public configurations have it from:
  https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth
--tokenizer random tries BEiT without it, on codes that mean nothing, and labels them so.
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pictures
from common import (
    AUGMENT, MASK, Block, CrossAttention, LayerScale, Mlp, Normalize, ViT, attend, drop_path,
    gather, init_weights, patchify, random_mask, split, uniform,
)  # fmt: skip
from engine import UserError, arg

BINS = 9  # of a HOG (MaskFeat)
DALLE = "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth"

# Table 2, by target; base_lr * 2048 / 256 gives its peaks, 1.6e-3 and 1.5e-3. Drop path and layer
# scale as the public code.
RECIPES = {
    "hog": dict(base_lr=2e-4, min_lr=1e-6, warmup_epochs=30.0, clip_grad=0.02, crop_scale_min=0.5,
                color_jitter=0.0, drop_path=0.0, layer_scale=0.0),
    "dvae": dict(base_lr=1.875e-4, min_lr=1e-5, warmup_epochs=10.0, clip_grad=3.0,
                 crop_scale_min=0.08, color_jitter=0.4, drop_path=0.1, layer_scale=0.1),
}  # fmt: skip


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source. None: what RECIPES has for the target."""

    target: str = arg("hog", "Sec. 4.1: HOG (MaskFeat) or dVAE codes (BEiT)", ["hog", "dvae"])
    tokenizer: str | None = arg(None, "for dvae: dalle_encoder.pth (see above), or random: a trial")
    tokenizer_precision: str = arg(
        "auto", "of the dVAE; auto: the step's. bf16 changes 1.8 % of a random encoder's codes",
        ["auto", "fp32", "bf16"],
    )  # fmt: skip
    # NOTE paper unclear: ratio and proxies. The public code hides 0.8 on MaskFeat and has one proxy
    # on BEiT; the paper's 0.6 and 8 here.
    proxies: int = arg(8, "Sec. 4.1; Fig. 5. 0: plain MIM (Eq. 2), one class token")
    mask_ratio: float | None = arg(None, "Sec. 4.1: 0.6 (Fig. 6), 0.4 for plain MIM")
    loss: str = arg("l2", "for hog: l1 (Sec. 3.1) or l2, the public code's", ["l2", "l1"])
    first_weights: str = arg(
        "public", "the public code's, or MAE's with sine-cosine positions, ahead in short runs",
        ["public", "mae"],
    )  # fmt: skip
    epochs: int = arg(300, "Sec. 4.1; Table 2 is garbled")
    warmup_epochs: float | None = arg(None, "Table 2: 30 (hog), 10 (dvae)")
    batch_size: int = arg(2048, "Table 2; the global batch")
    base_lr: float | None = arg(None, "Table 2: peak 1.6e-3 (hog), 1.5e-3 (dvae), * 256 / 2048")
    min_lr: float | None = arg(None, "Table 2: 1e-6 (hog), 1e-5 (dvae)")
    weight_decay: float = arg(0.05, "Table 2")
    beta1: float = arg(0.9, "Table 2")
    beta2: float = arg(0.999, "Table 2")
    clip_grad: float | None = arg(None, "Table 2: 0.02 (hog), 3.0 (dvae); 0 = off")
    drop_path: float | None = arg(None, "Table 2: 0 (hog), 0.1 (dvae), in both stacks")
    color_jitter: float | None = arg(None, "Table 2: 0 (hog), 0.4 (dvae)")
    image_size: int = arg(224, "Sec. 4.1")
    crop_scale_min: float | None = arg(None, "Table 2: 0.5 (hog), 0.08 (dvae)")
    patch_size: int = arg(16, "Sec. 4.1")
    embed_dim: int = arg(768, "Sec. 4.1: ViT-B")
    depth: int = arg(12, "Sec. 4.1: ViT-B")
    num_heads: int = arg(12, "Sec. 4.1: ViT-B")
    layer_scale: float | None = arg(None, "BEiT: 0.1 (dvae) to begin with; 0 = none")
    skip_last: bool = arg(True, "leave out the last layer's [IMG] rows, which reach no loss")

    FREE = (*engine.Config.FREE, "tokenizer")  # another place for the same file

    def resolve(self) -> None:
        """Fill in what depends on the target and on the proxies; refuse what cannot work.

        Errors: UserError naming the field and values that work.
        """
        for name, value in RECIPES[self.target].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        clip_grad, self.clip_grad = self.clip_grad, self.clip_grad or None
        super().resolve()
        self.clip_grad = clip_grad  # 0 stays 0: the next call would take None for the recipe's
        if self.proxies < 0:
            raise UserError(f"--proxies {self.proxies} must be 0 (plain MIM) or above, e.g. 8")
        if self.mask_ratio is None:
            self.mask_ratio = 0.6 if self.proxies else 0.4  # Sec. 4.1
        if not (0 < self.mask_ratio < 1 and 0 < self.num_visible < self.num_patches):
            raise UserError(
                f"--mask-ratio {self.mask_ratio} must leave some of {self.num_patches} patches "
                "visible and some hidden, e.g. 0.6"
            )
        for name in ("drop_path", "color_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{engine.flag(name)} {getattr(self, name)} is outside [0, 1)")
        engine.divides(self, "embed_dim", "num_heads")
        known = self.tokenizer == "random" or (self.tokenizer and Path(self.tokenizer).is_file())
        if self.target == "dvae" and not known:
            raise UserError(
                f"--target dvae needs --tokenizer PATH, DALL-E's image encoder, {DALLE}; "
                + (f"there is no file {self.tokenizer}; " if self.tokenizer else "")
                + "--tokenizer random tries it without, --target hog needs no file"
            )
        if self.target == "hog" and self.tokenizer:
            raise UserError("--tokenizer is for --target dvae; --target hog needs none")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """V, rounded down: 78 of 196 at 60 % (App. C) and 117 at 40 %, as the public code."""
        return math.floor((1 - self.mask_ratio) * self.num_patches + 1e-9)


# -------------------------------------------------------------------------------- target: HOG


class HOG(nn.Module):
    """Histograms of oriented gradients of every patch, MaskFeat's target.

    Sobel gradients of each channel; 9 bins of orientation over half a turn, filled with gradient
    lengths times a Gaussian window that repeats with each patch; 2 x 2 cells a patch (8 pixels each
    in patches of 16), each of unit L2 norm over its bins. 3 channels x 9 x 4 = 108 numbers.
    """

    def __init__(self, patch_size: int, image_size: int):
        super().__init__()
        self.cell = patch_size // 2
        n = torch.arange(patch_size) - (patch_size - 1) / 2
        g = torch.exp(-0.5 * (n / (patch_size / 2)) ** 2)  # standard deviation: half the window
        window = torch.outer(g, g) / g.sum() ** 2
        tiled = window.repeat(*(image_size // patch_size,) * 2)
        self.register_buffer("window", tiled, persistent=False)  # (H, W)

    def forward(self, imgs: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) float32 to (B, L, 108), in the order (3, 9, 2, 2)."""
        gx, gy = sobel(imgs)
        bins = (torch.atan2(gx, gy) / math.pi * BINS).floor().remainder(BINS)  # (B, 3, H, W)
        bins, length = bins.to(torch.int8), torch.hypot(gx, gy) * self.window
        # a cell's sum for each bin: nine passes need no (B, 3, 9, H, W) and no scattered additions
        cells = [F.avg_pool2d(length * (bins == k), self.cell) for k in range(BINS)]
        hog = F.normalize(torch.stack(cells, dim=2), dim=2)  # (B, 3, 9, 2h, 2w)
        B, _, _, rows, cols = hog.shape
        hog = hog.reshape(B, 3 * BINS, rows // 2, 2, cols // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return hog.reshape(B, rows * cols // 4, 12 * BINS)


def sobel(imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients along x and y, (B, C, H, W) each, of images with mirrored borders."""
    H, W = imgs.shape[-2:]
    x = F.pad(imgs, (1, 1, 1, 1), mode="reflect")
    # Where a gradient vanishes, rounding gives it a sign, and the sign a bin. In raster order this
    # equals the public code's convolution on a CPU bit for bit, which one in TF32 would not.
    a, b, c, d, _, f, g, h, i = (x[..., r : r + H, q : q + W] for r in range(3) for q in range(3))
    return a - c + 2 * d - 2 * f + g - i, a + 2 * b + c - g - 2 * h - i


def draw_hog(hog: Tensor, grid: tuple[int, int], side: int = 12) -> Tensor:
    """Draw HOGs (B, h*w, 108) as edges: a cell is `side` pixels, a bin a line along its edge.

    Returns: (B, 1, 2h*side, 2w*side) float in [0, 1].
    """
    (h, w), B = grid, len(hog)
    cells = hog.float().reshape(B, h, w, 3, BINS, 2, 2).mean(3).permute(0, 3, 1, 4, 2, 5)
    angle = (torch.arange(BINS, device=hog.device)[:, None, None] + 0.5) * math.pi / BINS
    at = torch.arange(side, device=hog.device) - (side - 1) / 2
    # a bin's gradient points along (x, y) = (sin, cos) of its angle; the edge lies across it
    lines = ((at * angle.sin() + at[:, None] * angle.cos()).abs() < 0.7).float()  # (9, side, side)
    return torch.einsum("bkhrwc,kij->bhriwcj", cells.clamp(0, 1), lines).reshape(
        B, 1, 2 * h * side, 2 * w * side).clamp(0, 1)  # fmt: skip


# ------------------------------------------------------------------------------ target: dVAE codes


class Tokenizer(nn.Module):
    """DALL-E's image encoder: the code of each patch is the largest of its logits (BEiT's target).

    Frozen and no part of a checkpoint: its weights are buffers that are not saved.

    Args:
        state: `{name}.w` and `{name}.b` of each convolution, with the names in OpenAI's encoder;
            widths are read off them (released: 256 channels at first, 8192 codes).
        image_size, grid: sides of image and patch grid; the encoder sees 8 * grid pixels.
        precision: auto follows the step's autocast, fp32 and bf16 do not. The resize and the logits
            are fp32 in any case; as in OpenAI's module, which runs the rest in fp16.
    """

    def __init__(
        self, state: dict[str, Tensor], image_size: int, grid: int, precision: str = "auto"
    ):
        super().__init__()
        self.precision = precision
        self.blocks = sum(k.startswith("blocks.group_1.") and k.endswith("conv_1.w") for k in state)
        self.num_codes = state["blocks.output.conv.b"].numel()
        for name, value in state.items():
            self.register_buffer(name.replace(".", "_"), value.float(), persistent=False)
        self.register_buffer("resize", lanczos(image_size, 8 * grid), persistent=False)

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (getattr(self, f"{name}.{k}".replace(".", "_")) for k in "wb")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def logits(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 to (B, codes, H/8, W/8): four groups of residual blocks."""
        x = self.conv("blocks.input", x)
        for group in range(1, 5):
            for block in range(1, self.blocks + 1):
                name, y = f"blocks.group_{group}.block_{block}", x
                for layer in range(1, 5):
                    y = self.conv(f"{name}.res_path.conv_{layer}", y.relu())
                if block == 1 and group > 1:  # the width doubles
                    x = self.conv(f"{name}.id_path", x)
                x = x + y / (4 * self.blocks) ** 2
            x = F.max_pool2d(x, 2) if group < 4 else x
        with torch.autocast(x.device.type, enabled=False):
            return self.conv("blocks.output.conv", x.float().relu())

    @torch.no_grad()
    def forward(self, rgb: Tensor) -> Tensor:
        """Codes of images (B, 3, H, W) uint8, (B, L) int64."""
        # The public code cuts its 112 pixels out of the photograph, by Lanczos. Ours is the crop of
        # 224 pixels reduced by Lanczos: the same view, filtered twice.
        kind, precision = rgb.device.type, self.precision
        bf16 = torch.is_autocast_enabled(kind) if precision == "auto" else precision == "bf16"
        with torch.autocast(kind, enabled=False):
            x = self.resize @ rgb.float() @ self.resize.T  # rows, then columns
            x = x.round().clamp(0, 255) / 255
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            return self.logits(0.8 * x + 0.1).argmax(1).flatten(1)  # [0.1, 0.9], as DALL-E


def lanczos(n_in: int, n_out: int) -> Tensor:
    """Matrix (n_out, n_in) that resizes a row of pixels as Pillow does: Lanczos-3, antialiased."""
    scale = n_in / n_out
    centre = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * scale
    x = (torch.arange(n_in) + 0.5 - centre) / max(scale, 1.0)
    weight = (x.sinc() * (x / 3).sinc()).where(x.abs() < 3, 0)
    return (weight / weight.sum(1, keepdim=True)).float()


def load_tokenizer(
    path: str | Path, image_size: int, grid: int, precision: str = "auto"
) -> Tokenizer:
    """Read the state dict of a DALL-E encoder, of any width; "random" is `random_state`.

    Errors: UserError where the file is none, or does not hold exactly an encoder's tensors.
    """
    try:
        state = random_state() if str(path) == "random" else engine.read(path, "--tokenizer")
    except UserError:
        # a whole zip, which torch.save writes, or what begins as pickles did before
        if Path(path).is_file() and (
            zipfile.is_zipfile(path) or Path(path).read_bytes()[:1] == b"\x80"
        ):
            raise UserError(
                f"--tokenizer {path} is a pickled module, as OpenAI's encoder.pkl, which cannot be "
                f"read safely; take {DALLE}, or where you trust it, after pip install DALL-E attrs:"
                " python -c \"import torch; torch.save(torch.load('encoder.pkl', 'cpu', "
                "weights_only=False).state_dict(), 'dalle_encoder.pth')\""
            ) from None
        raise
    try:
        state = state.get("state_dict", state)
        tokenizer = Tokenizer(state, image_size, grid, precision)
        tokenizer.logits(torch.zeros(1, 3, 8, 8))  # fails where a tensor is missing or misshapen
        if len(state) != (wanted := 2 * (5 + 16 * tokenizer.blocks)):
            raise ValueError(f"it has {len(state)} tensors, an encoder of its depth {wanted}")
    except Exception as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f"{path} is not a DALL-E encoder's state dict: {why}") from None
    return tokenizer


def random_state(width: int = 16, codes: int = 512) -> dict[str, Tensor]:
    """Fresh weights of a small DALL-E encoder (released: 256 and 8192), always the same."""
    noise, state = torch.Generator().manual_seed(0), {}

    def conv(name: str, n_in: int, n_out: int, k: int) -> None:
        weight = torch.randn(n_out, n_in, k, k, generator=noise) / (n_in * k * k) ** 0.5
        state.update({f"blocks.{name}.w": weight, f"blocks.{name}.b": torch.zeros(n_out)})

    conv("input", 3, width, 7)
    for group, (n, m) in enumerate(((1, 1), (1, 2), (2, 4), (4, 8)), start=1):
        n, m, q, name = n * width, m * width, m * width // 4, f"group_{group}.block_1"
        if n != m:
            conv(f"{name}.id_path", n, m, 1)
        for i, sizes in enumerate(((n, q, 3), (q, q, 3), (q, q, 3), (q, m, 1)), start=1):
            conv(f"{name}.res_path.conv_{i}", *sizes)
    conv("output.conv", m, codes, 1)
    # standardised over smooth noise: otherwise one code takes nearly all patches
    imgs = F.interpolate(torch.rand(8, 3, 8, 8, generator=noise), 64, mode="bilinear")
    std, mean = torch.std_mean(Tokenizer(state, 64, 8).logits(0.8 * imgs + 0.1), (0, 2, 3))
    state["blocks.output.conv.w"] /= std[:, None, None, None]
    state["blocks.output.conv.b"] -= mean / std
    return state


def color_jitter(rgb: Tensor, seed: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation, each by 1 +- strength, in a random order.

    Args:
        rgb: (B, 3, H, W) uint8.
        seed: (B,) int64.
    Returns: (B, 3, H, W) uint8. Each is torchvision's blend of the image with black, with its mean
        grey or with its own grey version.
    """
    # The public code has the jitter before the crop, we after it, so that contrast moves about the
    # mean grey of the crop. Model and tokenizer see the same.
    u = uniform(seed, 6, AUGMENT)
    factors, order = 1 + strength * (2 * u[:, :3] - 1), u[:, 3:].argsort(dim=1, stable=True)
    x = rgb.float()
    for step in order.split(1, dim=1):  # (B, 1)
        factor, kind = factors.gather(1, step)[..., None, None], step[..., None, None]
        grey = 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]  # (B, 1, H, W)
        other = torch.where(kind == 1, grey.mean((2, 3), keepdim=True), grey).where(kind > 0, 0)
        x = (factor * x + (1 - factor) * other).clamp(0, 255)
    return x.round().to(torch.uint8)


# ------------------------------------------------------------------------------------------ model


class Encoder(ViT):
    """What survives: a ViT with [PROXY] tokens (timm's register tokens), and no class token.

    `attention` has the prefix first. The rows of a patch, [:, :, P + patch, P:], are Figs. 7 and
    14, and with distances between patches Fig. 13; the rows of a proxy, [:, :, proxy, P:], are
    Fig. 8, their mean over images Fig. 9.
    """

    trained_norm, probe_layer = False, 7 / 12  # the norm sees [MASK] alone; Sec. 4.2

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        pos_embed = self.pos_embed[None].clone()
        del self.pos_embed  # the fixed one
        self.pos_embed = nn.Parameter(pos_embed)  # learned; `init` says how it starts

    def position(self, h: int, w: int) -> Tensor:
        """Position embedding of a grid, (1, h*w, D)."""
        return resize_position(self.pos_embed, self.grid, (h, w))

    def pooled(self, imgs: Tensor, layers: Sequence[int] | None, kind: str) -> list[Tensor]:
        """One vector an image and layer, (B, D): the columns "Patch" and "CLS" of Table 1.

        Args:
            imgs, layers: as `forward_features` takes them. Table 1: layer 7 (VOC: 6), 1-based.
            kind: "patch" averages the patches, "proxy" the proxies (plain MIM: the class token).
        """
        # as the public code: the "CLS" feature of 8 proxies is their mean
        return [x[kind == "proxy"].mean(1) for x in self.forward_features(imgs, layers)]


def resize_position(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic resize of a position embedding (1, L, D) from one grid to another."""
    if tuple(old) == tuple(new):
        return pos_embed
    grid = pos_embed.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2)


def make_encoder(cfg: Config, **kwargs) -> Encoder:
    return Encoder(
        patch_size=cfg.patch_size, embed_dim=cfg.embed_dim, depth=cfg.depth,
        num_heads=cfg.num_heads, class_token=not cfg.proxies, reg_tokens=cfg.proxies,
        init_values=cfg.layer_scale, **kwargs,
    )  # fmt: skip


def first_rows(block: Block, x: Tensor, n: int, drop: Tensor | None = None) -> Tensor:
    """Return block(x, drop)[:, :n]; the other rows of x are keys and values alone.

    Args: block and drop as common.Block; x (B, L, D). Returns: (B, n, D).
    """
    attn, drop, y = block.attn, (1.0, 1.0) if drop is None else drop, block.norm1(x)
    (B, L, D), heads = x.shape, (attn.num_heads, x.shape[2] // attn.num_heads)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(y[:, :n], weight[:D], bias[:D]).reshape(B, n, *heads).transpose(1, 2)
    k, v = F.linear(y, weight[D:], bias[D:]).reshape(B, L, 2, *heads).permute(2, 0, 3, 1, 4)
    y = attend(q, k, v).transpose(1, 2).flatten(2)
    x = x[:, :n] + drop[0] * block.ls1(attn.proj(y))
    return x + drop[1] * block.ls2(block.mlp(block.norm2(x)))


class ReconstructionBlock(nn.Module):
    """One layer of the second stack (Eq. 4): [MASK] tokens read [PROXY] and [MASK] tokens."""

    # As the public code: the first norm serves queries and what they read.

    def __init__(self, dim: int, num_heads: int, init_values: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = CrossAttention(dim, num_heads), Mlp(dim, 4 * dim)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(self, x: Tensor, proxies: Tensor, drop: Tensor | None = None) -> Tensor:
        """[MASK] tokens x (B, M, D) and this layer's [PROXY^{i+1}] (B, P, D) give (B, M, D)."""
        context = self.norm1(torch.cat([proxies, x], dim=1))  # (B, P + M, D)
        y = self.ls1(self.attn(context[:, proxies.shape[1] :], context))  # Eq. (4)
        x = x + (y if drop is None else drop[0] * y)
        y = self.ls2(self.mlp(self.norm2(x)))
        return x + (y if drop is None else drop[1] * y)


class SemanticMIM(nn.Module):
    """Both stacks, target and loss; `model(batch, progress)` returns (loss, logs)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, D = cfg, cfg.embed_dim
        self.normalize = Normalize()
        self.encoder = make_encoder(cfg, image_size=(cfg.image_size,) * 2)
        # The final norm sees only [MASK] in the loss, so it is thrown away (decoder_norm); the
        # encoder keeps a fresh one, which transfer trains, as the public code.
        self.encoder.norm.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_blocks = nn.ModuleList(
            ReconstructionBlock(D, cfg.num_heads, cfg.layer_scale)
            for _ in range(cfg.depth if cfg.proxies else 0)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        if cfg.target == "hog":
            self.hog = HOG(cfg.patch_size, cfg.image_size)
        else:
            grid = cfg.image_size // cfg.patch_size
            where = cfg.tokenizer, cfg.image_size, grid
            self.tokenizer = load_tokenizer(*where, cfg.tokenizer_precision)
        self.label = "random_codes_" if cfg.tokenizer == "random" else ""  # of all it says of them
        size = 12 * BINS if cfg.target == "hog" else self.tokenizer.num_codes
        self.decoder_pred = nn.Linear(D, size)
        self.init()

    @torch.no_grad()
    def init(self) -> None:
        """Set first weights as the public code, or as MAE; those of the head in either case."""
        # BEiT has no key bias: it adds one number to all logits of a query, so ours does nothing.
        init_weights(self)
        if self.cfg.first_weights == "public":
            for m in self.modules():
                if isinstance(m, (nn.Linear, nn.Conv2d)):
                    nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.trunc_normal_(self.encoder.pos_embed, std=0.02)
            if self.cfg.target == "dvae":  # BEiT
                for stack in (self.encoder.blocks, self.decoder_blocks):
                    for i, block in enumerate(stack, start=1):
                        block.attn.proj.weight /= math.sqrt(2 * i)
                        block.mlp.fc2.weight /= math.sqrt(2 * i)
        # the public code's; Xavier's predict 8 to 16 times a HOG's mean square and shrink first
        nn.init.trunc_normal_(self.decoder_pred.weight, std=0.02)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """With decay and without, as the public code: of tokens and positions, MaskFeat spares
        [MASK] alone, BEiT all but [MASK]."""
        spared = {"hog": ("mask_token",), "dvae": ("cls_token", "reg_token", "pos_embed")}
        groups = [{"params": [], "weight_decay": d} for d in (weight_decay, 0.0)]
        for name, p in self.named_parameters():
            if p.requires_grad:
                plain = p.ndim <= 1 or name.endswith(spared[self.cfg.target])
                groups[plain]["params"].append(p)
        return groups

    def tokens(self, imgs: Tensor, mask: Tensor, seed: Tensor | None = None) -> Tensor:
        """Run both stacks side by side.

        Args:
            imgs: (B, 3, H, W) float, normalised; what the mask hides is not read.
            mask: (B, N) bool with exactly `cfg.num_visible` False a sample.
            seed: (B,) int64 turns drop path on.
        Returns: [MASK] tokens in raster order after the final norm, (B, M, D).
        """
        encoder, P = self.encoder, self.encoder.num_prefix
        ids_keep, ids_mask, _ = split(mask, self.cfg.num_visible)
        position = encoder.position(*encoder.grid_of(imgs)).expand(len(imgs), -1, -1)
        img = encoder.patch_embed(gather(patchify(imgs, encoder.patch_size), ids_keep))
        x = encoder.add_prefix(img + gather(position, ids_keep))  # [PROXY, IMG], (B, P + V, D)
        hidden = self.mask_token + gather(position, ids_mask)  # [MASK], (B, M, D)
        depth, rate = len(encoder.blocks), self.cfg.drop_path
        scales = scales_2 = [None] * depth
        if seed is not None and rate > 0:  # another seed for the second stack: independent drops
            scales, scales_2 = drop_path(seed, depth, rate), drop_path(seed ^ 1, depth, rate)
        if not self.decoder_blocks:  # the baseline as printed: its last layer is whole
            x = torch.cat([x, hidden], dim=1)  # [CLS, IMG, MASK]; order matters to none of them
            for block, scale in zip(encoder.blocks, scales):
                x = block(x, scale)  # Eq. (2)
            return self.decoder_norm(x[:, -hidden.shape[1] :])
        layers = zip(encoder.blocks, scales, self.decoder_blocks, scales_2)
        for i, (compress, scale, reconstruct, scale_2) in enumerate(layers, start=1):
            if i == depth and self.cfg.skip_last:
                x = first_rows(compress, x, P, scale)  # Eq. (3), its [PROXY] rows
            else:
                x = compress(x, scale)  # Eq. (3)
            hidden = reconstruct(hidden, x[:, :P], scale_2)
        return self.decoder_norm(hidden)

    def predict(self, imgs: Tensor, mask: Tensor, seed: Tensor | None = None) -> Tensor:
        """Head's numbers of hidden patches, (B, M, 108 or codes); arguments as `tokens`."""
        return self.decoder_pred(self.tokens(imgs, mask, seed))

    def make_mask(self, seed: Tensor) -> Tensor:
        """Hide patches at random (Sec. 4.1): (B, N) bool from the samples' seeds."""
        N = self.cfg.num_patches
        return random_mask(uniform(seed, N, MASK), N - self.cfg.num_visible)

    @torch.no_grad()
    def make_target(self, rgb: Tensor) -> Tensor:
        """Targets of (B, 3, H, W) uint8: HOG (B, N, 108) float32, or codes (B, N, 1) int64."""
        if self.cfg.target == "hog":
            return self.hog(self.normalize(rgb))
        return self.tokenizer(rgb)[..., None]

    def error(self, pred: Tensor, target: Tensor) -> Tensor:
        """The similarity L of Eq. 1 of each token, in fp32: (B, M, C) and targets give (B, M)."""
        pred = pred.float()
        if self.cfg.target == "dvae":
            return F.cross_entropy(pred.transpose(1, 2), target[..., 0], reduction="none")
        # NOTE paper unclear: HOG loss. Sec. 3.1 names l1, the public code has l2.
        difference = pred - target
        return (difference.abs() if self.cfg.loss == "l1" else difference.square()).mean(-1)

    def loss(self, pred: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over a sample's [MASK] tokens, then over samples; every sample has as many (Eq. 1).

        Args: prediction and target of hidden patches, (B, M, C) and (B, M, 108 or 1).
        """
        logs = {}
        if self.cfg.target == "dvae":
            logs[f"{self.label}accuracy"] = (pred.argmax(-1) == target[..., 0]).float().mean()
        return self.error(pred, target).mean(), logs  # Eq. (1)

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys) and logs; `progress` changes nothing here."""
        rgb, seed = batch["rgb"], batch["seed"]
        if self.training and self.cfg.color_jitter:
            rgb = color_jitter(rgb, seed, self.cfg.color_jitter)
        mask = self.make_mask(seed)
        pred = self.predict(self.normalize(rgb), mask, seed if self.training else None)
        ids_mask = split(mask, self.cfg.num_visible)[1]
        return self.loss(pred, gather(self.make_target(rgb), ids_mask))


# ------------------------------------------------------------------------- looking at a model


@torch.no_grad()
def evaluate(model: SemanticMIM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss on random masks beside guesses that learn nothing of the image.

    `loss_other`: the model's own, where it sees the visible patches of the next image of the batch.
    HOG: `loss_position`, the mean HOG at that position in the batch's other images (what the
    training set's mean would score, worse by one in the batch's size), and the nearest visible
    patch. Codes: accuracy of the most frequent code among the batch's hidden ones, and of the
    nearest visible patch's. A batch of one has no others: `loss_other` is the loss.
    """
    B, imgs, label = len(batch["rgb"]), model.normalize(batch["rgb"]), model.label
    mask, target = model.make_mask(batch["seed"]), model.make_target(batch["rgb"])
    ids_mask = split(mask, model.cfg.num_visible)[1]
    truth = gather(target, ids_mask)
    total, logs = model.loss(model.predict(imgs, mask), truth)
    logs["loss_other"] = model.loss(model.predict(imgs.roll(1, 0), mask), truth)[0]
    side = model.cfg.image_size // model.cfg.patch_size
    at = torch.cartesian_prod(*(torch.arange(side, device=mask.device),) * 2).float()
    far = torch.cdist(at, at) + mask[:, None] * 1e6  # (B, N, N), from each patch to visible ones
    nearest = gather(gather(target, far.argmin(-1)), ids_mask)
    if model.cfg.target == "dvae":
        frequent = truth.flatten().mode().values
        logs |= {f"{label}accuracy_frequent": (truth == frequent).float().mean()}
        logs |= {f"{label}accuracy_nearest": (truth == nearest).float().mean()}
    else:
        others = (target.sum(0) - target) / max(B - 1, 1)  # (B, N, 108), each without its own
        logs |= {"loss_position": model.error(gather(others, ids_mask), truth).mean()}
        logs |= {"loss_nearest": model.error(nearest, truth).mean()}
    return {"loss": total, **logs}


def preview(model: SemanticMIM, batch: dict[str, Tensor], path: Path, step: int) -> None:
    """Write a picture: input, what is visible, the target, and the prediction of hidden patches.

    A HOG is drawn as the edges it stands for. The prediction is white; around it, in blue, is the
    target of visible patches, which have no loss. Colours of codes are arbitrary.
    """
    cfg, rgb = model.cfg, batch["rgb"]
    h = w = cfg.image_size // cfg.patch_size
    mask, target = model.make_mask(batch["seed"]), model.make_target(rgb)
    pred = model.predict(model.normalize(rgb), mask).float()
    ids_mask = split(mask, cfg.num_visible)[1][..., None]
    if cfg.target == "dvae":
        pred = pred.argmax(-1, keepdim=True)
    guess = target.scatter(1, ids_mask.expand_as(pred), pred)

    def at_size(size: Sequence[int]) -> Tensor:
        return F.interpolate(mask.view(-1, 1, h, w).float(), tuple(size), mode="nearest").bool()

    columns = {"input": rgb, "visible": rgb.masked_fill(at_size(rgb.shape[2:]), 128)}
    if cfg.target == "dvae":
        truth, guess = (pictures.colorize(x.view(-1, h, w) % 254 + 1) for x in (target, guess))
        kind = "random codes" if model.label else "codes"
        columns |= {f"{kind}: target": truth, f"{kind}: prediction": guess}
    else:
        truth, guess = (draw_hog(x, (h, w)) for x in (target, guess))
        blue = guess.new_tensor([0.3, 0.5, 1.0])[:, None, None]
        guess = guess * blue.where(~at_size(guess.shape[2:]), 1.0)
        columns |= {"HOG: target": truth.expand(-1, 3, -1, -1), "HOG: prediction (white)": guess}
        columns = {k: (v * 255).byte() if v.is_floating_point() else v for k, v in columns.items()}
    caption = f"semanticmim {cfg.model}, {cfg.proxies} proxies, step {step}, {cfg.data} val"
    pictures.contact_sheet(columns, path, caption, side=max(192, 24 * h))


def load_encoder(path: str | Path, **overrides) -> Encoder:
    """Rebuild the encoder of a checkpoint; the second stack and the tokenizer are not needed.

    Args:
        path: a checkpoint that a run of this script wrote.
        overrides: image_size (H, W), to which the position embedding is resized, and drop_path, as
            `common.ViT` takes them.
    Errors: UserError where the file is no such checkpoint.
    """
    cfg, state = engine.load_encoder(path, "semanticmim", Config)
    side = {"image_size": (cfg.image_size,) * 2}
    encoder = make_encoder(cfg, **{**side, **overrides})
    old = (cfg.image_size // cfg.patch_size,) * 2
    state["pos_embed"] = resize_position(state["pos_embed"], old, encoder.grid)
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------------- presets

PRESETS = {
    # Ours, for a laptop: 64 x 64 scenes, about two minutes on two cores; 4 proxies for 25 patches.
    "tiny": dict(
        image_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, proxies=4, epochs=2,
        warmup_epochs=0.2, batch_size=64, base_lr=1.6e-2, clip_grad=1.0, data="shapes",
        val_epochs=1, first_weights="mae",
    ),
    # ViT-S, not in the paper.
    "small": dict(embed_dim=384, num_heads=6, micro_batch=256),
    "base": dict(),  # the paper's on MaskFeat
    "base-beit": dict(target="dvae"),  # the paper's on BEiT; RECIPES has what differs
}  # fmt: skip


def main() -> None:
    engine.main("semanticmim", Config, PRESETS, __doc__, SemanticMIM, evaluate=evaluate,
                preview=preview)  # fmt: skip


if __name__ == "__main__":
    main()
