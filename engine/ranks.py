"""This process among the ranks: device, precision, and agreement between ranks."""

import contextlib
import ctypes
import os
import sys
import time
import typing
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import UserError
from engine.field import nearest


class World:
    """`rank`, `size`, `device` of this process, as torchrun's variables say; alone without them."""

    def __init__(self, device: str, precision: str):
        env = os.environ
        self.rank, self.size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank = int(env.get("LOCAL_RANK", self.rank))
        self.local_size = int(env.get("LOCAL_WORLD_SIZE", self.size))
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; --device cpu works anywhere")
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} ranks on this node, {torch.cuda.device_count()} CUDA devices: "
                "lower --nproc_per_node, or --device cpu"
            )
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        self.bf16 = precision == "bf16" or (precision == "auto" and has_bf16(self.device))

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def maximum(self, *values: int) -> list[int]:
        """Largest value over the ranks, through host memory, so no device is waited for."""
        if self.size == 1:
            return list(values)
        t = torch.tensor(values)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return t.tolist()

    def mean(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def from_rank_0(self, make: Callable[[], object]) -> object:
        """Run `make` on rank 0 and hand its result, or its UserError, to every rank."""
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except UserError as e:
                box[1] = str(e)
        if self.size > 1:
            dist.broadcast_object_list(box)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def raise_error(self, batch: dict) -> dict:
        """Raise the UserError that a loader sent in place of a batch, on every rank."""
        errors = [batch.get("error")] * self.size
        if self.size > 1:
            dist.all_gather_object(errors, batch.get("error"))
        for error in filter(None, errors):
            raise UserError(error)
        return batch

    def workers(self, wanted: int | None) -> int:
        """Loader processes of this rank: `wanted`, or its share of the cores, at most 16."""
        if wanted is not None:
            return wanted
        has = hasattr(os, "sched_getaffinity")  # not on macOS
        cores = len(os.sched_getaffinity(0)) if has else os.cpu_count()
        return max(1, min(16, cores // self.local_size))

    def split_batch(self, batch_size: int, micro_batch: int) -> tuple[int, int]:
        """Micro-batches a step, and samples in each: the fewest that divide a rank's share."""
        if batch_size % self.size:
            raise UserError(
                f"--batch-size {batch_size} is not divisible by the {self.size} ranks; nearest "
                f"that work: {nearest(batch_size, self.size)}"
            )
        share = batch_size // self.size
        fits = (a for a in range(1, share + 1) if share % a == 0 and share // a <= micro_batch)
        return (accum := next(fits)), share // accum


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products have units of their own: others are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # NOTE private names: AMX, and AVX512-BF16, where bf16 takes half of fp32's time.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def peak_memory(device: torch.device) -> float:
    """Most memory that this process had on its device so far, MiB; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, which a CPU step otherwise pays for in page faults."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def part() -> None:
    """End the ranks' group, all together: who goes on alone may take longer than others wait."""
    if dist.is_initialized():
        dist.barrier()  # torch 2.6 can hang in the next line while an all-reduce is being freed
        dist.destroy_process_group()


def command(name: str, main: Callable[[], int | None]) -> typing.NoReturn:
    """Run and exit with the status returned; an error of the user's or of the file system is one
    message and exit status 2.
    """
    rank = int(os.environ.get("RANK", 0))
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    try:
        status = main() or 0
    except UserError as e:
        if rank:  # rank 0 speaks first, and torchrun then ends the others: it met the same error
            time.sleep(5)
        tqdm.write(f"{name}: error: {e}", file=sys.stderr)
        status = 2
    except OSError as e:  # a full disk, say, which other ranks may not see
        print(f"{name}: error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if status == 0:
        part()
    sys.exit(status)
