"""Settings of detection: the papers' recipes by method, and the command line.

    VITDET, RECIPES, TINY    what a field becomes that the command line leaves out
    Config
    learning_rate            of a step

CFMAE and MCMAE give their own; CoMA follows ViTDet, and so does what no paper describes. Where a
paper is silent we do what public code does: ConvMAE's for MCMAE, detectron2's for ViTDet, and for
CFMAE that of CAE, whose every other number its Table 9 has.
"""

import math
import typing
from dataclasses import dataclass
from fractions import Fraction

import engine  # before torch: it sets how threads wait
import engine.config

import torch
from torch import nn

from downstream import encoders, transfer
from downstream.objects import CANVAS
from downstream.windows import everywhere
from engine import arg, require
from engine.field import data_arg, optim_arg

# detectron2's mask_rcnn_vitdet_b_100ep: 100 epochs at 64, drops at 163,889 and 177,546.
VITDET = dict(
    image_size=1024, augmentation="lsj", batch_size=64, lr=1e-4, weight_decay=0.1, layer_decay=0.7,
    drop_path=0.1, iterations=184_375, schedule="steps", drops="8/9,26/27", warmup_steps=250,
    neck="simple", window=14, everywhere="quarters", shifted=False, relative_bias=False,
)  # fmt: skip
VITDET_L = VITDET | dict(layer_decay=0.8, drop_path=0.4)  # its ViT-L, of 24 blocks
VITDET_H = VITDET | dict(  # 32; patches of 14; 75 epochs, mask_rcnn_vitdet_h_75ep
    layer_decay=0.9, drop_path=0.5, image_size=1036, iterations=138_281,
)  # fmt: skip
RECIPES = {
    # Table 9. NOTE paper unclear: learning rate of detection. 3e-3 is ten times CAE's public 3e-4,
    # which Table 9 otherwise repeats.
    "cfmae": dict(
        image_size=CANVAS, augmentation="short", batch_size=16, lr=3e-4, weight_decay=0.05,
        layer_decay=0.75, drop_path=0.2, epochs=12, schedule="steps", drops="9/12,11/12",
        warmup_steps=500, neck="levels", window=0, everywhere="", shifted=False,
        relative_bias=False,
    ),
    # Sec. 2.3 (windows, bias), Sec. 3.2 (25 epochs, cosine, 8e-5, decay 0.1); its public code.
    "mcmae": VITDET | dict(
        batch_size=32, lr=8e-5, layer_decay=1.0, iterations=92_187, schedule="cosine", drops="",
        warmup_steps=461, window=7, shifted=True, relative_bias=True,
    ),
    # "ViT-Det training methods", 768 x 768 (Table 3).
    "coma_dyvit": VITDET | dict(image_size=768, window=0, everywhere=""),
}  # fmt: skip
# The decay of ViTDet's ViT-L: 0.7 would leave the stem 1e-4 of the rate; drop path as ViT-B's,
# whose size it has.
RECIPES["coma_dyvit 24"] = RECIPES["coma_dyvit"] | dict(layer_decay=0.8)
RECIPES["mcmae 11"] = RECIPES["mcmae"] | dict(everywhere="1,4,7,11")  # Sec. 2.3, of the base model
RECIPES |= {k: VITDET for k in ("mae", "semanticmim", "vit", "beit")}
RECIPES |= {f"{k} 24": VITDET_L for k in ("mae", "vit", "semanticmim")}
RECIPES |= {f"{k} 32": VITDET_H for k in ("mae", "vit")}
TINY = dict(iterations=2000, epochs=None, augmentation="lsj")  # where --model tiny is silent

PRESETS = {
    "paper": dict(),
    "tiny": dict(  # ours: 64 x 64 scenes, minutes on two cores
        data="shapes", image_size=64, batch_size=8, micro_batch=8, lr=1e-3, clip_grad=1.0,
        warmup_steps=50, weight_decay=0.05, layer_decay=0.9, drop_path=0.0, schedule="cosine",
        drops="", dim=48, proposals=100, boxes=32,
    ),
}  # fmt: skip


@dataclass
class Config(transfer.SourceConfig):
    """Settings of a run. None: what RECIPES has for the encoder's method."""

    data: str = data_arg(
        "data/coco", "folder with {train,val}2017 and annotations/instances_*.json, or shapes"
    )
    train_images: str | None = data_arg(None, "folder of images, in place of DATA/train2017 ...")
    train_json: str | None = data_arg(None, "... and their objects, in COCO's format")
    val_images: str | None = data_arg(None, "folder of images, in place of DATA/val2017 ...")
    val_json: str | None = data_arg(None, "... and theirs")
    image_size: int | None = data_arg(
        None, "side of the crop. 1024: public code of MCMAE; 768: CoMA Table 3; CFMAE: around 1333"
    )
    augmentation: str | None = data_arg(
        None,
        "lsj: scaled by 0.1 to 2, crop, flip (public code of MCMAE, ViTDet); short: short side 480 "
        "to 800, long one at most 1333, flip (CFMAE Sec. E.3)",
        ["lsj", "short"],
    )
    scale_min: float = data_arg(0.1, "lsj: smallest scale; public code of MCMAE", within="(0, inf)")
    scale_max: float = data_arg(2.0, "lsj: largest scale; the same code", within="(0, inf)")

    neck: str | None = arg(
        None,
        "of a plain encoder. simple: a pyramid of its last map (ViTDet); levels: an FPN on four "
        "depths (CAE, for CFMAE)",
        ["simple", "levels"],
    )
    window: int | None = arg(
        None, "side of attention windows, in patches; 0: global. 7: MCMAE Sec. 2.3; 14: ViTDet",
        within="[0, inf)",
    )  # fmt: skip
    everywhere: str | None = arg(
        None,
        "blocks that attend globally all the same, from 1: 1,4,7,11: MCMAE Sec. 2.3; quarters, the "
        "last of each: ViTDet",
    )
    shifted: bool | None = arg(None, "every other windowed block is shifted by half (MCMAE 2.3)")
    relative_bias: bool | None = arg(
        None, "a bias of each offset, shared by windowed and by global blocks (MCMAE Sec. 2.3)"
    )
    dim: int = arg(256, "channels of neck and heads; public code of MCMAE", within="(0, inf)")
    proposals: int = arg(1000, "boxes the RPN keeps of an image; the same code", within="(0, inf)")
    boxes: int = arg(512, "boxes of an image to train on; the same code", within="(0, inf)")
    anchor: float = arg(
        8, "side of the RPN's anchors, in strides of their level; the same code: 32 at stride 4",
        within="(0, inf)",
    )  # fmt: skip
    train_position: bool = arg(False, "train fixed positions; learned ones are, anyway")
    drop_path: float | None = arg(
        None, "0.2: CFMAE Table 9; 0.1: public code of MCMAE, ViTDet", within="[0, 0.99]"
    )

    iterations: int | None = optim_arg(
        None, "length. 92,187: 25 epochs, MCMAE Sec. 3.2; 184,375: ViTDet's 100", within="(0, inf)"
    )
    epochs: int | None = optim_arg(
        None, "length in another unit. 12: CFMAE Table 9", within="(0, inf)"
    )
    schedule: str | None = optim_arg(
        None, "cosine: MCMAE Sec. 3.2; steps: CFMAE Table 9, ViTDet", ["cosine", "steps"]
    )
    drops: str | None = optim_arg(
        None, "steps: where the rate falls to a tenth, shares of the length: 9/12,11/12"
    )
    warmup_steps: int | None = optim_arg(
        None, "from 0.001 of the rate; public code of MCMAE, ViTDet, CAE", within="[0, inf)"
    )
    batch_size: int | None = optim_arg(
        None, "16: CFMAE Table 9; 32: public code of MCMAE; 64: ViTDet", within="(0, inf)"
    )
    micro_batch: int = arg(2, "most samples that one device takes at a time")
    lr: float | None = optim_arg(
        None,
        "peak rate, not scaled by the batch. 8e-5: MCMAE Sec. 3.2; 1e-4: ViTDet; CFMAE Table 9: "
        "3e-3, here 3e-4",
        within="(0, inf)",
    )
    layer_decay: float | None = optim_arg(
        None, "rate of a layer / of the next. 0.75: CFMAE Table 9; 0.7: ViTDet", within="[0, 1]"
    )
    weight_decay: float | None = optim_arg(
        None, "0.05: CFMAE Table 9; 0.1: MCMAE Sec. 3.2, ViTDet", within="[0, inf)"
    )
    beta2: float = optim_arg(0.999, "CFMAE Table 9; public code of MCMAE", within="[0, 1)")

    # No flags: the rate is --lr, its warm-up --warmup-steps, patches are the encoder's.
    SET: typing.ClassVar = tuple(
        "patch_size base_lr min_lr warmup_epochs crop_scale_min compile".split()
    )
    FURTHER: typing.ClassVar = engine.config.Config.FURTHER + tuple(
        "dim proposals boxes anchor beta1 beta2 clip_grad scale_min scale_max num_heads init_key "
        "mean std train_position".split()
    )
    FREE = engine.config.Config.FREE + SET

    def resolve(self) -> None:
        """Read the encoder's architecture, fill in the recipe, refuse what cannot work.

        Errors: UserError naming the field and values that work.
        """
        self.described = transfer.describe(self)
        transfer.one_length(self)
        with torch.device("meta"):  # no memory, no time
            encoder = encoders.build(self.described, self.described["config"]["patch_size"])
        depth = encoder.num_layers
        transfer.fill(self, recipe(self, depth))
        self.patch_size, self.base_lr = encoder.patch_size, self.lr * 256 / self.batch_size
        self.check_encoder(encoder)
        super().resolve()
        asked = (self.train_images, self.train_json, self.val_images, self.val_json)
        require(
            (self.scale_min <= self.scale_max, "scale_min", "is above --scale-max"),
            (bool(asked[0]) == bool(asked[1]), "train_images", "and --train-json go together"),
            (bool(asked[2]) == bool(asked[3]), "val_images", "and --val-json go together"),
            (self.data != "shapes" or not any(asked), "data", "shapes has its own images"),
        )

    def check_encoder(self, encoder: nn.Module) -> None:
        """UserError where crop or windows do not fit the encoder, or shares are none."""
        hierarchical = len(set(encoder.strides)) > 1
        stride = max(encoder.strides) if hierarchical else 2 * encoder.patch_size
        n = max(self.image_size // stride, 1)
        near = f"{n * stride} or {(n + 1) * stride}"
        ok = self.image_size % stride == 0 and self.image_size > 0
        words = (
            f"{self.image_size} is not divisible by the coarsest stride, {stride}; nearest: {near}"
        )
        self.blocks = getattr(encoder, "blocks", ())  # DyViT has stages, and windows of its own
        plain = self.blocks and not hierarchical
        require(
            (ok, "image_size", words),
            (self.blocks or not self.window, "window", "DyViT has windows of its own: 0"),
            (self.blocks or not self.relative_bias, "relative_bias", "is for blocks of a ViT"),
            (plain or self.neck == "simple", "neck", "is a plain encoder's; others have an FPN"),
        )
        shares(self.drops)
        self.globals = everywhere(self.everywhere, len(self.blocks))

    @property
    def windows(self) -> dict:
        """What the encoder's blocks are run with, see windows.Windows."""
        return {
            "window": self.window,
            "everywhere": self.globals,
            "shifted": self.shifted,
            "bias": self.relative_bias,
        }


def shares(text: str) -> list[float]:
    """Shares of the length such as "9/12,0.95"; UserError where one is none."""
    try:
        found = [float(Fraction(w)) for w in text.split(",") if w.strip()]
    except (ValueError, ZeroDivisionError):
        found = [-1.0]
    ok = all(0 < x < 1 for x in found)
    require((ok, "drops", f"{text}: want shares of the length between 0 and 1, e.g. 9/12,11/12"))
    return found


def recipe(cfg: Config, depth: int) -> dict:
    """What fields that are None become, for an encoder of so many layers."""
    method = cfg.described["method"]
    found = dict(RECIPES.get(f"{method} {depth}", RECIPES[method]))
    if cfg.model == "tiny":
        found |= TINY | {"window": min(found["window"], 4)}
    if cfg.epochs or cfg.iterations:
        found |= {"epochs": None, "iterations": None}
    return found


def learning_rate(cfg: Config, step: int, total: int) -> float:
    """Rate of a step (from 0) of `total`: warm-up along a line from 0.001 of the rate to where the
    schedule will be; a cosine to 0, or a tenth after each of `drops`.
    """
    drops = shares(cfg.drops)

    def schedule(done: float) -> float:
        if cfg.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 0.1 ** sum(done >= x for x in drops)

    warmup = min(cfg.warmup_steps, total // 10)
    if step >= warmup:
        return cfg.lr * schedule(step / total)
    start, end = 0.001 * schedule(0), schedule(warmup / total)
    return cfg.lr * (start + (end - start) * step / warmup)
