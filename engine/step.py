"""One step of the optimizer, and its learning rate."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.schedule import warmup_cosine


class Stopped(Exception):
    """SIGTERM or Ctrl-C, agreed on by all ranks: the unfinished step is dropped."""


class Step:
    """One step of the optimizer.

    Attributes: `number` from 0, `per_epoch` steps, `progress` 0-d in [0, 1], the share of training
    that is done, on the device; `logging`: whether a line of the log follows.
    """

    def __init__(self, run: object):
        self.run, self.number, self.per_epoch = run, run.number, run.per_epoch
        self.progress = torch.full((), run.number / run.total, device=run.device)
        done = run.number + 1
        self.logging = done % run.cfg.log_every == 0 or done == run.stop

    def micro_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's batches, on its device; ranks sum gradients in the last one alone."""
        run = self.run
        undo = remember_buffers(run.model) if run.accum > 1 else list
        for a in range(run.accum):
            began = time.monotonic()
            batch = next(run.batches)
            run.meter.waited += time.monotonic() - began
            due = run.lead and time.monotonic() - run.saved > 60 * run.cfg.save_minutes
            failed, number, due = run.world.maximum("error" in batch, run.signal, due)
            if failed:
                run.world.raise_error(batch)
            if number:
                undo()
                raise Stopped(number)
            if due and a == 0:
                run.save("last.pt")
            self.bad = batch["bad"]
            alone = a == run.accum - 1 or run.world.size == 1
            with contextlib.nullcontext() if alone else run.step_model.no_sync():
                yield run.world.to_device(batch)

    def backward(self, loss: Tensor, logs: dict[str, Tensor]) -> None:
        (loss / self.run.accum).backward()
        self.run.meter.add(self.number, loss, logs, self.bad)

    def update(self, lr: float) -> None:
        """Clip, if `cfg.clip_grad` says so, and let the optimizer take its step at this rate."""
        run = self.run
        run.meter.end_step(run.accum)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = 0.0
        if run.cfg.clip_grad:
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.clip_grad)
        elif self.logging:
            norm = nn.utils.get_total_norm(
                p.grad for p in run.model.parameters() if p.grad is not None
            )
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.number += 1
        if self.logging:
            epoch = run.number / run.per_epoch
            self.record = {"step": run.number, "epoch": epoch, "lr": lr, "grad_norm": float(norm)}


def cosine(cfg: Config, step: Step) -> float:
    """Rate of a step: linear warm-up to base_lr * batch / 256, then a cosine to min_lr."""
    peak = cfg.base_lr * cfg.batch_size / 256
    warmup, total = (n * step.per_epoch for n in (cfg.warmup_epochs, cfg.epochs))
    return warmup_cosine(step.number, peak, warmup, total, cfg.min_lr)


def remember_buffers(model: nn.Module) -> Callable[[], None]:
    """What puts buffers back as they are now: a forward pass moves BatchNorm's running means."""
    kept = [(b, b.clone()) for b in model.buffers()]

    def undo() -> None:
        for b, old in kept:
            b.copy_(old)

    return undo


def throw_away(run: object, model: nn.Module, batch: dict) -> None:
    """One forward and backward pass that leaves no trace in gradients and buffers."""
    undo = remember_buffers(run.model)
    with run.autocast():
        loss, _ = model(batch, torch.zeros((), device=run.device))
    loss.backward()
    run.model.zero_grad(set_to_none=True)
    undo()
