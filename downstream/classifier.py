"""A classifier on an encoder: what fine-tuning on images and on clips have in common.

Map: `Classifier`     encoder, mean of tokens, norm, linear layer, loss
     `evaluate`       loss and hits of a batch, while training
     `settle`         refuse what a resumed run's config does not tell
     `test`           top-1 and top-5 over all of a split; result.json, per_class.csv
"""

from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Normalize
from downstream.augment import draw_mix, mix, soft_targets
from downstream.scores import count_hits, shares, tally, write_result
from engine import UserError
from engine.ranks import World


class Classifier(nn.Module):
    """Encoder, mean over tokens, fresh norm, linear layer; `model(batch, progress)` gives a loss.

    As MAE, the norm comes after the mean: tokens are taken from the last layer before the encoder's
    own final norm, which therefore has no part in it. It stays in the checkpoint, frozen, so that
    every trainable parameter has a gradient (DDP asks for that) and the file still holds the whole
    encoder. With maps the mean is over the tokens of all granularities.

    Args:
        cfg: mixup, cutmix, switch_prob, smoothing, head_std.
        normalize: of "rgb"; names: granularities that the encoder sees.
        pool: "patch" tokens, or "prefix", class and proxy tokens.
    """

    def __init__(
        self, cfg: object, encoder: nn.Module, classes: list[str], normalize: Normalize,
        names: tuple[str, ...] = ("rgb",), pool: str = "patch",
    ):  # fmt: skip
        super().__init__()
        self.cfg, self.encoder, self.classes, self.normalize = cfg, encoder, classes, normalize
        self.names, self.pool, self.layer = names, pool, encoder.num_layers
        dim = encoder.norm.normalized_shape[0]
        encoder.norm.requires_grad_(False)
        self.fc_norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=cfg.head_std)
        nn.init.zeros_(self.head.bias)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {m: self.normalize(batch[m]) if m == "rgb" else batch[m] for m in self.names}

    def classify(self, inputs: dict[str, Tensor], seed: Tensor | None = None) -> Tensor:
        """Logits (B, classes); `seed` (B,) turns drop path on."""
        imgs = inputs if len(inputs) > 1 else inputs["rgb"]
        ((tokens, prefix),) = self.encoder.forward_features(imgs, [self.layer], seed)
        return self.head(self.fc_norm((tokens if self.pool == "patch" else prefix).mean(1)))

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


@torch.no_grad()
def evaluate(model: Classifier, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy and the shares of top-1 and top-5 hits in a batch."""
    logits = model.classify(model.inputs(batch)).float()
    _, top1, top5 = tally(logits, batch["label"]).sum(0) / len(logits)
    return {"loss": F.cross_entropy(logits, batch["label"]), "top1": top1, "top5": top5}


def settle(run: engine.Run, kept: dict | None, what: str = "samples") -> None:
    """Note how many samples are mixed; UserError where the resumed run had others, or classes.

    Args: `kept`: facts of the run that is continued, None: it is a new one.
    """
    cfg, facts = run.cfg, run.facts
    if cfg.mixup or cfg.cutmix:
        facts["mix_batch"] = run.micro
    if kept is None:
        return
    if kept["classes"] != facts["classes"]:
        raise UserError(f"{cfg.data} has other classes than when {run.out} was begun")
    mixed = kept.get("mix_batch")
    if "mix_batch" in facts and mixed not in (None, run.micro):
        raise UserError(
            f"{run.out}: mixup and cutmix mixed {mixed} {what} with one another, now it would be "
            f"{run.micro}; continue with --micro-batch {mixed}, on a number of ranks that divides "
            f"{cfg.batch_size // mixed}"
        )


def test(
    model: Classifier, dataset: torch.utils.data.Dataset, out: Path, world: World, facts: dict,
    numbers: Tensor | None = None, what: str = "images", at_once: int | None = None,
) -> None:  # fmt: skip
    """Test a model on all of a split and write result.json and per_class.csv.

    Args: `facts`: of result.json; `numbers`: as `count_hits`'; `what`: a sample is called;
        `at_once`: samples; None: `micro_batch`.
    """
    model.eval()
    counts, unreadable = count_hits(model, dataset, model.cfg, world, numbers, at_once=at_once)
    if world.rank == 0:
        write_result(out, model.classes, counts, facts | {"unreadable": unreadable})
        x = shares(counts)
        print(
            f"val         {x['images']} {what}, top-1 {x['top1']:.2f}, top-5 {x['top5']:.2f}; "
            f"{out / 'result.json'}",
            flush=True,
        )
