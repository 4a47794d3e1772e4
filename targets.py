"""What SemanticMIM predicts: HOG, as MaskFeat, or the codes of DALL-E's image encoder, as BEiT.

Both are frozen and have no parameters; no checkpoint holds them.

    HOG, draw_hog               gradients of each patch, and a picture of them
    Tokenizer, load_tokenizer   codes, by weights from a file or by random ones
"""

import math
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import UserError

BINS = 9  # of a HOG (MaskFeat)
DALLE = "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth"


# -------------------------------------------------------------------------------------------- HOG


class HOG(nn.Module):
    """Histograms of oriented gradients of every patch, MaskFeat's target.

    Sobel gradients of each channel; 9 bins of orientation over half a turn, filled with gradient
    lengths times a Gaussian window that repeats with each patch; 2 x 2 cells a patch (8 pixels each
    in patches of 16), each of unit L2 norm over its bins. 3 channels x 9 x 4 = 108 numbers.
    """

    size = 12 * BINS

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
        return F.pixel_unshuffle(hog.flatten(1, 2), 2).flatten(2).transpose(1, 2)


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
    cells = F.pixel_shuffle(hog.float().transpose(1, 2).unflatten(2, grid), 2)  # (B, 27, 2h, 2w)
    cells = cells.unflatten(1, (3, BINS)).mean(1).clamp(0, 1)
    angle = (torch.arange(BINS, device=hog.device)[:, None, None] + 0.5) * math.pi / BINS
    at = torch.arange(side, device=hog.device) - (side - 1) / 2
    # a bin's gradient points along (x, y) = (sin, cos) of its angle; the edge lies across it
    lines = ((at * angle.sin() + at[:, None] * angle.cos()).abs() < 0.7).float()  # (9, side, side)
    return F.conv_transpose2d(cells, lines[:, None], stride=side).clamp(0, 1)


# ------------------------------------------------------------------------------------------ codes


class Tokenizer(nn.Module):
    """DALL-E's image encoder: the code of each patch is the largest of its logits (BEiT's target).

    Args:
        state: `{name}.w` and `{name}.b` of each convolution, with the names in OpenAI's encoder;
            widths are read off them (released: 256 channels at first, 8192 codes).
        image_size, grid: sides of image and patch grid; the encoder sees 8 * grid pixels.
        precision: auto follows the step's autocast, fp32 and bf16 do not. The resize and the logits
            are fp32 in any case (on CUDA convolutions multiply in TF32, torch's default); as in
            OpenAI's module, which runs the rest in fp16.
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
        weight, bias = (getattr(self, f"blocks_{name}_{k}".replace(".", "_")) for k in "wb")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def logits(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 to (B, codes, H/8, W/8): four groups of residual blocks."""
        x = self.conv("input", x)
        for group in range(1, 5):
            for block in range(1, self.blocks + 1):
                name, y = f"group_{group}.block_{block}", x
                for layer in range(1, 5):
                    y = self.conv(f"{name}.res_path.conv_{layer}", y.relu())
                if block == 1 and group > 1:  # the width doubles
                    x = self.conv(f"{name}.id_path", x)
                x = x + y / (4 * self.blocks) ** 2
            x = F.max_pool2d(x, 2) if group < 4 else x
        with torch.autocast(x.device.type, enabled=False):
            return self.conv("output.conv", x.float().relu())

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
    if str(path) == "random":
        return Tokenizer(random_state(), image_size, grid, precision)
    try:
        state = engine.read(path, "--tokenizer")
    except UserError as e:
        raise UserError(
            f"{e}. OpenAI's encoder.pkl is a pickled module, which cannot be: take {DALLE}, or "
            'where you trust it, after pip install DALL-E attrs: python -c "import torch; '
            "torch.save(torch.load('encoder.pkl', 'cpu', weights_only=False).state_dict(), "
            "'dalle_encoder.pth')\""
        ) from None
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


def random_state(width: int = 16, blocks: int = 1, codes: int = 512) -> dict[str, Tensor]:
    """Fresh weights of a DALL-E encoder (released: 256, 2, 8192), always the same."""
    noise, n = torch.Generator().manual_seed(0), width
    convs = {"input": (width, 3, 7)}  # name: channels out, in, side of the kernel
    for group, m in enumerate((width, 2 * width, 4 * width, 8 * width), start=1):
        for name in (f"group_{group}.block_{i + 1}" for i in range(blocks)):
            convs |= {f"{name}.id_path": (m, n, 1)} if n != m else {}
            layers = ((m // 4, n, 3), (m // 4, m // 4, 3), (m // 4, m // 4, 3), (m, m // 4, 1))
            convs |= {f"{name}.res_path.conv_{i}": c for i, c in enumerate(layers, start=1)}
            n = m
    state = {}
    for name, (out, n_in, k) in {**convs, "output.conv": (codes, n, 1)}.items():
        weight = torch.randn(out, n_in, k, k, generator=noise) / (n_in * k * k) ** 0.5
        state |= {f"blocks.{name}.w": weight, f"blocks.{name}.b": torch.zeros(out)}
    # standardised over smooth noise: otherwise one code takes nearly all patches
    imgs = F.interpolate(torch.rand(8, 3, 8, 8, generator=noise), 64, mode="bilinear")
    std, mean = torch.std_mean(Tokenizer(state, 64, 8).logits(0.8 * imgs + 0.1), (0, 2, 3))
    state["blocks.output.conv.w"] /= std[:, None, None, None]
    state["blocks.output.conv.b"] -= mean / std
    return state
