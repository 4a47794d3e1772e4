"""The figures of `tools.visualize attention`: what tokens of a plain ViT attend to."""

import argparse
from collections.abc import Iterator

import engine  # noqa: F401 - before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from engine import UserError
from tools.charts import Series, chart, matplotlib
from tools.figures import blend, enlarge, frame, heat, open_images, sheet
from tools.models import image_size, key, letters, open_encoders
from vit import Encoder


def attention_distance(attention: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Mean distance in pixels between a query patch and what it attends to, a head.

    Each query's weights on patches, made to sum to one without the prefix tokens, average the
    distance between patch centres (SemanticMIM App. A, after Dosovitskiy et al. 2021); then the
    mean over queries and images.

    Args:
        attention: (B, heads, P + L, P + L), P prefix tokens first.
        grid: (h, w) of the L patches.
    Returns: (heads,) float.
    """
    # NOTE paper unclear: "all other patches". The query itself, at distance 0, keeps its weight.
    rows = torch.cartesian_prod(*(torch.arange(n) for n in grid)).float() * patch_size
    a = attention[:, :, -len(rows) :, -len(rows) :]
    mean = (a * torch.cdist(rows, rows)).sum(-1) / a.sum(-1)  # (B, heads, L)
    return mean.mean((0, 2))


def queries(args: argparse.Namespace, encoder: nn.Module, grid: tuple[int, int]) -> dict[str, int]:
    """Tokens of --query by name: patches "row,col", "cls", or "proxies", each of them."""
    h, w = grid
    prefix = ["cls"] if hasattr(encoder, "cls_token") else []
    prefix += [f"proxy {i}" for i in range(encoder.num_prefix - len(prefix))]
    found = {}
    for text in args.query or [f"{h // 2},{w // 2}"]:
        parts = text.split(",")
        if text in ("cls", "proxies"):
            mine = {name: i for i, name in enumerate(prefix) if (name == "cls") == (text == "cls")}
            if not mine:
                have = ", ".join(prefix) or "none"
                raise UserError(f"--query {text}: this encoder has no such token; it has {have}")
            found |= mine
        elif len(parts) == 2 and all(map(str.isdecimal, parts)):
            row, col = map(int, parts)
            if row >= h or col >= w:
                raise UserError(f"--query {text}: the grid is {h} x {w}, numbered from 0")
            found[f"patch {text}"] = encoder.num_prefix + row * w + col
        else:
            raise UserError(f"--query {text!r}: wanted ROW,COL, cls or proxies")
    return found


def layers_of(args: argparse.Namespace, encoder: nn.Module) -> list[int]:
    """Layers to look at, from 1; default: two thirds up, 8 of 12, as in SemanticMIM Fig. 1.

    What patches ask in SemanticMIM's last layer is not trained: only proxies ask there.
    """
    if type(encoder).attention is Encoder.attention:
        raise UserError("attention maps are for plain ViTs; this encoder is hierarchical")
    depth = len(encoder.blocks)
    if args.layer is not None and not 1 <= args.layer <= depth:
        raise UserError(f"--layer {args.layer} is outside 1 to {depth}")
    everywhere = args.depth or args.distance
    return list(range(1, depth + 1)) if everywhere else [args.layer or max(1, round(depth * 2 / 3))]


@torch.no_grad()
def attentions(
    args: argparse.Namespace, encoder: nn.Module, layers: list[int]
) -> Iterator[tuple[str, Tensor, tuple[int, int], dict[int, Tensor]]]:
    """Yield name, rgb (3, H, W), grid and {layer: (1, heads, P + L, P + L)} of each image."""
    for name, batch in open_images(args, image_size(args, encoder), encoder.patch_size):
        imgs = encoder.normalize(batch["rgb"])
        maps = {i: encoder.attention(imgs, i) for i in layers}
        yield name, batch["rgb"][0], encoder.grid_of(imgs), maps


def attention(args: argparse.Namespace) -> None:
    if args.distance or args.proxy_mean:
        args.images = args.images or "0-15"
    draw = proxy_means if args.proxy_mean else attention_maps
    (distances if args.distance else draw)(args, open_encoders(args))


def attention_maps(args: argparse.Namespace, encoders: dict[str, nn.Module]) -> None:
    """Rows: images and queries. Columns: layers or heads, of each encoder."""
    rows, columns = {}, {}
    for letter, encoder in zip(letters(encoders), encoders.values()):
        p, P, layers = encoder.patch_size, encoder.num_prefix, layers_of(args, encoder)
        for name, rgb, (h, w), maps in attentions(args, encoder, layers):
            for query, token in queries(args, encoder, (h, w)).items():
                at = token - P
                boxed = frame(rgb, at // w * p, at % w * p, p) if at >= 0 else rgb
                cells = {"input": boxed}
                for i, a in maps.items():
                    x = a[0, :, token, P:].unflatten(1, (h, w))  # (heads, h, w)
                    views = {f" head {k + 1}": y for k, y in enumerate(x)}
                    for head, y in (views if args.heads else {"": x.mean(0)}).items():
                        cell = enlarge(heat(y / y.amax().clamp(min=1e-30)), rgb.shape[-2:])
                        cells[f"{letter}layer {i}{head}"] = blend(rgb, cell, 0.75)
                rows.setdefault(f"{name} {query}", {}).update(cells)
                columns |= dict.fromkeys(cells)
    how = "each head" if args.heads else "mean over heads"
    caption = f"{key(encoders)}; {args.data}; attention from the query (red) to patches, {how}, "
    caption += "each map scaled to its own largest value"
    table = [[row.get(c) for c in columns] for row in rows.values()]
    sheet(args.output, caption, list(columns), table, list(rows), args.side, args.palette)


def proxy_means(args: argparse.Namespace, encoders: dict[str, nn.Module]) -> None:
    """Mean map of each prefix token over the images (SemanticMIM Fig. 9), rows: layers."""
    rows, labels = [], []
    for letter, encoder in zip(letters(encoders), encoders.values()):
        P, layers, count = encoder.num_prefix, layers_of(args, encoder), 0
        if P == 0:
            raise UserError("--proxy-mean: this encoder has neither a class token nor proxies")
        total = dict.fromkeys(layers, 0)
        for _, _, grid, maps in attentions(args, encoder, layers):
            means = {i: a[0, :, :P, P:].mean(0).unflatten(1, grid) for i, a in maps.items()}
            total, count = {i: total[i] + x for i, x in means.items()}, count + 1
        for i, x in total.items():  # (P, h, w)
            x = x / x.mean((1, 2), keepdim=True)
            unit = nn.functional.normalize((x - 1).flatten(1), dim=1)
            alike = (unit @ unit.T).fill_diagonal_(0).sum() / max(P * (P - 1), 1)
            rows.append([heat((y - y.amin()) / (y.amax() - y.amin()).clamp(min=1e-9)) for y in x])
            words = f"{letter}layer {i}; {x.amin():.2f} to {x.amax():.2f} x mean"
            labels.append(words + (f"; correlation of two {alike:.2f}" if P > 1 else ""))
    columns = [f"token {k}" for k in range(max(map(len, rows)))]
    caption = f"{key(encoders)}; attention of each prefix token (class token or proxies), mean "
    caption += f"over heads and {count} images of {args.data}, each map scaled to its own range"
    sheet(args.output, caption, columns, rows, labels, args.side, args.palette)


def distances(args: argparse.Namespace, encoders: dict[str, nn.Module]) -> None:
    """Mean attention distance of each head (dots) and layer (line), SemanticMIM Fig. 13."""
    matplotlib()  # before the work, not after it
    series, count = [], 0
    for n, (letter, encoder) in enumerate(zip(letters(encoders), encoders.values())):
        layers, p, found = layers_of(args, encoder), encoder.patch_size, []
        for _, _, grid, maps in attentions(args, encoder, layers):
            found.append(torch.stack([attention_distance(a, grid, p) for a in maps.values()]))
        x = torch.stack(found).mean(0)  # (layers, heads)
        count, L = len(found), grid[0] * grid[1]
        print(f"{letter}mean distance of layers: {', '.join(f'{y:.1f}' for y in x.mean(1))} pixels")
        even = attention_distance(torch.ones(1, 1, L, L), grid, p).item()
        series += [Series("", [i] * x.shape[1], y.tolist(), n, True) for i, y in zip(layers, x)]
        series.append(Series(f"{letter}mean of heads", layers, x.mean(1).tolist(), n))
        if even not in {s.y[0] for s in series if "even" in s.label}:
            series.append(Series(f"even attention, {L} patches", layers, [even] * len(layers), -1))
    caption = f"{key(encoders)}; mean over {count} images of {args.data}; dots are heads"
    panel = ("mean attention distance, pixels", "layer", series)
    chart(args.output, caption, [panel], size=(640, 360), palette=args.palette)
