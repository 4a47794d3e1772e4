"""What surrounds a training loop: ranks, folder, data, resume, signals, saves, evaluations, logs.

    with Run("mae", cfg) as run:
        model = run.place(MAE(cfg))
        optimizer = AdamW(decay_groups(model, cfg.weight_decay), lr=0.0, ...)
        for step in run.steps(model, optimizer, evaluate, preview):
            for batch in step.micro_batches():
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(lr)

A step depends on nothing but the weights, its number and the seed: masks and augmentation come
from each sample's seed, samples from the step's number. So the number of ranks, workers or
micro-batches, and where a run was interrupted, change nothing but rounding.
"""

import contextlib
import dataclasses
import inspect
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import UserError
from engine import checkpoint
from engine.config import Config
from engine.folder import open_data, open_folder, refuse_changes
from engine.loop import steps
from engine.ranks import World, keep_freed_memory
from engine.step import Stopped
from engine.validate import picture


NEXT = (
    "tools.visualize reconstruct --checkpoint {last}{images}",
    "downstream.probe {data} --checkpoint {last}",
)


class Run:
    """A run in its folder, on this rank.

    Args:
        method: whose checkpoints these are.
        cfg: settings.
        iterations: length of the schedule in steps; None: `cfg.epochs`.
        wrap: (data set, whether it is train's) -> data set; a method's own augmentation.
        then: what to do with a pre-trained checkpoint, as `python -m` takes it, see NEXT.
        facts: plain values that checkpoints keep beside the settings, e.g. what an encoder is.
        options: of both data sets, see `data.open_dataset`; `train` and `val` hold those of one;
            `source`: clips, for clips.
    Errors: UserError.
    """

    picture, steps = picture, steps
    collate = staticmethod(data.collate)  # samples to a batch; a task's own run may have another

    def __init__(
        self, method: str, cfg: Config, iterations: int | None = None,
        wrap: Callable | None = None, facts: dict | None = None, then: Sequence[str] = NEXT,
        train: dict | None = None, val: dict | None = None, **options,
    ):  # fmt: skip
        self.method, self.cfg, self.world = method, cfg, World(cfg.device, cfg.precision)
        self.wrap, self.facts, self.then = wrap, facts or {}, then
        self.lead, self.device = self.world.rank == 0, self.world.device
        self.accum, self.micro = self.world.split_batch(cfg.batch_size, cfg.micro_batch)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if self.device.type == "cpu":
            keep_freed_memory()
        out, resumed = self.world.from_rank_0(lambda: open_folder(cfg, method))
        self.out, self.last = Path(out), Path(out) / "last.pt"
        self.checkpoint = checkpoint.load(self.last, method) if resumed else None
        if self.checkpoint:
            refuse_changes(cfg, self.checkpoint["config"], self.last)
        self.train_set, self.val_set = (
            self.open(split, **options, **(own or {}))
            for split, own in (("train", train), ("val", val))
        )
        self.number = self.start = self.checkpoint["step"] if self.checkpoint else 0  # steps done
        self.sampler = data.BatchSampler(
            len(self.train_set), cfg.batch_size, cfg.seed, self.world.rank, self.world.size,
            self.accum, self.number,
        )  # fmt: skip
        self.per_epoch = self.sampler.steps_per_epoch
        self.total = iterations or cfg.epochs * self.per_epoch
        self.sampler.stop_step = self.stop = min(cfg.steps or self.total, self.total)
        torch.manual_seed(cfg.seed)

    def open(self, split: str, **options) -> torch.utils.data.Dataset | None:
        dataset = open_data(self.cfg, self.world, self.out, split, **options)
        return dataset if dataset is None or not self.wrap else self.wrap(dataset, split == "train")

    def lacks(self, name: str) -> bool:
        """Whether a result is still to be written: there was training, or the file is not there."""
        missing = self.world.from_rank_0(lambda: not (self.out / name).exists())
        return missing or self.number > self.start

    def __enter__(self) -> "Run":
        self.signal = 0
        data.shield_forkserver()
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame: object) -> None:
        """Remember the first signal; the loop asks for it, all ranks together."""
        self.signal = self.signal or number

    def __exit__(self, kind: type | None, error: Exception | None, trace: object) -> None:
        try:
            if kind is Stopped:  # a second signal must not end the save
                self.save("last.pt")
                self.say(f"stopped; continue with --resume --output {self.out}: {self.where()}")
                raise SystemExit(128 + error.args[0]) from None
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def say(self, words: str) -> None:
        if self.lead:
            tqdm.write(words)

    def where(self) -> str:
        return f"step {self.number} of {self.total}, {self.last}"

    def autocast(self) -> contextlib.AbstractContextManager:
        return self.world.autocast()

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to this rank's device; compile it and spread it, where that is asked for."""
        self.model = model.to(self.device)
        model = torch.compile(self.model) if self.cfg.compile else self.model
        if self.world.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        names = inspect.signature(DistributedDataParallel).parameters  # buffers never change here
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        return DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, **{sync: False}
        )

    def save(self, name: str) -> None:
        """Write a checkpoint; none of a loss or of weights that are not finite."""
        self.meter.check(self.sampler)
        wrong = [k for k, p in self.model.named_parameters() if not p.isfinite().all()]
        if wrong:  # by a gradient that was not finite, though its loss was
            names = f"{', '.join(wrong[:3])}{' ...' if wrong[3:] else ''}"
            raise UserError(
                f"weights are not finite after step {self.number}: {names}; they are not saved. "
                "Try a lower --base-lr, --clip-grad or --precision fp32"
            )
        state = {"window": self.meter.window()}  # all ranks reduce; rank 0 writes
        if self.lead:
            state |= {"format": checkpoint.FORMAT, "method": self.method, "step": self.number}
            state |= {"model": self.model.state_dict(), "config": dataclasses.asdict(self.cfg)}
            state |= {"facts": self.facts}
            checkpoint.save(self.out / name, state | {"optimizer": self.optimizer.state_dict()})
        self.world.maximum(0)
        if name == "last.pt":  # a snapshot is not what --resume looks for
            self.saved = time.monotonic()
