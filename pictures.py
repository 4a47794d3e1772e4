"""Pictures of what a run does: label maps in colour, and labelled sheets of images as PNG."""

import colorsys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def colorize(label_map: Tensor) -> Tensor:
    """Colour a label map (..., H, W) of ids 0..255: (..., 3, H, W) uint8, the same id always alike.

    0 is dark grey and 255 (unlabelled) black; the others step around the hue circle by the golden
    ratio, so that neighbouring ids are far apart.
    """
    colours = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.9 - 0.4 * (i // 3 % 2), 0.95 - 0.3 * (i // 7 % 2))
        for i in range(256)
    ]
    colours[0], colours[255] = (0.25, 0.25, 0.25), (0.0, 0.0, 0.0)
    table = (torch.tensor(colours) * 255).byte().to(label_map.device)
    return table[label_map.long()].movedim(-1, -3)


def hide(x: Tensor, hidden: Tensor) -> Tensor:
    """Hatch a picture (..., H, W) uint8 where `hidden` (..., H, W) is True: grey lines on white.

    Nothing that is visible looks so; plain grey could be a label map's background.
    """
    H, W = x.shape[-2:]
    step = max(4, H // 14)
    lines = (torch.arange(H)[:, None] + torch.arange(W)) % step < step // 4
    return torch.where(hidden, torch.where(lines, 160, 240).to(x), x)


def contact_sheet(columns: dict[str, Tensor], path: Path, caption: str, side: int = 192) -> None:
    """Write a PNG with one column a caption and one row a sample.

    Args:
        columns: caption -> (B, 3, H, W) uint8; sizes may differ, all are drawn `side` pixels high.
        path: the file to write.
        caption: a line above everything, which says what is shown and from what.
    """
    margin, head = 4, 30
    cells = {k: _resized(v, side) for k, v in columns.items()}
    rows = max(len(v) for v in cells.values())
    widths = [v[0].width + margin for v in cells.values()]
    sheet = Image.new("RGB", (sum(widths) + margin, head + rows * (side + margin)), "white")
    draw, x = ImageDraw.Draw(sheet), margin
    draw.text((margin, 2), caption, fill="black")
    for (name, images), width in zip(cells.items(), widths):
        draw.text((x, 16), name, fill="black")
        for row, image in enumerate(images):
            sheet.paste(image, (x, head + row * (side + margin)))
        x += width
    sheet.save(path)


def _resized(images: Tensor, side: int) -> list[Image.Image]:
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    size = (round(side * arrays.shape[2] / arrays.shape[1]), side)
    return [Image.fromarray(a).resize(size, Image.Resampling.NEAREST) for a in arrays]


def columns(reconstruction: dict[str, tuple]) -> dict[str, Tensor]:
    """The columns of a contact sheet: truth, what is visible of it, and the prediction of the rest.

    Args:
        reconstruction: name -> (truth, hidden, prediction). Truth and prediction are images
            (B, 3, H, W) uint8 or label maps (B, H, W); hidden (B, h, w) bool, True = hidden, on any
            grid that divides the image; None shows the prediction whole. A prediction may be None.
    """
    found = {}
    for name, (truth, hidden, pred) in reconstruction.items():
        none = pred is None
        truth, pred = (colorize(x) if x.ndim == 3 else x for x in (truth, truth if none else pred))
        found[name] = truth
        if hidden is not None:
            scale = [n // m for n, m in zip(truth.shape[-2:], hidden.shape[-2:])]
            hidden = hidden.repeat_interleave(scale[0], 1).repeat_interleave(scale[1], 2)[:, None]
            found[f"{name}: visible"] = truth.masked_fill(hidden, 255)
            pred = pred.where(hidden, truth)
        if not none:
            found[f"{name}: prediction"] = pred
    return found
