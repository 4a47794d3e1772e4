"""Checkpoints: plain types only, written whole or not at all, read with weights_only=True."""

import collections
import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from data import UserError
from files import replacing
from engine.config import Config
from engine.reader import read

FORMAT = 1


def save(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` is at any moment the old file or the new one, whole."""
    with writing(path):
        try:
            with replacing(str(path)) as f:
                torch.save(checkpoint, f)
        except RuntimeError as e:  # torch's zip writer hides an OSError behind it
            if "PytorchStreamWriter" not in str(e) and "unexpected pos" not in str(e):
                raise
            raise OSError(None, "probably a full disk") from None


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
        raise UserError(
            f"{path} is of method and format {found}; wanted {(method, FORMAT)}. From Python, "
            f"downstream.encoders.open_encoder({str(path)!r}) reads the encoder of any"
        )
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
    note: str = "",
) -> str:  # fmt: skip
    """Load a state dict: all that must fit, or nothing.

    Args:
        state: names as the model's; both may put `encoder.` before an encoder's or leave it out.
        path: of the file, for messages.
        may_miss: whether a name of the model's, without `encoder.`, may be absent from the file.
        may_stay: whether a name of the file's may be left there.
        note: of `read_state`, for the report's end.
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
    loaded = f"{path}: {len(own) - len(missing)} tensors loaded; left out: {lists[0]}"
    return f"{loaded}; missing, so fresh: {lists[1]}" + (f"; {note}" if note else "")


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
