"""Fine-tuning on clips: VideoMCMAE's encoder and a linear layer trained on classes, many-view test.

    python -m downstream.finetune_clips --data shapes --model tiny --checkpoint runs/.../last.pt
    torchrun --nproc_per_node=8 -m downstream.finetune_clips --data data/k400 --checkpoint ...
    torchrun --nproc_per_node=8 -m downstream.finetune_clips --model ssv2 --data data/ssv2 ...

Instead of a checkpoint's weights: --random, fresh ones; without a checkpoint: --encoder base. With
`--stride 0` all frames of a clip are one and the same: what a single picture tells.

Settings are VideoMAE's (Sec. 3.4 "closely follows" Sec. 3.1's for images: docs/decisions.md), but
for what Sec. 3.4 names: 50 epochs and no flips on SSv2, 3 x 5 and 3 x 2 test views.

Map: `Augmented`                    one RandAugment and one erasing for all frames of a clip
     `classifier.py`                mean of tokens, norm, linear layer, loss; here its views
     `main`                         the loop, and the test over all views of all of val

Data: ROOT/{train,val}/CLASS/CLIP/000001.jpg, see clips.py. A run leaves result.json and
per_class.csv beside engine.Run's files. Mixing is within a micro-batch, as in finetune.py.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait
import engine.config

import torch
from torch import Tensor

import clips
import motion
import videomcmae
from common import IMAGENET_MEAN, IMAGENET_STD, Normalize, init_weights
from downstream import augment
from downstream.classifier import Classifier, evaluate, settle, test
from downstream.transfer import in_classes
from engine import UserError, arg, cosine, layer_decay_groups, require
from engine.field import data_arg, optim_arg
from engine.folder import open_data


@dataclass
class Config(engine.config.Config):
    """Settings of a run; those without a source are VideoMAE's (its commands and defaults)."""

    data: str = arg("data/k400", "folder of clips in class folders, or shapes, in motion")
    model: str = arg("k400", "preset: of a data set")
    checkpoint: str | None = arg(None, "the encoder, from a run of videomcmae.py")
    random: bool = arg(False, "fresh weights in the architecture of --checkpoint")
    encoder: str | None = arg(None, "instead: a fresh one of this preset", [*videomcmae.PRESETS])
    image_size: int | None = arg(None, "pixels; default: pre-training's")
    patch_size: int | None = arg(None, "the encoder's; set by the run")
    frames: int | None = data_arg(None, "of a clip; default: pre-training's")
    stride: int = data_arg(4, "frames from one to the next", within="[0, inf)")
    sampling: str = data_arg("dense", "or one frame a segment", ["dense", "segments"])
    views: str = data_arg("5x3", "test views in time x in space; Sec. 3.4")
    flip: bool = data_arg(True, "half of the clips; off for SSv2, Sec. 3.4")
    epochs: int = arg(100, "Sec. 3.1; 50 on SSv2, Sec. 3.4")
    warmup_epochs: float = arg(5, "VideoMAE")
    batch_size: int = arg(512, "VideoMAE: 64 devices x 8")
    micro_batch: int = arg(16, "most clips that one device takes at a time")
    base_lr: float = arg(1e-3, "VideoMAE; 5e-4 on SSv2")
    min_lr: float = arg(2e-6, "VideoMAE: 1e-6 x batch / 256")
    weight_decay: float = arg(0.05, "VideoMAE")
    beta2: float = arg(0.999, "VideoMAE")
    layer_decay: float = optim_arg(0.75, "rate of a layer / of the next; VideoMAE", within="[0, 1]")
    drop_path: float = optim_arg(0.1, "VideoMAE", within="[0, 0.99]")
    crop_scale_min: float = arg(0.08, "VideoMAE")
    mixup: float = data_arg(0.8, "Beta parameter, 0 = off; VideoMAE", within="[0, 1]")
    cutmix: float = data_arg(1.0, "Beta parameter, 0 = off; VideoMAE", within="[0, 1]")
    switch_prob: float = data_arg(0.5, "share of cutmix; VideoMAE", within="[0, 1]")
    smoothing: float = data_arg(0.1, "label smoothing; VideoMAE", within="[0, 0.99]")
    rand_augment: float = data_arg(
        7.0, "magnitude of 10, 0 = off; four operations (rand-m7-n4-mstd0.5-inc1); VideoMAE",
        within="[0, 10]",
    )  # fmt: skip
    rand_augment_std: float = data_arg(0.5, "of that magnitude", within="[0, inf)")
    reprob: float = data_arg(0.25, "random erasing; VideoMAE", within="[0, 1]")
    head_std: float = arg(2e-5, "first weights of the classifier; VideoMAE: 0.02 x 0.001")
    val_samples: int = arg(1024, "evenly spaced clips of val that are looked at while training")

    color_jitter: typing.ClassVar = 0.0  # VideoMAE has none
    SAMPLES: typing.ClassVar = "clips"
    SET: typing.ClassVar = ("patch_size", "preview_epochs")
    FURTHER: typing.ClassVar = (*engine.config.Config.FURTHER, *(
        "crop_scale_min min_lr beta1 beta2 clip_grad switch_prob rand_augment_std head_std"
    ).split())  # fmt: skip

    def resolve(self) -> None:
        """Read what the encoder is, fill in its sizes, refuse what cannot work."""
        self.described = describe(self)
        for name in ("image_size", "frames", "patch_size"):
            if getattr(self, name) is None:
                setattr(self, name, self.described[name])
        super().resolve()
        c, n = self.described["cube_frames"], self.frames
        require(
            (n > 0 and n % c == 0, "frames", f"{n} must be a multiple of the encoder's {c}"),
            (len(self.test_views) == 2, "views", f"{self.views}: two numbers above 0, as 5x3"),
        )

    @property
    def test_views(self) -> tuple[int, ...]:
        """Views in time, in space; not two numbers where `views` is none such."""
        words = self.views.split("x")
        return tuple(int(n) for n in words if n.isdecimal() and int(n)) if words[2:] == [] else ()


def kept_facts(cfg: Config) -> dict | None:
    """The facts of the run that `cfg` continues, or None: it needs no other file."""
    path = f"{cfg.output}/last.pt"
    if not (cfg.resume and cfg.output) or not Path(path).exists():
        return None
    return engine.load(path, "finetune_clips")["facts"]


def describe(cfg: Config) -> dict:
    """Settings of the encoder's pre-training, of which it has its architecture; UserError."""
    if kept := kept_facts(cfg):
        return kept["encoder"]
    if (cfg.checkpoint is None) == (cfg.encoder is None):
        raise UserError("where is the encoder from? give one of --checkpoint, --encoder")
    if cfg.encoder:
        found = videomcmae.Config(**{"model": cfg.encoder, **videomcmae.PRESETS[cfg.encoder]})
        return dataclasses.asdict(found)
    return engine.load(cfg.checkpoint, "videomcmae")["config"]


# ----------------------------------------------------------------------------------- augmentation


class Augmented(augment.Augmented):
    """A training split with RandAugment and random erasing, alike in all frames of a clip."""

    def __init__(self, dataset: torch.utils.data.Dataset, cfg: Config):
        super().__init__(dataset, cfg, IMAGENET_MEAN, IMAGENET_STD)
        self.rand_augment = augment.RandAugment(  # VideoMAE's
            cfg.rand_augment, cfg.rand_augment_std, (128,) * 3, count=4
        )

    def augment(self, rgb: Tensor, seed: int) -> Tensor:
        """What becomes of a clip (T, 3, H, W) uint8; all frames draw the same."""
        rgb = torch.stack([self.distorted(frame, seed) for frame in rgb])
        torch.default_generator.manual_seed(seed + 1)
        return self.erased(rgb)


# ------------------------------------------------------------------------------------------ model


class ClipClassifier(Classifier):
    """The same on clips, as VideoMAE."""

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clips (B, T, 3, H, W) uint8, normalised; views of them, (B, n, T, 3, H, W), wait."""
        return batch if batch["rgb"].ndim == 6 else super().inputs(batch)

    def classify(self, inputs: dict[str, Tensor], seed: Tensor | None = None) -> Tensor:
        """Logits (B, classes); of views the log of their mean probability."""
        if inputs["rgb"].ndim == 5:
            return super().classify(inputs, seed)
        views = self.classify(self.inputs({"rgb": inputs["rgb"].flatten(0, 1)}))
        return views.float().softmax(-1).unflatten(0, inputs["rgb"].shape[:2]).mean(1).log()


def build(cfg: Config, classes: list[str], load: bool = True) -> tuple[Classifier, str]:
    """The model of a run, and a report of its encoder's weights; `load`: whether from the file."""
    pretrained = engine.load_config(cfg.checkpoint or "--encoder", videomcmae.Config, cfg.described)
    size = (cfg.frames, cfg.image_size, cfg.image_size)
    encoder, report = videomcmae.make_encoder(pretrained, size=size, drop_path=cfg.drop_path), ""
    init_weights(encoder)
    if load and cfg.checkpoint and not cfg.random:
        _, state = engine.load_encoder(cfg.checkpoint, "videomcmae", videomcmae.Config)
        report = engine.load_weights(encoder, state, cfg.checkpoint)
    model = ClipClassifier(cfg, encoder, classes, Normalize())
    return model, f"encoder     {report or 'fresh weights'}"


def told(cfg: Config) -> dict:
    """What result.json says of a model."""
    facts = {"protocol": "finetune_clips", "source": cfg.checkpoint or cfg.encoder}
    views = "1x1" if cfg.data == "shapes" else cfg.views  # moving scenes have one
    facts |= {"random": cfg.random or not cfg.checkpoint, "data": cfg.data, "views": views}
    return facts | {"epochs": cfg.epochs, "steps": cfg.steps}


# ---------------------------------------------------------------------------------- presets, loop


def class_names(root: str) -> list[str]:
    """The classes of a data set; UserError where there are not two."""
    if root != "shapes" and not Path(root, "train").is_dir():
        raise UserError(f"there is no folder {root}/train{clips.LAYOUT}")
    names = list(motion.MOTIONS) if root == "shapes" else clips.class_names(root)
    if len(names) < 2:
        raise UserError(f"{root} has no two class folders with clips{clips.LAYOUT}")
    return names


def need_all(run: engine.Run, classes: list[str]) -> None:
    """Refuse classes without a training clip."""
    listed = getattr(run.train_set, "files", None)
    lacking = {} if listed is None else set(range(len(classes))) - set(listed.labels.tolist())
    if lacking:
        shown = ", ".join(classes[n] for n in sorted(lacking)[:5])
        raise UserError(f"{len(lacking)} classes have no clip in {run.cfg.data}/train: {shown}")


PRESETS = {
    "k400": dict(),
    "ssv2": dict(epochs=50, base_lr=5e-4, sampling="segments", views="2x3", flip=False),
    # Ours: moving ShapeScenes, minutes on two cores. What tells motions apart varies little in the
    # mean of tokens: a classifier that learns slowly, or below it layers that learn fast, leave
    # hundreds of steps at chance. One epoch is too short for what regularises.
    "tiny": dict(
        data="shapes", stride=1, epochs=1, warmup_epochs=0.05, batch_size=16, base_lr=0.16,
        min_lr=1e-6, layer_decay=0.4, head_std=0.02, drop_path=0.0, mixup=0.0, cutmix=0.0,
        smoothing=0.0, rand_augment=0.0, reprob=0.0, views="1x1", val_samples=128,
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = engine.parse(Config, PRESETS, __doc__, argv)
    classes = class_names(cfg.data)
    loading = {"source": clips, "frames": cfg.frames, "stride": cfg.stride}
    loading |= {"sampling": cfg.sampling, "crop": "resized", "flip": cfg.flip}

    def augmented(dataset: torch.utils.data.Dataset, train: bool) -> torch.utils.data.Dataset:
        dataset = in_classes(dataset)
        return Augmented(dataset, cfg) if train and (cfg.rand_augment or cfg.reprob) else dataset

    facts = {"encoder": cfg.described, "classes": classes}
    with engine.Run("finetune_clips", cfg, wrap=augmented, facts=facts, **loading) as run:
        need_all(run, classes)
        settle(run, run.checkpoint and run.checkpoint["facts"], "clips")
        classifier, words = build(cfg, classes, load=run.checkpoint is None)
        if run.checkpoint is None:
            run.say(words)
        model = run.place(classifier)
        heads = [classifier.fc_norm, classifier.head]
        groups = layer_decay_groups(classifier.encoder, heads, cfg.weight_decay, cfg.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)
        for step in run.steps(model, optimizer, evaluate):
            for batch in step.micro_batches():  # rgb (B, T, 3, H, W) uint8; label, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(cosine(cfg, step))
        if run.lacks("result.json") and run.val_set is not None:
            views = open_data(cfg, run.world, run.out, "val", views=cfg.test_views, **loading)
            few = max(1, cfg.micro_batch // math.prod(cfg.test_views))  # clips, of all their views
            test(classifier, views, run.out, run.world, told(cfg), what="clips", at_once=few)


if __name__ == "__main__":
    engine.command("finetune_clips", main)
