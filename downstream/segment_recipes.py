"""Settings of segmentation: the papers' recipes by protocol and method, and the command line.

    UPERNET, RECIPES, LINEAR, TABLE_6, TINY    what a field becomes that the command line leaves out
    describe                                   what the encoder is: its source's, or a resumed run's
    Config

Where a paper is silent we do what its authors' public code does; SemanticMIM's and MCMAE's run on
mmsegmentation.
"""

import typing
from dataclasses import dataclass

import engine  # before torch: it sets how threads wait
import engine.config

import torch
from torch import nn

from data import UNLABELLED
from downstream import encoders, transfer
from downstream.windows import everywhere
from engine import UserError, arg, require
from engine.field import data_arg, optim_arg
from shapes import ShapeScenes

UPERNET = dict(
    image_size=512, batch_size=16, weight_decay=0.05, drop_path=0.1, train_position=False,
    photometric=True, evaluation="slide", classes=150,
)  # fmt: skip
RECIPES = {
    # Table 10 (drop path, weight decay, batch 16 too). NOTE paper unclear: "base learning rate";
    # taken as the rate itself, as in the three other papers.
    "cfmae": dict(lr=4e-4, layer_decay=0.65),
    # Table 4; the layer-wise decay is its public configuration's.
    "semanticmim": dict(image_size=640, lr=3e-5, layer_decay=0.9),
    # Sec. 3.3; drop path, trained positions, and 160k where the text has a "16k-iteration"
    # schedule, are the public configuration's. It also has --relative-bias --init-values 1
    # --fourth conv: options, as Sec. 2.3 max-pools the fourth map and names neither of the others.
    "mcmae": dict(lr=1e-4, layer_decay=0.75, drop_path=0.2, train_position=True),
    "mae": dict(lr=1e-4, layer_decay=0.65),  # mmsegmentation's for MAE
}
# 24 blocks and more: at 0.65 the first would learn at 2e-5 of the rate. 0.75 is MAE's for ViT-L, in
# its fine-tuning.
DEEP = RECIPES["mae"] | dict(layer_decay=0.75)
# CoMA: "the same fine-tuning protocol as MAE", at 512 x 512 (Table 3); no numbers.
RECIPES |= {"coma_dyvit": RECIPES["mae"], "coma_dyvit 24": DEEP, "mae 24": DEEP, "mae 32": DEEP}
# Public encoders; a number is the depth.
RECIPES |= {"vit": RECIPES["mae"], "vit 24": DEEP, "vit 32": DEEP, "beit": RECIPES["semanticmim"]}
# SemanticMIM's, for every method: Table 6 and, where that is silent or differs, its public code.
LINEAR = dict(
    image_size=448, batch_size=120, weight_decay=1e-4, drop_path=0.0, layer_decay=1.0,
    train_position=False, photometric=False, crop_scale_min=0.8, evaluation="crop", classes=21,
)  # fmt: skip
PROBE_RATE = 0.01 / 60  # for each sample of the batch: 0.02 at 120
TABLE_6 = dict(lr=0.01, weight_decay=0.0)  # the print; Sec. 4.2 has the layer at half the depth
TINY = {"upernet": dict(lr=1e-3, drop_path=0.0), "linear": dict(lr=0.01)}  # --model tiny, ours

PRESETS = {
    "paper": dict(),
    # Ours, for a laptop: 64 x 64 scenes, and 400 steps.
    "tiny": dict(
        data="shapes", image_size=64, batch_size=16, dim=64, aux_dim=32, photometric=False
    ),
}


@dataclass
class Config(transfer.SourceConfig):
    """Settings of a run. None: what RECIPES has for the protocol and the encoder's method."""

    protocol: str = arg(
        "upernet", "upernet end to end, or linear on a frozen layer", ["upernet", "linear"]
    )
    train_position: bool | None = arg(
        None, "train fixed positions: MCMAE's public configuration; learned ones are, anyway"
    )
    relative_bias: bool = arg(
        False, "MCMAE: stage 3 gets a relative position bias; on in its public configuration"
    )
    init_values: float | None = arg(
        None, "MCMAE: stage 3 gets LayerScale that starts here; 1 in its public configuration"
    )
    fourth: str = arg(
        "pool",
        "MCMAE: its fourth map by max-pooling, Sec. 2.3, or by a trained convolution, its public "
        "configuration",
        ["pool", "conv"],
    )
    window: int = arg(
        0, "UperNet: side of attention windows, in patches; 0: global, as all papers' here",
        within="[0, inf)",
    )  # fmt: skip
    everywhere: str = arg(
        "", "blocks that attend globally all the same, from 1: 1,4,7,11; quarters, the last of each"
    )
    shifted: bool = arg(False, "every other windowed block is shifted by half")
    layer: int | None = arg(
        None,
        "linear: which layer, 1-based. Two thirds of the depth: 8 of 12, SemanticMIM's public "
        "code; half of it: 6 of 12, its Sec. 4.2",
    )
    drop_path: float | None = arg(
        None,
        "0.1: CFMAE Table 10, SemanticMIM Table 4; 0.2: MCMAE's public code; linear, tiny: 0",
        within="[0, 0.99]",
    )
    dim: int = arg(
        768, "UperNet's channels; public code of SemanticMIM and MCMAE", within="(0, inf)"
    )
    aux_dim: int = arg(256, "auxiliary head's channels; the same code", within="(0, inf)")
    dropout: float = arg(
        0.1, "share of channels dropped before the classifiers; the same code", within="[0, 0.99]"
    )

    classes: int | None = data_arg(None, "of the maps. UperNet: 150 (ADE20K); linear: 21 (VOC)")
    image_size: int | None = data_arg(
        None,
        "height of the crop. 512: CFMAE Sec. E.4, CoMA Table 3; 640: SemanticMIM Table 4; linear: "
        "448, SemanticMIM Table 6",
    )
    crop_width: int | None = data_arg(None, "width of the crop; default: its height")
    scale_min: float = data_arg(
        0.5,
        "UperNet: random scale, as a factor of the size that covers the crop; public code of "
        "SemanticMIM and MCMAE",
        within="(0, inf)",
    )
    scale_max: float = data_arg(2.0, "the largest one; the same code", within="(0, inf)")
    crop_scale_min: float | None = data_arg(
        None, "linear: smallest area of a random resized crop; 0.8: SemanticMIM's public code"
    )
    photometric: bool | None = data_arg(
        None,
        "random brightness, contrast, saturation, hue; UperNet: public code of SemanticMIM and "
        "MCMAE",
    )
    evaluation: str | None = data_arg(
        None,
        "slide: windows over the image as it is (UperNet); whole: the image resized to the crop; "
        "crop: its labels, too (linear)",
        ["slide", "whole", "crop"],
    )

    recipe: str = optim_arg(
        "public",
        "of the linear probe: SemanticMIM's public code, or as it is printed: Table 6 (rate, "
        "decay), Sec. 4.2 (layer)",
        ["public", "table6"],
    )
    iterations: int | None = optim_arg(
        None,
        "length. UperNet: 160,000 (CFMAE Table 10, SemanticMIM Table 4; MCMAE's text says 16,000); "
        "tiny: 400",
        within="(0, inf)",
    )
    epochs: int | None = optim_arg(
        None, "length in another unit. Linear: 25, SemanticMIM Table 6", within="(0, inf)"
    )
    warmup_steps: int = optim_arg(
        1500,
        "CFMAE Sec. E.4, SemanticMIM Table 4; at most a tenth of the run. Linear: none",
        within="[0, inf)",
    )
    batch_size: int | None = optim_arg(
        None, "16: CFMAE Table 10, SemanticMIM Table 4; linear: 120, SemanticMIM Table 6"
    )
    micro_batch: int = arg(
        16, "most samples that one device takes at a time; UperNet's BatchNorm depends on it"
    )
    lr: float | None = optim_arg(
        None,
        "peak rate, not scaled by the batch. 4e-4: CFMAE Table 10; 3e-5: SemanticMIM Table 4; "
        "1e-4: MCMAE Sec. 3.3, CoMA as MAE; linear: 0.01 x batch / 60, SemanticMIM's public code, "
        "or 0.01, its Table 6; tiny: 1e-3, linear 0.01",
        within="(0, inf)",
    )
    layer_decay: float | None = optim_arg(
        None,
        "rate of a layer / of the next. 0.65: CFMAE Table 10, MAE; 0.75: MCMAE Sec. 3.3; 0.9: "
        "SemanticMIM's public code",
        within="[0, 1]",
    )
    weight_decay: float | None = optim_arg(
        None,
        "0.05: CFMAE Table 10, SemanticMIM Table 4, MCMAE Sec. 3.3; linear: 1e-4, SemanticMIM's "
        "public code, or 0, its Table 6",
    )
    beta2: float = optim_arg(0.999, "CFMAE Table 10, SemanticMIM Table 4")
    momentum: float = optim_arg(
        0.9, "of SGD, linear; SemanticMIM's public code", within="[0, 0.99]"
    )
    aux_weight: float = optim_arg(
        0.4, "weight of the auxiliary loss; public code of SemanticMIM and MCMAE", within="[0, inf)"
    )
    loss_size: int = optim_arg(
        100, "linear: short side at which the loss is taken, SemanticMIM Table 6", within="(0, inf)"
    )

    # No flags: the rate is --lr, its warm-up --warmup-steps, patches are the encoder's.
    SET: typing.ClassVar = ("base_lr", "min_lr", "warmup_epochs", "patch_size")
    FURTHER: typing.ClassVar = tuple(
        "beta1 beta2 clip_grad momentum loss_size aux_weight dim aux_dim dropout scale_min "
        "scale_max crop_scale_min deterministic log log_every save_minutes save_epochs val_epochs "
        "val_samples preview_epochs window everywhere shifted".split()
    )
    GONE: typing.ClassVar = ("description", "norm_batch")  # of older runs; facts by now
    FREE = transfer.SourceConfig.FREE + GONE + ("patch_size",)

    def resolve(self) -> None:
        """Read the encoder's architecture, fill in the recipe, refuse what cannot work.

        Errors: UserError naming the field and values that work.
        """
        self.described = describe(self)
        transfer.one_length(self)
        with torch.device("meta"):  # no memory, no time
            encoder = encoders.build(self.described)
        transfer.fill(self, recipe(self, encoder.num_layers))
        self.crop_width = self.crop_width or self.image_size
        check_encoder(self, encoder)
        self.patch_size = encoder.patch_size
        super().resolve()
        self.base_lr = self.lr * 256 / self.batch_size  # as the run's first screen shows it
        low = ShapeScenes.SEMANTIC_CLASSES if self.data == "shapes" else 1
        inside = low <= self.classes <= UNLABELLED
        require(
            (inside, "classes", f"{self.classes} is outside [{low}, {UNLABELLED}]"),
            (self.scale_min <= self.scale_max, "scale_min", "is above --scale-max"),
        )

    @property
    def options(self) -> dict:
        """What MCMAE's encoder gets beyond its pre-training; the description has it, too."""
        asked = {k: getattr(self, k) for k in ("relative_bias", "init_values", "fourth")}
        return {k: v for k, v in asked.items() if v != getattr(Config, k)}

    @property
    def windows(self) -> dict | None:
        """What the encoder's blocks are run with, see windows.Windows; None: themselves."""
        if not self.window:
            return None
        return {"window": self.window, "everywhere": self.globals, "shifted": self.shifted}

    @property
    def crop(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image_size, self.crop_width


def describe(cfg: Config) -> dict:
    """What the encoder is, see encoders.py, with what segmentation adds; UserError."""
    found = transfer.describe(cfg)
    if cfg.options and (cfg.protocol == "linear" or found["method"] != "mcmae"):
        flags = ", ".join(map(engine.flag, cfg.options))
        raise UserError(f"{flags}: for UperNet on MCMAE's encoder alone")
    return {**found, "options": {**found["options"], **cfg.options}}


def recipe(cfg: Config, depth: int) -> dict:
    """What fields that are None become, for an encoder of so many layers."""
    linear, kind = cfg.protocol == "linear", cfg.described["method"]
    ok = linear or cfg.recipe == "public"
    require((ok, "recipe", "table6 is of the linear probe: --protocol linear"))
    found = UPERNET | RECIPES.get(f"{kind} {depth}", RECIPES[kind])
    if linear:
        found = LINEAR | {"lr": PROBE_RATE * (cfg.batch_size or LINEAR["batch_size"])}
        found |= TABLE_6 if cfg.recipe == "table6" else {}
        found |= {"layer": round(depth * (1 / 2 if cfg.recipe == "table6" else 2 / 3))}
    if cfg.model == "tiny":
        found |= TINY[cfg.protocol]
    if cfg.data == "shapes":
        found |= {"classes": ShapeScenes.SEMANTIC_CLASSES}
    if not (cfg.iterations or cfg.epochs):
        length = {"epochs": 25} if linear else {"iterations": 160_000}
        found |= {"iterations": 400} if cfg.model == "tiny" else length
    return found


def check_encoder(cfg: Config, encoder: nn.Module) -> None:
    """UserError where the crop does not fit the encoder's strides, or it lacks the layer."""
    stride = max(encoder.strides)
    for name in ("image_size", "crop_width"):
        side = getattr(cfg, name)
        n = max(side // stride, 1)
        near = " or ".join(str(x * stride) for x in sorted({max(n, 2), n + 1}))
        words = f"{side} is not at least two times the encoder's largest stride, {stride}, and "
        ok = side % stride == 0 and side >= 2 * stride
        require((ok, name, words + f"divisible by it; nearest: {near}"))
    depth, blocks = encoder.num_layers, getattr(encoder, "blocks", ())  # DyViT has stages
    require(
        (blocks or not cfg.window, "window", "DyViT has windows of its own: 0"),
        (cfg.protocol != "linear" or not cfg.window, "window", "is UperNet's: 0"),
    )
    cfg.globals = everywhere(cfg.everywhere, len(blocks))
    if cfg.protocol == "linear":
        ok = 1 <= cfg.layer <= depth
        require((ok, "layer", f"{cfg.layer}: this encoder has layers 1 to {depth}"))
    else:
        require((cfg.layer is None, "layer", "is the linear probe's; UperNet reads four levels"))
