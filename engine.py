"""The run that all method scripts share: from the command line to checkpoints and logs.

    config       arg, Config, parse                 a dataclass is the command line
    world        World                              ranks, device, precision
    schedule     learning_rate, parameter_groups
    checkpoint   save, read, load, load_weights     plain types, atomic, read with weights_only=True
    loop         main, train                        from the command line to the last checkpoint

A step depends on nothing but the weights, its number and the seed: masks and augmentation come
from each sample's seed, samples from the step's number. So the number of ranks, workers or
micro-batches, and where a run was interrupted, change nothing but rounding.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import inspect
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# OpenMP's threads otherwise wait for one another in a busy loop: on a CPU with anything else to do,
# loader processes included, a step then takes many times as long. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import UserError

FORMAT = 1  # of the checkpoint
WRAPPERS = ("model", "state_dict", "module", "teacher")  # what public code wraps weights in
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip


# ----------------------------------------------------------------------------------------- config


def arg(default: object, source: str, choices: list | None = None) -> typing.Any:
    """A configuration field: its default, where that comes from (shown by --help), its choices."""
    return dataclasses.field(default=default, metadata={"help": source, "choices": choices})


LIMITS = (
    ("epochs batch_size micro_batch base_lr steps clip_grad log_every val_samples",
     lambda x: x > 0, "must be above 0"),
    ("warmup_epochs min_lr weight_decay workers save_minutes save_epochs val_epochs preview_epochs",
     lambda x: x >= 0, "must be 0 or above"),
    ("beta1 beta2", lambda x: 0 <= x < 1, "is outside [0, 1)"),
    ("crop_scale_min", lambda x: 0 < x <= 1, "is outside (0, 1]"),
    ("seed", lambda x: 0 <= x < 2**63, "is outside 0 to 2**63 - 1"),
)  # fmt: skip


@dataclass
class Config:
    """What every run needs. A method's own Config restates each value that its paper sets."""

    data: str = arg("data/imagenet", "folder of images and maps, or shapes, the embedded data")
    output: str | None = arg(None, "folder of the run; default: a new one under runs/")
    model: str = arg("base", "preset")
    epochs: int = arg(400, "length of the schedule")
    steps: int | None = arg(None, "stop after this many steps; the schedule keeps its length")
    warmup_epochs: float = arg(40, "linear warm-up")
    batch_size: int = arg(2048, "global batch, over all ranks and micro-batches")
    micro_batch: int = arg(128, "most samples that one device takes at a time; set by the preset")
    base_lr: float = arg(1.5e-4, "lr = base_lr * batch_size / 256")
    min_lr: float = arg(0.0, "where the cosine ends")
    weight_decay: float = arg(0.05, "not on biases, norms, tokens, embeddings")
    beta1: float = arg(0.9, "AdamW")
    beta2: float = arg(0.95, "AdamW")
    clip_grad: float | None = arg(None, "largest gradient norm")
    image_size: int = arg(224, "pixels")
    patch_size: int = arg(16, "pixels")
    crop_scale_min: float = arg(0.2, "smallest area of the random resized crop")
    seed: int = arg(0, "of weights, order, crops, masks")
    workers: int | None = arg(None, "loader processes a rank; default: its cores, at most 16")
    device: str = arg("auto", "auto, cpu or cuda", choices=["auto", "cpu", "cuda"])
    precision: str = arg("auto", "auto: bf16 where matrix units have it", ["auto", "fp32", "bf16"])
    compile: bool = arg(False, "torch.compile the model")
    deterministic: bool = arg(False, "deterministic CUDA kernels")
    resume: bool = arg(False, "continue the run in --output")
    log_every: int = arg(20, "steps between lines of log.jsonl")
    save_minutes: float = arg(20.0, "minutes between saves of last.pt")
    save_epochs: int = arg(0, "epochs between snapshots that are kept; 0 = none")
    val_epochs: int = arg(0, "epochs between evaluations; 0 = at the start and the end alone")
    val_samples: int = arg(512, "most samples of the val split that an evaluation reads")
    preview_epochs: int = arg(0, "epochs between preview pictures; 0 = at the end alone")

    # What may differ when a run is resumed; everything else is part of its result.
    FREE: typing.ClassVar = (
        "output", "steps", "micro_batch", "workers", "device", "compile", "resume", "log_every",
        "save_minutes", "save_epochs", "val_epochs", "val_samples", "preview_epochs",
    )  # fmt: skip

    def data_options(self) -> dict:
        """What the method asks of the loader, as keyword arguments of `data.open_dataset`."""
        return {"granularities": ("rgb",)}

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the schedule."""
        return self.epochs * steps_per_epoch

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Rate of a step (from 0)."""
        return learning_rate(self, step, steps_per_epoch)

    def optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        """The optimizer of `parameter_groups`; the loop sets its rate."""
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.beta1, self.beta2), fused=True)

    def wrap(self, dataset: torch.utils.data.Dataset, train: bool) -> torch.utils.data.Dataset:
        """Put a method's own augmentation around a split; none here."""
        return dataset

    def resolve(self) -> None:
        """Fill in defaults that depend on other fields; UserError on values that cannot work."""
        divides(self, "image_size", "patch_size")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag(name)} {value} is not a finite number")
        for names, fits, words in LIMITS:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise UserError(f"{flag(name)} {value} {words}")
        if self.resume and not self.output:
            raise UserError("--resume needs --output, the folder of the run to continue")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def divides(cfg: Config, whole: str, part: str) -> None:
    """UserError naming the nearest values that work unless `part` divides `whole`."""
    n, k = getattr(cfg, whole), getattr(cfg, part)
    if k <= 0 or n <= 0:
        raise UserError(f"{flag(whole)} {n} and {flag(part)} {k} must be above 0")
    if n % k:
        near = sorted({max(n // k, 1) * k, (n // k + 1) * k})
        raise UserError(
            f"{flag(whole)} {n} is not divisible by {flag(part)} {k}; "
            f"nearest that work: {' or '.join(map(str, near))}"
        )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (--help lists every flag)")


def parse(cls: type[Config], presets: dict[str, dict], doc: str, argv: list[str] | None) -> Config:
    """Build a Config: command line before preset before class default."""
    parser = Parser(
        description=doc, usage="%(prog)s [--flag value ...]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = next(t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)))
        choices = list(presets) if f.name == "model" else f.metadata["choices"]
        shown = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        else:
            extra = {"type": kind, "choices": choices}
            extra |= {} if choices else {"metavar": kind.__name__}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=shown, **extra)
    parser.epilog = "presets (--model), which change these defaults:\n" + "\n".join(
        f"  {name}: " + " ".join(f"{flag(k)} {v}" for k, v in values.items())
        for name, values in presets.items()
    )
    given = vars(parser.parse_args(argv))
    preset = presets[given.get("model", cls.model)]
    cfg = cls(**{**preset, **given})
    cfg.resolve()
    return cfg


# ------------------------------------------------------------------------------------------ world


class World:
    """This process among the ranks: `rank`, `size`, `device`; and agreement between ranks."""

    def __init__(self, cfg: Config):
        env = os.environ
        self.rank, self.size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank = int(env.get("LOCAL_RANK", self.rank))
        self.local_size = int(env.get("LOCAL_WORLD_SIZE", self.size))
        if cfg.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; --device cpu works anywhere")
        cuda = cfg.device != "cpu" and torch.cuda.is_available()
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
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and has_bf16(self.device))

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

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


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products have units of their own: others are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # NOTE private names: AMX, and AVX512-BF16, where bf16 takes half of fp32's time.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, which a CPU step otherwise pays for in page faults."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


# --------------------------------------------------------------------------------------- schedule


def learning_rate(cfg: Config, step: int, steps_per_epoch: int) -> float:
    """Rate of a step (from 0): linear warm-up to lr = base_lr * batch / 256, cosine to min_lr."""
    peak = cfg.base_lr * cfg.batch_size / 256
    warmup, total = cfg.warmup_epochs * steps_per_epoch, cfg.epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    done = (step - warmup) / max(total - warmup, 1)
    return cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights with decay; biases, norms, tokens and embeddings without."""
    groups = ({"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0})
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.ndim <= 1 or name.endswith(("_token", "_tokens", "_embed"))
            groups[plain]["params"].append(p)
    return list(groups)


# ------------------------------------------------------------------------------------- checkpoint


def save(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` is at any moment the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as f:
                torch.save(checkpoint, f)
                f.flush()
                os.fsync(f.fileno())
        except (OSError, RuntimeError) as e:  # torch's zip writer hides the first behind the second
            temporary.unlink(missing_ok=True)
            raise e if isinstance(e, OSError) else OSError(None, "the disk is full?") from None
        os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say in one line what could not be written, a full disk being the usual reason."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot write {path}: {e.strerror or e}. What was there before is whole; once there "
            "is room, --resume with --output goes on from the last checkpoint"
        ) from None


def warn_of_space(model: nn.Module, out: Path) -> None:
    """Say so when checkpoints (weights and AdamW's two moments) will not fit onto the disk."""
    size = sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())
    needed = size * (1 if (out / "last.pt").exists() else 2)  # the old one stays meanwhile
    if (free := shutil.disk_usage(out).free) < needed:
        print(f"warning     checkpoints take {size / 2**30:.2f} GiB, twice that while one is "
              f"written; {out} has {free / 2**30:.2f} GiB free", flush=True)  # fmt: skip


def read(path: str | Path, option: str = "") -> object:
    """Read a file's tensors and plain data, `.safetensors` too; no code in it is run.

    Errors: UserError, which begins with the option, e.g. "--init".
    """
    name = f"{option} {path}".strip()
    if not Path(path).is_file():
        what = "is a folder, not a file" if Path(path).is_dir() else "no such file"
        raise UserError(f"{name}: {what}")
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        # Public files keep their options beside the weights, as a Namespace; that is data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch's words advise to read it unsafely, or are "101"
        kind = ".safetensors" if str(path).endswith(".safetensors") else "a file of torch.save"
        if isinstance(e, PermissionError):
            raise UserError(f"{name}: {e.strerror}") from None
        raise UserError(
            f"{name} cannot be read safely: it is damaged, cut short, not {kind}, or holds more "
            "than tensors and plain data"
        ) from None


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read Hugging Face's file format: length of a JSON header, the header, the tensors' bytes."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:start]), memoryview(raw)[start:]
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        x = torch.frombuffer(bytearray(body[begin:end]), dtype=DTYPES[t["dtype"]])
        out[name] = x.reshape(t["shape"])
    return out


def read_state(path: str | Path, option: str, key: str | None = None) -> tuple[dict, str]:
    """Read a state dict of any origin: by itself, or in what public code wraps around it.

    Args:
        path: a file of torch.save, or `.safetensors`; a checkpoint of ours, too.
        option: for messages, e.g. "--init".
        key: where the state dict is, e.g. "model_ema" (--init-key); None: the first of WRAPPERS.
    Returns: names and tensors; what a report says of the choice, "" where there was none.
    Errors: UserError.
    """
    return unwrap(read(path, option), f"{option} {path}", key)


def unwrap(content: object, name: str, key: str | None = None) -> tuple[dict, str]:
    """Find the state dict in what a file holds; as `read_state`, `name` begins its messages."""
    state, taken, others = content, [], []
    for _ in range(3):
        if not isinstance(state, dict) or any(isinstance(v, Tensor) for v in state.values()):
            break
        wanted = [key] if key in state and key not in taken else [k for k in WRAPPERS if k in state]
        if not wanted:
            break
        inner = {k: v.values() for k, v in state.items() if k != wanted[0] and isinstance(v, dict)}
        others += [k for k, v in inner.items() if any(isinstance(x, Tensor) for x in v)]
        taken, state = [*taken, wanted[0]], state[wanted[0]]
    if key is not None and key not in taken:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else "no names at all"
        raise UserError(f"{name} has no {key!r}, but {found[:300]}")
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        under = ", ".join(map(repr, WRAPPERS))
        raise UserError(f"{name} holds no state dict, neither itself nor under {under}")
    report = f"{'.'.join(taken)} taken, not {', '.join(others)}" if others else ""
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}, report


def load(path: str | Path, method: str) -> dict:
    """Read a checkpoint of `method` onto the CPU.

    Errors: UserError where the file is none of ours, or of another method or format.
    """
    checkpoint = read(path)
    keys = {"format", "method", "step", "config", "model", "optimizer", "window"}
    if not isinstance(checkpoint, dict) or not keys <= set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project")
    found = (checkpoint["method"], checkpoint["format"])
    if found != (method, FORMAT):
        raise UserError(f"{path} is of method and format {found}; wanted {(method, FORMAT)}")
    return checkpoint


def load_encoder(path: str | Path, method: str, cls: type[Config]) -> tuple[Config, dict]:
    """Read a checkpoint's Config and its encoder's state dict; UserError as `load`."""
    checkpoint, prefix = load(path, method), "encoder."
    weights = checkpoint["model"].items()
    state = {k.removeprefix(prefix): v for k, v in weights if k.startswith(prefix)}
    return load_config(path, cls, checkpoint["config"]), state


def load_config(path: str | Path, cls: type[Config], fields: dict) -> Config:
    """The Config of a checkpoint's fields; UserError naming those that this version has not."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := [k for k in fields if k not in known]:
        raise UserError(f"{path}: its config has fields unknown here: {', '.join(unknown)}")
    return cls(**fields)


def load_weights(
    model: nn.Module, state: dict[str, Tensor], path: str | Path,
    may_miss: Callable[[str], bool] = lambda name: False,
    may_stay: Callable[[str], bool] = lambda name: False,
) -> str:  # fmt: skip
    """Load a state dict: all that must fit, or nothing.

    Args:
        state: names as the model's; both may put `encoder.` before an encoder's or leave it out.
        path: of the file, for messages.
        may_miss: whether a name of the model's, without `encoder.`, may be absent from the file.
        may_stay: whether a name of the file's may be left there.
    Returns: a report of what was loaded, left out, and missing and so fresh.
    Errors: UserError listing the names and shapes that do not fit.
    """
    own = {k.removeprefix("encoder."): v for k, v in model.state_dict().items()}
    state = {k.removeprefix("encoder."): v for k, v in state.items()}
    missing, left = [k for k in own if k not in state], [k for k in state if k not in own]
    problems = [f"missing {k}" for k in missing if not may_miss(k)]
    problems += [f"unexpected {k}" for k in left if not may_stay(k)]
    problems += [
        f"{k} has shape {tuple(getattr(state[k], 'shape', ()))}, the model {tuple(v.shape)}"
        for k, v in own.items() if k in state and getattr(state[k], "shape", None) != v.shape
    ]  # fmt: skip
    if problems:
        shown = "; ".join(problems[:8]) + (f"; {len(problems) - 8} more" if problems[8:] else "")
        raise UserError(f"{path} does not fit the model, nothing was loaded: {shown}")
    with torch.no_grad():
        for k in own.keys() & state.keys():
            own[k].copy_(state[k])  # state_dict() shares the model's memory
    lists = []
    for names in (left, missing):
        counts = collections.Counter(k.split(".")[0] for k in names).items()
        lists.append(", ".join(k if n == 1 else f"{k} ({n})" for k, n in counts) or "nothing")
    loaded = f"{path}: {len(own) - len(missing)} tensors loaded"
    return f"{loaded}; left out: {lists[0]}; missing, so fresh: {lists[1]}"


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: str | Path) -> None:
    """Load an optimizer's state; UserError where it belongs to other parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    try:
        fits = own == [group["params"] for group in state["param_groups"]] and all(
            value is None or value.shape in ((), params[i].shape)
            for i, values in state["state"].items() for value in values.values()
        )  # fmt: skip
    except (AttributeError, IndexError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"the optimizer state in {path} does not fit the model's parameters")
    optimizer.load_state_dict(state)


def refuse_changes(cfg: Config, old: dict, path: Path) -> None:
    """UserError naming the fields in which a resumed run would differ from its checkpoint."""
    new = dataclasses.asdict(cfg)
    changed = [k for k in {**old, **new} if k not in cfg.FREE and old.get(k) != new.get(k)]
    if changed:
        shown = "; ".join(f"{flag(k)} was {old.get(k)}, is {new.get(k)}" for k in changed)
        raise UserError(f"{path} is a run with other settings: {shown}")


# ------------------------------------------------------------------------------------------- data


def open_folder(cfg: Config, method: str) -> tuple[str, bool]:
    """Create the folder of a run, or enter one to resume; (path, whether it holds a checkpoint)."""
    out = Path(cfg.output or f"runs/{method}-{cfg.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    number = itertools.count(2)
    while not cfg.output and out.exists():
        out = out.with_name(f"{out.name.partition('_')[0]}_{next(number)}")
    if not cfg.resume and any((out / n).exists() for n in ("config.json", "log.jsonl", "last.pt")):
        raise UserError(f"{out} holds a run: continue it with --resume, or choose another --output")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot create the output folder {out}: {e}") from None
    return str(out), (out / "last.pt").exists()


def open_data(cfg: Config, world: World, out: Path, split: str) -> torch.utils.data.Dataset | None:
    """Open one split on every rank; None where a folder has no val split.

    Rank 0 lists the files once, and the list is frozen in the run's folder, which all nodes share:
    a run that continues from a checkpoint, and every worker, maps it from there.
    """
    options = cfg.data_options()
    common = (cfg.image_size, cfg.patch_size, options.pop("granularities"))
    keys = {"scale": (cfg.crop_scale_min, 1.0), "train": split == "train", "seed": cfg.seed}
    keys |= options
    if cfg.data == "shapes":
        return cfg.wrap(data.open_dataset(cfg.data, split, *common, **keys), split == "train")
    folder = out / f"files-{split}"

    def listing() -> bool:
        if split != "train" and not (Path(cfg.data) / split).is_dir():
            return False
        if not ((out / "last.pt").exists() and (folder / "files.npy").exists()):
            files = data.scan(cfg.data, split, common[2])
            data.check(data.open_dataset(cfg.data, split, *common, files=files, **keys))
            with writing(folder):
                files.save(folder)
        return True

    if not world.from_rank_0(listing):
        return None
    for _ in range(60):  # a network file system shows a new folder late
        if (folder / "files.npy").exists():
            break
        time.sleep(0.5)
    else:
        raise UserError(f"rank {world.rank} does not see {folder}: all nodes must share --output")
    files = data.FileList.open(folder)
    dataset = data.open_dataset(cfg.data, split, *common, files=files, **keys)
    return cfg.wrap(dataset, split == "train")


def split_batch(cfg: Config, world: World) -> tuple[int, int]:
    """Micro-batches a step and samples in each: the fewest that divide a rank's share evenly."""
    if cfg.batch_size % world.size:
        near = cfg.batch_size // world.size * world.size
        raise UserError(
            f"--batch-size {cfg.batch_size} is not divisible by the {world.size} ranks; nearest "
            f"that work: {f'{near} or ' if near else ''}{near + world.size}"
        )
    share = cfg.batch_size // world.size
    accum = next(a for a in range(1, share + 1) if share % a == 0 and share // a <= cfg.micro_batch)
    return accum, share // accum


# ------------------------------------------------------------------------------------------- logs


class Meter:
    """Loss terms, times and unreadable files of a run; nothing here waits for the device until a
    line is written or a checkpoint is due.
    """

    def __init__(self, out: Path, world: World, train_set: data.Dataset, checkpoint: dict | None):
        self.out, self.world, self.train_set, self.names = out, world, train_set, []
        self.sum, self.part, self.count, self.bad = 0.0, 0.0, 0, 0
        self.finite_until = self.bad_terms = None  # on the device: first step with a bad loss
        if checkpoint:
            self.names, values, self.count = checkpoint["window"].values()
            self.sum = torch.tensor(values, device=world.device) if self.count else 0.0
        if world.rank == 0:  # a line after the checkpoint belongs to steps that will be done again
            path, at = out / "log.jsonl", checkpoint["step"] if checkpoint else -1
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            temporary = path.with_name(path.name + ".tmp")
            with writing(path):
                temporary.write_text("".join(x for x in lines if self.is_whole(x, at)))
                os.replace(temporary, path)

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
        self.names = ["loss", *logs]
        terms = torch.stack([loss.detach().float(), *(v.float() for v in logs.values())])
        self.part = self.part + terms
        if self.bad_terms is None:
            self.finite_until = torch.full((), 1e18, dtype=torch.float64, device=terms.device)
            self.bad_terms = torch.zeros_like(terms)
        wrong = ~terms[0].isfinite() & (self.finite_until > 1e17)
        self.finite_until = self.finite_until.where(~wrong, step)
        self.bad_terms = torch.where(wrong, terms, self.bad_terms)
        for index in bad[bad >= 0].tolist():
            self.bad += 1
            with writing(path := self.out / "bad_files.txt"), open(path, "a") as f:
                f.write(self.train_set.files.name(index) + "\n")

    def end_step(self, accum: int) -> None:
        """Count a step of `accum` micro-batches; those of a step that is dropped never count."""
        self.sum, self.part, self.count = self.sum + self.part / accum, 0.0, self.count + 1

    def window(self) -> dict:
        """Sums since the last line, mean over ranks: a resumed run completes that line."""
        values = self.world.mean(self.sum.clone()).tolist() if self.count else []
        return {"names": self.names, "sum": values, "count": self.count}

    def check(self, sampler: data.BatchSampler) -> None:
        """UserError where a loss was not finite: step, terms, samples, last checkpoint."""
        if self.bad_terms is None:
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

    def log(self, record: dict, batch_size: int, sampler: data.BatchSampler) -> str:
        """Write a line of means since the last one; returns the progress bar's text."""
        self.check(sampler)
        window = self.window()
        means = {k: v / self.count for k, v in zip(self.names, window["sum"])}
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.count - self.first) * batch_size / seconds
        cuda = self.world.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        peak = peak / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        bad = int(self.world.mean(torch.tensor(float(self.bad))) * self.world.size)
        times = {"images_per_s": rate, "data_wait": self.waited / seconds, "peak_memory_mib": peak}
        self.write(record | means | times | {"unreadable_files": bad})
        limit = max(10, len(self.train_set) // 1000)  # 0.1 % of an epoch
        if bad > limit:
            raise UserError(
                f"{bad} unreadable images in this epoch (more than {limit}); their names are in "
                f"{self.out / 'bad_files.txt'}"
            )
        self.sum, self.count = 0.0, 0
        self.restart()
        return f"loss {means['loss']:.4f}, {rate:.1f} images/s, data wait {times['data_wait']:.0%}"

    def write(self, record: dict) -> None:
        if self.world.rank == 0:
            with writing(path := self.out / "log.jsonl"), open(path, "a") as f:
                f.write(json.dumps(record) + "\n")


def summary(
    method: str, cfg: Config, world: World, model: nn.Module, sets: tuple, batch: tuple[int, int],
    per_epoch: int, out: Path,
) -> str:  # fmt: skip
    """The screen that a run begins with."""
    million = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) / 1e6
               for n, m in (("all", model), ("encoder", model.encoder))}  # fmt: skip
    (accum, micro), (train_set, val_set), total = batch, sets, cfg.total_steps(per_epoch)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    threads = "" if device != "CPU" else f", {torch.get_num_threads()} threads a rank"
    lines = {
        "method": f"{method}, preset {cfg.model}, {cfg.image_size} pixels",
        "parameters": f"{million['all']:.2f} M, of which the encoder {million['encoder']:.2f} M",
        "data": f"{cfg.data}: train {len(train_set)} images, val "
        + (str(len(val_set)) if val_set else "none, so nothing is evaluated")
        + f"; {len(train_set.classes)} classes; {', '.join(train_set.granularities)}",
        "batch": f"{cfg.batch_size} = {world.size} ranks x {accum} steps x {micro}",
        "rate": f"{cfg.base_lr * cfg.batch_size / 256:.3g} = {cfg.base_lr} x batch / 256",
        "length": f"{total} steps, {total / per_epoch:g} epochs of {per_epoch}"
        + (f", stopping after {cfg.steps} steps" if cfg.steps else ""),
        "device": f"{device}{threads}, {'bf16' if world.bf16 else 'fp32'}"
        + f", {workers(cfg, world)} loader processes a rank",
        "output": str(out),
    }
    return "\n".join(f"{k:<11} {v}" for k, v in lines.items())


# ------------------------------------------------------------------------------------------- loop


def workers(cfg: Config, world: World) -> int:
    """Loader processes of this rank: its share of the cores it may use, at most 16."""
    if cfg.workers is not None:
        return cfg.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // world.local_size))


def ramp(progress: float, device: torch.device) -> Tensor:
    """The share of training done, as the 0-d tensor that models take, filled on the device."""
    return torch.full((), progress, device=device)


def to_device(batch: dict, device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def raise_error(batch: dict, world: World | None = None) -> dict:
    """Raise the UserError that a loader sent in place of a batch; with `world` on every rank."""
    errors = [batch.get("error")] * (world.size if world else 1)
    if len(errors) > 1:
        dist.all_gather_object(errors, batch.get("error"))
    for error in filter(None, errors):
        raise UserError(error)
    return batch


def evenly(length: int, count: int) -> list[int]:
    """`count` evenly spaced indices: the first ones of a folder would be of its first classes."""
    return [i * length // count for i in range(count)]


@torch.no_grad()
def validation(
    cfg: Config, world: World, model: nn.Module, val_set: data.Dataset, micro: int,
    evaluate: Callable | None,
) -> dict[str, float]:  # fmt: skip
    """Means over `val_samples` of the val split, evenly spaced, shared out over the ranks."""
    share = max(1, min(cfg.val_samples, len(val_set)) // world.size)
    picks = evenly(len(val_set), share * world.size)
    pairs = [(0, i) for i in picks[world.rank * share :][:share]]
    loader = torch.utils.data.DataLoader(
        val_set, batch_sampler=[pairs[i : i + micro] for i in range(0, share, micro)],
        collate_fn=data.collate, worker_init_fn=data.worker_init,
        num_workers=min(workers(cfg, world), share // 256),
    )  # fmt: skip
    total = 0.0
    for batch in loader:
        batch = to_device(raise_error(batch, world), world.device)
        with world.autocast():
            if evaluate:
                terms = evaluate(model, batch)
            else:
                loss, terms = model(batch, ramp(1.0, world.device))
                terms = {"loss": loss, **terms}
        values = torch.stack([v.float() for v in terms.values()])
        total = total + values * len(batch["seed"]) / share
    return dict(zip(terms, world.mean(total).tolist()))


class Stop:
    """Remembers the first SIGTERM or Ctrl-C; the loop asks for it, all ranks together."""

    def __init__(self):
        self.signal = 0
        self.old = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number: int, frame: object) -> None:
        self.signal = self.signal or number

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def train(
    method: str, cfg: Config, world: World, build: Callable[[Config], nn.Module],
    evaluate: Callable | None = None, preview: Callable | None = None,
    finish: Callable | None = None,
) -> int:  # fmt: skip
    """Train from the start or from the last checkpoint; returns the exit status.

    Args:
        build: makes the model; `model(batch, progress)` returns (loss, logs). A model that has
            `before_step()` is told when its weights are about to change; one that has
            `parameter_groups(weight_decay)` says itself what decays, and by `lr_scale` how fast a
            group learns (layer-wise decay).
        evaluate: (model, batch) -> dict of 0-d tensors, averaged over the val split; default: the
            model's own logs at the end of training.
        preview: (model, batch, path, step) writes a picture.
        finish: (model, out) is called on every rank once training has come to its end.
    Errors: UserError.
    """
    lead, device = world.rank == 0, world.device
    accum, micro = split_batch(cfg, world)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        keep_freed_memory()
    out, resumed = world.from_rank_0(lambda: open_folder(cfg, method))
    out = Path(out)
    checkpoint = load(out / "last.pt", method) if resumed else None
    if checkpoint:
        refuse_changes(cfg, checkpoint["config"], out / "last.pt")
    train_set = open_data(cfg, world, out, "train")
    val_set = open_data(cfg, world, out, "val")
    start = checkpoint["step"] if checkpoint else 0
    sampler = data.BatchSampler(
        len(train_set), cfg.batch_size, cfg.seed, world.rank, world.size, accum, start
    )
    per_epoch = sampler.steps_per_epoch
    total = cfg.total_steps(per_epoch)
    sampler.stop_step = stop = min(cfg.steps or total, total)

    torch.manual_seed(cfg.seed)
    model = build(cfg).to(device)
    groups = getattr(model, "parameter_groups", lambda decay: parameter_groups(model, decay))
    optimizer = cfg.optimizer(groups(cfg.weight_decay))
    step_model = torch.compile(model) if cfg.compile else model
    if world.size > 1:
        ids = [device.index] if device.type == "cuda" else None
        names = inspect.signature(DistributedDataParallel).parameters  # buffers never change here
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        step_model = DistributedDataParallel(
            step_model, device_ids=ids, gradient_as_bucket_view=True, **{sync: False}
        )
        # DDP regroups its buckets after the first backward pass, and with them the order of sums.
        # Two passes whose gradients are thrown away give a fresh and a resumed run the same order.
        batch = data.collate([train_set[pair] for pair in sampler.indices(0)[:micro]])
        batch = to_device(raise_error(batch, world), device)
        buffers = [b.clone() for b in model.buffers()]  # BatchNorm's must not count them
        for _ in range(2):
            with world.autocast():
                loss, _ = step_model(batch, ramp(0, device))
            loss.backward()
            optimizer.zero_grad(set_to_none=True)
        for b, kept in zip(model.buffers(), buffers):
            b.copy_(kept)
    if checkpoint:
        load_weights(model, checkpoint["model"], out / "last.pt")
        load_optimizer(optimizer, checkpoint["optimizer"], out / "last.pt")
    if start >= stop:  # what a cluster that restarts its jobs comes to in the end
        if finish and start >= total and not (out / "result.json").exists():
            finish(model, out)
        if lead:
            print(f"finished already: {out} is at step {start} of {total}")
        return 0
    meter = Meter(out, world, train_set, checkpoint)
    if lead:
        sets = (train_set, val_set)
        print(summary(method, cfg, world, model, sets, (accum, micro), per_epoch, out), flush=True)
        if checkpoint:
            print(f"resumed     {out / 'last.pt'} at step {start}")
        with writing(out / "config.json"):
            (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
        warn_of_space(model, out)
    loader = torch.utils.data.DataLoader(
        train_set, batch_sampler=sampler, collate_fn=data.collate, num_workers=workers(cfg, world),
        worker_init_fn=data.worker_init, pin_memory=device.type == "cuda",
    )  # fmt: skip

    def write(path: Path, step: int) -> None:
        meter.check(sampler)  # nothing is saved after a loss that was not finite
        state = {"window": meter.window()}  # all ranks reduce; rank 0 writes
        if lead:
            state |= {"format": FORMAT, "method": method, "step": step, "model": model.state_dict()}
            state |= {"config": dataclasses.asdict(cfg), "optimizer": optimizer.state_dict()}
            save(path, state)
        world.maximum(0)

    def validate(step: int, picture: bool) -> None:
        if val_set is None:
            return
        model.eval()
        terms = validation(cfg, world, model, val_set, micro, evaluate)
        meter.write({"step": step, "epoch": step / per_epoch, "val": terms})
        if lead:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in terms.items())
            tqdm.write(f"val, step {step}: {shown}")
            if picture and preview:
                path = out / f"preview-{step:07d}.png"
                picks = evenly(len(val_set), min(4, len(val_set)))
                batch = data.collate([val_set[0, i] for i in picks])
                with writing(path), torch.no_grad(), world.autocast():
                    preview(model, to_device(raise_error(batch), device), path, step)
                tqdm.write(f"preview     {path}")
        model.train()
        world.maximum(0)

    if checkpoint is None:
        validate(0, picture=False)
    interrupt, batches, status = Stop(), iter(loader), 0
    bar = tqdm(total=stop, initial=start, unit="step", disable=not lead, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    step, due, last_save = start, False, time.monotonic()
    meter.restart()
    while step < stop:
        progress = ramp(step / total, device)
        for a in range(accum):
            began = time.monotonic()
            batch = next(batches)
            meter.waited += time.monotonic() - began
            due = lead and time.monotonic() - last_save > 60 * cfg.save_minutes
            failed, number, due = world.maximum("error" in batch, interrupt.signal, due)
            if failed or number:
                break
            if due and a == 0:
                write(out / "last.pt", step)
                last_save = time.monotonic()
            last = a == accum - 1
            sync = contextlib.nullcontext() if last or world.size == 1 else step_model.no_sync()
            with sync:
                with world.autocast():
                    loss, logs = step_model(to_device(batch, device), progress)
                (loss / accum).backward()
            meter.add(step, loss, logs, batch["bad"])
        if failed:
            raise_error(batch, world)
        if number:  # the unfinished step is dropped
            status = 128 + number
            break
        meter.end_step(accum)
        lr = cfg.learning_rate(step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        step += 1
        logging = step % cfg.log_every == 0 or step == stop
        if cfg.clip_grad:
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        elif logging:
            norm = nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        if hasattr(model, "before_step"):
            model.before_step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if logging:
            record = {"step": step, "epoch": step / per_epoch, "lr": lr, "grad_norm": float(norm)}
            text = meter.log(record, cfg.batch_size, sampler)
            bar.set_postfix_str(text, refresh=False)
        epoch, rest = divmod(step, per_epoch)
        if rest == 0:
            meter.bad = 0
            if cfg.save_epochs and epoch % cfg.save_epochs == 0:
                write(out / f"epoch-{epoch:04d}.pt", step)
            shown = cfg.preview_epochs and epoch % cfg.preview_epochs == 0
            if step < stop and ((cfg.val_epochs and epoch % cfg.val_epochs == 0) or shown):
                validate(step, picture=bool(shown))
                meter.restart()
    bar.close()
    write(out / "last.pt", step)
    interrupt.restore()
    if status == 0:
        validate(step, picture=True)
        if finish:
            finish(model, out)
    if lead:
        what = "finished" if status == 0 else f"stopped; continue with --resume --output {out}"
        print(f"{what}: step {step} of {total}, {out / 'last.pt'}", flush=True)
    return status


def main(
    method: str, cls: type[Config], presets: dict[str, dict], doc: str, build: Callable, **functions
) -> None:
    """From the command line to a finished run, and out."""

    def run() -> int:
        cfg = parse(cls, presets, doc, None)
        return train(method, cfg, World(cfg), build, **functions)

    command(method, run)


def command(name: str, run: Callable[[], int]) -> typing.NoReturn:
    """Run and exit with the status returned; an error of the user's or of the file system is one
    message and exit status 2.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        status = run()
    except UserError as e:
        if rank == 0:
            tqdm.write(f"{name}: error: {e}", file=sys.stderr)
        else:
            time.sleep(5)  # torchrun ends every rank once one has left: let rank 0 speak first
        status = 2
    except OSError as e:  # a full disk, say, which other ranks may not see
        print(f"{name}: error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if dist.is_initialized() and status == 0:
        dist.barrier()  # torch 2.6 can hang in the next line while an all-reduce is being freed
        dist.destroy_process_group()
    sys.exit(status)
