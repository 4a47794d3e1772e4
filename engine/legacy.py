"""The run as `train`, for what has no loop of its own yet; it goes when the last one has."""

import torch

import data
from engine import config, ranks
from engine.config import parse
from engine.folder import open_data as _open_data
from engine.ranks import command
from engine.checkpoint import writing
from engine.run import Run
from engine.validate import evenly
from engine.schedule import decay_groups, warmup_cosine


class Config(config.Config):
    def data_options(self) -> dict:
        return {"granularities": ("rgb",)}

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.epochs * steps_per_epoch

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        return learning_rate(self, step, steps_per_epoch)

    def optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.beta1, self.beta2), fused=True)

    def wrap(self, dataset, train: bool):
        return dataset


class World(ranks.World):
    def __init__(self, cfg):
        super().__init__(cfg.device, cfg.precision)


def learning_rate(cfg, step: int, per_epoch: int) -> float:
    peak = cfg.base_lr * cfg.batch_size / 256
    warmup, total = cfg.warmup_epochs * per_epoch, cfg.epochs * per_epoch
    return warmup_cosine(step, peak, warmup, total, cfg.min_lr)


parameter_groups = decay_groups


def split_batch(cfg, world):
    return world.split_batch(cfg.batch_size, cfg.micro_batch)


def workers(cfg, world) -> int:
    return world.workers(cfg.workers)


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def ramp(progress, device):
    return torch.full((), progress, device=device)


def raise_error(batch, world=None):
    if world is not None:
        return world.raise_error(batch)
    if "error" in batch:
        raise data.UserError(batch["error"])
    return batch


def open_data(cfg, world, out, split):
    dataset = _open_data(cfg, world, out, split, **cfg.data_options())
    return dataset if dataset is None else cfg.wrap(dataset, split == "train")


class LegacyRun(Run):
    def __init__(self, method, cfg, **options):
        iterations = getattr(cfg, "iterations", None)
        super().__init__(method, cfg, iterations, wrap=cfg.wrap, **options)
        self.total = cfg.total_steps(self.per_epoch)
        self.sampler.stop_step = self.stop = min(cfg.steps or self.total, self.total)

    def picture(self, preview) -> None:
        path = self.out / f"preview-{self.number:07d}.png"
        length = len(self.val_set)
        batch = data.collate([self.val_set[0, i] for i in evenly(length, min(4, length))])
        with writing(path), self.autocast():
            preview(self.model, self.world.to_device(raise_error(batch)), path, self.number)
        self.say(f"preview     {path}")


def train(method, cfg, world, build, evaluate=None, preview=None, finish=None) -> int:
    try:
        with LegacyRun(method, cfg, **cfg.data_options()) as run:
            model = build(cfg)
            raw = model
            model = run.place(model)
            groups = getattr(raw, "parameter_groups", lambda decay: decay_groups(raw, decay))
            optimizer = cfg.optimizer(groups(cfg.weight_decay))
            for step in run.steps(model, optimizer, evaluate, preview):
                for batch in step.micro_batches():
                    with run.autocast():
                        loss, logs = model(batch, step.progress)
                    step.backward(loss, logs)
                if hasattr(raw, "before_step"):
                    raw.before_step()
                step.update(cfg.learning_rate(step.number, step.per_epoch))
            if finish and run.lacks("result.json"):
                finish(run.model, run.out)
        return 0
    except SystemExit as e:
        return e.code


def main(method, cls, presets, doc, build, **functions):
    def run() -> int:
        cfg = parse(cls, presets, doc, None)
        return train(method, cfg, World(cfg), build, **functions)

    command(method, run)
