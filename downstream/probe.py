"""Probes of a frozen encoder: a linear layer, or nearest neighbours, on its features.

    train_heads    many rates at a time; the heads, LARS and nearest neighbours are heads.py's
    main           features.py passes once through the data; then every feature is scored

The protocol is MAE's: BatchNorm, LARS, rate 0.1 x batch / 256, batch 16384 (MCMAE's: 4096), 90
epochs, 10 of warm-up, no decay. SemanticMIM's is its Table 5, AdamW, 4e-3 at batch 1024, decay
1e-4, 100 epochs, with the frozen LayerNorm of its public code in the place of BatchNorm, at layer 7
(Sec. 4.2; the public configuration takes the last). One thing differs: those crop each image anew
in every epoch, here the features are those of the centre crop, or of `--views` augmented passes
that take turns.

  CPU:  python -m downstream.probe --protocol knn --data shapes --model tiny --checkpoint ...
  GPU:  torchrun --nproc_per_node=8 -m downstream.probe --protocol linear --layers all
        --data data/imagenet --checkpoint ... --cache features
        (8 ranks share the pass over the data, the first one trains the heads)

The encoder is found as in finetune.py: --checkpoint, --init, --method, --random.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait
import engine.config

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream import encoders, recipes, transfer
from downstream.features import cached, choose_layers, columns, pooled_norm, read
from downstream.heads import LARS, Heads, knn, score_heads
from downstream.scores import shares, tally, write_result
from downstream.source import open_source
from engine import UserError, arg
from engine.field import data_arg, optim_arg, run_arg
from engine.ranks import World, part
from engine.schedule import warmup_cosine


@dataclass
class Config(transfer.Config):
    """Settings of a probe. None: what the encoder's method, its checkpoint or protocol sets."""

    protocol: str = arg("linear", "linear layer or nearest neighbours", ["linear", "knn"])
    epochs: int | None = arg(None, "MAE's 90, SemanticMIM's 100")
    warmup_epochs: float | None = arg(None, "10: MAE; 0: SemanticMIM")
    batch_size: int | None = arg(None, "MAE's 16384, MCMAE's public code 4096, SemanticMIM's 1024")
    weight_decay: float | None = arg(None, "0: MAE; 1e-4: SemanticMIM Table 5")
    head_std: float | None = arg(
        None, "first weights. MAE's 0.01, SemanticMIM's public code 0.02", within="[0, inf)"
    )
    layers: str | None = arg(
        None,
        "frozen layers: 1,2,...; norm, the last after its norm "
        "(default); all. SemanticMIM Sec. 4.2: 7 of 12",
    )
    features: str | None = arg(None, "patch, prefix, both, with commas; default: all it has")
    probe: str | None = optim_arg(
        None,
        "adamw, on a LayerNorm: SemanticMIM Table 5, its public code; lars, on a BatchNorm: MAE",
        ["lars", "adamw"],
    )
    rates: str | None = optim_arg(
        None,
        "base rates to try: lr = rate * batch / 256; the first is MAE's 0.1 or SemanticMIM's 1e-3",
    )
    views: int = data_arg(
        0, "augmented passes over train that take turns; 0 = the centre crop alone",
        within="[0, inf)",
    )  # fmt: skip
    cache: str | None = run_arg(None, "folder of the features, for use again; default: in --output")
    cache_dtype: str = run_arg("float16", "of the features on disk", ["float16", "float32"])
    k: int = arg(20, "nearest neighbours", within="(0, inf)")
    temperature: float = arg(0.07, "of their votes", within="(0, inf)")

    SET = transfer.Config.SET + tuple(  # all but the first have no use here
        "base_lr min_lr beta1 beta2 clip_grad compile deterministic resume log log_every "
        "save_minutes save_epochs val_epochs val_samples preview_epochs".split()
    )

    def resolve(self) -> None:
        """Read the encoder's description, fill in the recipe, refuse what cannot work."""
        self.described = transfer.describe(self, image_size=self.image_size)
        semantic = self.described["method"] == "semanticmim"
        self.probe = self.probe or ("adamw" if semantic else "lars")
        linear = self.protocol == "linear"
        recipe = recipes.probing(self.described, self.probe) if linear else {}
        transfer.fill(self, recipe | transfer.inputs(self))
        super().resolve()
        if linear:
            choose_rates(self.rates)


def choose_rates(text: str) -> list[float]:
    """Base learning rates of `--rates`; UserError on what is no positive number."""
    try:
        rates = [float(x) for x in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < x < math.inf for x in rates):
        raise UserError(f"--rates {text}: numbers above 0 with commas between, e.g. 0.1,0.3")
    return rates


def train_heads(
    rows: np.ndarray | list[np.ndarray],
    labels: np.ndarray,
    classes: int,
    rates: list[float],
    cfg: Config,
    device: torch.device,
) -> Heads:
    """Train one head a learning rate, all on the same batches.

    Args:
        rows: (N, D), or several views of it that take turns by epoch.
        labels: (N,) int64; -1 is left out.
        rates: lr = rate * batch / 256, the batch bounded by the data.
        cfg: epochs, warmup_epochs, batch_size, weight_decay, probe ("lars" or "adamw"), head_std,
            seed.
    """
    views, usable = rows if isinstance(rows, list) else [rows], np.flatnonzero(labels >= 0)
    batch = min(cfg.batch_size, len(usable))
    if batch < 2:
        raise UserError(f"{len(usable)} usable training images; BatchNorm needs two")
    per_epoch = len(usable) // batch
    torch.manual_seed(cfg.seed)
    heads = Heads(len(rates), views[0].shape[1], classes, cfg.probe, cfg.head_std)
    heads = heads.to(device).train()
    groups = [{"params": [w, b]} for w, b in zip(heads.weights, heads.biases)]
    kind = LARS if cfg.probe == "lars" else torch.optim.AdamW
    optimizer = kind(groups, lr=0.0, weight_decay=cfg.weight_decay)
    generator = torch.Generator().manual_seed(cfg.seed)
    total, warmup = cfg.epochs * per_epoch, cfg.warmup_epochs * per_epoch
    for step in range(min(cfg.steps or total, total)):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            order = usable[torch.randperm(len(usable), generator=generator).numpy()]
        picks = np.sort(order[at * batch : (at + 1) * batch])  # sorted: kind to a file on disk
        x = torch.from_numpy(views[epoch % len(views)][picks]).to(device)
        y = torch.from_numpy(labels[picks]).to(device)
        logits = heads(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(rates))) * len(rates)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # of the sum: each head gets the gradient of its own mean
        now = warmup_cosine(step, batch / 256, warmup, total)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * now
        optimizer.step()
    return heads.eval()


# ------------------------------------------------------------------------------------------- main

PRESETS = {
    "paper": dict(),  # by method: recipes.PROBES
    "tiny": recipes.TINY["linear"],
}


def open_frozen(cfg: Config, device: torch.device) -> tuple[nn.Module, nn.Module | None, str]:
    """The encoder without gradients, the norm after the mean of its last layer, and a report."""
    torch.manual_seed(cfg.seed)
    encoder, state = encoders.build(cfg.described), {}
    if not (cfg.random or cfg.method):
        heads = {} if cfg.num_heads is None else {"num_heads": cfg.num_heads}
        source = open_source(cfg.checkpoint, cfg.init, cfg.init_key, **heads)
        state = source.content.get("model", source.state)
    words = transfer.start(encoder, cfg)
    encoder = encoder.to(device).eval().requires_grad_(False)
    return encoder, pooled_norm(encoder, state), words


def score(cfg: Config, folder: Path, where: slice, classes: int, device: torch.device) -> list:
    """One feature's results, [(its rate or None, counts (C, 3))]."""
    rows, labels = read(folder / "val", where)
    views = [read(folder / f"train-{v}", where) for v in range(max(cfg.views, 1))]
    if cfg.protocol == "knn":
        votes = knn(*views[0], rows, classes, cfg.k, cfg.temperature, device=device)
        return [(None, tally(votes, torch.from_numpy(labels)))]
    rates = choose_rates(cfg.rates)
    heads = train_heads([v[0] for v in views], views[0][1], classes, rates, cfg, device)
    return list(zip(rates, score_heads(heads, rows, labels, device)))


def write(cfg: Config, out: Path, classes: list[str], table: list[tuple[dict, Tensor]]) -> None:
    """Write and show the best of the sweep, beside the first and all others."""
    best, counts = max(table, key=lambda pair: pair[0]["top1"])  # the first of equals
    first = {k: v for k, v in table[0][0].items() if k != "images"}
    facts = {"protocol": cfg.protocol, "source": cfg.checkpoint or cfg.init or cfg.method}
    facts |= {"random": cfg.random or bool(cfg.method), "first": first}
    facts |= {"sweep": [row for row, _ in table]}
    facts |= {k: v for k, v in best.items() if k in ("features", "rate")}
    note = "the best of the sweep, chosen on the val split itself: optimistic"
    facts["note"] = note if len(table) > 1 else "one setting"
    write_result(out, classes, counts, facts)
    shown = f"{best['features']}: top-1 {best['top1']:.2f}, top-5 {best['top5']:.2f}"
    print(f"best        {shown} ({facts['note']}); {out / 'result.json'}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Probe every chosen feature; rank 0 trains and writes, all ranks extract."""
    cfg = engine.parse(Config, PRESETS, __doc__, argv)
    classes, world = transfer.class_names(cfg.data), World(cfg.device, cfg.precision)
    out = Path(world.from_rank_0(lambda: engine.open_folder(cfg, "probe")[0]))
    encoder, norm, words = open_frozen(cfg, world.device)
    layers = choose_layers(cfg.layers, encoder)
    where, width = columns(encoder, cfg.image_size, layers, cfg.features, norm)
    if world.rank == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
        whose = cfg.described.get("input", "ImageNet's")
        print(
            f"{words}\npixels      mean {cfg.mean}, deviation {cfg.std}: {whose}\n"
            f"features    {', '.join(where)}: {width} numbers an image\n"
            f"output      {out}",
            flush=True,
        )
    folder = cached(encoder, layers, width, out, cfg, world, norm)
    part()
    if world.rank:
        return
    table = []
    for name, at in where.items():
        for rate, counts in score(cfg, folder, at, len(classes), world.device):
            row = {"features": name} | ({"rate": rate} if rate else {}) | shares(counts)
            table.append((row, counts))
            shown = [f"{k} {v:.2f}" if k.startswith("top") else f"{k} {v}" for k, v in row.items()]
            print("  ".join(shown), flush=True)
    write(cfg, out, classes, table)


if __name__ == "__main__":
    engine.command("probe", main)
