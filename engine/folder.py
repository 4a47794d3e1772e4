"""A run's folder: made once, entered again to resume; its frozen list of files."""

import dataclasses
import itertools
import time
from pathlib import Path
from types import ModuleType

import torch

import data
from data import UserError
from engine.checkpoint import writing
from engine.config import Config
from engine.field import flag
from engine.ranks import World


def open_folder(cfg: Config, method: str) -> tuple[str, bool]:
    """Create the folder of a run, or enter one to resume; (path, whether it holds a checkpoint)."""
    out = Path(cfg.output or f"runs/{method}-{cfg.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    name, number = out.name, itertools.count(2)
    while not cfg.output and out.exists():
        out = out.with_name(f"{name}_{next(number)}")
    if not cfg.resume and any((out / n).exists() for n in ("config.json", "log.jsonl", "last.pt")):
        raise UserError(f"{out} holds a run: continue it with --resume, or choose another --output")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot create the output folder {out}: {e}") from None
    return str(out), (out / "last.pt").exists()


def refuse_changes(cfg: Config, old: dict, path: Path) -> None:
    """UserError naming the fields in which a resumed run would differ from its checkpoint."""
    new = dataclasses.asdict(cfg)
    changed = [k for k in {**old, **new} if k not in cfg.FREE and old.get(k) != new.get(k)]
    if changed:
        shown = "; ".join(f"{flag(k)} was {old.get(k)}, is {new.get(k)}" for k in changed)
        raise UserError(f"{path} is a run with other settings: {shown}")


def most_unreadable(length: int) -> int:
    """How many unreadable images an epoch may have: 0.1 % of it, and always 10."""
    return max(10, length // 1000)


def wait_for(path: Path, world: World) -> None:
    """Wait until this rank sees a file of rank 0's; UserError where it does not come."""
    for _ in range(60):  # a network file system shows a new folder late
        if path.exists():
            return
        time.sleep(0.5)
    raise UserError(f"rank {world.rank} does not see {path}: all nodes must share --output")


def open_data(
    cfg: Config, world: World, out: Path, split: str, source: ModuleType = data, **options
) -> torch.utils.data.Dataset | None:
    """Open one split on every rank; None where a folder has no val split.

    `source` has `scan`, `check` and `open_dataset` as data.py, or, for clips, clips.py.

    Rank 0 lists the files once, and the list is frozen in the run's folder, which all nodes share:
    a run that continues from a checkpoint, and every worker, maps it from there.
    """
    keys = {"image_size": cfg.image_size, "patch_size": cfg.patch_size, "granularities": ("rgb",)}
    keys |= {"scale": (cfg.crop_scale_min, 1.0), "train": split == "train", "seed": cfg.seed}
    keys |= options
    if cfg.data == "shapes":
        return source.open_dataset(cfg.data, split, **keys)
    folder = out / f"files-{split}"

    def listing() -> bool:
        if split != "train" and not (Path(cfg.data) / split).is_dir():
            return False
        if not ((out / "last.pt").exists() and (folder / "files.json").exists()):
            files = source.scan(cfg.data, split, keys["granularities"])
            said = source.check(source.open_dataset(cfg.data, split, files=files, **keys))
            if "\n" in said:  # names follow
                most = most_unreadable(len(files))
                print(f"warning     {split}: {said}\n  Unreadable images are replaced by the next "
                      f"one; more than {most} in an epoch end the run", flush=True)  # fmt: skip
            with writing(folder):
                files.save(folder)
        return True

    if not world.from_rank_0(listing):
        return None
    wait_for(folder / "files.json", world)
    return source.open_dataset(cfg.data, split, files=data.FileList.open(folder), **keys)
