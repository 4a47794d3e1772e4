"""The figures of tools/visualize.py that take a model apart: reconstruct, attention."""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from types import SimpleNamespace

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

import cfmae
import coma_dyvit
import mcmae
import semanticmim
from common import (
    MASK, Normalize, patch_statistics, patchify, random_mask, split, uniform, unpatchify,
)  # fmt: skip
from downstream.encoders import open_encoder
from engine import UserError
from pictures import colorize, hide
from tools.charts import Series, chart, matplotlib, peek
from tools.figures import blend, enlarge, frame, heat, legend, numbers, open_images, sheet

MODELS = {
    "cfmae": (cfmae, cfmae.CFMAE),
    "semanticmim": (semanticmim, semanticmim.SemanticMIM),
    "mcmae": (mcmae, mcmae.MCMAE),
    "coma_dyvit": (coma_dyvit, coma_dyvit.CoMA),
}


# ------------------------------------------------------------------------------------ checkpoints


def read(path: str) -> tuple[str, dict]:
    """Method and content of a pre-training checkpoint; UserError where it is none."""
    method = peek(path).get("method", "cfmae")
    if method not in MODELS:
        raise UserError(f"{path} is of {method}; wanted a checkpoint of {', '.join(MODELS)}")
    return method, engine.load(path, method)


def check_finite(model: nn.Module, path: str) -> nn.Module:
    """The model; UserError where a weight is NaN or infinite: no picture could be drawn."""
    for name, p in model.state_dict().items():
        if p.is_floating_point() and not p.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; this run has diverged")
    return model


def load_model(path: str) -> tuple[str, nn.Module, int]:
    """Rebuild a whole pre-training model, decoder included: method, model, step.

    Errors: UserError where the file is no checkpoint of the four scripts.
    """
    method, checkpoint = read(path)
    script, build = MODELS[method]
    cfg = engine.load_config(path, script.Config, checkpoint["config"])
    if hasattr(cfg, "init"):  # what the run started from is not needed again
        cfg.init = None
    model = build(cfg).eval()
    engine.load_weights(model, checkpoint["model"], path)
    return method, check_finite(model, path), checkpoint["step"]


def open_encoders(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The encoders that --checkpoint, --init (any number) and --method name, by their captions."""
    sources = [{"checkpoint": path} for path in args.checkpoint or ()]
    heads = {} if args.num_heads is None else {"num_heads": args.num_heads}
    sources += [{"init": path, **heads} for path in args.init or ()]
    sources += [{"method": args.method, "model": args.encoder}] if args.method else []
    if not sources:
        raise UserError("name a --checkpoint, an --init or a --method to look at")
    found = {}
    for source in sources:
        encoder, description, _ = open_encoder(**source, random=args.random)
        words = " ".join(dict.fromkeys([description["method"], *map(str, source.values())]))
        step = f", step {peek(source['checkpoint'])['step']}" if "checkpoint" in source else ""
        fresh = args.random or "method" in source
        encoder = check_finite(encoder.eval(), words)
        found[words + (", fresh weights" if fresh else step)] = encoder
    return found


def image_size(args: argparse.Namespace, encoder: nn.Module) -> tuple[int, int]:
    """(H, W): --image-size, or what the encoder was trained with."""
    p, n = encoder.patch_size, args.image_size
    step = max(encoder.strides)
    if n is not None and (n < 1 or n % step):
        near = f"{max(n // step, 1) * step} or {(n // step + 1) * step}"
        raise UserError(f"--image-size {n} is not divisible by {step}; nearest: {near}")
    return (n, n) if n else tuple(p * k for k in encoder.grid)


# ------------------------------------------------------------------------------------ reconstruct


def choose_mask(args: argparse.Namespace, cfg: engine.Config, seed: Tensor) -> Tensor:
    """The mask that the flags ask for, (M, N) bool, of a sample with `seed` (1,).

    Without any: the method's random one. --only and --hide: whole granularities, the others visible
    or with --mask-ratio hidden in part. --patches: these, in all granularities that are shown.
    """
    names, N = getattr(cfg, "names", ("rgb",)), getattr(cfg, "num_positions", None)
    N, ratio = N or cfg.num_patches, args.mask_ratio
    for name in (*args.only, *args.hide):
        if name not in names:
            raise UserError(f"--only or --hide {name}: this model has {', '.join(names)}")
    if args.patches and ratio is not None or args.visible and not args.patches:
        raise UserError("--patches goes without --mask-ratio, --visible with --patches")
    if ratio is not None and not 0 <= ratio < 1:
        raise UserError(f"--mask-ratio {ratio} is outside [0, 1)")
    shown = torch.tensor([n in (args.only or names) and n not in args.hide for n in names])
    hidden = (~shown)[:, None].repeat(1, N)  # (M, N)
    if args.patches:
        chosen = torch.zeros(N, dtype=torch.bool)
        chosen[numbers(args.patches, N, "--patches")] = True
        hidden = hidden | (~chosen if args.visible else chosen)
    elif args.only or args.hide:
        noise = uniform(seed, len(names) * N, MASK).view(-1, N)
        hidden = hidden | random_mask(noise, round((ratio or 0) * N))
    else:
        cfg = dataclasses.replace(cfg, mask_ratio=cfg.mask_ratio if ratio is None else ratio)
        cfg.resolve()
        if isinstance(cfg, cfmae.Config):
            cfg, none = dataclasses.replace(cfg, masking="RD"), torch.zeros(1, N, dtype=torch.long)
            return cfmae.progressive_mask(cfg, seed, torch.ones(()), none, none)[0][0]
        if isinstance(cfg, semanticmim.Config):
            return semanticmim.make_mask(cfg, {"seed": seed}, None)
        if isinstance(cfg, mcmae.Config):
            return mcmae.make_mask(cfg, {"seed": seed}, None)
        return MODELS[type(cfg).__module__][1].make_mask(SimpleNamespace(cfg=cfg), seed)
    if hidden.all() or not hidden.any():
        raise UserError("the mask hides " + ("everything" if hidden.all() else "nothing"))
    return hidden


def pixels(model: nn.Module, pred: Tensor | None, rgb: Tensor, normalised: bool = False) -> Tensor:
    """Predicted patches (1, N, p*p*3), None for the true ones, as a picture (3, H, W) uint8.

    Where the target is normalised by patch, each gets its true mean and deviation back; or, with
    `normalised`, grey for 0 and a fifth of the range for a deviation, which the model made alone.
    """
    p, (H, W) = model.cfg.patch_size, rgb.shape[-2:]
    patches = patchify(model.normalize(rgb), p)
    mean, std = patch_statistics(patches) if model.cfg.norm_pix_loss else (0.0, 1.0)
    pred, grid = (patches - mean) / std if pred is None else pred, (H // p, W // p)
    if normalised and model.cfg.norm_pix_loss:
        x = 0.5 + 0.2 * unpatchify(pred, p, grid)
    else:
        x = unpatchify(pred * std + mean, p, grid) * model.normalize.std + model.normalize.mean
    return (x[0] * 255).round().clamp(0, 255).byte()


@torch.no_grad()
def predict(
    model: nn.Module, batch: dict[str, Tensor], mask: Tensor, normalised: bool = False
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Run a model on a mask (M, N): {what: (truth, prediction)}, pictures (3, H, W) uint8 each.

    `normalised`: as `pixels` takes it, for truth and prediction.
    """
    V, rgb = int((~mask).sum()), batch["rgb"]
    # what num_visible, which the models read, comes from
    cfg = model.cfg = dataclasses.replace(model.cfg, mask_ratio=1 - V / mask.numel())
    grid = (cfg.image_size // cfg.patch_size,) * 2

    def draw(pred: Tensor) -> tuple[Tensor, Tensor]:
        truth = pixels(model, None, rgb, True) if normalised else rgb[0]
        return truth, pixels(model, pred, rgb, normalised)

    if isinstance(model, cfmae.CFMAE):
        pred, found = model.predict(model.patches(batch), mask[None], V), {}
        for t in model.granularities:
            if t == "rgb":
                found[t] = draw(pred[t])
            else:
                labels = pred[t].unflatten(-1, (cfmae.LABELS, -1)).argmax(-1)  # (1, N, 16)
                found[t] = colorize(batch[t])[0], colorize(unpatchify(labels, 4, grid))[0, 0]
        return found
    imgs = model.normalize(rgb)
    if isinstance(model, semanticmim.SemanticMIM):
        target = model.make_target(rgb)
        pred = model.decoder_pred(model.tokens(imgs, mask))  # (1, M, C): hidden patches alone
        pred = pred if cfg.target == "hog" else pred.argmax(-1, keepdim=True)
        ids = split(mask, V)[1][..., None].expand_as(pred)
        both = [target, torch.zeros_like(target).scatter(1, ids, pred.to(target.dtype))]
        if cfg.target == "hog":
            drawn = [(semanticmim.draw_hog(x, grid)[0] * 255).byte().repeat(3, 1, 1) for x in both]
        else:
            drawn = [colorize(x.view(grid) % 254 + 1) for x in both]
            drawn[1] = drawn[1] * mask.view(grid)  # visible patches are not predicted
        return {"rgb": (rgb[0], None), cfg.target: tuple(drawn)}
    if isinstance(model, mcmae.MCMAE):
        return {"rgb": draw(model.predict(imgs, mask))}
    pred = model.predict(imgs, mask, V)
    if cfg.method == "mae":
        return {"rgb": draw(pred)}
    other = model.complement(imgs, mask)
    whole = coma_dyvit.assemble(pred, other, mask)
    return {
        "rgb": draw(pred), "the complement": draw(other),
        "assembled (Eq. 2), nothing seen": draw(whole),
    }


def reconstruct(args: argparse.Namespace) -> None:
    method, model, step = load_model(args.checkpoint)
    cfg, rows, labels, side, maps = model.cfg, [], [], args.side, []
    names, classes = getattr(cfg, "names", ("rgb",)), getattr(cfg, "semantic_classes", 255)
    if method == "semanticmim":
        side = max(side, 24 * cfg.image_size // cfg.patch_size)
    for name, batch in open_images(args, cfg.image_size, cfg.patch_size, names, classes):
        mask = choose_mask(args, cfg, batch["seed"])
        share = mask.float().mean()
        found = predict(model, batch, mask, args.normalised)
        for m, (what, (truth, pred)) in enumerate(found.items()):
            hidden = mask[m if len(mask) > 1 else 0]
            hidden = ~hidden if what == "the complement" else hidden
            n = math.isqrt(len(hidden))
            if "Eq." in what:
                rows.append([truth, None, pred, None])
            else:
                hidden = enlarge(hidden.view(n, n), truth.shape[-2:])
                both = None if pred is None else pred.where(hidden, truth)
                rows.append([truth, hide(truth, hidden), pred, both])
            labels.append(f"{name} {what}")
            maps += [truth, pred] if what == "semantic" else []
    how = f"{share:.1%} hidden" + ("" if args.patches else f", --seed {args.seed}")
    how += f", only {' '.join(args.only)} visible" if args.only else ""
    how += f", {' '.join(args.hide)} hidden whole" if args.hide else ""
    chosen = f", patches {args.patches} {'visible' if args.visible else 'hidden'}"
    how += chosen if args.patches else ""
    note = "; predicted pixels have each patch's true mean and standard deviation"
    note = "; pixels normalised by patch, nothing true put in" if args.normalised else note
    note = note if getattr(cfg, "norm_pix_loss", False) else ""
    note += "; the third column means nothing where patches are visible: no loss there"
    note = note if method != "semanticmim" else ""
    caption = f"{method} {cfg.model}, {args.checkpoint}, step {step}; {args.data}; {how}{note}"
    columns = ("input = truth", "visible", "prediction", "prediction, visible patches laid over")
    key = legend(args, maps)
    sheet(args.output, caption, columns, rows, labels, side, args.palette, key)


# -------------------------------------------------------------------------------------- attention


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
    if not hasattr(encoder, "attention"):
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
        imgs = Normalize()(batch["rgb"])
        maps = {i: encoder.attention(imgs, i) for i in layers}
        yield name, batch["rgb"][0], encoder.grid_of(imgs), maps


def attention(args: argparse.Namespace) -> None:
    if args.distance or args.proxy_mean:
        args.images = args.images or "0-15"
    draw = proxy_means if args.proxy_mean else attention_maps
    (distances if args.distance else draw)(args, open_encoders(args))


def letters(encoders: dict[str, nn.Module]) -> list[str]:
    """What tells several encoders apart in a picture: "A: ", "B: "; nothing for one alone."""
    return [f"{chr(65 + n)}: " if len(encoders) > 1 else "" for n in range(len(encoders))]


def key(encoders: dict[str, nn.Module]) -> str:
    """What the letters stand for."""
    return "; ".join(letter + name for letter, name in zip(letters(encoders), encoders))


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
