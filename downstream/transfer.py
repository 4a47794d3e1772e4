"""What all transfers share, their encoder's source; and classification its pixels and classes."""

import typing
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait
import engine.config

from torch import nn

import data
import files
import shapes
from common import IMAGENET_MEAN, IMAGENET_STD
from downstream import encoders
from engine import UserError, arg
from engine.field import data_arg


@dataclass
class SourceConfig(engine.config.Config):
    """Which encoder a transfer starts from.

    An heir's `resolve` reads its description into the attribute `described`, which is no field.
    """

    model: str = arg("paper", "preset")
    checkpoint: str | None = arg(None, "encoder from a checkpoint of this project")
    init: str | None = arg(None, "encoder from a public state dict: MAE, timm ViT, ConvMAE, BEiT")
    method: str | None = arg(None, "fresh encoder of a method ...", list(encoders.METHODS))
    encoder: str | None = arg(None, "... and of this preset of it")
    random: bool = arg(False, "fresh weights in the architecture of --checkpoint or --init")
    init_key: str | None = arg(None, "which state dict of --init's file, e.g. model_ema")
    num_heads: int | None = arg(None, "of --init, where the file's width does not tell")
    mean: str | None = data_arg(
        None, "of pixels, as 0.5,0.5,0.5; default: what the encoder was trained with"
    )
    std: str | None = data_arg(None, "their deviation, alike")

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the encoder's input, pixels in [0, 1]; `resolve` knows them."""
        usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # of runs from before they were kept
        return tuple(list(self.described.get(k) or v) for k, v in usual.items())

    @property
    def colour(self) -> tuple[int, int, int]:
        """What images are padded with: 0 after normalisation."""
        return tuple(round(255 * x) for x in self.statistics[0])


@dataclass
class Config(SourceConfig):
    """Settings of classification. None: what the encoder's method, checkpoint or protocol sets."""

    image_size: int | None = arg(None, "pixels; default: pre-training's")
    patch_size: int | None = arg(None, "the encoder's; set by the run")
    crop_scale_min: float = arg(0.08, "SemanticMIM Table 3; the usual one")
    crop_pct: float | None = data_arg(
        None, "centre crop of val; 224 / 256 at 224 pixels, above 1: MAE; below 1: ours",
        within="(0, 1]",
    )  # fmt: skip

    SET: typing.ClassVar = ("patch_size",)


def three(name: str, text: str) -> list[float]:
    """The numbers of --mean or --std; UserError on what are no three."""
    try:
        x = [float(x) for x in text.split(",")]
    except ValueError:
        x = []
    if len(x) != 3 or not all(0 <= v <= 1 for v in x) or (name == "std" and not all(x)):
        low = "[0" if name == "mean" else "(0"
        raise UserError(f"--{name} {text}: three numbers in {low}, 1], e.g. 0.5,0.5,0.5")
    return x


def describe(cfg: SourceConfig, granularities: str | None = None, **changes) -> dict:
    """The description of a run's encoder; a resumed run has it in its folder.

    Args:
        granularities: what CFMAE's encoder sees; without maps it has no parameters for them.
        changes: of its config, e.g. image_size; None: none.
    """
    if kept := encoders.kept_facts(cfg):
        return kept["description"]
    changes |= {"num_heads": cfg.num_heads, "key": cfg.init_key}
    changes |= {name: three(name, x) for name in ("mean", "std") if (x := getattr(cfg, name))}
    changes = {k: v for k, v in changes.items() if v is not None}
    sources = (cfg.checkpoint, cfg.init, cfg.method, cfg.encoder)
    description = encoders.describe(*sources, **changes)
    if description["method"] == "cfmae":
        changes["granularities"] = granularities or "R"
        description = encoders.describe(*sources, **changes)
    return description


def fill(cfg: Config, values: dict) -> None:
    """Set the fields that are None."""
    for name, value in values.items():
        if getattr(cfg, name, 0) is None:
            setattr(cfg, name, value)


def one_length(cfg: Config) -> None:
    """UserError where the length of a run is given in both its units."""
    if cfg.iterations and cfg.epochs:
        raise UserError("--iterations and --epochs both say how long; give one")


def start(encoder: nn.Module, cfg: SourceConfig) -> str:
    """Load what the command line names, unless weights are fresh; words on it."""
    if cfg.random or cfg.method:
        return "encoder     fresh weights"
    return encoders.load(encoder, cfg.described, cfg.checkpoint, cfg.init, cfg.init_key)


def inputs(cfg: Config) -> dict:
    """What the description sets of a run's pixels."""
    described = cfg.described
    size = cfg.image_size or described["config"]["image_size"]
    if not isinstance(size, int):
        raise UserError(f"the encoder is for {size} pixels, not square: give --image-size")
    found = {k: ",".join(f"{x:g}" for x in v) for k, v in zip(("mean", "std"), cfg.statistics)}
    found |= {"image_size": size, "patch_size": described["config"]["patch_size"]}
    return found | {"crop_pct": 224 / 256 if size == 224 else 1.0}


def class_names(root: str, trained: bool = True) -> list[str]:
    """The classes of a data set, folders with an image in them, in the order of its labels.

    Errors: UserError where there are not two, or, if `trained`, where val has one that train lacks.
    """
    if root == "shapes":
        return list(shapes.SHAPES)
    splits = {split: files.layout(root, split).get("rgb") for split in ("train", "val")}
    found = {split: files.class_folders(f"{root}/{x}") for split, x in splits.items() if x}
    if not found:
        raise UserError(f"there is no folder {root}/train or {root}/val{files.LAYOUT}")
    names = sorted({name for names in found.values() for name in names})
    if len(names) < 2:
        what = "no class folders with images" if not names else f"one class alone, {names[0]},"
        where = Path(root, splits[next(iter(found))])
        raise UserError(
            f"{what} in {where}; expected: {root}/{{train,val}}/<class>/"
            "NAME.jpg, two classes or more. To start without any files: --data shapes"
        )
    unknown = [name for name in found.get("val", ()) if name not in found.get("train", ())]
    if trained and unknown and "train" in found:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise UserError(
            f"{len(unknown)} classes of {root}/val have no image in {root}/train, so nothing can "
            f"learn them: {shown}"
        )
    return names


def in_classes(dataset: data.Dataset) -> data.Dataset:
    """The data set itself; UserError where an image of it lies in no class folder."""
    listed = getattr(dataset, "files", None)
    if listed is not None and (listed.labels < 0).any():
        loose = listed.name(int((listed.labels < 0).argmax()))
        raise UserError(f"{loose} lies in no class folder; expected {{train,val}}/<class>/NAME")
    return dataset
