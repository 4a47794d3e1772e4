"""The loop's surroundings: what is yielded to it, and what happens between its steps."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

import data
from engine import checkpoint
from engine.log import Meter
from engine.report import following, learned, screen, warn_of_size
from engine.step import Step, throw_away
from engine.validate import validate


def steps(
    run: object, model: nn.Module, optimizer: torch.optim.Optimizer,
    evaluate: Callable | None = None, preview: Callable | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Yield the steps that are left, from the last checkpoint on; save, evaluate and log.

    Args:
        model, optimizer: of the loop, the model as `place` returned it.
        evaluate: (model, batch) -> dict of 0-d tensors, averaged over the val split; None: the
            model's own loss and logs at the end of training.
        preview: (model, batch) -> {name: (truth, hidden, prediction)}, see `pictures.columns`.
    """
    cfg = run.cfg
    run.step_model, run.optimizer = model, optimizer
    if run.world.size > 1:
        settle(run, model)
    if run.checkpoint:
        checkpoint.load_weights(run.model, run.checkpoint["model"], run.last)
        checkpoint.load_optimizer(optimizer, run.checkpoint["optimizer"], run.last)
        del run.checkpoint["model"], run.checkpoint["optimizer"]  # memory of every rank
    drawn = not preview or not run.lacks(f"preview-{run.number:07d}.png")  # it comes last
    if run.number >= run.stop and drawn:  # what a cluster that restarts its jobs comes to
        run.say(f"finished already: {run.out} is at step {run.number} of {run.total}")
        return
    run.meter = Meter(run.out, run.world, run.train_set, run.checkpoint, cfg.log, cfg.SAMPLES)
    if run.lead:
        print(screen(run, run.model), flush=True)
        if run.checkpoint:
            print(f"resumed     {run.last} at step {run.number}")
        with checkpoint.writing(path := run.out / "config.json"):
            path.write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
        checkpoint.warn_of_space(run.model, run.out)
        warn_of_size(run)
    loader = torch.utils.data.DataLoader(
        run.train_set, batch_sampler=run.sampler, collate_fn=run.collate,
        num_workers=run.world.workers(cfg.workers), worker_init_fn=data.worker_init,
        pin_memory=run.device.type == "cuda",
    )  # fmt: skip
    if run.checkpoint is None:
        validate(run, evaluate)
    run.batches, run.saved = iter(loader), time.monotonic()
    bar = tqdm(
        total=run.stop, initial=run.number, unit="step", disable=not run.lead,
        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    run.meter.restart()
    while run.number < run.stop:
        step = Step(run)
        yield step
        bar.update()
        if step.logging:
            bar.set_postfix_str(run.meter.log(step.record, cfg.batch_size, run.sampler), False)
        end_of_epoch(run, evaluate, preview)
    bar.close()
    run.save("last.pt")
    validate(run, evaluate, preview)
    run.say(f"finished: {run.where()}{learned(run)}")
    if not run.facts:  # of pre-training; a transfer keeps facts of its encoder
        run.say(following(run))


def settle(run: object, model: nn.Module) -> None:
    """Give a fresh and a resumed run the same order of sums.

    DDP regroups its buckets after the first backward pass. The gradients of two passes are
    thrown away, and what they did to buffers (BatchNorm's) is undone.
    """
    batch = run.collate([run.train_set[pair] for pair in run.sampler.indices(0)[: run.micro]])
    batch = run.world.to_device(run.world.raise_error(batch))
    for _ in range(2):
        throw_away(run, model, batch)


def end_of_epoch(run: object, evaluate: Callable | None, preview: Callable | None) -> None:
    cfg, (epoch, rest) = run.cfg, divmod(run.number, run.per_epoch)
    if rest:
        return
    run.meter.bad = 0
    if cfg.save_epochs and epoch % cfg.save_epochs == 0:
        run.save(f"epoch-{epoch:04d}.pt")
    shown = cfg.preview_epochs and epoch % cfg.preview_epochs == 0
    looked = cfg.val_epochs and epoch % cfg.val_epochs == 0
    if run.number < run.stop and (shown or looked):
        validate(run, evaluate, preview if shown else None)
        run.meter.restart()
