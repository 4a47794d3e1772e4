"""Semantic segmentation with a pre-trained encoder: UperNet end to end, or a linear probe.

    python -m downstream.segment --data ROOT --checkpoint runs/.../last.pt [--protocol linear] ...
    python -m downstream.segment --data shapes --model tiny --checkpoint runs/.../last.pt
    python -m downstream.segment evaluate RUN [--data ROOT]      a finished run, on any val split
    python -m downstream.segment prepare-ade SRC DST             from the data sets' own layout ...
    python -m downstream.segment prepare-voc SRC DST             ... to ours, by links

Map: segment_recipes.py          the papers' settings, by protocol and method
     upernet.py                  the networks and the loss
     pixels.py                   crops, sliding windows and scores
     `main`                      training, then `report`: mIoU of a whole split

Data: ROOT/{train,val}/{rgb,semantic}/ as data.py has it; labels are read at full resolution and 255
is ignored. ROOT/classes.txt, one name a line, names the rows of the per-class table.

A run leaves, beside every run's files, result.json, classes.csv and a picture of predictions.
UperNet's BatchNorm depends on how many samples it sees at a time (--micro-batch, on CUDA times the
ranks): two runs that differ in it differ by more than rounding.
"""

import csv
import json
import sys
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import pictures
from data import UNLABELLED
from downstream import encoders, transfer
from downstream.pixels import Augment, count, scores
from downstream.prepare import prepare_ade, prepare_voc
from downstream.segment_recipes import PRESETS, Config
from downstream.upernet import Segmenter, resize
from engine import UserError, parse
from engine.folder import open_data
from engine.ranks import World
from shapes import ShapeScenes


def build(cfg: Config) -> Segmenter:
    """The model of a run, with fresh weights."""
    encoder = encoders.build(cfg.described, cfg.crop, cfg.drop_path, cfg.train_position)
    sizes = {"dim": cfg.dim, "aux_dim": cfg.aux_dim, "dropout": cfg.dropout}
    loss_size = cfg.loss_size if cfg.protocol == "linear" else 0  # UperNet's: all pixels
    common = cfg.layer, cfg.aux_weight, loss_size, *cfg.statistics, cfg.windows
    return Segmenter(encoder, cfg.classes, *common, **sizes)


def make_optimizer(cfg: Config, model: Segmenter) -> torch.optim.Optimizer:
    """SGD on the probe's layer, biases decay too (SemanticMIM Table 6 and its public code); AdamW
    with rates by layer otherwise.
    """
    if cfg.protocol == "linear":
        groups = [{"params": list(model.head.parameters()), "weight_decay": cfg.weight_decay}]
        return torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum)
    groups = engine.layer_decay_groups(
        model.encoder, [model.head], cfg.weight_decay, cfg.layer_decay
    )
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)


def learning_rate(cfg: Config, step: int, total: int) -> float:
    """Rate of a step (from 0) of `total`. UperNet: warm-up, times a line to 0 ("linear decay",
    polynomial of power 1); linear: a tenth after each 10 of 25 epochs (SemanticMIM's public code).
    """
    if cfg.protocol == "linear":
        return cfg.lr * 0.1 ** (5 * step // (2 * total))
    warmup = min(cfg.warmup_steps, total // 10)
    return cfg.lr * min(1.0, (step + 1) / max(warmup, 1)) * (1 - step / total)


def norm_batch(run: engine.Run) -> int:
    """How many samples BatchNorm sees at a time; UserError where one alone, or a resumed run saw
    others.
    """
    samples = run.micro * (run.world.size if run.device.type == "cuda" else 1)
    if samples == 1:
        raise UserError(
            "UperNet's BatchNorm needs two samples at a time: raise --batch-size or --micro-batch, "
            "or take fewer ranks"
        )
    before = run.checkpoint or {"config": {}}
    kept = {**before["config"], **(before.get("facts") or {})}.get("norm_batch")
    if kept not in (None, samples):
        raise UserError(
            f"UperNet's BatchNorm saw {kept} samples at a time in {run.out} and would see "
            f"{samples}: resume with its --micro-batch and ranks"
        )
    return samples


# -------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: Segmenter, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss on crops of held-out images, and the share of labelled pixels that are right."""
    labels, (x,) = model.labels(batch), model.predict(batch["rgb"])
    loss, labelled = model.loss(x, labels), labels != UNLABELLED
    right = (resize(x, labels.shape[1:]).argmax(1) == labels) & labelled
    share = right.flatten(1).sum(1) / labelled.flatten(1).sum(1).clamp(min=1)
    return {"loss": loss, "loss_main": loss, "pixel_accuracy": share.mean()}


@torch.no_grad()
def reconstruct(model: Segmenter, batch: dict[str, Tensor]) -> dict[str, tuple]:
    """Images, and the prediction laid over them; labels, and the prediction, also where there is no
    label, as pictures.py draws them.
    """
    pred = model.logits(batch["rgb"]).argmax(1)
    over = (batch["rgb"] // 2 + pictures.colorize(pred) // 2).to(torch.uint8)
    return {"image": (batch["rgb"], None, over), "labels": (batch["semantic"], None, pred)}


def report(model: Segmenter, dataset: data.Dataset, cfg: Config, world: World, out: Path) -> None:
    """Test a model on the whole val split; write result.json and classes.csv."""
    names = class_names(cfg)
    if world.size > 1:  # the running means of BatchNorm are those of rank 0's checkpoint
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    matrix, images = count(model, dataset, cfg, world)
    if not matrix.sum():
        raise UserError(f"{cfg.data} val has no labelled pixel in {images} images that can be read")
    if world.rank:
        return
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
    print(
        f"result      mIoU {means['mIoU']:.4f}, pixel accuracy {means['pixel_accuracy']:.4f}, "
        f"mean accuracy {means['mean_accuracy']:.4f} on {images} images: {out}/result.json"
    )


# -------------------------------------------------------------------------------------------- runs


def samples(cfg: Config) -> dict:
    """What the loader brings, of either split, see data.py: crops with a label at every pixel."""
    return dict(
        image_size=cfg.crop,
        granularities=("rgb", "semantic"),
        semantic_classes=cfg.classes,
        label_stride=1,
    )


def open_run(path: Path, **given) -> tuple[Segmenter, Config]:
    """The model of a run without its pre-training checkpoint, and its settings, some as `given`.

    Args: `path`: of a checkpoint in the run's folder.
    """
    checkpoint = engine.load(path, "segment")
    fields = {k: v for k, v in checkpoint["config"].items() if k not in Config.GONE}
    given |= {"resume": True, "output": str(path.parent)}
    older = {"train_position": False}  # what runs from before a field had
    cfg = engine.load_config(path, Config, older | fields | given)
    cfg.resolve()
    model = build(cfg)
    engine.load_weights(model, checkpoint["model"], path)
    return model, cfg


def class_names(cfg: Config) -> list[str]:
    """Names of the classes, as far as there are any: ShapeScenes', the lines of classes.txt."""
    if cfg.data == "shapes":
        return list(ShapeScenes.SEMANTIC_NAMES)
    path = Path(cfg.data, "classes.txt")
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def evaluate_run(argv: list[str]) -> None:
    """Evaluate a finished run without its pre-training checkpoint."""
    parser = engine.Parser(prog="downstream.segment evaluate", description=evaluate_run.__doc__)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--data", help="default: that of the run")
    parser.add_argument("--output", help="default: RUN/evaluation")
    parser.add_argument("--evaluation", choices=["slide", "whole", "crop"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("run", "output")}
    model, cfg = open_run(Path(args.run, "last.pt"), **given)
    world, out = World(cfg.device, cfg.precision), Path(args.output or Path(args.run, "evaluation"))
    out.mkdir(parents=True, exist_ok=True)
    model.to(world.device)
    dataset = open_data(cfg, world, out, "val", **samples(cfg))
    if dataset is None:
        raise UserError(f"{cfg.data} has no val split")
    report(model, dataset, cfg, world, out)


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"evaluate": evaluate_run, "prepare-ade": prepare_ade, "prepare-voc": prepare_voc}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    cfg = parse(Config, PRESETS, __doc__, argv)
    with engine.Run(
        "segment",
        cfg,
        iterations=cfg.iterations,
        train=dict(transform=Augment(cfg, True)),
        val=dict(transform=Augment(cfg, False)),
        facts={"description": cfg.described},
        **samples(cfg),
    ) as run:
        if cfg.protocol == "upernet":
            run.facts["norm_batch"] = norm_batch(run)
        segmenter = build(cfg)
        if not run.checkpoint:
            run.say(transfer.start(segmenter.encoder, cfg))
        (mean, std), whose = cfg.statistics, cfg.described.get("input", "ImageNet's")
        run.say(f"pixels      mean {mean}, deviation {std}: {whose}")
        if run.world.size > 1 and run.device.type == "cuda":  # on CPUs each rank has its own
            segmenter = nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)
        model = run.place(segmenter)
        optimizer = make_optimizer(cfg, segmenter)
        for step in run.steps(model, optimizer, evaluate, reconstruct):
            for batch in step.micro_batches():  # rgb (B, 3, H, W), semantic (B, H, W) uint8
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(learning_rate(cfg, step.number, run.total))
        if run.val_set is None:
            run.say(f"{cfg.data} has no val split: nothing is evaluated")
        elif run.lacks("result.json"):
            report(segmenter, run.val_set, cfg, run.world, run.out)


if __name__ == "__main__":
    engine.command("segment", main)
