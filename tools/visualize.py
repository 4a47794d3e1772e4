"""The papers' figures from a checkpoint, a configuration or a log: one sub-command a picture (PNG).

    reconstruct  CFMAE Figs. 3, 4, 7-10; any method   input, what is visible, prediction, both
    attention    CFMAE Fig. 1, SemanticMIM Figs. 1, 7, 8, 15, 16; --depth Fig. 14;
                 --proxy-mean Fig. 9; --distance Fig. 13
    masks        what every method hides; --over-training: CFMAE's curriculum; --frequency: CoMA
                 Fig. 2
    schedule     CFMAE Fig. 5, and the learning rate
    features     MCMAE Fig. 5: a pyramid by its first three principal components
    dataset      CFMAE Fig. 6: images beside their maps
    log          loss terms, rate, images/s of runs; --output x.csv: as a table
    results      what transfer gave over a setting of pre-training, or parameters: SemanticMIM
                 Figs. 5, 6 (proxies, mask_ratio), CoMA Fig. 5

    python -m tools.visualize reconstruct --checkpoint runs/x/last.pt --output reconstruct.png
    python -m tools.visualize attention --checkpoint runs/x/last.pt --query 3,4 --output maps.png

Images: `--data shapes`, ROOT/{train,val}/... as data.py has it, a folder of bare images, or one of
them; with `--only rgb` reconstruct needs no maps where there are none. `masks`
and `schedule` take the flags of the method's script, too: `--model base --epochs 1600`. schedule,
log, results and --distance are charts, for which `pip install matplotlib`.
"""

import argparse

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor

import data
import files
from downstream.encoders import METHODS
from engine import UserError
from tools.attention import attention
from tools.charts import log, results
from tools.figures import available, blend, legend, look, open_images, sheet, where
from tools.masks import masks, schedule
from tools.models import image_size, key, letters, open_encoders
from tools.reconstruct import reconstruct


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
            pyramids.append((name, encoder.forward_pyramid(encoder.normalize(batch["rgb"]))))
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
        raise UserError(f"{args.data} has no maps beside its images{files.LAYOUT}")
    for name, batch in open_images(args, size, 4, have):  # 4: maps at the image's own resolution
        cells = [look(batch, m) for m in have]
        rows.append(cells + [blend(cells[0], x, 0.5) for x in cells[1:]])
        maps += [batch["semantic"]] if "semantic" in have else []
        labels.append(name)
    columns = [*have, *(f"{m} laid over" for m in have[1:])]
    caption = f"{args.data}, split {where(args)[1]}, centre crops; one id has one colour always; "
    caption += "in instance maps dark grey is background, black unlabelled"
    key = legend(args, maps)
    sheet(args.output, caption, columns, rows, labels, args.side, args.palette, key)


# ------------------------------------------------------------------------------------------- main

YES, NUMBER, SOME = {"action": "store_true"}, {"type": int}, {"nargs": "+"}
FIGURE = {
    "--output": dict(help="the PNG to write; default: COMMAND.png"),
    "--palette": dict(YES, help="256 colours: a small file"),
}
IMAGES = {
    "--data": dict(default="shapes", help="a folder, an image, or shapes"),
    "--split": dict(default="val"),
    "--images": dict(help="which ones, e.g. 0-3,17"),
    "--seed": dict(NUMBER, default=0, help="of masks"),
    "--side": dict(NUMBER, default=128, help="height of a cell in pixels"),
}
ENCODERS = {
    "--checkpoint": dict(SOME, help="of this project, one or several"),
    "--init": dict(SOME, help="public weights: MAE, BEiT, ConvMAE"),
    "--num-heads": dict(NUMBER, help="of --init, where widths do not tell"),
    "--method": dict(choices=list(METHODS), help="fresh weights"),
    "--encoder": dict(default="base", help="preset for --method"),
    "--random": dict(YES, help="fresh weights in their place"),
    "--image-size": dict(NUMBER, help="default: as it was trained"),
}
WHOLE = {"nargs": "+", "default": (), "choices": list(data.GRANULARITIES)}
MODEL = {
    "--checkpoint": dict(required=True),
    "--mask-ratio": dict(type=float, help="default: the run's"),
    "--patches": dict(help="hide these, e.g. 3,17-20, in raster order"),
    "--visible": dict(YES, help="--patches are the visible ones"),
    "--normalised": dict(YES, help="no true patch statistics"),
    "--only": dict(WHOLE, help="whole granularities that are visible"),
    "--hide": dict(WHOLE, help="whole granularities that are hidden"),
}
ATTENTION = {
    "--query": dict(SOME, help="ROW,COL of the patch grid, cls, proxies"),
    "--layer": dict(NUMBER, help="from 1; default: two thirds up"),
    "--heads": dict(YES, help="each head by itself"),
    "--depth": dict(YES, help="all layers"),
    "--proxy-mean": dict(YES, help="prefix tokens, mean over images"),
    "--distance": dict(YES, help="mean distance a head and layer"),
}
MASKS = {
    "--method": dict(choices=list(METHODS), help="default: all"),
    "--over-training": dict(
        nargs="*", type=float, metavar="PROGRESS",
        help="CFMAE, these shares of training; default: 0 0.2 .. 1",
    ),
    "--frequency": dict(NUMBER, help="CoMA: count over so many iterations"),
}  # fmt: skip
SCHEDULE = {
    "--checkpoint": dict(help="take its configuration"),
    "--method": dict(choices=list(METHODS), help="default: cfmae"),
    "--data": dict(default="shapes"),
}
LOG = {
    "runs": dict(SOME, help="folders of runs, or log.jsonl files"),
    "--keys": dict(help="panels, e.g. loss,lr; default: all"),
    "--apart": dict(YES, help="panels of their own for each run"),
    "--healthy": dict(
        metavar="METHOD", help="beside it a good run of this script's --data shapes --model tiny"
    ),
}
RESULTS = {
    "files": dict(SOME, help="result.json, or the folders that hold them"),
    "--x": dict(
        required=True, help="a field of the runs' configs, as epochs, mask_ratio, proxies, "
        "decoder_depth; step; or parameters",
    ),
    "--metric": dict(help="default: top1 or mIoU"),
    "--by": dict(help="a line for each value of these, e.g. target,proxies"),
}  # fmt: skip
SIZE = {"--image-size": dict(NUMBER, help="default: 224")}
COMMANDS = {
    reconstruct: ("what a model predicts of what it does not see", IMAGES | MODEL),
    attention: ("what tokens of a plain ViT attend to", IMAGES | ENCODERS | ATTENTION),
    masks: ("what masks hide", IMAGES | MASKS),
    schedule: ("curriculum and learning rate", SCHEDULE),
    features: ("a pyramid's principal components", IMAGES | ENCODERS),
    dataset: ("images beside their maps", IMAGES | SIZE),
    log: ("curves of one or several runs", LOG),
    results: ("results of transfer over a setting of pre-training", RESULTS),
}


def parser() -> argparse.ArgumentParser:
    """The command line; its errors are UserErrors."""
    raw, doc = argparse.RawDescriptionHelpFormatter, __doc__
    top = engine.Parser(
        prog="python -m tools.visualize", description=doc, allow_abbrev=False, formatter_class=raw
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, (words, flags) in COMMANDS.items():
        sub = commands.add_parser(run.__name__, help=words, description=words, allow_abbrev=False)
        sub.set_defaults(run=run)
        for name, options in (FIGURE | flags).items():
            sub.add_argument(name, **options)
    return top


def main(argv: list[str] | None = None) -> int:
    """Write the picture that the command line asks for."""
    args, args.rest = (top := parser()).parse_known_args(argv)
    takes_more = args.command in ("masks", "schedule") and not getattr(args, "checkpoint", None)
    if args.rest and not takes_more:
        top.error(f"unrecognized arguments: {' '.join(args.rest)}")
    if getattr(args, "side", 1) < 1 or getattr(args, "seed", 0) < 0:
        top.error("--side must be above 0, --seed 0 or above")
    if not all(0 <= x <= 1 for x in getattr(args, "over_training", None) or ()):
        top.error("--over-training takes shares of training, 0 to 1")
    if getattr(args, "frequency", None) is not None and args.frequency < 1:
        top.error("--frequency must be above 0")
    args.output = args.output or f"{args.command}.png"
    args.run(args)
    print(args.output)
    return 0


if __name__ == "__main__":
    engine.command("visualize", main)
