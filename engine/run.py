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
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from engine import checkpoint
from engine.config import Config
from engine.folder import open_data, open_folder, refuse_changes, screen
from engine.log import Meter
from engine.ranks import World, keep_freed_memory
from engine.step import Step, Stopped
from engine.validate import picture, validate


class Run:
    """A run in its folder, on this rank.

    Args:
        method: whose checkpoints these are.
        cfg: settings.
        iterations: length of the schedule in steps; None: `cfg.epochs`.
        wrap: (data set, whether it is train's) -> data set; a method's own augmentation.
        facts: plain values that checkpoints keep beside the settings, e.g. what an encoder is.
        options: of both data sets, see `data.open_dataset`; `train` and `val` hold those of one.
    Errors: UserError.
    """

    picture = picture
    collate = staticmethod(data.collate)  # samples to a batch; a task's own run may have another

    def __init__(
        self, method: str, cfg: Config, iterations: int | None = None,
        wrap: Callable | None = None,
        facts: dict | None = None,
        train: dict | None = None, val: dict | None = None, **options,
    ):  # fmt: skip
        self.method, self.cfg, self.world = method, cfg, World(cfg.device, cfg.precision)
        self.wrap, self.facts = wrap, facts or {}
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
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame: object) -> None:
        """Remember the first signal; the loop asks for it, all ranks together."""
        self.signal = self.signal or number

    def __exit__(self, kind: type | None, error: Exception | None, trace: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is Stopped:
            self.save("last.pt")
            self.say(f"stopped; continue with --resume --output {self.out}: {self.where()}")
            raise SystemExit(128 + error.args[0]) from None

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

    def settle(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give a fresh and a resumed run the same order of sums.

        DDP regroups its buckets after the first backward pass. The gradients of two passes are
        thrown away, and what they did to buffers (BatchNorm's) is undone.
        """
        batch = self.collate(
            [self.train_set[pair] for pair in self.sampler.indices(0)[: self.micro]]
        )
        batch = self.world.to_device(self.world.raise_error(batch))
        buffers = [b.clone() for b in self.model.buffers()]
        for _ in range(2):
            with self.autocast():
                loss, _ = model(batch, torch.zeros((), device=self.device))
            loss.backward()
            optimizer.zero_grad(set_to_none=True)
        for b, kept in zip(self.model.buffers(), buffers):
            b.copy_(kept)

    def steps(
        self, model: nn.Module, optimizer: torch.optim.Optimizer,
        evaluate: Callable | None = None, preview: Callable | None = None,
    ) -> Iterator[Step]:  # fmt: skip
        """Yield the steps that are left, from the last checkpoint on; save, evaluate and log.

        Args:
            model, optimizer: of the loop, the model as `place` returned it.
            evaluate: (model, batch) -> dict of 0-d tensors, averaged over the val split; None: the
                model's own loss and logs at the end of training.
            preview: (model, batch) -> {name: (truth, hidden, prediction)}, see `pictures.columns`.
        """
        cfg = self.cfg
        self.step_model, self.optimizer = model, optimizer
        if self.world.size > 1:
            self.settle(model, optimizer)
        if self.checkpoint:
            checkpoint.load_weights(self.model, self.checkpoint["model"], self.last)
            checkpoint.load_optimizer(optimizer, self.checkpoint["optimizer"], self.last)
        if self.number >= self.stop:  # what a cluster that restarts its jobs comes to in the end
            self.say(f"finished already: {self.out} is at step {self.number} of {self.total}")
            return
        self.meter = Meter(self.out, self.world, self.train_set, self.checkpoint)
        if self.lead:
            print(screen(self, self.model), flush=True)
            if self.checkpoint:
                print(f"resumed     {self.last} at step {self.number}")
            with checkpoint.writing(path := self.out / "config.json"):
                path.write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
            checkpoint.warn_of_space(self.model, self.out)
        loader = torch.utils.data.DataLoader(
            self.train_set, batch_sampler=self.sampler, collate_fn=self.collate,
            num_workers=self.world.workers(cfg.workers), worker_init_fn=data.worker_init,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        if self.checkpoint is None:
            validate(self, evaluate)
        self.batches, self.saved = iter(loader), time.monotonic()
        bar = tqdm(
            total=self.stop, initial=self.number, unit="step", disable=not self.lead,
            dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # fmt: skip
        self.meter.restart()
        while self.number < self.stop:
            step = Step(self)
            yield step
            bar.update()
            if step.logging:
                bar.set_postfix_str(
                    self.meter.log(step.record, cfg.batch_size, self.sampler), False
                )
            self.end_of_epoch(evaluate, preview)
        bar.close()
        self.save("last.pt")
        validate(self, evaluate, preview)
        self.say(f"finished: {self.where()}")

    def end_of_epoch(self, evaluate: Callable | None, preview: Callable | None) -> None:
        cfg, (epoch, rest) = self.cfg, divmod(self.number, self.per_epoch)
        if rest:
            return
        self.meter.bad = 0
        if cfg.save_epochs and epoch % cfg.save_epochs == 0:
            self.save(f"epoch-{epoch:04d}.pt")
        shown = cfg.preview_epochs and epoch % cfg.preview_epochs == 0
        looked = cfg.val_epochs and epoch % cfg.val_epochs == 0
        if self.number < self.stop and (shown or looked):
            validate(self, evaluate, preview if shown else None)
            self.meter.restart()

    def save(self, name: str) -> None:
        """Write a checkpoint; nothing is saved after a loss that was not finite."""
        self.meter.check(self.sampler)
        state = {"window": self.meter.window()}  # all ranks reduce; rank 0 writes
        if self.lead:
            state |= {"format": checkpoint.FORMAT, "method": self.method, "step": self.number}
            state |= {"model": self.model.state_dict(), "config": dataclasses.asdict(self.cfg)}
            state |= {"facts": self.facts}
            checkpoint.save(self.out / name, state | {"optimizer": self.optimizer.state_dict()})
        self.world.maximum(0)
        self.saved = time.monotonic()
