"""The loop's surroundings: what is yielded to it, and what happens between its steps."""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

import data
from engine import checkpoint
from engine.folder import screen
from engine.log import Meter
from engine.step import Step
from engine.validate import learned, validate


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
    if run.number >= run.stop:  # what a cluster that restarts its jobs comes to in the end
        run.say(f"finished already: {run.out} is at step {run.number} of {run.total}")
        return
    run.meter = Meter(run.out, run.world, run.train_set, run.checkpoint, cfg.log)
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


def following(run: object) -> str:
    """What to do with a pre-trained model: commands, which run where there are classes."""
    tiny = " --model tiny" if run.cfg.model == "tiny" else ""  # of the next task's presets, too
    folder, note = shlex.quote(run.cfg.data), ""
    if run.val_set is None or len(run.train_set.classes) < 2:
        folder = "DATA"
        note = "\n            (DATA: a folder of {train,val}/<class>/NAME.jpg, two classes or more)"
    words = {"last": shlex.quote(str(run.last)), "data": f"--data {folder}{tiny}"}
    package = __name__.removesuffix("engine.loop")  # "" in a checkout
    commands = [f"python -m {package}{line.format(**words)}" for line in run.then]
    return "next        " + "\n            ".join(commands) + note


def warn_of_size(run: object) -> None:
    """Say what a large model will need of a CPU: memory, and time as a few samples take it."""
    million = sum(p.numel() for p in run.model.parameters()) / 1e6
    if run.device.type != "cpu" or million <= 20:
        return
    batch = run.collate([run.train_set[pair] for pair in run.sampler.indices(0)[:4]])
    if "error" in batch:  # the loop says which
        return
    count = len(batch["seed"])
    seconds, kept = trial(run, batch)
    left, share = run.stop - run.number, run.cfg.batch_size / run.world.size / count
    hours = left * share * seconds / 3600
    units = ((72, 24, "days"), (2, 1, "hours"), (0, 1 / 60, "minutes"))
    length = next(f"{hours / unit:.2g} {name}" for least, unit, name in units if hours >= least)
    print(f"warning     {million:.0f} M parameters on a CPU: weights, gradients and AdamW take "
          f"{16 * million / 1024:.1f} GiB, what {run.micro} samples keep for the backward pass "
          f"{kept / count * run.micro / 2**30:.1f} GiB (--micro-batch), and the {left} steps about "
          f"{length}, as a trial of {count} samples has it. --model tiny is made for a CPU",
          flush=True)  # fmt: skip


def trial(run: object, batch: dict) -> tuple[float, int]:
    """Seconds of a forward and backward pass, and the bytes that the first keeps for the second."""
    weights, kept = {p.data_ptr() for p in run.model.parameters()}, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        throw_away(run, run.model, batch)
    seconds = time.perf_counter() - began
    return seconds, sum(size for at, size in kept.items() if at not in weights)


def settle(run: object, model: nn.Module) -> None:
    """Give a fresh and a resumed run the same order of sums.

    DDP regroups its buckets after the first backward pass. The gradients of two passes are
    thrown away, and what they did to buffers (BatchNorm's) is undone.
    """
    batch = run.collate([run.train_set[pair] for pair in run.sampler.indices(0)[: run.micro]])
    batch = run.world.to_device(run.world.raise_error(batch))
    for _ in range(2):
        throw_away(run, model, batch)


def throw_away(run: object, model: nn.Module, batch: dict) -> None:
    """One forward and backward pass that leaves no trace in gradients and buffers."""
    buffers = [b.clone() for b in run.model.buffers()]
    with run.autocast():
        loss, _ = model(batch, torch.zeros((), device=run.device))
    loss.backward()
    run.model.zero_grad(set_to_none=True)
    for b, kept in zip(run.model.buffers(), buffers):
        b.copy_(kept)


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
