"""Classification with a pre-trained encoder: fine-tuning, linear probe, nearest neighbours.

    python -m downstream.classify --data shapes --model tiny --checkpoint runs/.../last.pt
    python -m downstream.classify --protocol linear --layers all --data ROOT --checkpoint ...
    python -m downstream.classify --protocol knn --data ROOT --checkpoint ...
    torchrun --nproc_per_node=8 -m downstream.classify --data data/imagenet --checkpoint ...
    python -m downstream.classify --protocol evaluate --finetuned runs/.../last.pt --data ROOT
    python -m downstream.classify --protocol evaluate --init mae_finetuned_vit_base.pth --data ROOT

Instead of --checkpoint: the same with --random, fresh weights; --init FILE, a public encoder;
--method cfmae --encoder base, a fresh one. `--model tiny` takes minutes on a CPU; TINY says what is
small about it. The last two test a fine-tuned model again, ours on any data with its classes, a
public one on data that has all of them: classes are the class folders, sorted.

mixup and cutmix mix a micro-batch with itself. So with them, other than in pre-training, the number
of samples that a device takes at a time is part of the result, and --resume refuses another.

Map: `MAE`, `RECIPES`, `Config`     the papers' settings by method; `recipe` finds them
     `Classifier`                   encoder, mean of tokens, norm, linear layer, loss
     `report`                       top-1 and top-5 over all of val

Data: ROOT/{train,val}/<class>/NAME.jpg (or rgb/<class>/, see data.py). A run leaves result.json and
per_class.csv beside engine.train's files. augment.py has the augmentation, probe.py the protocols
with a frozen encoder, robustness.py ImageNet-A, -R, -Sketch and -C.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import shapes
from cfmae import NAMES
from common import IMAGENET_MEAN, IMAGENET_STD, Normalize
from downstream import encoders, probe
from downstream.augment import Augmented, draw_mix, mix, soft_targets
from downstream.scores import count_hits, match_classes, shares, tally, write_result
from engine import UserError, arg

# What the encoder's method sets unless the command line or the preset does. MAE's are those of its
# published command for ViT-B, with its erasing of DeiT's.
MAE = dict(
    epochs=100, warmup_epochs=5.0, batch_size=1024, base_lr=5e-4, min_lr=1e-6, weight_decay=0.05,
    layer_decay=0.65, drop_path=0.1, reprob=0.25, color_jitter=0.0, head_std=2e-5,
    train_position=True,
)  # fmt: skip
MAE_LARGE = MAE | dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)  # its ViT-L's
# The public configuration on BEiT, 4e-3 at 1024. NOTE paper unclear: Table 3 repeats the linear
# probe's numbers; --recipe table3 is the print.
BEIT = MAE | dict(base_lr=1e-3, warmup_epochs=20.0, head_std=0.02)
# By `recipe`'s keys. A method's number of blocks or target comes first, then the method itself.
RECIPES = {
    "cfmae": MAE | dict(batch_size=2048, reprob=0.0),  # Table 8; base_lr and decay: `defaults`
    "semanticmim": BEIT,
    # The public configuration on MaskFeat, 8e-3 at 2048.
    "semanticmim hog": BEIT | dict(batch_size=2048, color_jitter=0.4, head_std=2e-5),
    "beit": BEIT,
    # NOTE paper unclear: "the default finetuning parameters of the original MAE except for the
    # layer-wise decay (0.65, 0.75, 0.85)", Sec. 3.1: for what? The published command is MAE's.
    "mcmae": MAE,
    "mcmae 23": MAE | dict(layer_decay=0.75),  # its L and H: as MAE's
    "mcmae 31": MAE | dict(layer_decay=0.75),
    # NOTE paper unclear: not given. MAE's, whose ViT of 24 blocks has 0.75: at 0.65 the stem below
    # 24 blocks would learn at 2e-5 of the rate, at 0.75 at 8e-4. DyViT's positions are fixed.
    "coma_dyvit": MAE | dict(train_position=False),
    "coma_dyvit 24": MAE | dict(train_position=False, layer_decay=0.75),
    "mae": MAE,
    "mae 24": MAE_LARGE,
    "mae 32": MAE_LARGE | dict(drop_path=0.3),  # its ViT-H's
    "vit": MAE,
    "vit 24": MAE_LARGE,
    "vit 32": MAE_LARGE | dict(drop_path=0.3),  # its ViT-H's
}
TABLE_3 = dict(  # SemanticMIM's, as printed; the rest, layer-wise decay too, is its public code's
    epochs=100, warmup_epochs=0.0, batch_size=1024, base_lr=1e-3, min_lr=0.0, weight_decay=1e-4,
    drop_path=0.1,
)  # fmt: skip
PROBES = {
    # MAE's, with its published rate first. No paper here but SemanticMIM describes its probe.
    "lars": dict(epochs=90, warmup_epochs=10.0, batch_size=16384, weight_decay=0.0, head_std=0.01,
                 rates="0.1,0.3,1,3,10"),
    # SemanticMIM Table 5: peak 4e-3 at 1024; first weights: its public code's.
    "adamw": dict(epochs=100, warmup_epochs=0.0, batch_size=1024, weight_decay=1e-4, head_std=0.02,
                  rates="1e-3,3e-4,3e-3"),
    "mcmae": dict(batch_size=4096),  # its published command; all else as MAE
}  # fmt: skip
TINY = {  # --model tiny, ours: 20,000 images of 64 x 64, minutes on two cores
    "finetune": dict(epochs=10, warmup_epochs=1.0, batch_size=64, base_lr=8e-3, layer_decay=0.75,
                     drop_path=0.0, mixup=0.0, cutmix=0.0, reprob=0.0, color_jitter=0.0,
                     head_std=2e-5),
    "linear": dict(epochs=30, warmup_epochs=3.0, batch_size=512),
}  # fmt: skip


def recipe(description: dict) -> dict:
    """Find what RECIPES has for an encoder: by kind and target, kind and depth, or kind."""
    method, config = description["method"], description["config"]
    with torch.device("meta"):  # no memory, no time
        depth = encoders.num_layers(encoders.build(description, config["patch_size"]))
    kind = "vit" if config.get("backbone") == "vit" else method
    keys = (f"{kind} {config.get('target')}", f"{kind} {depth}", kind)
    return next(RECIPES[key] for key in keys if key in RECIPES)


@dataclass
class Config(engine.Config):
    """Settings of a run. None: what the encoder's method, its checkpoint or the protocol sets."""

    model: str = arg("paper", "preset")
    protocol: str = arg("finetune", "evaluate tests a finished run, --finetuned, once more",
                        choices=["finetune", "linear", "knn", "evaluate"])  # fmt: skip
    checkpoint: str | None = arg(None, "encoder from a checkpoint of this project")
    init: str | None = arg(None, "encoder from a public state dict: MAE, timm ViT, ConvMAE, BEiT; "
                                 "for evaluate: with its classifier")  # fmt: skip
    method: str | None = arg(None, "fresh encoder of a method ...", list(encoders.METHODS))
    encoder: str | None = arg(None, "... and of this preset of it")
    random: bool = arg(False, "fresh weights in the architecture of --checkpoint or --init")
    init_key: str | None = arg(None, "which state dict of --init's file, e.g. model_ema")
    num_heads: int | None = arg(None, "of --init, where the file's width does not tell")
    finetuned: str | None = arg(None, "for evaluate: last.pt of a fine-tuning run")
    description: str | None = arg(None, "the encoder in JSON; set by the run")
    classes: str | None = arg(None, "names of the classes in JSON; set by the run")
    recipe: str = arg("public", "for SemanticMIM: the public code's, or Table 3",
                      choices=["public", "table3"])  # fmt: skip
    mean: str | None = arg(None, "of the pixels, as 0.5,0.5,0.5; default: what the encoder was "
                                 "trained with")  # fmt: skip
    std: str | None = arg(None, "their deviation, alike")
    granularities: str | None = arg(
        None, "CFMAE: what the encoder sees; default R. R+I+S is the dagger row of Table 1",
        choices=["R", "R+S", "R+I", "R+I+S"],
    )  # fmt: skip
    pool: str = arg(
        "patch", "mean of the patch tokens (CFMAE E.2, CoMA, MAE), or of class and proxy tokens "
        "(SemanticMIM Table 1, CLS)", choices=["patch", "prefix"],
    )  # fmt: skip
    image_size: int | None = arg(None, "pixels; default: pre-training's")
    patch_size: int | None = arg(None, "the encoder's; set by the run")
    epochs: int | None = arg(None, "100: CFMAE Table 8, SemanticMIM Table 3, MCMAE Sec. 3.1; "
                                   "linear: MAE's 90, SemanticMIM's 100")  # fmt: skip
    warmup_epochs: float | None = arg(None, "5: CFMAE E.2, MAE; 20: SemanticMIM's public code")
    batch_size: int | None = arg(None, "2048: CFMAE Table 8, SemanticMIM's public code on "
                                 "MaskFeat; 1024: on BEiT, its Table 3, MAE; linear: MAE's 16384, "
                                 "MCMAE's public code 4096")  # fmt: skip
    base_lr: float | None = arg(None, "CFMAE Table 8: 1e-3 (400 epochs), 5e-4 (1600); 1e-3: "
                                      "SemanticMIM; 5e-4: MAE's public code")  # fmt: skip
    min_lr: float | None = arg(None, "1e-6: MAE's and SemanticMIM's public code; 0: its Table 3")
    weight_decay: float | None = arg(None, "0.05: CFMAE Table 8, MAE, SemanticMIM's public code")
    beta2: float = arg(0.999, "CFMAE Table 8, SemanticMIM Table 3")
    layer_decay: float | None = arg(
        None, "rate of a layer / of the next. CFMAE Table 8: 0.7 (400 epochs), 0.65 (1600); 0.65: "
        "public code of MAE, MCMAE, SemanticMIM; 0.75: of MAE for 24 blocks and more",
    )  # fmt: skip
    train_position: bool | None = arg(None, "train fixed positions, too: public code of MAE, "
                                      "MCMAE; learned ones always are")  # fmt: skip
    drop_path: float | None = arg(None, "0.1: CFMAE Table 8, SemanticMIM Table 3, MAE")
    crop_scale_min: float = arg(0.08, "SemanticMIM Table 3; the usual one")
    crop_pct: float | None = arg(None, "centre crop of val; 224 / 256 at 224 pixels, above 1: MAE; "
                                       "below 1: ours")  # fmt: skip
    mixup: float | None = arg(None, "Beta parameter, 0 = off. 0.8: CFMAE Table 8, MAE; 0 with maps")
    cutmix: float | None = arg(None, "Beta parameter, 0 = off. 1.0: CFMAE Table 8, MAE")
    switch_prob: float = arg(0.5, "share of cutmix where both are on; timm's")
    smoothing: float = arg(0.1, "label smoothing. CFMAE Table 8, MAE")
    rand_augment: float = arg(9.0, "magnitude of 10, 0 = off. (9, 0.5): CFMAE Table 8, MAE")
    rand_augment_std: float = arg(0.5, "of that magnitude")
    reprob: float | None = arg(None, "random erasing. 0.25: public code of MAE, MCMAE, "
                               "SemanticMIM; 0: CFMAE Table 8 does not name it")  # fmt: skip
    color_jitter: float | None = arg(None, "0.4: SemanticMIM's public code on MaskFeat")
    head_std: float | None = arg(None, "first weights of the classifier. 2e-5: MAE, SemanticMIM on "
                                 "MaskFeat; 0.02: on BEiT; linear: MAE's 0.01, 0.02")  # fmt: skip
    mix_batch: int | None = arg(None, "samples that mixup and cutmix mix with one another, those "
                                      "of a micro-batch; set by the run")  # fmt: skip
    val_samples: int = arg(2048, "evenly spaced images of val that are looked at while training")
    layers: str | None = arg(None, "frozen layers: 1,2,...; norm, the last after its norm "
                                   "(default); all. SemanticMIM Sec. 4.2: 7 of 12")  # fmt: skip
    features: str | None = arg(None, "patch, prefix, both, with commas; default: all it has")
    probe: str | None = arg(None, "adamw, on a LayerNorm: SemanticMIM Table 5, its public code; "
                                  "lars, on a BatchNorm: MAE", ["lars", "adamw"])  # fmt: skip
    rates: str | None = arg(None, "base rates to try: lr = rate * batch / 256; the first is MAE's "
                                  "0.1 or SemanticMIM's 1e-3")  # fmt: skip
    views: int = arg(0, "augmented passes over train that take turns; 0 = the centre crop alone")
    cache: str | None = arg(None, "folder of the features, for use again; default: in --output")
    cache_dtype: str = arg("float16", "of the features on disk", ["float16", "float32"])
    k: int = arg(20, "nearest neighbours")
    temperature: float = arg(0.07, "of their votes")

    FREE = engine.Config.FREE + ("cache",)

    @property
    def names(self) -> tuple[str, ...]:
        """The granularities, in the order of data.GRANULARITIES."""
        return tuple(NAMES[letter] for letter in (self.granularities or "R").split("+"))

    def data_options(self) -> dict:
        """What the loader must bring (see data.open_dataset)."""
        options = {"granularities": self.names}
        if "semantic" in self.names:
            options["semantic_classes"] = json.loads(self.description)["config"]["semantic_classes"]
        return options

    def wrap(self, dataset: data.Dataset, train: bool) -> data.Dataset:
        """RandAugment, jitter and random erasing around train; val's centre crop."""
        files = getattr(dataset, "files", None)
        if files is not None and (files.labels < 0).any():
            loose = files.name(int((files.labels < 0).argmax()))
            raise UserError(f"{loose} lies in no class folder; expected {{train,val}}/<class>/NAME")
        if self.protocol in ("linear", "knn"):
            dataset.train = train and self.views > 0
        if not dataset.train and files is not None:
            dataset.crop_pct = self.crop_pct
        if not train or self.protocol != "finetune":
            return dataset
        return Augmented(dataset, self, *self.statistics())

    def given_statistics(self) -> dict[str, list[float]]:
        """--mean and --std, where they are given, as three numbers; UserError on others."""
        found = {}
        for name in ("mean", "std"):
            text = getattr(self, name)
            try:
                x = [float(x) for x in text.split(",")] if text else [0.5] * 3
            except ValueError:
                x = []
            if len(x) != 3 or not all(0 <= v <= 1 for v in x) or (name == "std" and not all(x)):
                low = "[0" if name == "mean" else "(0"
                raise UserError(f"--{name} {text}: three numbers in {low}, 1], e.g. 0.5,0.5,0.5")
            found |= {name: x} if text else {}
        return found

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the encoder's input, pixels in [0, 1], of a resolved Config."""
        return tuple(self.given_statistics().values())

    def resolve(self) -> None:
        """Read the encoder's architecture and the classes, fill in the recipe, refuse the rest.

        Errors: UserError naming the field and values that work.
        """
        if self.protocol == "evaluate" and bool(self.finetuned) == bool(self.init):
            raise UserError("--protocol evaluate needs --finetuned, last.pt of a run, or --init, a "
                            "public classifier")  # fmt: skip
        if self.protocol == "evaluate" and self.finetuned:
            kept = engine.load(self.finetuned, "classify")["config"]
            kept = {"train_position": False} | kept  # before that field they were fixed
            own = ("protocol", "data", "finetuned", "precision", *self.FREE)
            for f in (f for f in dataclasses.fields(self) if f.name not in own):
                value = kept.get(f.name, f.default)  # the field may be newer than the run
                if getattr(self, f.name) not in (f.default, value):
                    flag = engine.flag(f.name)
                    raise UserError(f"{flag} is {value} in {self.finetuned}: leave it out")
                setattr(self, f.name, value)
        if self.description is None:
            self.description = encoders.kept_description(self) or self.describe()
        description = json.loads(self.description)
        for name, value in self.defaults(description).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().resolve()
        self.given_statistics()
        unit = "layer_decay drop_path mixup cutmix switch_prob smoothing reprob color_jitter"
        for name in unit.split():
            top = 0.99 if name in ("drop_path", "smoothing") else 1
            if not 0 <= getattr(self, name) <= top:
                raise UserError(f"{engine.flag(name)} {getattr(self, name)} is outside [0, {top}]")
        if not (0 <= self.rand_augment <= 10 and self.rand_augment_std >= 0):
            raise UserError("--rand-augment is a magnitude in [0, 10], its std 0 or above")
        if self.head_std < 0:
            raise UserError(f"--head-std {self.head_std} must be 0 or above")
        if self.views < 0 or self.k < 1 or self.temperature <= 0 or not 0 < self.crop_pct <= 1:
            raise UserError("--views >= 0, --k >= 1, --temperature > 0, --crop-pct in (0, 1]")
        if self.granularities and description["method"] != "cfmae":
            raise UserError(f"--granularities is CFMAE's; this encoder is {description['method']}")
        if len(self.names) > 1:
            if self.protocol in ("linear", "knn"):
                raise UserError(f"--protocol {self.protocol} reads RGB alone: --granularities R")
            if self.mixup:
                raise UserError("--mixup is undefined on label maps; cutmix alone: --mixup 0")
        if self.classes is None:
            self.classes = json.dumps(class_names(self.data, self.protocol != "evaluate"))

    def describe(self) -> str:
        """The encoder's description as JSON, at the image size of this run."""
        changes = {"image_size": self.image_size, "num_heads": self.num_heads}
        changes |= {"key": self.init_key, **self.given_statistics()}
        changes = {k: v for k, v in changes.items() if v is not None}
        sources = (self.checkpoint, self.init, self.method, self.encoder)
        description = encoders.describe(*sources, **changes)
        if description["method"] == "cfmae":  # without maps, no parameters for them
            changes["granularities"] = self.granularities or "R"
            description = encoders.describe(*sources, **changes)
        return json.dumps(description)

    def defaults(self, description: dict) -> dict:
        """What fields that are None become."""
        method, config = description["method"], description["config"]
        tiny = TINY.get(self.protocol, {}) if self.model == "tiny" else {}
        inputs = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # of runs from before the field
        inputs = {k: ",".join(f"{x:g}" for x in description.get(k, v)) for k, v in inputs.items()}
        self.probe = self.probe or ("adamw" if method == "semanticmim" else "lars")
        size = config["image_size"]
        if not isinstance(size, int):
            raise UserError(f"the encoder is for {size} pixels, not square: give --image-size")
        found = recipe(description) | {"mixup": 0.8 if len(self.names) == 1 else 0.0, "cutmix": 1.0}
        if method == "cfmae" and config["epochs"] < 1600:  # Table 8; from scratch alike
            found |= dict(base_lr=1e-3, layer_decay=0.7)
        if self.recipe == "table3":
            if method not in ("semanticmim", "beit"):
                raise UserError(f"--recipe table3 is SemanticMIM's; this encoder is {method}")
            found |= TABLE_3
        if self.protocol == "linear":
            found |= PROBES[self.probe] | PROBES.get(method, {})
        crop_pct = 224 / 256 if (self.image_size or size) == 224 else 1.0
        return found | inputs | tiny | {"image_size": size, "patch_size": config["patch_size"],
                                        "crop_pct": crop_pct}  # fmt: skip


def class_names(root: str, trained: bool = True) -> list[str]:
    """The classes of a data set, folders with an image in them, in the order of its labels.

    Errors: UserError where there are not two, or, if `trained`, where val has one that train lacks.
    """
    if root == "shapes":
        return list(shapes.SHAPES)
    splits = {split: data.layout(root, split).get("rgb") for split in ("train", "val")}
    found = {split: data.class_folders(f"{root}/{x}") for split, x in splits.items() if x}
    if not found:
        raise UserError(f"there is no folder {root}/train or {root}/val{data.LAYOUT}")
    names = sorted({name for names in found.values() for name in names})
    if len(names) < 2:
        what = "no class folders with images" if not names else f"one class alone, {names[0]},"
        raise UserError(
            f"{what} in {root}/{next(iter(found))}; expected: {root}/{{train,val}}/<class>/"
            "NAME.jpg, two classes or more. To start without any files: --data shapes"
        )
    unknown = [name for name in found.get("val", ()) if name not in found.get("train", ())]
    if trained and unknown and "train" in found:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise UserError(f"{len(unknown)} classes of {root}/val have no image in {root}/train, so "
                        f"nothing can learn them: {shown}")  # fmt: skip
    return names


# ------------------------------------------------------------------------------------------ model


class Classifier(nn.Module):
    """Encoder, mean over tokens, fresh norm, linear layer; `model(batch, progress)` gives a loss.

    As MAE, the norm comes after the mean: tokens are taken from the last layer before the encoder's
    own final norm, which therefore has no part in it. It stays in the checkpoint, frozen, so that
    every trainable parameter has a gradient (DDP asks for that) and the file still holds the whole
    encoder. With maps the mean is over the tokens of all granularities.
    """

    def __init__(self, cfg: Config, encoder: nn.Module):
        super().__init__()
        self.cfg, self.encoder, self.normalize = cfg, encoder, Normalize(*cfg.statistics())
        self.layer, classes = encoders.num_layers(encoder), len(json.loads(cfg.classes))
        dim = encoder.norm.normalized_shape[0]
        encoder.norm.requires_grad_(False)
        self.fc_norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=cfg.head_std)
        nn.init.zeros_(self.head.bias)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        heads = [self.fc_norm, self.head]
        return encoders.layer_decay_groups(self.encoder, heads, weight_decay, self.cfg.layer_decay)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {m: self.normalize(batch[m]) if m == "rgb" else batch[m] for m in self.cfg.names}

    def classify(self, inputs: dict[str, Tensor], seed: Tensor | None = None) -> Tensor:
        """Logits (B, classes); `seed` (B,) turns drop path on."""
        imgs = inputs if len(inputs) > 1 else inputs["rgb"]
        ((tokens, prefix),) = self.encoder.forward_features(imgs, [self.layer], seed)
        return self.head(self.fc_norm((tokens if self.cfg.pool == "patch" else prefix).mean(1)))

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Cross-entropy with smoothed, mixed targets of a batch (see data.py for its keys)."""
        cfg, inputs, lam = self.cfg, self.inputs(batch), None
        if cfg.mixup or cfg.cutmix:
            # with maps the box lies on their grid, so that it cuts all granularities alike
            size = list(inputs.values())[-1].shape[-2:]
            lam, blend, box = draw_mix(batch["seed"], size, cfg.mixup, cfg.cutmix, cfg.switch_prob)
            inputs = {m: mix(x, blend, box) for m, x in inputs.items()}
        logits = self.classify(inputs, batch["seed"]).float()
        target = soft_targets(batch["label"], lam, logits.shape[1], cfg.smoothing)
        return -(target * logits.log_softmax(-1)).sum(-1).mean(), {}


def build(cfg: Config) -> Classifier:
    """Model of a run, its encoder loaded unless the run's own checkpoint will be."""
    description = json.loads(cfg.description)
    encoder = encoders.build(description, cfg.image_size, cfg.drop_path, cfg.train_position)
    if cfg.pool == "prefix" and not getattr(encoder, "num_prefix", 0):
        raise UserError("--pool prefix: this encoder has no class or proxy tokens; --pool patch")
    resumed = cfg.resume and Path(cfg.output, "last.pt").exists()
    if not (cfg.random or cfg.method or resumed or cfg.finetuned):
        report = encoders.load(encoder, description, cfg.checkpoint, cfg.init, cfg.init_key)
        if os.environ.get("RANK", "0") == "0":
            print(report, flush=True)
    return Classifier(cfg, encoder)


# ------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: Classifier, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy and the shares of top-1 and top-5 hits in a batch."""
    logits = model.classify(model.inputs(batch)).float()
    _, top1, top5 = tally(logits, batch["label"]).sum(0) / len(logits)
    return {"loss": F.cross_entropy(logits, batch["label"]), "top1": top1, "top5": top5}


def report(
    model: Classifier, dataset: data.Dataset, out: Path, cfg: Config, world: engine.World, **how
) -> None:
    """Test a model on all of a split and write result.json and per_class.csv."""
    counts, unreadable = count_hits(model.eval(), dataset, cfg, world, **how)
    facts = {"protocol": "finetune", "source": cfg.checkpoint or cfg.init or cfg.method}
    facts |= {"random": cfg.random or bool(cfg.method), "finetuned": cfg.finetuned}
    facts |= {"data": cfg.data, "unreadable": unreadable}
    if cfg.finetuned or not cfg.init or cfg.protocol == "finetune":  # a public one's: not known
        facts |= {"epochs": cfg.epochs, "steps": cfg.steps}
    if world.rank == 0:
        write_result(out, json.loads(cfg.classes), counts, facts)
        x = shares(counts)
        print(f"val         {x['images']} images, top-1 {x['top1']:.2f}, top-5 {x['top5']:.2f}; "
              f"{out / 'result.json'}", flush=True)  # fmt: skip


def load_finetuned(cfg: Config, world: engine.World) -> Classifier:
    """Build the model of `cfg.finetuned`, without the encoder's own file, or public `cfg.init`'s.

    A public one has the norm after the mean of the patches (`fc_norm`), or `norm` on its class
    token; its head must have as many rows as there are classes.
    """
    if cfg.finetuned:
        model = build(cfg)
        engine.load_weights(model, engine.load(cfg.finetuned, "classify")["model"], cfg.finetuned)
        return model.to(world.device).eval()
    heads = {} if cfg.num_heads is None else {"num_heads": cfg.num_heads}
    encoder, description, state = encoders.open_classifier(
        cfg.init, cfg.image_size, cfg.init_key, **heads
    )
    rows, classes = len(state["head.weight"]), len(json.loads(cfg.classes))
    if rows != classes:
        raise UserError(f"--init {cfg.init} classifies {rows} classes, {cfg.data} has {classes}")
    cfg.pool = description["pool"]
    if world.rank == 0:
        print(description["report"], flush=True)
    model = Classifier(cfg, encoder)
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v
             for k, v in state.items()}  # fmt: skip
    state |= {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    engine.load_weights(model, state, cfg.init)
    return model.to(world.device).eval()


# ------------------------------------------------------------------------------------------- main

PRESETS = {
    "paper": dict(),  # by method: RECIPES
    "tiny": dict(),  # TINY, by protocol
}


def settle_mixing(cfg: Config, world: engine.World) -> None:
    """Note how many samples mix with one another; UserError where a resumed run had others."""
    if not (cfg.mixup or cfg.cutmix):
        return
    _, mixed = engine.split_batch(cfg, world)
    path = Path(cfg.output or "", "config.json")
    kept = json.loads(path.read_text()).get("mix_batch") if cfg.resume and path.exists() else None
    if kept not in (None, mixed):
        raise UserError(
            f"{cfg.output}: mixup and cutmix mixed {kept} samples with one another, now it would "
            f"be {mixed}; continue with --micro-batch {kept}, on a number of ranks that divides "
            f"{cfg.batch_size // kept}"
        )
    cfg.mix_batch = mixed


def main(argv: list[str] | None = None) -> int:
    """Run one protocol; returns the exit status."""
    cfg = engine.parse(Config, PRESETS, __doc__, argv)
    world = engine.World(cfg)
    if world.rank == 0:
        whose = json.loads(cfg.description).get("input", "ImageNet's")
        print(f"pixels      mean {cfg.mean}, deviation {cfg.std}: {whose}", flush=True)
    if cfg.protocol in ("linear", "knn"):
        return probe.run(cfg, world)
    if cfg.protocol == "finetune":
        settle_mixing(cfg, world)

        def finish(model: Classifier, out: Path) -> None:
            dataset = engine.open_data(cfg, world, out, "val")
            if dataset is not None:
                report(model, dataset, out, cfg, world)

        return engine.train("classify", cfg, world, build, evaluate=evaluate, finish=finish)
    out = Path(world.from_rank_0(lambda: engine.open_folder(cfg, "classify")[0]))
    dataset = engine.open_data(cfg, world, out, "val")
    if dataset is None:
        raise UserError(f"{cfg.data} has no folder val")
    numbers = match_classes(dataset.classes, json.loads(cfg.classes), cfg.data)
    report(load_finetuned(cfg, world), dataset, out, cfg, world, numbers=numbers)
    return 0


if __name__ == "__main__":
    engine.command("classify", main)
