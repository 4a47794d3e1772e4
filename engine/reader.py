"""Files of weights, ours and public ones, read without running any code in them."""

import argparse
import collections
import functools
import json
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from data import UserError

WRAPPERS = ("model", "state_dict", "module", "teacher")  # what public code wraps weights in
OURS = "masked_image_modelling"  # our entry of a .safetensors file's metadata
DTYPES = {  # widest first, as its package sorts
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read(path: str | Path, option: str = "", mapped: bool = False) -> object:
    """Read a file's tensors and plain data, `.safetensors` too; no code in it is run.

    Args: `mapped`: tensors stay in the file until they are used, where its format allows.
    Errors: UserError, which begins with the option, e.g. "--init".
    """
    name = f"{option} {path}".strip()
    if not Path(path).is_file():
        what = "is a folder, not a file" if Path(path).is_dir() else "no such file"
        what += "; a run's checkpoint is last.pt in it" * Path(path, "last.pt").is_file()
        raise UserError(f"{name}: {what}")
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        # Public files keep their options beside the weights, as a Namespace; that is data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # torch's words advise to read it unsafely, or are "101"
        kind = ".safetensors" if str(path).endswith(".safetensors") else "a file of torch.save"
        if isinstance(e, PermissionError):
            raise UserError(f"{name}: {e.strerror}") from None
        raise UserError(
            f"{name} cannot be read safely: it is damaged, cut short, not {kind}, or holds more "
            "than tensors and plain data"
        ) from None


def read_once(path: str | Path, option: str = "") -> object:
    """As `read`, mapped, and once in this process, however many ask; nobody may change it."""
    stat = os.stat(path) if Path(path).is_file() else None
    return _read_once(str(path), option, stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _read_once(path: str, option: str, stamp: tuple | None) -> object:
    return read(path, option, mapped=True)


def forget() -> None:
    """Let go of what `read_once` keeps: a mapped file takes its disk space even when replaced."""
    _read_once.cache_clear()


def read_safetensors(path: str | Path) -> dict:
    """Read Hugging Face's file format: length of a JSON header, the header, the tensors' bytes.

    Returns: a state dict; what `write_safetensors` was given.
    """
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:start]), memoryview(raw)[start:]
    words, out = header.pop("__metadata__", None) or {}, collections.OrderedDict()
    for name, t in header.items():
        begin, end = t["data_offsets"]
        out[name] = torch.empty(t["shape"], dtype=DTYPES[t["dtype"]])
        if end > begin:  # frombuffer refuses nothing at all
            x = torch.frombuffer(bytearray(body[begin:end]), dtype=out[name].dtype)
            out[name] = x.reshape(t["shape"])
    facts = json.loads(words.get(OURS, "{}"))
    out._metadata = {"": facts}
    return {**facts, "model": out} if "config" in facts else out


def write_safetensors(path: str | Path, content: dict) -> None:
    """Write a state dict, or a checkpoint of ours without optimizer, in Hugging Face's format.

    Beside the tensors it has texts alone: all else of a checkpoint, or what `told` reads, is JSON.
    """
    state, facts = content, told(content)
    if "model" in content:
        state, facts = content["model"], {k: v for k, v in content.items() if k != "model"}
    kinds, at = {dtype: name for name, dtype in DTYPES.items()}, 0
    header = {"__metadata__": {"format": "pt", OURS: json.dumps(facts)}}
    # The package's own order, wide types first, which keeps each tensor aligned.
    names = sorted(state, key=lambda k: (list(DTYPES).index(kinds[state[k].dtype]), k))
    for k in names:
        end = at + state[k].nbytes
        dtype, shape = kinds[state[k].dtype], list(state[k].shape)
        header[k], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for k in names:
            file.write(state[k].cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def told(content: object) -> dict:
    """What a plain state dict tells of its model, e.g. num_heads, where `tools.export` wrote it.

    It stands where torch keeps the versions of modules, which a strict load lets pass.
    """
    return getattr(content, "_metadata", {}).get("", {})


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
