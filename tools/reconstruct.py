"""The figure of `tools.visualize reconstruct`: what a model predicts of what it does not see."""

import argparse
import dataclasses

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from common import pixel_target, random_mask, unpatchify
from data import UNLABELLED
from downstream.encoders import METHODS
from engine import UserError
from noise import MASK, uniform
from pictures import parts
from tools.figures import available, legend, numbers, open_images, sheet
from tools.models import hiding, load_model, own_mask

COLUMNS = ("input = truth", "visible", "prediction", "prediction, visible patches laid over")


def granularities(cfg: engine.Config) -> tuple[str, ...]:
    """What a model reads."""
    return getattr(cfg, "names", ("rgb",))


def choose_mask(args: argparse.Namespace, method: str, cfg: engine.Config, batch: dict) -> Tensor:
    """The mask that the flags ask for, of a batch of one: (1, N) or (1, M, N) bool.

    Without any: the method's own, at the end of training. --only and --hide: whole granularities,
    the others visible or with --mask-ratio hidden in part. --patches: these, in all granularities
    that are shown.
    """
    names, ratio = granularities(cfg), args.mask_ratio
    for name in (*args.only, *args.hide):
        if name not in names:
            raise UserError(f"--only or --hide {name}: this model has {', '.join(names)}")
    if args.patches and ratio is not None or args.visible and not args.patches:
        raise UserError("--patches goes without --mask-ratio, --visible with --patches")
    if ratio is not None and not 0 <= ratio < 1:
        raise UserError(f"--mask-ratio {ratio} is outside [0, 1)")
    chosen = args.patches or args.only or args.hide
    if ratio is not None and not chosen:
        cfg = dataclasses.replace(cfg, mask_ratio=ratio)
        cfg.resolve()
    own = own_mask(method, cfg, batch)
    if not chosen:
        return own
    N = own.shape[-1]
    shown = torch.tensor([n in (args.only or names) and n not in args.hide for n in names])
    hidden = (~shown)[:, None].repeat(1, N)  # (M, N)
    if args.patches:
        picked = torch.zeros(N, dtype=torch.bool)
        picked[numbers(args.patches, N, "--patches")] = True
        hidden = hidden | (~picked if args.visible else picked)
    else:
        noise = uniform(batch["seed"], len(names) * N, MASK).view(-1, N)
        hidden = hidden | random_mask(noise, round((ratio or 0) * N))
    if hidden.all():
        raise UserError("the mask hides everything")
    if not hidden.any():
        raise UserError(
            f"nothing of {', '.join(names)} is hidden: add --mask-ratio {cfg.mask_ratio}"
        )
    return hidden.view_as(own)


def predict(
    method: str, model: nn.Module, batch: dict[str, Tensor], mask: Tensor, normalised: bool = False
) -> dict[str, tuple]:
    """A script's `reconstruct` with this mask: name -> (truth, hidden, prediction).

    `normalised`: where the target is normalised by patch, show that, truth and prediction, with
    ImageNet's mean for 0 and its deviation for 1; otherwise each patch gets its true ones back.
    """
    cfg, rgb = model.cfg, batch["rgb"]
    visible = int((~mask).sum())  # what num_visible, which models read, is to be
    changes = {"mask_ratio": 1 - visible / mask.numel()}
    normalised = normalised and getattr(cfg, "norm_pix_loss", False)
    if normalised:
        changes["norm_pix_loss"] = False
    model.cfg = dataclasses.replace(cfg, **changes)
    with hiding(method, mask):
        found = METHODS[method].reconstruct(model, batch)
    model.cfg = cfg
    if normalised:
        p, (H, W) = cfg.patch_size, rgb.shape[-2:]
        target = unpatchify(pixel_target(model.normalize(rgb), p, True), p, (H // p, W // p))
        target = model.normalize.undo(target)
        found = {k: (target if x[0] is rgb else x[0], *x[1:]) for k, x in found.items()}
    return found


def reconstruct(args: argparse.Namespace) -> None:
    method, model, step = load_model(args.checkpoint)
    cfg, rows, labels, side, maps = model.cfg, [], [], args.side, []
    names, classes = granularities(cfg), getattr(cfg, "semantic_classes", 255)
    whole = [m for m in names if m in args.hide or args.only and m not in args.only]
    have = available(args)
    blank = [m for m in whole if m not in have]  # photographs have no maps to hide
    read, n = [m for m in names if m not in blank], cfg.image_size // max(cfg.patch_size // 4, 1)
    if have and (lacking := [m for m in read if m not in have]):
        words = f"{' and '.join(lacking)} map{'s' * (len(lacking) > 1)}"
        raise UserError(f"{args.data} has no {words}; with --only rgb none is needed")
    for name, batch in open_images(args, cfg.image_size, cfg.patch_size, read, classes):
        batch |= {m: torch.full((1, n, n), UNLABELLED, dtype=torch.uint8) for m in blank}
        mask = choose_mask(args, method, cfg, batch)
        for what, entry in predict(method, model, batch, mask, args.normalised).items():
            row = [None if x is None else x[0] for x in parts(*entry)]
            rows.append(row)
            labels.append(f"{name} {what}")
            maps += [entry[0], entry[2]] if what == "semantic" else []
            if row[0].shape[1] > cfg.image_size:  # a drawing, which needs its size
                side = max(side, row[0].shape[1])
    how = f"{mask.float().mean():.1%} hidden" + ("" if args.patches else f", --seed {args.seed}")
    how += f", only {' '.join(args.only)} visible" if args.only else ""
    how += f", {' '.join(args.hide)} hidden whole" if args.hide else ""
    chosen = f", patches {args.patches} {'visible' if args.visible else 'hidden'}"
    how += chosen if args.patches else ""
    note = "; predicted pixels have each patch's true mean and standard deviation"
    note = "; pixels normalised by patch, nothing true put in" if args.normalised else note
    note = note if getattr(cfg, "norm_pix_loss", False) else ""
    note += "; the third column means nothing where patches are visible: no loss there"
    caption = f"{method} {cfg.model}, {args.checkpoint}, step {step}; {args.data}; {how}{note}"
    key = legend(args, maps)
    sheet(args.output, caption, COLUMNS, rows, labels, side, args.palette, key)
