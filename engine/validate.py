"""What a run looks at while it trains: the val split's means, and a picture."""

from collections.abc import Callable

import torch

import data
import pictures
from engine import checkpoint


@torch.no_grad()
def validate(run: object, evaluate: Callable | None, preview: Callable | None = None) -> None:
    """Log the val split's means, and draw a picture; without val of what it was trained on."""
    run.model.eval()
    if run.val_set is not None:
        means(run, evaluate)
    if preview and run.lead:
        run.picture(preview)
    run.model.train()
    run.world.maximum(0)


def means(run: object, evaluate: Callable | None) -> None:
    """Over `val_samples` of the val split, evenly spaced and shared out over the ranks."""
    length, size, cfg = len(run.val_set), run.world.size, run.cfg
    share = max(1, min(cfg.val_samples, length) // size)
    pairs = [(0, i) for i in evenly(length, share * size)[run.world.rank * share :][:share]]
    batches = [pairs[i : i + run.micro] for i in range(0, share, run.micro)]
    loader = torch.utils.data.DataLoader(
        run.val_set, batch_sampler=batches,
        collate_fn=run.collate, worker_init_fn=data.worker_init,
        num_workers=min(run.world.workers(cfg.workers), share // 256),
    )  # fmt: skip
    total = 0.0
    for batch in loader:
        batch = run.world.to_device(run.world.raise_error(batch))
        with run.autocast():
            if evaluate:
                terms = evaluate(run.model, batch)
            else:
                loss, terms = run.model(batch, torch.ones((), device=run.device))
                terms = {"loss": loss, **terms}
        values = torch.stack([v.float() for v in terms.values()])
        total = total + values * len(batch["seed"]) / share
    terms = dict(zip(terms, run.world.mean(total).tolist()))
    run.meter.write({"step": run.number, "epoch": run.number / run.per_epoch, "val": terms})
    shown = "  ".join(f"{k} {v:.4g}" for k, v in terms.items())
    run.say(f"val, step {run.number}: {shown}")


def picture(run: object, preview: Callable) -> None:
    """Draw four evenly spaced images of the val split, or of train where there is none."""
    shown, split = run.val_set, "val"
    if shown is None:
        shown, split = run.train_set, "train: images that it was trained on"
    path, length = run.out / f"preview-{run.number:07d}.png", len(shown)
    batch = run.collate([shown[0, i] for i in evenly(length, min(4, length))])
    if "error" in batch:
        raise data.UserError(batch["error"])
    caption = f"{run.method} {run.cfg.model}, step {run.number}, {run.cfg.data} {split}"
    with checkpoint.writing(path), run.autocast():
        columns = pictures.columns(preview(run.model, run.world.to_device(batch)))
        side = max(192, *(x.shape[-2] for x in columns.values()))
        pictures.contact_sheet(columns, path, caption, side)
    run.say(f"preview     {path}")


def evenly(length: int, count: int) -> list[int]:
    """`count` evenly spaced indices: the first ones of a folder would be of its first classes."""
    return [i * length // count for i in range(count)]
