"""What tools/visualize.py draws, and what it draws with: images of a folder; sheets, charts, heat.

Pillow is all it needs.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
from engine import UserError
from pictures import colorize

GREY = 128  # of what is hidden
# Okabe and Ito's colours, which the colour-blind can tell apart; black last
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
HEAT = ((0, 0, 10), (70, 15, 110), (165, 45, 95), (235, 105, 40), (250, 190, 60), (252, 255, 165))


# ----------------------------------------------------------------------------------- images


def numbers(text: str, limit: int, what: str) -> list[int]:
    """Read "3,17-20" as [3, 17, 18, 19, 20]; UserError where one is not below `limit`."""
    try:
        ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
    except ValueError:
        ends = [[]]
    if not all(0 < len(e) < 3 and e[0] <= e[-1] for e in ends):
        raise UserError(f"{what} {text!r}: wanted numbers and ranges, as 3,17-20")
    if max(e[-1] for e in ends) >= limit:
        raise UserError(f"{what} {text!r}: there are {limit}, numbered from 0")
    return [i for e in ends for i in range(e[0], e[-1] + 1)]


def where(args: argparse.Namespace) -> tuple[str, str]:
    """Root and split of --data; a folder without train/ and val/ is itself a split."""
    root = Path(args.data)
    inside = [root / split for split in ("train", "val", args.split)]
    if args.data != "shapes" and root.is_dir() and not any(p.is_dir() for p in inside):
        return str(root.resolve().parent), root.resolve().name
    return args.data, args.split


def available(args: argparse.Namespace) -> tuple[str, ...]:
    """The granularities that --data has."""
    return data.GRANULARITIES if args.data == "shapes" else tuple(data.layout(*where(args)))


def open_images(
    args: argparse.Namespace, size: int | tuple[int, int], patch_size: int,
    granularities: tuple[str, ...] = ("rgb",), classes: int = 255,
) -> Iterator[tuple[str, dict[str, Tensor]]]:  # fmt: skip
    """Yield (name, batch of one) of the images that --images chooses: centre crops."""
    dataset = data.open_dataset(*where(args), size, patch_size, granularities, (1.0, 1.0), False,
                                args.seed, semantic_classes=classes)  # fmt: skip
    for i in numbers(args.images or "0-3", len(dataset), "--images"):
        batch = engine.raise_error(data.collate([dataset[0, i]]))
        name = dataset.files.name(i) if hasattr(dataset, "files") else f"scene {i}"
        if batch["bad"] >= 0:
            raise UserError(f"{name} cannot be read")
        yield name, batch


# --------------------------------------------------------------------------------- pictures


def font(size: int) -> ImageFont.ImageFont:
    """Pillow's own font; without FreeType, or before Pillow 10.1, its small bitmap font."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


def wrap(text: str, face: ImageFont.ImageFont, width: float) -> str:
    """Break text into lines of at most `width` pixels, words that are longer left whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def height(text: str, face: ImageFont.ImageFont) -> int:
    """Height of a block of lines, as `ImageDraw.text` draws it."""
    return math.ceil(ImageDraw.Draw(Image.new("1", (1, 1))).textbbox((0, 0), text, face)[3])


def heat(x: Tensor) -> Tensor:
    """Colour (h, w) numbers in [0, 1], from black over red to light yellow: (3, h, w) uint8."""
    table = torch.tensor(HEAT, dtype=torch.float32)
    at = x.float().clamp(0, 1) * (len(HEAT) - 1)
    low = at.long().clamp(max=len(HEAT) - 2)
    colours = table[low].lerp(table[low + 1], (at - low)[..., None])  # (h, w, 3)
    return colours.round().byte().movedim(-1, 0)


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the cells of (..., h, w) to `size` (H, W), multiples of h and w."""
    x = x.repeat_interleave(size[0] // x.shape[-2], -2)
    return x.repeat_interleave(size[1] // x.shape[-1], -1)


def look(batch: dict[str, Tensor], name: str, mask: Tensor | None = None) -> Tensor:
    """Picture of a granularity, (3, H, W) uint8, grey where `mask` (N,) hides it."""
    x = batch[name][0] if name == "rgb" else colorize(batch[name])[0]
    if mask is None:
        return x
    n = math.isqrt(mask.numel())
    return x.masked_fill(enlarge(mask.view(n, n), x.shape[-2:]), GREY)


def blend(rgb: Tensor, other: Tensor, share: float) -> Tensor:
    """Lay (3, H, W) over the grey version of another picture, `share` of it showing."""
    return rgb.float().mean(0, keepdim=True).lerp(other.float(), share).round().byte()


def frame(rgb: Tensor, top: int, left: int, side: int) -> Tensor:
    """Draw a red square, its upper left corner at (top, left), on a copy of (3, H, W) uint8."""
    inside, t = torch.zeros(rgb.shape[1:], dtype=torch.bool), max(1, rgb.shape[1] // 96)
    inside[top : top + side, left : left + side] = True
    inside[top + t : top + side - t, left + t : left + side - t] = False
    return torch.where(inside, torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None], rgb)


def picture(x: Tensor, side: int) -> Image.Image:
    """(3, H, W) uint8 as an image `side` pixels high: enlarged by cells, reduced by means."""
    image = Image.fromarray(x.cpu().permute(1, 2, 0).contiguous().numpy())
    size = (max(1, round(side * image.width / image.height)), side)
    how = Image.Resampling.NEAREST if side >= image.height else Image.Resampling.BOX
    return image.resize(size, how)


def save(image: Image.Image, path: str | Path, palette: bool) -> None:
    """Write a PNG and make its folder; `palette`: 256 colours, a small file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image = image.quantize(256, dither=Image.Dither.NONE) if palette else image
    image.save(path, "PNG", optimize=True)


def sheet(
    path: str | Path, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Tensor | None]],
    labels: Sequence[str] = (), side: int = 128, palette: bool = False,
) -> None:  # fmt: skip
    """Write a table of pictures as PNG.

    Args:
        caption: stands above everything, and says what is shown and from what.
        columns: a title for each column.
        rows: of cells (3, H, W) uint8, drawn `side` pixels high; None leaves a place empty.
        labels: a word before each row, or none at all.
    """
    face, gap = font(11), 4
    cells = [[None if x is None else picture(x, side) for x in row] for row in rows]
    widths = [max((row[i].width for row in cells if row[i]), default=side)
              for i in range(len(columns))]  # fmt: skip
    titles = [wrap(t, face, w) for t, w in zip(columns, widths)]
    labels = [wrap(label, face, 110) for label in labels]
    words = [word for label in labels for word in label.split("\n")]
    left = gap + (math.ceil(max(map(face.getlength, words))) + 2 * gap if words else 0)
    width = max(left + sum(w + gap for w in widths), 420)
    caption = wrap(caption, face, width - 2 * gap)
    top = height(caption, face) + 2 * gap
    head = top + max(height(t, face) for t in titles) + gap
    image = Image.new("RGB", (width, head + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((gap, gap // 2), caption, "black", face)
    for r, row in enumerate(cells):
        x, y = left, head + r * (side + gap)
        if labels:
            draw.text((gap, y), labels[r], "black", face)
        for cell, title, w in zip(row, titles, widths):
            if r == 0:
                draw.text((x, top), title, "black", face)
            if cell:
                image.paste(cell, (x, y))
            x += w + gap
    save(image, path, palette)


# ----------------------------------------------------------------------------------- charts


@dataclass
class Series:
    """Points of a chart: numbers x and y of equal length, a line or dots, a place in COLOURS."""

    label: str  # "": not in the legend
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dots: bool = False


def ticks(low: float, high: float, most: int = 6, least: float = 0.0) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` steps of at least `least`."""
    raw = max((high - low) / most, least)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(k * unit for k in (1, 2, 2.5, 5, 10) if k * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-6)
    return [i * step for i in range(first, math.floor(high / step + 1e-6) + 1)]


def chart(
    path: str | Path, caption: str, panels: Sequence[tuple[str, str, Sequence[Series]]],
    columns: int = 1, size: tuple[int, int] = (560, 280), palette: bool = False,
) -> None:  # fmt: skip
    """Write line charts as PNG.

    Args:
        panels: (title, name of the x axis, series) of each; points that are not finite are left
            out. y starts at 0 where all values are positive and spread over most of the range.
        columns: panels side by side.
        size: of a panel, in pixels.
    """
    k = 2  # drawn twice as large, then reduced: smooth lines
    columns, face = min(columns, len(panels)), font(11 * k)
    (W, H), count = (n * k for n in size), math.ceil(len(panels) / columns)
    caption = wrap(caption, face, W * columns - 8 * k)
    top = height(caption, face) + 6 * k
    image = Image.new("RGB", (W * columns, top + H * count), "white")
    draw = ImageDraw.Draw(image)
    draw.text((4 * k, 2 * k), caption, "black", face)
    for n, (title, axis, series) in enumerate(panels):
        _panel(draw, face, k, n % columns * W, top + n // columns * H, W, H, title, axis, series)
    save(image.resize((image.width // k, image.height // k), Image.Resampling.BOX), path, palette)


def _panel(draw, face, k, x0, y0, W, H, title, axis, series) -> None:
    """Draw one chart into the W x H pixels at (x0, y0); `k` pixels are one of the result."""
    points = [[(x, y) for x, y in zip(s.x, s.y) if math.isfinite(x) and math.isfinite(y)]
              for s in series]  # fmt: skip
    xs, ys = zip(*(p for part in points for p in part)) if any(points) else ((0, 1), (0, 1))
    low, high = min(ys), max(ys)
    low = 0.0 if 0 <= low < 0.5 * high else low
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    low, high = low - 0.05 * (high - low) * (low != 0), high + 0.05 * (high - low)
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    a, b, c, d = x0 + 56 * k, x0 + W - 14 * k, y0 + 38 * k, y0 + H - 34 * k  # the box of the axes

    def place(x: float, y: float) -> tuple[float, float]:
        return a + (b - a) * (x - left) / (right - left), d - (d - c) * (y - low) / (high - low)

    for value in ticks(low, high):
        y = place(left, value)[1]
        draw.line([(a, y), (b, y)], "#dddddd", k)
        draw.text((a - 4 * k, y), f"{value:.4g}", "black", face, anchor="rm")
    whole = all(x == int(x) for x in xs)
    for value in ticks(left, right, least=float(whole)):
        x = place(value, low)[0]
        draw.line([(x, d), (x, d + 4 * k)], "black", k)
        draw.text((x, d + 5 * k), f"{value:.6g}", "black", face, anchor="mt")
    draw.rectangle((a, c, b, d), outline="black", width=k)
    draw.text(((a + b) / 2, d + 19 * k), axis, "black", face, anchor="mt")
    draw.text((a, y0 + 6 * k), title, "black", face)
    x = a
    for s, part in zip(series, points):
        colour = COLOURS[s.colour % len(COLOURS)]
        at = [place(*p) for p in part]
        if s.dots or len(at) == 1:
            for px, py in at:
                draw.ellipse((px - 2 * k, py - 2 * k, px + 2 * k, py + 2 * k), fill=colour)
        elif at:
            draw.line(at, colour, 2 * k, joint="curve")
        if s.label:
            if s.dots:
                draw.ellipse((x + 2 * k, y0 + 27 * k, x + 6 * k, y0 + 31 * k), fill=colour)
            else:
                draw.line([(x, y0 + 29 * k), (x + 8 * k, y0 + 29 * k)], colour, 2 * k)
            draw.text((x + 12 * k, y0 + 22 * k), s.label, "black", face)
            x += 22 * k + face.getlength(s.label)
