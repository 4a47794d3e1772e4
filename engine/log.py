"""What a run says while it trains: log.jsonl, the bar's text, a loss that is not finite."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from data import BatchSampler, UserError
from engine.checkpoint import writing
from engine.folder import most_unreadable
from engine.ranks import World, peak_memory
from files import replacing


class Meter:
    """Loss terms, times and unreadable files of a run; nothing here waits for the device until a
    line is written or a checkpoint is due.

    A term that only some steps have (CoMA's second branch) is the mean over these.
    """

    def __init__(
        self, out: Path, world: World, train_set: Dataset, checkpoint: dict | None, log: str = "",
        samples: str = "images",
    ):  # fmt: skip
        self.samples, self.count = samples, 0
        self.out, self.world, self.train_set = out, world, train_set
        self.bad = self.part_bad = 0  # unreadable files of this epoch, and of an unfinished step
        lead = log == "tensorboard" and world.rank == 0
        self.board = tensorboard(out, checkpoint["step"] + 1 if checkpoint else 0) if lead else None
        self.names, self.counts = [], []  # of the window: terms, and the steps that had each
        self.sum = self.part = torch.zeros(0, device=world.device)
        if checkpoint and world.rank == 0:  # of the epoch so far, over all ranks
            self.bad = checkpoint["window"].get("bad", 0)
        self.finite_until = None  # on the device: the first step with a bad loss, and its terms
        if checkpoint and checkpoint["window"]["count"]:
            self.names, values, self.count = (checkpoint["window"][k] for k in FIELDS[:3])
            self.sum = torch.tensor(values, device=world.device)
            self.counts = checkpoint["window"].get("counts", [self.count] * len(self.names))
        if world.rank == 0:  # a line after the checkpoint belongs to steps that will be done again
            path, at = out / "log.jsonl", checkpoint["step"] if checkpoint else -1
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            with writing(path), replacing(str(path)) as f:
                f.write("".join(x for x in lines if self.is_whole(x, at)).encode())

    @staticmethod
    def is_whole(line: str, at: int) -> bool:
        """Whether a line of the log belongs to a step up to `at` and was not torn by a crash."""
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= at
        except ValueError:
            return False

    def restart(self) -> None:
        """Start the clock, after anything that is not training."""
        self.began, self.waited, self.first = time.monotonic(), 0.0, self.count

    def add(self, step: int, loss: Tensor, logs: dict[str, Tensor], bad: Tensor) -> None:
        """Take in one micro-batch; `bad` (B,), on the CPU, is -1 or an unreadable file."""
        terms = {"loss": loss.detach(), **logs}
        new = [k for k in terms if k not in self.names]
        self.names, self.counts = self.names + new, self.counts + [0] * len(new)
        none = torch.zeros((), device=loss.device)
        values = torch.stack([terms.get(k, none).float() for k in self.names])
        self.now = [k in terms for k in self.names]
        self.sum, self.part = (self.widen(x, values) for x in (self.sum, self.part))
        self.part = self.part + values
        if self.finite_until is None:
            self.finite_until = torch.full((), 1e18, dtype=torch.float64, device=loss.device)
            self.bad_terms = torch.zeros_like(values)
        wrong = ~values[0].isfinite() & (self.finite_until > 1e17)
        self.finite_until = self.finite_until.where(~wrong, step)
        self.bad_terms = torch.where(wrong, values, self.widen(self.bad_terms, values))
        for index in bad[bad >= 0].tolist():
            self.part_bad += 1
            name = self.train_set.files.name(index) + "\n"  # which may be no UTF-8
            with writing(path := self.out / "bad_files.txt"), open(path, "ab") as f:
                f.write(os.fsencode(name))

    @staticmethod
    def widen(x: Tensor, to: Tensor) -> Tensor:
        return torch.cat([x, to.new_zeros(len(to) - len(x))]) if len(x) < len(to) else x

    def end_step(self, accum: int) -> None:
        """Count a step of `accum` micro-batches; those of a step that is dropped never count."""
        self.sum, self.part = self.sum + self.part / accum, torch.zeros_like(self.part)
        self.counts, self.count = [a + b for a, b in zip(self.counts, self.now)], self.count + 1
        self.bad, self.part_bad = self.bad + self.part_bad, 0

    def window(self) -> dict:
        """Sums since the last line, mean over ranks, and `bad`: a resumed run goes on from here."""
        values = self.world.mean(self.sum.clone()).tolist() if self.count else []
        window = dict(zip(FIELDS, (self.names, values, self.count, self.counts)))
        bad = self.world.mean(torch.tensor(float(self.bad))) * self.world.size
        return window | {"bad": round(float(bad))}

    def check(self, sampler: BatchSampler) -> None:
        """UserError where a loss was not finite: step, terms, samples, last checkpoint."""
        if self.finite_until is None:
            return
        first = self.finite_until.clone()
        if self.world.size > 1:
            dist.all_reduce(first, dist.ReduceOp.MIN)
        if first > 1e17:
            return
        mine = (self.finite_until == first).float()  # the terms' mean over the ranks that saw it
        terms = torch.stack([mine, *self.bad_terms.where(mine > 0, 0.0)])
        if self.world.size > 1:
            dist.all_reduce(terms)
        terms = zip(self.names, (terms[1:] / terms[0]).tolist())
        terms = ", ".join(f"{k} {v:.4g}" for k, v in terms)
        step, last = int(first), self.out / "last.pt"
        where = f"last good checkpoint {last}" if last.exists() else "no checkpoint before it"
        samples = [index for _, index in sampler.indices(step)]
        raise UserError(
            f"the loss of step {step + 1} is not finite ({terms}); {where}; samples of that step: "
            f"{samples[:64]}{' ...' if samples[64:] else ''}. Try a lower --base-lr, --clip-grad "
            "or --precision fp32"
        )

    def log(self, record: dict, batch_size: int, sampler: BatchSampler) -> str:
        """Write a line of means since the last one; returns the progress bar's text."""
        self.check(sampler)
        window = self.window()
        means = {k: v / n for k, v, n in zip(self.names, window["sum"], self.counts)}
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.count - self.first) * batch_size / seconds
        peak = peak_memory(self.world.device)
        bad = window["bad"]
        times = {"images_per_s": rate, "data_wait": self.waited / seconds, "peak_memory_mib": peak}
        self.write(record | means | times | {"unreadable_files": bad})
        if bad > (limit := most_unreadable(sampler.length)):
            raise UserError(
                f"{bad} unreadable {self.samples} in this epoch (more than {limit}); their names "
                f"are in {self.out / 'bad_files.txt'}"
            )
        self.names, self.counts, self.count = [], [], 0
        self.sum = self.part = torch.zeros(0, device=self.world.device)
        self.finite_until = None
        self.restart()
        wait = f"data wait {times['data_wait']:.0%}"
        return f"loss {means['loss']:.4f}, {rate:.1f} {self.samples}/s, {wait}"

    def write(self, record: dict) -> None:
        if self.world.rank == 0:
            with writing(path := self.out / "log.jsonl"), open(path, "a") as f:
                f.write(json.dumps(record) + "\n")
        for name, value in record.items() if self.board else ():
            terms = {f"val/{k}": v for k, v in value.items()} if name == "val" else {name: value}
            for k, v in terms.items():
                self.board.add_scalar(k, v, record["step"])
            self.board.flush()


def tensorboard(out: Path, step: int) -> object:
    """A writer of TensorBoard's files; what it wrote of steps from this one on is done again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--log tensorboard: pip install tensorboard") from None
    return SummaryWriter(out, purge_step=step)


FIELDS = ("names", "sum", "count", "counts")  # of a window; older checkpoints lack the last
