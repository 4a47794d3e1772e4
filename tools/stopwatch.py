"""Time one row of `benchmark step`: the script's own loop, around one batch that is there already.

`Stopwatch` takes the place of `engine.Run`, so what is timed is what a run does: forward, backward,
clipping where the recipe has it, what a method adds (CoMA's Eq. 4), AdamW. Of that:

    seconds  by the clock, and of the CPU, all threads together: those do not grow with what else a
             machine does
    FLOPs    torch.utils.flop_counter, 2 a multiply-add
    parts    one more step, in which a dispatch mode times each operator and asks which module it
             belongs to, forward or backward; the same by operator. Shares, as it slows the step
"""

import argparse
import contextlib
import importlib
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import engine  # before torch: it sets how threads wait

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from torch.utils.module_tracker import ModuleTracker

import data
import mae
import targets
from engine.ranks import World, peak_memory
from tools import peers

PER_EPOCH = 1000  # steps, which only the rate depends on


# ------------------------------------------------------------------------------------ what counts


def backward_of_convolution(grad, x, w, _bias, _stride, _pad, _dil, transposed, *rest, **_) -> int:
    """FLOPs of a convolution's backward; flop_counter's own takes a grouped one for a dense one."""
    (_, _, wanted), dims = rest[-3:], (x, w, grad)
    return sum(wanted[:2]) * conv_flop_count(*dims, transposed=transposed)


def flop_counter() -> FlopCounterMode:
    mapping = {torch.ops.aten.convolution_backward: backward_of_convolution}
    return FlopCounterMode(display=False, custom_mapping=mapping)


class Parts(TorchDispatchMode):
    """Times every operator and books it on the part of the model that it belongs to.

    `spans` has (part, operator, begin, end) of each.
    """

    def __init__(self, cuda: bool):
        super().__init__()
        self.cuda, self.tracker, self.spans = cuda, ModuleTracker(), []

    def __enter__(self):
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.tracker.__exit__(*args)

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        began = self.now()
        out = func(*args, **(kwargs or {}))
        owners = [p.partition(".")[2] for p in self.tracker.parents]  # "" is the model itself
        names = ("encoder", "decoder", "evaluation")
        part = next((n for n in names if any(o.startswith(n) for o in owners)), "masks, loss")
        self.spans.append((part, func.overloadpacket.__name__, began, self.now()))
        return out

    def shares(self, key: int = 0) -> dict[str, float]:
        """Shares of the time by part, or with `key` 1 by operator."""
        if self.cuda:
            torch.cuda.synchronize()
        total = defaultdict(float)
        for *names, a, b in self.spans:
            total[names[key]] += a.elapsed_time(b) if self.cuda else b - a
        whole = sum(total.values())
        return {k: v / whole for k, v in sorted(total.items())}


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a square matrix product in ten: FLOP/s on CUDA, FLOP a CPU second on a CPU."""
    cuda = device.type == "cuda"
    n, now = (8192, time.perf_counter) if cuda else (2048, time.process_time)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        began = now()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        times.append(now() - began)
    return 2 * n**3 / min(times[2:])


# ---------------------------------------------------------------------------------------- the run


class Step(engine.Step):
    """A step of the loop, which notes what its parts take."""

    def micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        with self.run.watch:
            yield from super().micro_batches()

    def backward(self, loss: torch.Tensor, logs: dict[str, torch.Tensor]) -> None:
        if isinstance(self.run.watch, FlopCounterMode):
            self.run.result["flops"] = self.run.watch.get_total_flops()  # forward's
        super().backward(loss, logs)

    def update(self, lr: float) -> None:
        began = self.run.clock()
        super().update(lr)
        self.seconds = self.run.clock() - began


class Stopwatch(engine.Run):
    """A run as its loop sees it: one batch, no data, nothing saved; `result` is what it measured.

    Args: `args`, of `benchmark step`; `out`, a folder to forget; the others as `engine.Run`'s.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        out: str,
        method: str,
        cfg: engine.Config,
        iterations: int | None = None,
        granularities: tuple[str, ...] = ("rgb",),
        source: ModuleType = data,
        frames: int | None = None,
        stride: int | None = None,
        **_,
    ):
        self.args, self.method, self.cfg, self.out = args, method, cfg, Path(out)
        self.world = World(cfg.device, cfg.precision)
        self.device, self.lead, self.checkpoint, self.signal = self.world.device, True, None, 0
        self.cuda = self.device.type == "cuda"
        if not self.cuda:
            engine.keep_freed_memory()
        self.accum, self.micro, self.per_epoch = 1, args.batch_size, PER_EPOCH
        self.total = self.stop = iterations or cfg.epochs * PER_EPOCH
        self.number = self.start = self.total // 2  # halfway, where two masks of CFMAE may mix
        self.granularities, self.result, self.raw = granularities, {}, False
        self.source, self.clip = source, {"frames": frames, "stride": stride} if frames else {}
        torch.manual_seed(cfg.seed)

    def place(self, model: nn.Module) -> Callable:
        """The model, compiled or not; while operators are counted, never."""
        compiled = super().place(model)
        return lambda *args: (self.model if self.raw else compiled)(*args)

    def clock(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def scenes(self, size: int) -> dict[str, torch.Tensor]:
        """A batch of ShapeScenes, with the granularities that the method asks for."""
        pixels, seen = (self.cfg.image_size, self.cfg.patch_size), self.granularities
        scenes = self.source.open_dataset(
            "shapes", "train", *pixels, seen, (1.0, 1.0), True, 0, **self.clip
        )
        batch = data.collate([scenes[0, i] for i in range(size)])
        return {k: v if k == "bad" else v.to(self.device) for k, v in batch.items()}

    def steps(
        self, model: Callable, optimizer: torch.optim.Optimizer, *_: object
    ) -> Iterator[Step]:
        """Yield warm-up and timed steps, and with --details two more, for FLOPs and for parts."""
        args, times, cpu, updates = self.args, [], [], []
        self.step_model, self.optimizer, self.saved = model, optimizer, time.monotonic()
        self.meter = engine.Meter(self.out, self.world, None, None)
        self.meter.restart()
        self.watch = contextlib.nullcontext()
        self.batches = itertools.repeat(self.scenes(args.batch_size))
        for _ in range(args.warmup + args.steps):
            began, used = self.clock(), time.process_time()
            yield (step := Step(self))
            times.append(self.clock() - began)
            cpu.append(time.process_time() - used)
            updates.append(step.seconds)
        self.result |= {"times": times[args.warmup :], "cpu": cpu[args.warmup :]}
        self.result["peak"] = peak_memory(self.device)
        if args.details:
            yield from self.details(statistics.median(updates[args.warmup :]))

    def details(self, update: float) -> Iterator[Step]:
        self.raw, whole, found = True, self.batches, self.result
        self.batches, self.watch = itertools.repeat(self.scenes(2)), flop_counter()
        yield Step(self)
        found |= {"flops": found["flops"] / 2, "flops_step": self.watch.get_total_flops() / 2}
        self.batches, self.watch = whole, Parts(self.cuda)
        yield Step(self)
        rest = update / statistics.median(found["times"])
        for key, name in enumerate(("parts", "operators")):
            shares = {k: v * (1 - rest) for k, v in self.watch.shares(key).items()}
            found[name] = shares | {"optimizer": rest}
        found["parameters"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        dtype = torch.bfloat16 if self.world.bf16 else torch.float32
        found["matrix_peak"] = matrix_peak(self.device, dtype)


def one(args: argparse.Namespace, rows: dict[str, tuple[str, str]]) -> dict:
    """Time one of `rows`, {name: (method, its flags)}, a peer, or --method, in this process."""
    runs = []
    with tempfile.TemporaryDirectory() as out:

        def run(*given, **options) -> Stopwatch:
            runs.append(Stopwatch(args, out, *given, **options))
            return runs[0]

        how = ["--precision", args.precision, "--device", args.device]
        how += ["--compile"] * args.compile + ["--log-every", str(10**9)]
        with mock.patch.object(engine, "Run", run):
            if args.rows in peers.PEERS:
                with mock.patch.object(mae, "MAE", lambda _: peers.build(args.rows, args.peers)):
                    mae.main(how)
            else:
                method, flags = rows.get(args.rows) or (args.method, f"--model {args.model}")
                if "DALLE" in flags:
                    torch.save(targets.random_state(256, 2, 8192), f"{out}/dalle.pth")
                    flags = flags.replace("DALLE", f"{out}/dalle.pth")
                importlib.import_module(method).main([*flags.split(), *args.flags.split(), *how])
    return {"row": args.rows or f"{args.method}-{args.model}", **runs[0].result}
