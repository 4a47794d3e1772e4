"""What every run is told: each field has a default, a source, choices or a range."""

import dataclasses
import math
import typing
from dataclasses import dataclass

from data import UserError
from engine.field import arg, data_arg, divides, flag, inherited, inside, optim_arg, refusal
from engine.field import require, run_arg


@dataclass
class Config:
    """What every run needs. A method's own Config restates each value that its paper sets."""

    data: str = data_arg("data/imagenet", "folder of images and maps, or shapes, the embedded data")
    output: str | None = run_arg(None, "folder of the run; default: a new one under runs/")
    model: str = arg("base", "preset")
    epochs: int = optim_arg(400, "length of the schedule", within="(0, inf)")
    steps: int | None = run_arg(
        None, "stop after this many steps; the schedule keeps its length", within="(0, inf)"
    )
    warmup_epochs: float = optim_arg(40, "linear warm-up", within="[0, inf)")
    batch_size: int = optim_arg(
        2048, "global batch, over all ranks and micro-batches", within="(0, inf)"
    )
    micro_batch: int = run_arg(
        128, "most samples that one device takes at a time; set by the preset", within="(0, inf)"
    )
    base_lr: float = optim_arg(1.5e-4, "lr = base_lr * batch_size / 256", within="(0, inf)")
    min_lr: float = optim_arg(0.0, "where the cosine ends", within="[0, inf)")
    weight_decay: float = optim_arg(
        0.05, "not on biases, norms, tokens, embeddings", within="[0, inf)"
    )
    beta1: float = optim_arg(0.9, "AdamW", within="[0, 1)")
    beta2: float = optim_arg(0.95, "AdamW", within="[0, 1)")
    clip_grad: float | None = optim_arg(None, "largest gradient norm", within="(0, inf)")
    image_size: int = data_arg(224, "pixels")
    patch_size: int = arg(16, "pixels")
    crop_scale_min: float = data_arg(
        0.2, "smallest area of the random resized crop", within="(0, 1]"
    )
    seed: int = run_arg(0, "of weights, order, crops, masks", within="[0, 9223372036854775807]")
    workers: int | None = run_arg(
        None, "loader processes a rank; default: its cores, at most 16", within="[0, inf)"
    )
    device: str = run_arg("auto", "auto, cpu or cuda", ["auto", "cpu", "cuda"])
    precision: str = run_arg("auto", "auto: bf16 where units for it are", ["auto", "fp32", "bf16"])
    compile: bool = run_arg(False, "torch.compile the model")
    deterministic: bool = run_arg(False, "deterministic CUDA kernels")
    resume: bool = run_arg(False, "continue the run in --output")
    log_every: int = run_arg(20, "steps between lines of log.jsonl", within="(0, inf)")
    save_minutes: float = run_arg(20.0, "minutes between saves of last.pt", within="[0, inf)")
    save_epochs: int = run_arg(
        0, "epochs between snapshots that are kept; 0 = none", within="[0, inf)"
    )
    val_epochs: int = run_arg(
        0, "epochs between evaluations; 0 = at start, end and previews", within="[0, inf)"
    )
    val_samples: int = run_arg(
        512, "most samples of the val split that an evaluation reads", within="(0, inf)"
    )
    preview_epochs: int = run_arg(
        0, "epochs between preview pictures; 0 = at the end alone", within="[0, inf)"
    )

    log: str = run_arg("jsonl", "tensorboard: its files, too", ["jsonl", "tensorboard"])

    # What may differ when a run is resumed; everything else is part of its result.
    FREE: typing.ClassVar = tuple(
        "output steps micro_batch workers device compile resume log log_every save_minutes "
        "save_epochs val_epochs val_samples preview_epochs".split()
    )
    USUAL: typing.ClassVar = tuple(  # what --help shows first
        "data model output epochs steps batch_size micro_batch device compile resume".split()
    )
    SAMPLES: typing.ClassVar = "images"  # what a run's words call them
    SET: typing.ClassVar = ()  # what the program sets, or has no use for: no flags
    FURTHER: typing.ClassVar = tuple(  # flags that --help names in one line
        "workers deterministic log log_every save_minutes save_epochs val_epochs val_samples "
        "preview_epochs".split()
    )

    def resolve(self) -> None:
        """Fill in defaults that depend on other fields; UserError on values that cannot work."""
        divides(self, "image_size", "patch_size")
        for f in dataclasses.fields(self):
            value, within = getattr(self, f.name), inherited(type(self), f.name, "within")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag(f.name)} {value} is not a finite number")
            if value is not None and not inside(value, within):
                raise UserError(f"{flag(f.name)} {value} {refusal(within)}")
        require((not self.resume or self.output, "resume", "needs --output, the run to continue"))
        warm = 0 if "warmup_epochs" in self.SET else self.warmup_epochs or 0
        words = f"{warm:g} leaves nothing of --epochs {self.epochs}; a tenth of these is usual"
        require((not self.epochs or warm < self.epochs, "warmup_epochs", words))
