"""The papers' figures from a checkpoint, a configuration or a log: one sub-command a picture (PNG).

    reconstruct  CFMAE Figs. 3, 4, 7-10; any method   input, what is visible, prediction, both
    attention    CFMAE Fig. 1, SemanticMIM Figs. 1, 7, 8, 15, 16; --depth Fig. 14;
                 --proxy-mean Fig. 9; --distance Fig. 13
    masks        what every method hides; --over-training: CFMAE's curriculum; --frequency: CoMA
                 Fig. 2
    schedule     CFMAE Fig. 5, and the learning rate
    features     MCMAE Fig. 5: a pyramid by its first three principal components
    dataset      CFMAE Fig. 6: images beside their maps
    log          loss terms, rate, images/s of runs
    results      what transfer gave over a setting of pre-training, or parameters: SemanticMIM
                 Figs. 5, 6 (proxies, mask_ratio), CoMA Fig. 5, MCMAE Fig. 4 (epochs)

    python -m tools.visualize reconstruct --checkpoint runs/x/last.pt --output reconstruct.png
    python -m tools.visualize attention --checkpoint runs/x/last.pt --query 3,4 --output maps.png

Images: `--data shapes`, ROOT/{train,val}/... as data.py has it, or a folder of bare images. `masks`
and `schedule` take the flags of the method's script, too: `--model base --epochs 1600`. schedule,
log, results and --distance are charts, for which `pip install matplotlib`.
"""

import argparse
import dataclasses
from types import SimpleNamespace

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor

import cfmae
import coma_dyvit
import data
from common import Normalize
from engine import UserError
from tools.charts import Series, chart, log, results
from tools.figures import available, blend, heat, legend, look, open_images, sheet, where
from tools.model_figures import (
    MODELS, attention, image_size, key, letters, open_encoders, read, reconstruct,
)  # fmt: skip


# ------------------------------------------------------------------------------ masks, schedule


def configure(args: argparse.Namespace, method: str, *flags: str) -> engine.Config:
    """A method's configuration: that of --checkpoint, or its preset with the flags left over."""
    if getattr(args, "checkpoint", None):
        method, checkpoint = read(args.checkpoint)
        return engine.load_config(args.checkpoint, MODELS[method][0].Config, checkpoint["config"])
    script, given = MODELS[method][0], ["--data", args.data, *args.rest, *flags]
    return engine.parse(script.Config, script.PRESETS, script.__doc__, given)


def cfmae_masks(cfg: cfmae.Config, batch: dict, progress: float, kind: str = "") -> Tensor:
    """CFMAE's mask (M, N) of one image at a moment of training, or one `kind` of mask alone."""
    cfg = dataclasses.replace(cfg, masking=kind or cfg.masking)
    return cfmae.make_mask(cfg, batch, torch.tensor(progress))[0][0]


def masks(args: argparse.Namespace) -> None:
    args.images = args.images or "0-1"
    if args.frequency is not None:
        return frequency(args)
    if args.over_training is not None:
        return over_training(args)
    rows, bands, shares, maps = {}, [], [], []
    have = available(args) if args.method in (None, "cfmae") else ("rgb",)
    if args.method in (None, "cfmae"):
        cfg = configure(args, "cfmae", "--granularities", "R+I+S", "--masking", "SG-IG-RD")
        shares.append(f"CFMAE {cfg.mask_ratio:.1%}, {cfg.num_visible} patches of all maps visible")
        kinds = ("SG", "IG", "RD") if len(have) == 3 else ("RD",)  # the others need the maps
        titles = [[*have], *([f"CFMAE {kind}, {m}" for m in have] for kind in kinds)]
        bands += [x + y for x, y in zip(titles[::2], titles[1::2])]  # two side by side
        sizes = (cfg.image_size, cfg.patch_size)
        for name, batch in open_images(args, *sizes, have, cfg.semantic_classes):
            row = rows.setdefault(name, {m: look(batch, m) for m in have})
            maps += [row["semantic"]] if "semantic" in row else []
            for kind in kinds:
                mask = cfmae_masks(cfg, batch, 0.0, kind)
                row |= {f"CFMAE {kind}, {m}": look(batch, m, x) for m, x in zip(cfg.names, mask)
                        if m in have}  # fmt: skip
    for methods in (
        (("semanticmim", (), "SemanticMIM"), ("semanticmim", ("--proxies", "0"), "plain MIM")),
        (("mcmae", (), "MCMAE block"), ("mcmae", ("--masking", "token"), "MCMAE token")),
        (("coma_dyvit", (), "CoMA"),),
    ):
        if args.method not in (None, methods[0][0]):
            continue
        bands.append(["rgb"])
        for method, flags, title in methods:
            cfg, build = configure(args, method, *flags), MODELS[method][1]
            for name, batch in open_images(args, cfg.image_size, cfg.patch_size):
                mask = build.make_mask(SimpleNamespace(cfg=cfg), batch["seed"])  # no weights needed
                row = rows.setdefault(name, {})
                row |= {"rgb": look(batch, "rgb"), title: look(batch, "rgb", mask)}
                if method == "coma_dyvit":
                    row["CoMA complement"] = look(batch, "rgb", ~mask)
            shares.append(f"{title} {mask.float().mean():.1%}")
            bands[-1] += [title, "CoMA complement"] if method == "coma_dyvit" else [title]
    caption = f"masks (hatched = hidden) on {args.data}, seed {args.seed}; hidden: "
    columns = [title for band in bands for title in band]
    table = [[row.get(c) for c in columns] for row in rows.values()]
    sheet(args.output, caption + "; ".join(shares), columns, table, list(rows), args.side,
          args.palette, legend(args, maps), [len(band) for band in bands])  # fmt: skip


def over_training(args: argparse.Namespace) -> None:
    """CFMAE's mask of the same images as training goes on, the sample's noise being the same."""
    cfg, rows, labels, names = configure(args, "cfmae"), [], [], tuple(data.GRANULARITIES)
    if not set(names) <= {*available(args)} or cfg.names != names:
        raise UserError("--over-training needs --data and granularities with both kinds of maps")
    images = list(open_images(args, cfg.image_size, cfg.patch_size, names, cfg.semantic_classes))
    for progress in args.over_training or (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts = cfmae.schedule(cfg, torch.tensor(progress)).items()
        labels.append(f"progress {progress:g}: " + " ".join(f"{k}={v:.1f}" for k, v in parts))
        found = [(batch, cfmae_masks(cfg, batch, progress)) for _, batch in images]
        rows.append([look(b, m, x) for b, mask in found for m, x in zip(names, mask)])
    caption = f"CFMAE {cfg.masking} over training, --mix {cfg.mix}, {cfg.mask_ratio:.1%} hidden "
    caption += f"(hatched); {args.data}, seed {args.seed}"
    if cfg.mix == "score":
        caption += "; as Eq. 11 is printed, two weighted masks give the heavier one, whole"
    columns = [f"{name} {m}" for name, _ in images for m in names]
    key = legend(args, [look(batch, "semantic") for _, batch in images])
    sheet(args.output, caption, columns, rows, labels, args.side, args.palette, key)


def frequency(args: argparse.Namespace) -> None:
    """How often each patch is hidden (CoMA Fig. 2); one scale of colours for all panels."""
    cfg = configure(args, "coma_dyvit")
    maps = coma_dyvit.masking_frequency(cfg, args.frequency, args.seed)
    span = max((x - x.float().mean()).abs().max().item() for x in maps.values()) or 1.0
    cells = [heat(0.5 + (x - x.float().mean()) / (2 * span)) for x in maps.values()]
    columns = [f"{k}: {x.min()} to {x.max()}, mean {x.float().mean():.1f}, deviation "
               f"{x.float().std(correction=0):.1f}" for k, x in maps.items()]  # fmt: skip
    caption = f"times that each patch is hidden in {args.frequency} iterations of masks with "
    caption += f"{cfg.mask_ratio:.0%}, --evaluation {cfg.evaluation}; random: in the adaptive "
    caption += "branch, as in MAE; complementary: in either; gradient: in a branch that learns. "
    caption += f"Colour: difference from the panel's mean, black -{span:.0f}, yellow +{span:.0f}"
    sheet(args.output, caption, columns, [cells], (), max(args.side, 192), args.palette)


def schedule(args: argparse.Namespace) -> None:
    method = read(args.checkpoint)[0] if args.checkpoint else args.method or "cfmae"
    cfg, n = configure(args, method), 1000
    at, panels = [cfg.epochs * i / n for i in range(n + 1)], []
    if method == "cfmae":
        names = {"SG": "alpha_S", "IG": "alpha_I", "RD": "random, 1 - alpha_S - alpha_I"}
        shares = cfmae.schedule(cfg, torch.arange(n + 1) / n).items()
        lines = [Series(names[k], at, v.tolist(), i) for i, (k, v) in enumerate(shares)]
        panels.append((f"share of each mask, {cfg.masking}", "epoch", lines))
    rates = [engine.learning_rate(cfg, int(x * n), n) for x in at]
    panels.append(("learning rate of a step", "epoch", [Series("", at, rates)]))
    source = args.checkpoint or f"preset {cfg.model}"
    caption = f"{method}, {source}: {cfg.epochs} epochs, warm-up {cfg.warmup_epochs}, peak "
    caption += f"{cfg.base_lr * cfg.batch_size / 256:.3g} = {cfg.base_lr} x {cfg.batch_size} / 256"
    chart(args.output, caption, panels, 2, (460, 280), args.palette)


# -------------------------------------------------------------------------------- features, data


def principal_components(x: Tensor) -> tuple[Tensor, Tensor]:
    """First three principal components of rows, and their shares of the variance.

    Args:
        x: (n, D), D at least 3.
    Returns: (n, 3), in decreasing order, signs such that each direction's largest weight is
        positive; (3,).
    """
    x = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)  # ascending
    axes = vectors[:, -3:].flip(1)  # (D, 3)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    shares = values.flip(0)[:3] / values.sum().clamp(min=1e-30)
    return (x @ axes).float(), shares.clamp(min=0).float()


@torch.no_grad()
def features(args: argparse.Namespace) -> None:
    rows, columns, encoders = {}, {}, open_encoders(args)
    for letter, encoder in zip(letters(encoders), encoders.values()):
        pyramids = []
        for name, batch in open_images(args, image_size(args, encoder), encoder.patch_size):
            pyramids.append((name, encoder.forward_pyramid(Normalize()(batch["rgb"]))))
            rows.setdefault(name, {})["input"] = batch["rgb"][0]
        for level, stride in enumerate(encoder.strides):
            maps = [pyramid[level][0] for _, pyramid in pyramids]  # (C, h, w) each
            x, shares = principal_components(torch.cat([m.flatten(1).T for m in maps]))
            low, high = (x.quantile(q, dim=0) for q in (0.01, 0.99))
            x = (255 * (x - low) / (high - low).clamp(min=1e-9)).clamp(0, 255).byte()
            title = f"{letter}level {level + 1}, stride {stride}: {shares.sum():.0%}"
            columns[title] = None
            for (name, _), part in zip(pyramids, x.split([m[0].numel() for m in maps])):
                rows[name][title] = part.T.unflatten(1, maps[0].shape[1:])
    caption = f"{key(encoders)}; {args.data}; first three principal components as red, green, "
    caption += "blue, fitted to all rows of a column; percent: their share of the variance"
    table = [[row.get(c) for c in ("input", *columns)] for row in rows.values()]
    sheet(args.output, caption, ["input", *columns], table, list(rows), args.side, args.palette)


def dataset(args: argparse.Namespace) -> None:
    args.images = args.images or "0-7"
    have, size, rows, labels, maps = available(args), args.image_size or 224, [], [], []
    if len(have) == 1:
        raise UserError(f"{args.data} has no maps beside its images{data.LAYOUT}")
    for name, batch in open_images(args, size, 4, have):  # 4: maps at the image's own resolution
        cells = [look(batch, m) for m in have]
        rows.append(cells + [blend(cells[0], x, 0.5) for x in cells[1:]])
        maps += [cells[have.index("semantic")]] if "semantic" in have else []
        labels.append(name)
    columns = [*have, *(f"{m} laid over" for m in have[1:])]
    caption = f"{args.data}, split {where(args)[1]}, centre crops; one id has one colour always; "
    caption += "in instance maps dark grey is background, black unlabelled"
    key = legend(args, maps)
    sheet(args.output, caption, columns, rows, labels, args.side, args.palette, key)


# ------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    """The command line; its errors are UserErrors."""
    top = engine.Parser(prog="python -m tools.visualize", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, words: str, *groups: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=words, description=words, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--output", required=True, help="the PNG to write")
        sub.add_argument("--palette", action="store_true", help="256 colours: a small file")
        if "images" in groups:
            sub.add_argument("--data", default="shapes", help="a folder, or shapes")
            sub.add_argument("--split", default="val")
            sub.add_argument("--images", help="which ones, e.g. 0-3,17")
            sub.add_argument("--seed", type=int, default=0, help="of masks")
            sub.add_argument("--side", type=int, default=128, help="height of a cell in pixels")
        if "encoders" in groups:
            sub.add_argument("--checkpoint", nargs="+", help="of this project, one or several")
            sub.add_argument("--init", nargs="+", help="public weights: MAE, BEiT, ConvMAE")
            sub.add_argument("--num-heads", type=int, help="of --init, where widths do not tell")
            sub.add_argument("--method", choices=list(MODELS), help="fresh weights")
            sub.add_argument("--encoder", default="base", help="preset for --method")
            sub.add_argument("--random", action="store_true", help="fresh weights in their place")
            sub.add_argument("--image-size", type=int, help="default: as it was trained")
        return sub

    sub = command(reconstruct, "what a model predicts of what it does not see", "images")
    sub.add_argument("--checkpoint", required=True)
    sub.add_argument("--mask-ratio", type=float, help="default: the run's")
    sub.add_argument("--patches", help="hide these, e.g. 3,17-20, in raster order")
    sub.add_argument("--visible", action="store_true", help="--patches are the visible ones")
    sub.add_argument("--normalised", action="store_true", help="no true patch statistics")
    some = {"nargs": "+", "default": (), "choices": data.GRANULARITIES}
    sub.add_argument("--only", help="whole granularities that are visible", **some)
    sub.add_argument("--hide", help="whole granularities that are hidden", **some)
    sub = command(attention, "what tokens of a plain ViT attend to", "images", "encoders")
    sub.add_argument("--query", nargs="+", help="ROW,COL of the patch grid, cls, proxies")
    sub.add_argument("--layer", type=int, help="from 1; default: two thirds up")
    sub.add_argument("--heads", action="store_true", help="each head by itself")
    sub.add_argument("--depth", action="store_true", help="all layers")
    sub.add_argument("--proxy-mean", action="store_true", help="prefix tokens, mean over images")
    sub.add_argument("--distance", action="store_true", help="mean distance a head and layer")
    sub = command(masks, "what masks hide", "images")
    sub.add_argument("--method", choices=list(MODELS), help="default: all four")
    sub.add_argument("--over-training", nargs="*", type=float, metavar="PROGRESS",
                     help="CFMAE, these shares of training; default: 0 0.2 .. 1")  # fmt: skip
    sub.add_argument("--frequency", type=int, help="CoMA: count over so many iterations")
    sub = command(schedule, "curriculum and learning rate")
    sub.add_argument("--checkpoint", help="take its configuration")
    sub.add_argument("--method", choices=list(MODELS), help="default: cfmae")
    sub.add_argument("--data", default="shapes")
    command(features, "a pyramid's principal components", "images", "encoders")
    sub = command(dataset, "images beside their maps", "images")
    sub.add_argument("--image-size", type=int, help="default: 224")
    sub = command(log, "curves of one or several runs")
    sub.add_argument("runs", nargs="+", help="folders of runs, or log.jsonl files")
    sub.add_argument("--keys", help="panels, e.g. loss,lr; default: all")
    sub = command(results, "results of transfer over a setting of pre-training")
    sub.add_argument("files", nargs="+", help="result.json, or the folders that hold them")
    sub.add_argument("--x", required=True, help="a field of the runs' configs, as epochs, "
                     "mask_ratio, proxies, decoder_depth; step; or parameters")  # fmt: skip
    sub.add_argument("--metric", help="default: top1 or mIoU")
    sub.add_argument("--by", help="a line for each value of these, e.g. target,proxies")
    return top


def main(argv: list[str] | None = None) -> int:
    """Write the picture that the command line asks for."""
    args, args.rest = (top := parser()).parse_known_args(argv)
    if args.rest and args.command not in ("masks", "schedule"):
        top.error(f"unrecognized arguments: {' '.join(args.rest)}")
    if getattr(args, "side", 1) < 1 or getattr(args, "seed", 0) < 0:
        top.error("--side must be above 0, --seed 0 or above")
    if not all(0 <= x <= 1 for x in getattr(args, "over_training", None) or ()):
        top.error("--over-training takes shares of training, 0 to 1")
    if getattr(args, "frequency", None) is not None and args.frequency < 1:
        top.error("--frequency must be above 0")
    args.run(args)
    print(args.output)
    return 0


if __name__ == "__main__":
    engine.command("visualize", main)
