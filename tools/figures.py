"""What tools/visualize.py draws, and what it draws with: images of a folder; sheets, heat.

Pillow is all it needs.
"""

import argparse
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import engine  # noqa: F401 - before torch: it sets how threads wait

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import files
import shapes
from downstream.photos import photographs
from engine import UserError
from pictures import colorize, hide

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
    if args.data == "shapes" or Path(args.data).is_file():
        return tuple(data.GRANULARITIES)[: None if args.data == "shapes" else 1]
    return tuple(files.layout(*where(args)))


def open_images(
    args: argparse.Namespace, size: int | tuple[int, int], patch_size: int,
    granularities: tuple[str, ...] = ("rgb",), classes: int = 255,
) -> Iterator[tuple[str, dict[str, Tensor]]]:  # fmt: skip
    """Yield (name, batch of one) of the images that --images chooses, by default the first four,
    or of the photograph that --data is: centre crops.

    Images that cannot be read are left out, which a line on stderr says.
    """
    (root, split), listed, one = where(args), None, Path(args.data).is_file()
    if one:
        (root, listed), split = photographs([args.data]), ""
        if lacking := [m for m in granularities if m != "rgb"]:
            raise UserError(f"{args.data} has no {' and '.join(lacking)} map, which this needs")
    dataset = data.open_dataset(root, split, size, patch_size, granularities, (1.0, 1.0), False,
                                args.seed, listed, semantic_classes=classes)  # fmt: skip
    images, yielded = "0" if one else args.images or f"0-{min(4, len(dataset)) - 1}", 0
    chosen = numbers(images, len(dataset), "--images")
    for i in chosen:
        if args.data != "shapes":
            try:
                dataset.load(i)  # dataset[0, i] would take the next one for it
            except data.Unreadable as e:
                left_out(str(e))
                continue
        batch = data.collate([dataset[0, i]])
        if "error" in batch:
            raise UserError(batch["error"])
        yielded += 1
        yield dataset.files.name(i) if args.data != "shapes" else f"scene {i}", batch
    if not yielded:
        raise UserError(f"none of the images {images} of {args.data} can be read")


@functools.cache  # a picture may go through the images several times
def left_out(what: str) -> None:
    print(f"left out: {what}", file=sys.stderr)


def class_names(folder: str) -> Sequence[str]:
    """Names of semantic ids: ShapeScenes', the lines of classes.txt, or categories.json as COCO's.

    Both files lie beside train/ and val/; without them, no names.
    """
    if folder == "shapes":
        return shapes.ShapeScenes.SEMANTIC_NAMES
    if (path := Path(folder, "classes.txt")).is_file():
        return path.read_text(errors="replace").splitlines()
    if (path := Path(folder, "categories.json")).is_file():
        try:
            return [str(c["name"]) for c in json.loads(path.read_text())]
        except (ValueError, TypeError, KeyError):
            raise UserError(f'{path}: wanted a list of {{"name": ...}}, as COCO has it') from None
    return ()


def legend(args: argparse.Namespace, maps: Sequence[Tensor]) -> dict[str, tuple | None]:
    """{class: its colour} of the semantic maps (1, h, w) in a figure, by number, for `sheet`.

    Of more than 30 classes the 30 that cover most.
    """
    if not maps:
        return {}
    names = class_names(args.data)
    table = [tuple(c) for c in colorize(torch.arange(256)[:, None])[..., 0].T.tolist()]
    ids, counts = torch.cat([x.flatten() for x in maps]).unique(return_counts=True)
    area = dict(zip(ids.tolist(), counts.tolist()))
    few = sorted(sorted(area, key=area.get, reverse=True)[:30])
    found = {"semantic maps:": None}
    found |= {names[i] if i < len(names) else f"class {i}": table[i] for i in few if i < 255}
    found |= {"unlabelled": table[255]} if 255 in few else {}
    return found | ({f"and {len(area) - 30} more": None} if len(area) > 30 else {})


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
    """Picture of a granularity, (3, H, W) uint8, hatched where `mask` (N,) hides it."""
    x = batch[name][0] if name == "rgb" else colorize(batch[name])[0]
    if mask is None:
        return x
    n = math.isqrt(mask.numel())
    return hide(x, enlarge(mask.view(n, n), x.shape[-2:]))


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
    key: dict[str, tuple | None] | None = None, bands: Sequence[int] = (),
) -> None:  # fmt: skip
    """Write a table of pictures as PNG.

    Args:
        caption: stands above everything, and says what is shown and from what.
        columns: a title for each column.
        rows: of cells (3, H, W) uint8, drawn `side` pixels high; None leaves a place empty.
        labels: a word before each row, or none at all.
        key: words with a colour each or None, shown below the caption.
        bands: numbers of columns, where the table is cut: the parts stand below each other.
    """
    face, gap = font(11), 4
    cells = [[None if x is None else picture(x, side) for x in row] for row in rows]
    widths = [max((row[i].width for row in cells if row[i]), default=side)
              for i in range(len(columns))]  # fmt: skip
    titles = [wrap(t, face, w) for t, w in zip(columns, widths)]
    labels = [wrap(label, face, 110) for label in labels]
    words = [word for label in labels for word in label.split("\n")]
    left = gap + (math.ceil(max(map(face.getlength, words))) + 2 * gap if words else 0)
    ends = [0, *itertools.accumulate(bands or [len(columns)])]
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    width = max(420, *(left + sum(w + gap for w in widths[part]) for part in parts))
    caption = wrap(caption, face, width - 2 * gap)
    top, x, swatches = height(caption, face) + 2 * gap, gap, []
    for word, colour in (key or {}).items():
        step = 14 * bool(colour) + math.ceil(face.getlength(word)) + 3 * gap
        x, top = (gap, top + 16) if x + step > width else (x, top)
        swatches.append((x, top, word, colour))
        x += step
    top += 20 * bool(swatches)
    heads = [max(height(t, face) for t in titles[part]) + gap for part in parts]
    tall = top + sum(heads) + len(parts) * len(rows) * (side + gap)
    image = Image.new("RGB", (width, tall), "white")
    draw = ImageDraw.Draw(image)
    draw.text((gap, gap // 2), caption, "black", face)
    for x, y, word, colour in swatches:
        if colour:
            draw.rectangle((x, y + 2, x + 10, y + 12), colour)
        draw.text((x + 14 * bool(colour), y), word, "black", face)
    for part, head in zip(parts, heads):
        x = left
        for title, w in zip(titles[part], widths[part]):
            draw.text((x, top), title, "black", face)
            x += w + gap
        top += head
        for r, row in enumerate(cells):
            x = left
            if labels:
                draw.text((gap, top), labels[r], "black", face)
            for cell, w in zip(row[part], widths[part]):
                if cell:
                    image.paste(cell, (x, top))
                x += w + gap
            top += side + gap
    save(image, path, palette)
