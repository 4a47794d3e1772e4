"""Fine-tuning: an encoder and a linear layer trained on classes; a trained one tested again.

    python -m downstream.finetune --data shapes --model tiny --checkpoint runs/.../last.pt
    torchrun --nproc_per_node=8 -m downstream.finetune --data data/imagenet --checkpoint ...
    python -m downstream.finetune evaluate --finetuned runs/.../last.pt --data ROOT
    python -m downstream.finetune evaluate --init mae_finetuned_vit_base.pth --data ROOT

Instead of --checkpoint: the same with --random, fresh weights; --init FILE, a public encoder;
--method cfmae --encoder base, a fresh one. `--model tiny` takes minutes on a CPU; recipes.TINY says
what is small about it; of a few thousand images its ten epochs are few steps, so a run says how
many more it wants. `evaluate` tests ours on any data with its classes, a public one on data
that has all of them: classes are the class folders, sorted.

mixup and cutmix mix a micro-batch with itself. So with them, other than in pre-training, the number
of samples that a device takes at a time is part of the result, and --resume refuses another.

Map: `recipes.py`                   the papers' settings by method
     `classifier.py`                encoder, mean of tokens, norm, linear layer, loss; its test
     `main`                         the loop

Data: ROOT/{train,val}/<class>/NAME.jpg (or rgb/<class>/, see data.py). A run leaves result.json and
per_class.csv beside engine.Run's files. augment.py has the augmentation, evaluate.py the second
test, probe.py the protocols with a frozen encoder, robustness.py ImageNet-A, -R, -Sketch and -C.
"""

import math
import sys
import typing
from dataclasses import dataclass

import engine  # before torch: it sets how threads wait
import engine.config

import torch
from torch import nn

import data
from cfmae import NAMES
from common import Normalize
from downstream import encoders, recipes, transfer
from downstream.augment import Augmented
from downstream.classifier import Classifier, evaluate, settle, test
from engine import UserError, arg, cosine, layer_decay_groups, require
from engine.field import data_arg, optim_arg


@dataclass
class Config(transfer.Config):
    """Settings of a run. None: what the encoder's method or its checkpoint sets."""

    recipe: str = optim_arg(
        "public", "for SemanticMIM: the public code's, or Table 3", ["public", "table3"]
    )
    granularities: str | None = data_arg(
        None,
        "CFMAE: what the encoder sees; default R. R+I+S is the dagger row of Table 1",
        ["R", "R+S", "R+I", "R+I+S"],
    )
    pool: str = arg(
        "patch",
        "mean of the patch tokens (CFMAE E.2, CoMA, MAE), or of class and proxy tokens "
        "(SemanticMIM Table 1, CLS)",
        choices=["patch", "prefix"],
    )
    epochs: int | None = arg(None, "100: CFMAE Table 8, SemanticMIM Table 3, MCMAE Sec. 3.1")
    warmup_epochs: float | None = arg(None, "5: CFMAE E.2, MAE; 20: SemanticMIM's public code")
    batch_size: int | None = arg(
        None,
        "2048: CFMAE Table 8, SemanticMIM's public code on "
        "MaskFeat; 1024: on BEiT, its Table 3, MAE",
    )
    base_lr: float | None = arg(
        None,
        "CFMAE Table 8: 1e-3 (400 epochs), 5e-4 (1600); 1e-3: SemanticMIM; 5e-4: MAE's public code",
    )
    min_lr: float | None = arg(None, "1e-6: MAE's and SemanticMIM's public code; 0: its Table 3")
    weight_decay: float | None = arg(None, "0.05: CFMAE Table 8, MAE, SemanticMIM's public code")
    beta2: float = arg(0.999, "CFMAE Table 8, SemanticMIM Table 3")
    layer_decay: float | None = optim_arg(
        None,
        "rate of a layer / of the next. CFMAE Table 8: 0.7 (400 epochs), 0.65 (1600); 0.65: "
        "public code of MAE, MCMAE, SemanticMIM; 0.75: of MAE for 24 blocks and more",
        within="[0, 1]",
    )
    train_position: bool | None = arg(
        None, "train fixed positions, too: public code of MAE, MCMAE; learned ones always are"
    )
    drop_path: float | None = optim_arg(
        None, "0.1: CFMAE Table 8, SemanticMIM Table 3, MAE", within="[0, 0.99]"
    )
    mixup: float | None = data_arg(
        None, "Beta parameter, 0 = off. 0.8: CFMAE Table 8, MAE; 0 with maps", within="[0, 1]"
    )
    cutmix: float | None = data_arg(
        None, "Beta parameter, 0 = off. 1.0: CFMAE Table 8, MAE", within="[0, 1]"
    )
    switch_prob: float = data_arg(0.5, "share of cutmix where both are on; timm's", within="[0, 1]")
    smoothing: float = data_arg(0.1, "label smoothing. CFMAE Table 8, MAE", within="[0, 0.99]")
    rand_augment: float = data_arg(
        9.0, "magnitude of 10, 0 = off. (9, 0.5): CFMAE Table 8, MAE", within="[0, 10]"
    )
    rand_augment_std: float = data_arg(0.5, "of that magnitude", within="[0, inf)")
    reprob: float | None = data_arg(
        None,
        "random erasing. 0.25: public code of MAE, MCMAE, SemanticMIM; 0: CFMAE Table 8 does "
        "not name it",
        within="[0, 1]",
    )
    color_jitter: float | None = data_arg(
        None, "0.4: SemanticMIM's public code on MaskFeat", within="[0, 1]"
    )
    head_std: float | None = arg(
        None,
        "first weights of the classifier. 2e-5: MAE, SemanticMIM on MaskFeat; 0.02: on BEiT",
        within="[0, inf)",
    )
    val_samples: int = arg(2048, "evenly spaced images of val that are looked at while training")

    SET = (*transfer.Config.SET, "preview_epochs")
    FURTHER: typing.ClassVar = tuple(
        "crop_scale_min min_lr beta1 beta2 clip_grad switch_prob rand_augment_std color_jitter "
        "head_std log log_every save_minutes save_epochs deterministic".split()
    )
    # Those after FREE's own: what runs from before had in their config.
    FREE = engine.config.Config.FREE + tuple(
        "protocol finetuned description classes mix_batch layers features probe rates views cache "
        "cache_dtype k temperature".split()
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The granularities, in the order of data.GRANULARITIES."""
        return tuple(NAMES[letter] for letter in (self.granularities or "R").split("+"))

    def resolve(self) -> None:
        """Read the encoder's description, fill in the recipe, refuse what cannot work."""
        self.described = transfer.describe(self, self.granularities, image_size=self.image_size)
        method, maps = self.described["method"], len(self.names) > 1
        recipe = recipes.finetuning(self.described, self.recipe == "table3", maps)
        transfer.fill(self, recipe | transfer.inputs(self))
        super().resolve()
        fits = method == "cfmae" or not self.granularities
        require(
            (fits, "granularities", f"is CFMAE's; this encoder is {method}"),
            (not (maps and self.mixup), "mixup", "is undefined on label maps; cutmix alone: 0"),
        )


# ------------------------------------------------------------------------------- model, its test


def classifier_on(encoder: nn.Module, cfg: Config, classes: list[str]) -> Classifier:
    """The classifier of a run, with its encoder's pixels and granularities."""
    return Classifier(cfg, encoder, classes, Normalize(*cfg.statistics), cfg.names, cfg.pool)


def build(cfg: Config, classes: list[str], load: bool = True) -> tuple[Classifier, str]:
    """The model of a run, and a report of its encoder's weights; `load`: whether from the file."""
    encoder = encoders.build(cfg.described, cfg.image_size, cfg.drop_path, cfg.train_position)
    if cfg.pool == "prefix" and not getattr(encoder, "num_prefix", 0):
        raise UserError("--pool prefix: this encoder has no class or proxy tokens; --pool patch")
    report = transfer.start(encoder, cfg) if load else ""
    return classifier_on(encoder, cfg, classes), report


def told(cfg: Config, finetuned: str | None = None, trained: bool = True) -> dict:
    """What result.json says of a model; a public one's epochs are not known."""
    facts = {"protocol": "finetune", "source": cfg.checkpoint or cfg.init or cfg.method}
    facts |= {"random": cfg.random or bool(cfg.method), "finetuned": finetuned, "data": cfg.data}
    return facts | ({"epochs": cfg.epochs, "steps": cfg.steps} if trained else {})


# ------------------------------------------------------------------------------------------- loop


def loading(cfg: Config) -> dict:
    """What the loader must bring, see data.open_dataset."""
    options = {"granularities": cfg.names}
    if "semantic" in cfg.names:
        options["semantic_classes"] = cfg.described["config"]["semantic_classes"]
    return options


def kept_facts(run: engine.Run) -> dict | None:
    """Facts of the run that this one continues; those from before had some in their config."""
    if run.checkpoint is None:
        return None
    return {"mix_batch": run.checkpoint["config"].get("mix_batch")} | encoders.kept_facts(run.cfg)


def few_steps(run: engine.Run) -> str:
    """What to say of a schedule that is too short for a head that starts at nothing, or "".

    500 images of 10 classes, --model tiny: top-1 is 31.8 % after 70 steps of 64, its linear probe's
    32.2, and 38.8 after 930 steps of 16. 1000 of 40: 15.3 after 150, 18.5, and 19.1 after 1054.
    """
    cfg, images = run.cfg, len(run.train_set)
    if run.total >= 1000 or cfg.steps or run.checkpoint:
        return ""
    batch = min(cfg.batch_size, 16)
    epochs = max(cfg.epochs, math.ceil(1000 / (images // batch)))
    return (
        f"warning     {run.total} steps teach little, a linear probe may do better: try "
        f"--batch-size {batch} --epochs {epochs}, {epochs * (images // batch)} steps"
    )


PRESETS = {
    "paper": dict(),  # by method: recipes.RECIPES
    "tiny": recipes.TINY["finetune"],
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["evaluate"]:
        from downstream import evaluate as again  # which needs this module

        return again.main(argv[1:])
    cfg = engine.parse(Config, PRESETS, __doc__, argv)
    facts = {"description": cfg.described, "classes": transfer.class_names(cfg.data)}

    def augmented(dataset: data.Dataset, train: bool) -> data.Dataset:
        dataset = transfer.in_classes(dataset)
        return Augmented(dataset, cfg, *cfg.statistics) if train else dataset

    with engine.Run(
        "classify", cfg, wrap=augmented, facts=facts, val={"crop_pct": cfg.crop_pct}, **loading(cfg)
    ) as run:
        settle(run, kept_facts(run))
        classifier, words = build(cfg, facts["classes"], load=run.checkpoint is None)
        if run.checkpoint is None:
            run.say(words)
        whose = cfg.described.get("input", "ImageNet's")
        if words := few_steps(run):
            run.say(words)
        run.say(f"pixels      mean {cfg.mean}, deviation {cfg.std}: {whose}")
        model = run.place(classifier)
        heads = [classifier.fc_norm, classifier.head]
        groups = layer_decay_groups(classifier.encoder, heads, cfg.weight_decay, cfg.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)
        for step in run.steps(model, optimizer, evaluate):
            for batch in step.micro_batches():  # rgb (B, 3, H, W) uint8; label, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(cosine(cfg, step))
        if run.lacks("result.json") and run.val_set is not None:
            test(classifier, run.val_set, run.out, run.world, told(cfg))


if __name__ == "__main__":
    engine.command("finetune", main)
