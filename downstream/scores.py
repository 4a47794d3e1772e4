"""Counting hits: top-1 and top-5 of every class, over all of a split, on any number of ranks.

tally                    counts of a batch
count_hits               counts of a split
match_classes            folder names to a model's classes
shares, write_result     per cent, result.json and per_class.csv
"""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from engine import UserError
from engine.ranks import World


def tally(logits: Tensor, labels: Tensor) -> Tensor:
    """Images, top-1 and top-5 hits of each class: (B, C) and (B,) give (C, 3) float64.

    A label of -1 is left out. Ties go to the smaller class.
    """
    logits, labels = logits[labels >= 0].float(), labels[labels >= 0]
    best = logits.argsort(dim=1, descending=True, stable=True)[:, :5] == labels[:, None]
    hits = torch.stack([torch.ones_like(best[:, 0]), best[:, 0], best.any(1)], dim=1)
    counts = torch.zeros(logits.shape[1], 3, dtype=torch.float64, device=logits.device)
    return counts.index_add_(0, labels, hits.double())


def shares(counts: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in per cent over all images of (C, 3) counts."""
    images, top1, top5 = counts.sum(0).tolist()
    return {
        "top1": 100 * top1 / max(images, 1),
        "top5": 100 * top5 / max(images, 1),
        "images": int(images),
    }


def write_result(out: Path, classes: list[str], counts: Tensor, facts: dict) -> None:
    """Write result.json (facts, top-1, top-5) and per_class.csv into a folder."""
    with open(out / "per_class.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["class", "name", "images", "top1", "top5"])
        for number, (name, (n, *hits)) in enumerate(zip(classes, counts.tolist())):
            hits = [f"{100 * h / n:.2f}" if n else "" for h in hits]
            table.writerow([number, name, int(n), *hits])
    (out / "result.json").write_text(json.dumps(facts | shares(counts), indent=1) + "\n")


@torch.no_grad()
def count_hits(
    model: nn.Module,
    dataset: data.Dataset,
    cfg: object,
    world: World,
    numbers: Tensor | None = None,
    among: Tensor | None = None,
    at_once: int | None = None,
) -> tuple[Tensor, int]:
    """Count top-1 and top-5 hits over all of a split, every image once, shared over the ranks.

    Args:
        cfg: micro_batch and workers.
        numbers: the model's class of each of the data set's; default: the same.
        among: the classes whose logits count; default: all.
        at_once: samples; default: micro_batch.
    Returns: (classes, 3) counts as `tally`; number of unreadable images, left out.
    """
    total, classes = len(dataset), model.head.out_features
    share = math.ceil(total / world.size)
    mine = [world.rank * share + i for i in range(share)]  # past the end: the last one, not counted
    n = at_once or cfg.micro_batch
    batches = [mine[i : i + n] for i in range(0, share, n)]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[[(0, min(i, total - 1)) for i in b] for b in batches],
        collate_fn=data.collate,
        worker_init_fn=data.worker_init,
        num_workers=world.workers(cfg.workers) if share > 2048 else 0,
    )
    numbers = torch.arange(classes) if numbers is None else numbers
    hidden = torch.full((classes,), among is not None)
    hidden = (hidden if among is None else hidden.index_fill(0, among, False)).to(world.device)
    counts = torch.zeros(classes, 3, dtype=torch.float64, device=world.device)
    unreadable = torch.zeros(1, dtype=torch.float64)
    for places, batch in zip(batches, loader):
        world.raise_error(batch)
        counted = torch.tensor(places) < total
        unreadable += (counted & (batch["bad"] >= 0)).sum()
        label = numbers[batch["label"]].where(counted & (batch["bad"] < 0), -1)
        batch = world.to_device(batch)
        with world.autocast():
            logits = model.classify(model.inputs(batch)).float().masked_fill(hidden, -torch.inf)
        counts += tally(logits, label.to(world.device))
    counts, unreadable = (world.mean(x) * world.size for x in (counts, unreadable))
    return counts.cpu().round(), int(unreadable.round())


def match_classes(names: Sequence[str], classes: Sequence[str], where: str) -> Tensor:
    """The model's class of each folder name; UserError where it has no such class."""
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in number]
    if unknown or not names:
        shown = f"folders {', '.join(unknown[:5])}" if unknown else "no class folders"
        raise UserError(f"{where}: {shown}; the model's classes are {', '.join(classes[:5])}, ...")
    return torch.tensor([number[name] for name in names])
