"""The figures of tools/visualize.py that need no weights: masks, and the schedule of a run."""

import argparse
import dataclasses

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor

import cfmae
import coma_dyvit
import data
from downstream.encoders import METHODS
from engine import UserError
from tools.charts import Series, chart
from tools.figures import available, heat, legend, look, open_images, sheet
from tools.models import own_mask, read

# method: panels, each of a title, flags of its script, and a title for what the mask leaves visible
PANELS = {
    "mae": (("MAE", (), None),),
    "semanticmim": (("SemanticMIM", (), None), ("plain MIM", ("--proxies", "0"), None)),
    "mcmae": (("MCMAE block", (), None), ("MCMAE token", ("--masking", "token"), None)),
    "coma_dyvit": (("CoMA", (), "CoMA complement"),),
}


def configure(args: argparse.Namespace, method: str, *flags: str) -> engine.Config:
    """A method's configuration: its preset with the flags left over."""
    script, given = METHODS[method], ["--data", args.data, *args.rest, *flags]
    return engine.parse(script.Config, script.PRESETS, script.__doc__, given)


# ------------------------------------------------------------------------------------------ masks


class Table:
    """Cells by row and column, columns in bands, and what the caption says of hidden shares."""

    def __init__(self):
        self.rows, self.bands, self.shares, self.maps = {}, [], [], []

    def add(self, name: str, cells: dict[str, Tensor]) -> None:
        self.rows.setdefault(name, {}).update(cells)


def masks(args: argparse.Namespace) -> None:
    """What each method hides."""
    args.images = args.images or "0-1"
    if args.frequency is not None:
        return frequency(args)
    if args.over_training is not None:
        return over_training(args)
    table = Table()
    for method in [args.method] if args.method else METHODS:
        BANDS.get(method, band)(args, method, table)
    caption = f"masks (hatched = hidden) on {args.data}, seed {args.seed}; hidden: "
    caption += "; ".join(table.shares)
    columns = [title for band in table.bands for title in band]
    cells = [[row.get(c) for c in columns] for row in table.rows.values()]
    sizes, names = [len(band) for band in table.bands], list(table.rows)
    key = legend(args, table.maps)
    sheet(args.output, caption, columns, cells, names, args.side, args.palette, key, sizes)


def cfmae_bands(args: argparse.Namespace, method: str, table: Table) -> None:
    """Each kind of mask of CFMAE, over the granularities that --data has."""
    have = available(args)
    cfg = configure(args, method, "--granularities", "R+I+S", "--masking", "SG-IG-RD")
    table.shares.append(
        f"CFMAE {cfg.mask_ratio:.1%}, {cfg.num_visible} patches of all maps visible"
    )
    kinds = ("SG", "IG", "RD") if len(have) == 3 else ("RD",)  # the others need the maps
    titles = [[*have], *([f"CFMAE {kind}, {m}" for m in have] for kind in kinds)]
    table.bands += [x + y for x, y in zip(titles[::2], titles[1::2])]  # two side by side
    sizes = (cfg.image_size, cfg.patch_size)
    for name, batch in open_images(args, *sizes, have, cfg.semantic_classes):
        cells = {m: look(batch, m) for m in have}
        table.maps += [batch["semantic"]] if "semantic" in have else []
        for kind in kinds:
            mask = own_mask(method, dataclasses.replace(cfg, masking=kind), batch)[0]
            shown = {m: x for m, x in zip(cfg.names, mask) if m in have}
            cells |= {f"CFMAE {kind}, {m}": look(batch, m, x) for m, x in shown.items()}
        table.add(name, cells)


def band(args: argparse.Namespace, method: str, table: Table) -> None:
    """A method's panels, beside the image."""
    titles = ["rgb"]
    for title, flags, complement in PANELS.get(method, ((method, (), None),)):
        cfg = configure(args, method, *flags)
        for name, batch in open_images(args, cfg.image_size, cfg.patch_size):
            mask = own_mask(method, cfg, batch)
            table.add(name, {"rgb": look(batch, "rgb"), title: look(batch, "rgb", mask)})
            if complement:
                table.add(name, {complement: look(batch, "rgb", ~mask)})
        table.shares.append(f"{title} {mask.float().mean():.1%}")
        titles += [title, complement] if complement else [title]
    table.bands.append(titles)


BANDS = {"cfmae": cfmae_bands}  # whose masks are of several granularities


def over_training(args: argparse.Namespace) -> None:
    """CFMAE's mask of the same images as training goes on, the sample's noise being the same."""
    cfg, rows, labels, names = configure(args, "cfmae"), [], [], tuple(data.GRANULARITIES)
    if not set(names) <= {*available(args)} or cfg.names != names:
        raise UserError("--over-training needs --data and granularities with both kinds of maps")
    images = list(open_images(args, cfg.image_size, cfg.patch_size, names, cfg.semantic_classes))
    for progress in args.over_training or (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        shares = cfmae.schedule(cfg, torch.tensor(progress)).items()
        labels.append(f"progress {progress:g}: " + " ".join(f"{k}={v:.1f}" for k, v in shares))
        found = [(batch, own_mask("cfmae", cfg, batch, progress)[0]) for _, batch in images]
        rows.append([look(b, m, x) for b, mask in found for m, x in zip(names, mask)])
    caption = f"CFMAE {cfg.masking} over training, --mix {cfg.mix}, {cfg.mask_ratio:.1%} hidden "
    caption += f"(hatched); {args.data}, seed {args.seed}"
    if cfg.mix == "score":
        caption += "; as Eq. 11 is printed, two weighted masks give the heavier one, whole"
    columns = [f"{name} {m}" for name, _ in images for m in names]
    key = legend(args, [batch["semantic"] for _, batch in images])
    sheet(args.output, caption, columns, rows, labels, args.side, args.palette, key)


def masking_frequency(
    cfg: coma_dyvit.Config, iterations: int = 1600, seed: int = 0
) -> dict[str, Tensor]:
    """Count how often each patch of an image that is met so often is hidden (CoMA Fig. 2).

    Returns: maps (h, w) int64. `random`: hidden by the adaptive mask, as in MAE; `complementary`:
        in either branch, the paper's count, flat by construction; `gradient`: in one that learns.
    """
    seeds = torch.tensor([data.sample_seed(seed, step, 0) for step in range(iterations)])
    mask = own_mask("coma_dyvit", cfg, {"seed": seeds})
    first, both = mask.sum(0), mask.sum(0) + (~mask).sum(0)
    # Fig. 2 counts both branches; what teaches is `gradient`.
    taught = both if cfg.evaluation in ("common", "shared") else first
    maps = {"random": first, "complementary": both, "gradient": taught}
    return {name: x.view(cfg.image_size // cfg.patch_size, -1) for name, x in maps.items()}


def frequency(args: argparse.Namespace) -> None:
    """How often each patch is hidden (CoMA Fig. 2); one scale of colours for all panels."""
    cfg = configure(args, "coma_dyvit")
    maps = masking_frequency(cfg, args.frequency, args.seed)
    span = max((x - x.float().mean()).abs().max().item() for x in maps.values()) or 1.0
    cells = [heat(0.5 + (x - x.float().mean()) / (2 * span)) for x in maps.values()]
    columns = [
        f"{k}: {x.min()} to {x.max()}, mean {x.float().mean():.1f}, deviation "
        f"{x.float().std(correction=0):.1f}"
        for k, x in maps.items()
    ]
    caption = f"times that each patch is hidden in {args.frequency} iterations of masks with "
    caption += f"{cfg.mask_ratio:.0%}, --evaluation {cfg.evaluation}; random: in the adaptive "
    caption += "branch, as in MAE; complementary: in either; gradient: in a branch that learns. "
    caption += f"Colour: difference from the panel's mean, black -{span:.0f}, yellow +{span:.0f}"
    sheet(args.output, caption, columns, [cells], (), max(args.side, 192), args.palette)


# --------------------------------------------------------------------------------------- schedule


def schedule(args: argparse.Namespace) -> None:
    """Curriculum (CFMAE Fig. 5) and learning rate."""
    method = args.method or "cfmae"
    if args.checkpoint:
        method, cfg, _ = read(args.checkpoint)
    else:
        cfg = configure(args, method)
    n = 1000  # steps an epoch, and points of a curve
    at, panels = [cfg.epochs * i / n for i in range(n + 1)], []
    if method == "cfmae":
        names = {"SG": "alpha_S", "IG": "alpha_I", "RD": "random, 1 - alpha_S - alpha_I"}
        shares = cfmae.schedule(cfg, torch.arange(n + 1) / n).items()
        lines = [Series(names[k], at, v.tolist(), i) for i, (k, v) in enumerate(shares)]
        panels.append((f"share of each mask, {cfg.masking}", "epoch", lines))
    peak = cfg.base_lr * cfg.batch_size / 256
    length = cfg.warmup_epochs * n, cfg.epochs * n
    rates = [engine.warmup_cosine(int(x * n), peak, *length, cfg.min_lr) for x in at]
    panels.append(("learning rate of a step", "epoch", [Series("", at, rates)]))
    source = args.checkpoint or f"preset {cfg.model}"
    caption = f"{method}, {source}: {cfg.epochs} epochs, warm-up {cfg.warmup_epochs}, peak "
    caption += f"{peak:.3g} = {cfg.base_lr} x {cfg.batch_size} / 256"
    chart(args.output, caption, panels, 2, (460, 280), args.palette)
