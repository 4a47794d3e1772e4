"""Features of a frozen encoder: once through the data, into memory-mapped files.

    choose_layers, pooled_norm, columns   which layers, what `norm` means, where in a row each lies
    extract, cached, read                 a split's rows; both splits', unless they are there; again

A feature is a layer and what is taken from it: the mean of its patch tokens (`patch`), of its
prefix tokens, the class token or the proxies (`prefix`), or both side by side (`both`). Layers are
1-based block outputs; `norm` is the last one after the norm that was trained with it: the encoder's
final norm, before the mean, or fine-tuning's, after it. Where pre-training's norm saw something
else (SemanticMIM's, MCMAE's), it is a fresh LayerNorm after the mean, as their public code has it.
"""

import contextlib
import json
import math
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where two probes must not fill a cache at once
    fcntl = None

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from common import Normalize
from downstream.transfer import Config, in_classes
from engine import UserError
from engine.folder import open_data
from engine.ranks import World

IN_MEMORY = 8 * 2**30  # bytes of features that are read into memory; more stay on disk


def choose_layers(text: str | None, encoder: nn.Module) -> list[str]:
    """Layers of `--layers`: numbers, `norm`, or `all`; UserError on others."""
    depth = encoder.num_layers
    if text is None:
        share = encoder.probe_layer
        return ["norm"] if share is None else [str(math.ceil(depth * share))]
    known = [str(n) for n in range(1, depth + 1)] + ["norm"]
    chosen = known if text == "all" else [x.strip() for x in text.split(",")]
    if wrong := [x for x in chosen if x not in known]:
        raise UserError(f"--layers {','.join(wrong)}: choose from 1 to {depth}, norm; or all")
    return list(dict.fromkeys(chosen))


@torch.no_grad()
def features(
    encoder: nn.Module, imgs: Tensor, layers: list[str], norm: nn.Module | None = None
) -> list[tuple[str, Tensor]]:
    """Averaged tokens of some layers, one pass: [(name, (B, D)), ...], patch before prefix.

    Args:
        norm: what `norm` means after the mean (see `pooled_norm`); None: the encoder's, before it.
    """
    depth, found = encoder.num_layers, []
    outputs = encoder.forward_features(imgs, [depth if n == "norm" else int(n) for n in layers])
    for name, (tokens, prefix) in zip(layers, outputs):
        for kind, x in (("patch", tokens), ("prefix", prefix)):
            if x.shape[1]:
                final = name == "norm"
                x = (encoder.norm(x) if final and norm is None else x).float().mean(1)
                found.append((f"{name}/{kind}", norm(x) if final and norm is not None else x))
    return found


def pooled_norm(encoder: nn.Module, state: dict[str, Tensor]) -> nn.Module | None:
    """The norm that belongs after the mean of the last layer; None: the encoder's own, before it.

    It is the trained one of a fine-tuned classifier, or fresh where the encoder's was not trained
    on what its features are.

    Args:
        state: what is in the encoder's file; {} without one.
    """
    norm = nn.LayerNorm(encoder.norm.normalized_shape[0], eps=1e-6)
    if "fc_norm.weight" in state:
        norm.load_state_dict({k: state[f"fc_norm.{k}"] for k in ("weight", "bias")})
    elif encoder.trained_norm:
        return None
    return norm.to(next(encoder.parameters()).device).requires_grad_(False)


def columns(
    encoder: nn.Module,
    size: int,
    layers: list[str],
    kinds: str | None,
    norm: nn.Module | None = None,
) -> tuple[dict, int]:
    """Where each feature lies in a row, {"7/patch": slice}, and the width of a row."""
    device, at, where = next(encoder.parameters()).device, 0, {}
    for name, x in features(encoder, torch.zeros(1, 3, size, size, device=device), layers, norm):
        where[name] = slice(at, at := at + x.shape[1])
        if name.endswith("/prefix"):  # its layer's patches lie before it
            layer = name.partition("/")[0]
            where[f"{layer}/both"] = slice(where[f"{layer}/patch"].start, at)
    wanted = (kinds or "patch,prefix,both").split(",")
    chosen = {n: s for n, s in where.items() if n.partition("/")[2] in wanted}
    lacking = set(wanted) - {n.partition("/")[2] for n in where}
    if lacking and kinds:
        raise UserError(
            f"--features {','.join(sorted(lacking))}: choose from patch, prefix, both; "
            "an encoder without class or proxy tokens has patch alone"
        )
    return chosen, at


def reserve(path: Path, shape: tuple[int, ...], kind: np.dtype) -> None:
    """Make a file for features, all of it: a disk that fills under a map would kill the process.

    Errors: UserError where there is no room.
    """
    with engine.writing(path):
        np.lib.format.open_memmap(path, "w+", kind, shape).flush()
        with open(path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)


def extract(
    encoder: nn.Module,
    dataset: data.Dataset,
    view: int,
    layers: list[str],
    width: int,
    path: Path,
    cfg: Config,
    world: World,
    norm: nn.Module | None = None,
) -> None:
    """Write the features of a split to PATH.npy (N, width) and its labels to PATH.labels.npy.

    Ranks share the rows. An unreadable image gets label -1. `view` is the epoch whose crops a
    training split takes.
    """
    names = {path.with_suffix(".npy"): ((len(dataset), width), np.dtype(cfg.cache_dtype))}
    names[path.with_suffix(".labels.npy")] = ((len(dataset),), np.dtype(np.int64))
    if world.rank == 0:
        for name, (shape, kind) in names.items():
            reserve(name, shape, kind)
    world.maximum(0)
    rows, labels = (np.load(name, mmap_mode="r+") for name in names)
    first, last = (len(dataset) * (world.rank + i) // world.size for i in (0, 1))
    starts = range(first, last, cfg.micro_batch)
    batches = [[(view, i) for i in range(s, min(s + cfg.micro_batch, last))] for s in starts]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=data.collate,
        worker_init_fn=data.worker_init,
        num_workers=world.workers(cfg.workers) if len(dataset) > 2048 else 0,
    )
    normalize, finite, failed = Normalize(*cfg.statistics).to(world.device), True, {}
    bar = tqdm(
        zip(starts, loader),
        total=len(batches),
        disable=world.rank > 0,
        unit="batch",
        desc=path.stem,
        mininterval=5,
    )
    for start, batch in bar:
        if "error" in batch:
            failed = batch
            break
        with world.autocast():
            imgs = normalize(batch["rgb"].to(world.device))
            found = features(encoder, imgs, layers, norm)
        block = torch.cat([x for _, x in found], dim=1).cpu().numpy()
        with np.errstate(over="ignore"):
            rows[start : start + len(block)] = block
        finite &= bool(np.isfinite(rows[start : start + len(block)]).all())
        labels[start : start + len(block)] = batch["label"].where(batch["bad"] < 0, -1).numpy()
    world.raise_error(failed)  # of any rank, on all
    for x in (rows, labels):
        x.flush()
    if world.maximum(not finite)[0]:
        raise UserError(f"features of {path.stem} are not finite; try --cache-dtype float32")


def read(path: Path, where: slice) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one feature, in memory unless they are too large, and labels; both numpy."""
    rows = np.load(path.with_suffix(".npy"), mmap_mode="r")[:, where]
    rows = np.array(rows) if rows.nbytes < IN_MEMORY else rows
    return rows, np.load(path.with_suffix(".labels.npy"))


def cached(
    encoder: nn.Module,
    layers: list[str],
    width: int,
    out: Path,
    cfg: Config,
    world: World,
    norm: nn.Module | None,
) -> Path:
    """Folder of the features, which are computed unless they lie there from the same encoder.

    One command at a time fills a folder; another one waits, and finds it filled.
    """
    folder = Path(cfg.cache or out / "features")
    source = cfg.checkpoint or cfg.init
    stat = os.stat(source) if source and os.path.exists(source) else None
    fields = "data random seed image_size crop_scale_min crop_pct views cache_dtype mean std "
    key = {"description": json.dumps(cfg.described), "layers": layers, "width": width}
    key |= {name: getattr(cfg, name) for name in (fields + "init_key").split()}
    key |= {"bf16": world.bf16, "source": source, "file": stat and [stat.st_size, stat.st_mtime]}
    train_set = open_data(cfg, world, out, "train", train=cfg.views > 0, crop_pct=cfg.crop_pct)
    val_set = open_data(cfg, world, out, "val", crop_pct=cfg.crop_pct)
    if val_set is None:
        raise UserError(f"{cfg.data} has no folder val, which a probe is tested on")
    train_set, val_set = in_classes(train_set), in_classes(val_set)
    key |= {"train": len(train_set), "val": len(val_set)}

    def start() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "features.json"
        if fcntl and not path.exists():
            lock = stack.enter_context(open(folder / "lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # the system lets go of it with the other's process
                print(f"features    another command fills {folder}; waiting", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        found = json.loads(path.read_text()) if path.exists() else None
        if found is not None and found != key:
            changed = ", ".join(k for k in key if found.get(k) != key[k])
            raise UserError(
                f"{folder} holds features of another run ({changed} differ); "
                "choose another --cache or --output"
            )
        return found is not None

    with contextlib.ExitStack() as stack:
        if not world.from_rank_0(start):
            for view in range(max(cfg.views, 1)):
                path = folder / f"train-{view}"
                extract(encoder, train_set, view, layers, width, path, cfg, world, norm)
            extract(encoder, val_set, 0, layers, width, folder / "val", cfg, world, norm)
            if world.rank == 0:
                (folder / "features.json").write_text(json.dumps(key, indent=1))
        elif world.rank == 0:
            print(f"features    from {folder}", flush=True)
    return folder
