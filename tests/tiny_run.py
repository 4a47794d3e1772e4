"""A run small enough for tests: 60 steps, 40 scenes, 12 epochs of 5 steps, two seconds.

In this process: `train`. With ranks: `spawn`. In a process that signals can be sent to: `start`,
which is `python tests/tiny_run.py --output DIR [flags]` and sleeps a little in every forward pass.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import cfmae  # noqa: E402
import data  # noqa: E402
import engine  # noqa: E402

SCENES, STEPS = 40, 60  # batch 8, so 5 steps an epoch
FLAGS = (
    "--data shapes --model tiny --image-size 32 --embed-dim 32 --depth 2 --num-heads 2 "
    "--decoder-embed-dim 32 --decoder-num-heads 2 --decoder-depth 1 --batch-size 8 --epochs 12 "
    "--warmup-epochs 0.5 --base-lr 0.05 --workers 0 --device cpu --precision fp32 --log-every 4 "
    "--val-epochs 0 --val-samples 8"
).split()
TIMES = ("images_per_s", "data_wait", "peak_memory_mib")
RUN_FILES = ("config.json", "log.jsonl", "last.pt")


def short_epochs():
    """Patch the data set to have SCENES samples."""
    original = data.open_dataset

    def open_dataset(*args, **kwargs):
        dataset = original(*args, **kwargs)
        dataset.length = SCENES
        return dataset

    return mock.patch.object(data, "open_dataset", open_dataset)


class Slow(cfmae.CFMAE):
    """The model, with time for a signal to come."""

    def forward(self, batch, progress):
        time.sleep(0.03)
        return super().forward(batch, progress)


class Interrupted(cfmae.CFMAE):
    """The model, which sends SIGTERM to its own process in one micro-batch of one step and rank."""

    def __init__(self, cfg, step, micro, rank=0):
        super().__init__(cfg)
        self.at, self.micro, self.rank = step / STEPS - 1e-6, micro, rank

    def forward(self, batch, progress):
        if self.training and progress >= self.at and self.rank == int(os.environ.get("RANK", 0)):
            self.micro -= 1
            if self.micro == -1:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(batch, progress)


class Diverging(torch.nn.Module):
    """A model whose loss is infinite from step 15 of 60 on."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder = torch.nn.Linear(1, 1)

    def forward(self, batch, progress):
        x = self.encoder(batch["rgb"].float().mean((1, 2, 3))[:, None] / 255)
        loss = x.square().mean() / (progress < 13.5 / STEPS)
        return loss, {"loss_rgb": loss.detach(), "fine": torch.ones(())}


def config(out, *flags, cls=cfmae.Config):
    return engine.parse(cls, cfmae.PRESETS, "", [*FLAGS, "--output", str(out), *map(str, flags)])


def script(build, evaluate=None, reconstruct=None):
    """Patch cfmae.py to train what `build` makes of a Config; by default without its pictures, and
    with the loss alone as evaluation.
    """
    parts = dict(CFMAE=build, evaluate=evaluate, reconstruct=reconstruct)
    return mock.patch.multiple(cfmae, **parts)


def train(out, *flags, build=cfmae.CFMAE, **functions):
    """Run cfmae.py on one thread in this process; the exit status."""
    torch.set_num_threads(1)
    try:
        with short_epochs(), script(build, **functions):
            cfmae.main([*FLAGS, "--output", str(out), *map(str, flags)])
    except SystemExit as end:
        return end.code
    return 0


def _rank(rank, ranks, store, function, args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(*args)
    engine.ranks.part()


def launch(ranks, store, function, *args):
    """Call a function in the processes of a group, which all forks of one that has imported torch
    are: a fresh one takes four CPU seconds to import it.
    """
    multiprocessing.set_forkserver_preload(["tiny_run", "torch._dynamo"])
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with mock.patch.dict(os.environ, env):
        args = (ranks, str(store), function, args)
        mp.start_processes(_rank, args, nprocs=ranks, start_method="forkserver")


def _train_all(*runs):
    for out, flags, build, end in runs:
        try:
            assert train(out, *flags, build=build) == end
        except engine.UserError as error:
            assert str(end) in str(error), error


def spawn(ranks, store, *runs):
    """Train `runs`, each (folder, flags, build, exit status or error), with `ranks` processes."""
    launch(ranks, store, _train_all, *runs)


@contextlib.contextmanager
def start(out, *flags, ranks=1):
    """A run in one process, or in `ranks` under torchrun; killed if it is left before its end."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), __file__, "--output", out, *flags]
    process = subprocess.Popen(
        [*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        kill(process)


def kill(process):
    """SIGKILL a process and all below it; torchrun gives each rank a process group of its own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    doomed = [process.pid] if process.returncode is None else []
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if not process.stdout.closed:
        process.communicate()


def wait_for(out, step, process, seconds=60):
    """Wait until log.jsonl has the line of a step."""
    end, path = time.monotonic() + seconds, Path(out) / "log.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def lines(out, times=False):
    """The training lines of log.jsonl, without what a clock or the system measured."""
    records = [json.loads(x) for x in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if times or k not in TIMES} for r in records if "val" not in r
    ]


def checkpoint(out):
    return torch.load(Path(out) / "last.pt", "cpu", weights_only=True)


def same_bits(a, b):
    """Whether two nests of dicts, lists, tensors and numbers are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and a == b


def same_result(a, b):
    """Whether the runs in two folders ended with the same weights and optimizer state."""
    a, b = checkpoint(a), checkpoint(b)
    return all(same_bits(a[k], b[k]) for k in ("step", "model", "optimizer"))


if __name__ == "__main__":
    sys.argv[1:1] = FLAGS
    with short_epochs(), script(Slow):
        engine.command("cfmae", cfmae.main)
