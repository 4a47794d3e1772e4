"""Semantic segmentation with a pre-trained encoder: UperNet end to end, or a linear probe.

    python -m downstream.segment --data ROOT --checkpoint runs/.../last.pt [--protocol linear] ...
    python -m downstream.segment --data shapes --model tiny --checkpoint runs/.../last.pt
    python -m downstream.segment evaluate RUN [--data ROOT]      a finished run, on any val split
    python -m downstream.segment prepare-ade SRC DST             from the data sets' own layout ...
    python -m downstream.segment prepare-voc SRC DST             ... to ours, by links

Map: `Config`, `RECIPES`      the papers' settings, by protocol and method
     `evaluate`, `finish`     mIoU of a whole split and the files that say so
     `build`, `run`           the model; training, then evaluation
     upernet.py the networks, pixels.py crops, sliding windows and scores

Data: ROOT/{train,val}/{rgb,semantic}/ as data.py has it; labels are read at full resolution and 255
is ignored. ROOT/classes.txt, one name a line, names the rows of the per-class table.

A run leaves, beside engine.train's files, result.json, classes.csv and a picture of predictions.
Where a paper is silent we do what its authors' public code does; SemanticMIM's and MCMAE's run on
mmsegmentation. UperNet's BatchNorm depends on how many samples it sees at a time (--micro-batch, on
CUDA times the ranks): two runs that differ in it differ by more than rounding.
"""

import csv
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import pictures
from common import IMAGENET_MEAN, IMAGENET_STD
from data import UNLABELLED
from shapes import ShapeScenes
from downstream import encoders
from downstream.pixels import (
    Augment, Whole, confusion, padded, prepare_ade, prepare_voc, scores, slide,
)  # fmt: skip
from downstream.upernet import Segmenter, resize
from engine import UserError, arg

# What --protocol and the checkpoint's method set unless the command line does.
UPERNET = dict(
    image_size=512, batch_size=16, weight_decay=0.05, drop_path=0.1, train_position=False,
    photometric=True, evaluation="slide",
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
    # "the same fine-tuning protocol as MAE", at 512 x 512 (Table 3); no numbers. These are
    # mmsegmentation's for MAE.
    "coma_dyvit": dict(lr=1e-4, layer_decay=0.65),
}
# 24 blocks and more: at 0.65 the first would learn at 2e-5 of the rate. 0.75 is MAE's for ViT-L, in
# its fine-tuning.
DEEP = RECIPES["coma_dyvit"] | dict(layer_decay=0.75)
RECIPES |= {"mae": RECIPES["coma_dyvit"], "vit": RECIPES["coma_dyvit"]}
RECIPES |= {"beit": RECIPES["semanticmim"]}  # as "vit", of public encoders
RECIPES |= dict.fromkeys(("coma_dyvit 24", "mae 24", "mae 32", "vit 24", "vit 32"), DEEP)
# SemanticMIM's, for every method: Table 6 and, where that is silent or differs, its public code.
LINEAR = dict(
    image_size=448, batch_size=120, weight_decay=1e-4, drop_path=0.0, layer_decay=1.0,
    train_position=False, photometric=False, crop_scale_min=0.8, evaluation="crop",
)  # fmt: skip
PROBE_RATE = 0.01 / 60  # for each sample of the batch: 0.02 at 120
TABLE_6 = dict(lr=0.01, weight_decay=0.0)  # the print, which also has the layer at half the depth
TINY = {"upernet": dict(lr=1e-3, drop_path=0.0), "linear": dict(lr=0.01)}  # --model tiny, ours


@dataclass
class Config(engine.Config):
    """Settings of a run. None: what RECIPES has for the protocol and the encoder's method."""

    model: str = arg("paper", "preset")
    protocol: str = arg("upernet", "upernet end to end, or linear on a frozen layer",
                        choices=["upernet", "linear"])  # fmt: skip
    checkpoint: str | None = arg(None, "encoder from a checkpoint of this project")
    init: str | None = arg(None, "encoder from a public state dict: MAE, timm ViT, ConvMAE, BEiT")
    init_key: str | None = arg(None, "which state dict of --init's file, e.g. model_ema")
    method: str | None = arg(None, "fresh encoder of a method ...", list(encoders.METHODS))
    encoder: str | None = arg(None, "... and of this preset of it")
    random: bool = arg(False, "fresh weights in the architecture of --checkpoint or --init")
    num_heads: int | None = arg(None, "of --init, where the file's width does not tell")
    description: str | None = arg(None, "the encoder in JSON; set by the run")
    recipe: str = arg("public", "of the linear probe: SemanticMIM's public code, or Table 6 as it "
                      "is printed (rate, decay, layer)", choices=["public", "table6"])  # fmt: skip
    mean: str | None = arg(None, "R,G,B of [0, 1] pixels, subtracted from images; default: what "
                                 "the encoder is known to want, else ImageNet's")  # fmt: skip
    std: str | None = arg(None, "R,G,B by which they are divided; default likewise")
    train_position: bool | None = arg(None, "train fixed positions; on for MCMAE, its public "
                                            "configuration; learned ones are, anyway")  # fmt: skip
    relative_bias: bool = arg(False, "MCMAE: stage 3 gets a relative position bias; on in its "
                              "public configuration")  # fmt: skip
    init_values: float | None = arg(None, "MCMAE: stage 3 gets LayerScale that starts here; 1 in "
                                          "its public configuration")  # fmt: skip
    fourth: str = arg("pool", "MCMAE: its fourth map by max-pooling, Sec. 2.3, or by a trained "
                      "convolution, its public configuration", ["pool", "conv"])  # fmt: skip
    classes: int | None = arg(None, "of the maps. UperNet: 150 (ADE20K); linear: 21 (VOC)")
    image_size: int | None = arg(
        None, "height of the crop. 512: CFMAE Sec. E.4, CoMA Table 3; 640: SemanticMIM Table 4; "
        "linear: 448, SemanticMIM Table 6")  # fmt: skip
    crop_width: int | None = arg(None, "width of the crop; default: its height")
    patch_size: int = arg(4, "4 keeps labels at full resolution; not to be changed")
    iterations: int | None = arg(None, "length. UperNet: 160,000 (CFMAE Table 10, SemanticMIM "
                                       "Table 4; MCMAE's text says 16,000)")  # fmt: skip
    epochs: int | None = arg(None, "length in another unit. Linear: 25, SemanticMIM Table 6")
    warmup_steps: int = arg(1500, "CFMAE Table 10, SemanticMIM Table 4; at most a tenth of the "
                                  "run. Linear: none")  # fmt: skip
    warmup_epochs: float = arg(0.0, "not used here: --warmup-steps")
    batch_size: int | None = arg(None, "16: CFMAE Table 10, SemanticMIM Table 4; linear: 120, "
                                       "SemanticMIM Table 6")  # fmt: skip
    micro_batch: int = arg(16, "most samples that one device takes at a time; UperNet's BatchNorm "
                               "depends on it")  # fmt: skip
    norm_batch: int | None = arg(None, "samples that BatchNorm sees at a time; set by the run")
    lr: float | None = arg(
        None, "peak rate, not scaled by the batch. 4e-4: CFMAE Table 10; 3e-5: SemanticMIM Table "
        "4; 1e-4: MCMAE Sec. 3.3, CoMA; linear: 0.01 x batch / 60, SemanticMIM's public code, or "
        "0.01, its Table 6")  # fmt: skip
    base_lr: float | None = arg(None, "set from --lr")
    layer_decay: float | None = arg(
        None, "rate of a layer / of the next. 0.65: CFMAE Table 10, MAE; 0.75: MCMAE Sec. 3.3; "
        "0.9: SemanticMIM's public code")  # fmt: skip
    weight_decay: float | None = arg(
        None, "0.05: CFMAE Table 10, SemanticMIM Table 4, MCMAE Sec. 3.3; linear: 1e-4, "
        "SemanticMIM's public code, or 0, its Table 6")  # fmt: skip
    beta2: float = arg(0.999, "CFMAE Table 10, SemanticMIM Table 4")
    momentum: float = arg(0.9, "of SGD, linear; SemanticMIM's public code")
    drop_path: float | None = arg(None, "0.1: CFMAE Table 10, SemanticMIM Table 4; 0.2: MCMAE's "
                                        "public code; linear: 0")  # fmt: skip
    dim: int = arg(768, "UperNet's channels; public code of SemanticMIM and MCMAE")
    aux_dim: int = arg(256, "auxiliary head's channels; the same code")
    aux_weight: float = arg(0.4, "weight of the auxiliary loss; the same code")
    dropout: float = arg(0.1, "share of channels dropped before the classifiers; the same code")
    layer: int | None = arg(
        None, "linear: which layer, 1-based. Two thirds of the depth: 8 of 12, SemanticMIM's "
        "public code; half of it: 6 of 12, its Table 6")  # fmt: skip
    loss_size: int = arg(100, "linear: short side at which the loss is taken, SemanticMIM Table 6")
    scale_min: float = arg(0.5, "UperNet: random scale, as a factor of the size that covers the "
                                "crop; public code of SemanticMIM and MCMAE")  # fmt: skip
    scale_max: float = arg(2.0, "the largest one; the same code")
    crop_scale_min: float | None = arg(
        None, "linear: smallest area of a random resized crop, in the place of that scale; 0.8: "
        "SemanticMIM's public code")  # fmt: skip
    photometric: bool | None = arg(None, "random brightness, contrast, saturation, hue; UperNet: "
                                         "public code of SemanticMIM and MCMAE")  # fmt: skip
    evaluation: str | None = arg(
        None, "slide: windows over the image as it is (UperNet); whole: the image resized to the "
        "crop; crop: its labels, too (linear)", ["slide", "whole", "crop"])  # fmt: skip

    def data_options(self) -> dict:
        """What the loader must bring (see data.open_dataset)."""
        return {"granularities": ("rgb", "semantic"), "semantic_classes": self.classes}

    def resolve(self) -> None:
        """Read the encoder's architecture, fill in the recipe, refuse what cannot work.

        Errors: UserError naming the field and values that work.
        """
        asked = {"num_heads": self.num_heads, "key": self.init_key}
        asked |= {name: triple(self, name) for name in ("mean", "std")}
        asked = {k: v for k, v in asked.items() if v is not None}
        self.description = self.description or encoders.kept_description(self)
        if self.description is None:
            sources = (self.checkpoint, self.init, self.method, self.encoder)
            encoder = encoders.describe(*sources, **asked)
            if encoder["method"] == "cfmae":  # images alone do not train the maps' embeddings
                encoder["config"]["granularities"] = "R"
            if self.options:
                encoder["options"] |= self.options
            self.description = json.dumps(encoder)
        shapes, linear, method = self.data == "shapes", self.protocol == "linear", self.kind
        if self.options and (linear or method != "mcmae"):
            flags = ", ".join(engine.flag(name) for name in self.options)
            raise UserError(f"{flags}: for UperNet on MCMAE's encoder alone")
        with torch.device("meta"):  # no memory, no time
            encoder = encoders.build(self.described)
        depth = encoders.num_layers(encoder)
        recipe = UPERNET | RECIPES.get(f"{method} {depth}", RECIPES[method])
        if linear:
            recipe = LINEAR | {"lr": PROBE_RATE * (self.batch_size or LINEAR["batch_size"])}
            recipe |= TABLE_6 if self.recipe == "table6" else {}
        elif self.recipe != "public":
            raise UserError("--recipe table6 is of the linear probe: --protocol linear")
        recipe = recipe | (TINY[self.protocol] if self.model == "tiny" else {})
        recipe["classes"] = ShapeScenes.SEMANTIC_CLASSES if shapes else 21 if linear else 150
        for name, value in recipe.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.iterations and self.epochs:
            raise UserError("--iterations and --epochs both say how long; give one")
        if not (self.iterations or self.epochs):
            self.iterations, self.epochs = (None, 25) if linear else (160_000, None)
            if self.model == "tiny":
                self.iterations, self.epochs = 400, None
        if self.base_lr is not None:
            raise UserError("--base-lr: give --lr, the rate itself")
        self.crop_width = self.crop_width or self.image_size
        if self.patch_size != 4:
            raise UserError("--patch-size: leave it at 4, the encoder has its own")
        super().resolve()
        self.base_lr = self.lr * 256 / self.batch_size
        self.check_encoder(encoder)
        low = ShapeScenes.SEMANTIC_CLASSES if shapes else 1
        if not low <= self.classes <= UNLABELLED:
            raise UserError(f"--classes {self.classes} is outside [{low}, {UNLABELLED}]")
        if self.loss_size < 1:
            raise UserError(f"--loss-size {self.loss_size} must be 1 or more")
        if not 0 < self.scale_min <= self.scale_max:
            raise UserError("0 < --scale-min <= --scale-max, e.g. 0.5 and 2")
        for name in ("layer_decay", "drop_path", "dropout", "momentum"):
            if not 0 <= getattr(self, name) <= (top := 1 if name == "layer_decay" else 0.99):
                raise UserError(f"{engine.flag(name)} {getattr(self, name)} is outside [0, {top}]")
        for name in ("iterations", "lr", "dim", "aux_dim"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{engine.flag(name)} {value} must be above 0")

    def check_encoder(self, encoder: nn.Module) -> None:
        """UserError where the crop does not fit the encoder's strides, or it lacks the layer."""
        stride = max(encoder.strides)
        for name, side in (("image_size", self.image_size), ("crop_width", self.crop_width)):
            if side % stride or side < 2 * stride:
                n = side // stride
                near = sorted({max(n, 2) * stride, max(n + 1, 2) * stride})
                raise UserError(
                    f"{engine.flag(name)} {side} is not at least two times the encoder's largest "
                    f"stride, {stride}, and divisible by it; nearest: {' or '.join(map(str, near))}"
                )
        if self.protocol == "linear":
            depth, share = encoders.num_layers(encoder), 1 / 2 if self.recipe == "table6" else 2 / 3
            self.layer = round(depth * share) if self.layer is None else self.layer
            if not 1 <= self.layer <= depth:
                raise UserError(f"--layer {self.layer}: this encoder has layers 1 to {depth}")
        elif self.layer is not None:
            raise UserError("--layer is the linear probe's; UperNet reads four levels")

    @property
    def described(self) -> dict:
        """The encoder's architecture, as encoders.describe gives it."""
        return json.loads(self.description)

    @property
    def kind(self) -> str:
        """The encoder's method, as RECIPES has it: "vit" also for CoMA's MAE on a plain ViT."""
        plain = self.described["config"].get("backbone") == "vit"
        return "vit" if plain else self.described["method"]

    @property
    def options(self) -> dict:
        """What MCMAE's encoder gets beyond its pre-training; the description has it, too."""
        asked = {k: getattr(self, k) for k in ("relative_bias", "init_values", "fourth")}
        return {k: v for k, v in asked.items() if v != getattr(Config, k)}

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of [0, 1] pixels that the encoder wants; --mean and --std are in the
        description.
        """
        usual, known = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}, self.described
        return tuple(list(known.get(k) or v) for k, v in usual.items())

    @property
    def colour(self) -> tuple[int, int, int]:
        """What images are padded with: 0 after normalisation."""
        return tuple(round(255 * x) for x in self.statistics[0])

    @property
    def crop(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image_size, self.crop_width

    def wrap(self, dataset: data.Dataset, train: bool) -> data.Dataset:
        """Crops of the folder's images; scenes come in the crop's size and have their own views."""
        if isinstance(dataset, ShapeScenes):
            keys = dict(granularities=dataset.granularities, length=len(dataset), seed=self.seed)
            return ShapeScenes("train" if train else "val", self.crop, 4, train=train, **keys)
        dataset.transform = Augment(self, train)
        return dataset

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the schedule."""
        return self.iterations or self.epochs * steps_per_epoch

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Rate of a step (from 0). UperNet: warm-up, times a line to 0 ("linear decay", polynomial
        of power 1); linear: a tenth after each 10 of 25 epochs (SemanticMIM's public code).
        """
        total, peak = self.total_steps(steps_per_epoch), self.base_lr * self.batch_size / 256
        if self.protocol == "linear":
            return peak * 0.1 ** (5 * step // (2 * total))
        warmup = min(self.warmup_steps, total // 10)
        return peak * min(1.0, (step + 1) / max(warmup, 1)) * (1 - step / total)

    def optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        """SGD for the linear probe (SemanticMIM Table 6), otherwise AdamW."""
        if self.protocol == "linear":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)
        return super().optimizer(groups)


def triple(cfg: Config, name: str) -> list[float] | None:
    """The three numbers of --mean or --std, "R,G,B"; UserError where they are none."""
    if getattr(cfg, name) is None:
        return None
    try:
        r, g, b = values = [float(x) for x in getattr(cfg, name).split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= x <= 1 for x in values) or (name == "std" and not all(values)):
        raise UserError(f"{engine.flag(name)} {getattr(cfg, name)} is not R,G,B of pixels in "
                        "[0, 1], e.g. 0.5,0.5,0.5")  # fmt: skip
    return values


# -------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(cfg: Config, world: engine.World, model: Segmenter, dataset: data.Dataset) -> tuple:
    """Run a model over a whole split, shared out over the ranks.

    Returns: confusion matrix (C, C) int64 on the CPU, on every rank; images read.
    """
    model.eval()
    whole, C = Whole(cfg, dataset), cfg.classes
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(whole, range(world.rank, len(whole), world.size)),
        batch_size=cfg.micro_batch, collate_fn=list, num_workers=engine.workers(cfg, world),
        worker_init_fn=data.worker_init,
    )  # fmt: skip
    matrix, failed = torch.zeros(C * C + 1, dtype=torch.float64), {}  # the last: images read
    for samples in loader:
        failed = next((s for s in samples if "error" in s), {})
        if failed:
            break
        samples, groups = [s for s in samples if "rgb" in s], {}
        for sample in samples:
            groups.setdefault(sample["rgb"].shape, []).append(sample)
        for (_, h, w), group in groups.items():
            imgs = torch.stack([padded(s["rgb"], cfg.crop, cfg.colour) for s in group])
            imgs = imgs.to(world.device)
            with world.autocast():
                y = slide(model.logits, imgs, cfg.crop, cfg.micro_batch)[:, :, :h, :w]
            for logits, sample in zip(y, group):
                labels = sample["semantic"].to(world.device)
                pred = resize(logits[None], labels.shape).argmax(1)[0]
                matrix[:-1] += confusion(pred, labels, C).flatten().cpu()
        matrix[-1] += len(samples)
    engine.raise_error(failed, world)  # on every rank
    if world.size > 1:
        dist.all_reduce(matrix)
    return matrix[:-1].view(C, C).long(), int(matrix[-1])


def finish(cfg: Config, world: engine.World, model: Segmenter, out: Path) -> bool:
    """Evaluate on the whole val split, if there is one; write result.json and classes.csv."""
    names = ShapeScenes.SEMANTIC_NAMES if cfg.data == "shapes" else ()
    if (path := Path(cfg.data, "classes.txt")).is_file():
        names = path.read_text(errors="replace").splitlines()
    dataset = engine.open_data(cfg, world, out, "val")
    if dataset is None:
        if world.rank == 0:
            print(f"{cfg.data} has no val split: nothing is evaluated")
        return False
    if world.size > 1:  # the running means of BatchNorm are those of rank 0's checkpoint
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    matrix, images = evaluate(cfg, world, model, dataset)
    if not matrix.sum():
        raise UserError(f"{cfg.data} val has no labelled pixel in {images} images that can be read")
    if world.rank:
        return True
    means, iou, accuracy = scores(matrix)
    with open(out / "classes.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(("id", "name", "IoU", "accuracy", "labelled_pixels", "predicted_pixels"))
        for i in range(cfg.classes):
            values = (f"{v[i]:.4f}" if v[i] == v[i] else "" for v in (iou, accuracy))
            name = names[i] if i < len(names) else ""
            rows.writerow((i, name, *values, int(matrix[i].sum()), int(matrix[:, i].sum())))
    result = means | {"images": images, "unreadable": len(dataset) - images}
    result |= {"classes": cfg.classes, "classes_seen": int((~iou.isnan()).sum())}
    asked = ("data", "protocol", "checkpoint", "init", "random", "seed")
    result |= {k: getattr(cfg, k) for k in asked}
    result |= {"method": cfg.described["method"], "evaluation": cfg.evaluation, "crop": cfg.crop}
    result |= {"layer": cfg.layer} if cfg.protocol == "linear" else {}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"result      mIoU {means['mIoU']:.4f}, pixel accuracy {means['pixel_accuracy']:.4f}, "
          f"mean accuracy {means['mean_accuracy']:.4f} on {images} images: {out}/result.json")
    return True


@torch.no_grad()
def preview(model: Segmenter, batch: dict[str, Tensor], path: Path, step: int) -> None:
    """Write a picture: images, labels, predictions (shown where there is no label, too)."""
    pred = model.logits(batch["rgb"]).argmax(1)
    columns = {"image": batch["rgb"], "labels": pictures.colorize(batch["semantic"])}
    columns["prediction"] = pictures.colorize(pred)
    pictures.contact_sheet(columns, path, f"step {step}, val; black: unlabelled")


# --------------------------------------------------------------------------------------------- run


def build(cfg: Config, world: engine.World) -> Segmenter:
    """The model of a run, with pre-trained weights unless a checkpoint will be resumed."""
    encoder = encoders.build(cfg.described, cfg.crop, cfg.drop_path, cfg.train_position)
    kept = cfg.resume and Path(cfg.output, "last.pt").exists()
    if not (kept or cfg.random or cfg.method):
        key = {} if cfg.init_key is None else {"key": cfg.init_key}
        report = encoders.load(encoder, cfg.described, cfg.checkpoint, cfg.init, **key)
        if world.rank == 0:
            print(report)
    mean, std = cfg.statistics
    if world.rank == 0:
        whose = cfg.described.get("input", "ImageNet's")
        print(f"pixels      mean {mean}, deviation {std}: {whose}")
    model = Segmenter(
        encoder, cfg.classes, cfg.layer if cfg.protocol == "linear" else None, cfg.dim,
        cfg.aux_dim, cfg.dropout, cfg.aux_weight, cfg.layer_decay, cfg.loss_size, mean, std,
    )  # fmt: skip
    if world.size > 1 and world.device.type == "cuda":  # on CPUs each rank has its own statistics
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def run(argv: list[str]) -> int:
    """Train, then evaluate."""
    cfg = engine.parse(Config, PRESETS, __doc__, argv)
    world = engine.World(cfg)
    accum, micro = engine.split_batch(cfg, world)
    synchronised = world.size > 1 and world.device.type == "cuda"
    if micro == 1 and cfg.protocol == "upernet" and not synchronised:
        raise UserError("UperNet's BatchNorm needs two samples at a time: raise --batch-size or "
                        "--micro-batch, or take fewer ranks")  # fmt: skip
    if cfg.protocol == "upernet":
        check_norm_batch(cfg, micro * (world.size if synchronised else 1))
    return engine.train(
        "segment", cfg, world, functools.partial(build, world=world), preview=preview,
        finish=functools.partial(finish, cfg, world),
    )  # fmt: skip


def check_norm_batch(cfg: Config, now: int) -> None:
    """Note how many samples BatchNorm sees at a time; UserError where a resumed run saw others."""
    path = Path(cfg.output or "", "config.json")
    kept = cfg.resume and path.exists() and json.loads(path.read_text()).get("norm_batch")
    if kept and kept != now:
        raise UserError(f"UperNet's BatchNorm saw {kept} samples at a time in {cfg.output} and "
                        f"would see {now}: resume with its --micro-batch and ranks")  # fmt: skip
    cfg.norm_batch = now


def run_evaluate(argv: list[str]) -> int:
    """Evaluate a finished run without its pre-training checkpoint."""
    parser = engine.Parser(prog="downstream.segment evaluate", description=run_evaluate.__doc__)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--data", help="default: that of the run")
    parser.add_argument("--output", help="default: RUN/evaluation")
    parser.add_argument("--evaluation", choices=["slide", "whole", "crop"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    checkpoint = engine.load(Path(args.run, "last.pt"), "segment")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("run", "output")}
    given |= {"resume": True, "output": args.run}
    cfg = engine.load_config(args.run, Config, checkpoint["config"] | given)
    if cfg.data == "shapes" and cfg.classes < ShapeScenes.SEMANTIC_CLASSES:
        raise UserError(f"ShapeScenes has {ShapeScenes.SEMANTIC_CLASSES} classes, the run "
                        f"{cfg.classes}: give --data")  # fmt: skip
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers} must be 0 or more")
    world, out = engine.World(cfg), Path(args.output or Path(args.run, "evaluation"))
    out.mkdir(parents=True, exist_ok=True)
    model = build(cfg, world).to(world.device)
    engine.load_weights(model, checkpoint["model"], Path(args.run, "last.pt"))
    if not finish(cfg, world, model, out):
        raise UserError(f"{cfg.data} has no val split")
    return 0


PRESETS = {
    "paper": dict(),
    # Ours, for a laptop: 64 x 64 scenes.
    "tiny": dict(
        data="shapes", image_size=64, batch_size=16, dim=64, aux_dim=32, photometric=False,
    ),  # and 400 steps
}  # fmt: skip


def main() -> None:
    commands = {"evaluate": run_evaluate, "prepare-ade": prepare_ade, "prepare-voc": prepare_voc}
    argv = sys.argv[1:]
    known = argv and argv[0] in commands
    engine.command("segment", lambda: commands[argv[0]](argv[1:]) if known else run(argv))


if __name__ == "__main__":
    main()
