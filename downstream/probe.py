"""Probes of a frozen encoder: its features once through the data, then a linear layer or knn.

    columns, extract     features of several layers, averaged, in memory-mapped files
    LARS, train_heads    a norm without parameters and a linear layer, many rates at a time
    knn                  weighted nearest neighbours by cosine, streamed over the bank
    run                  what `python -m downstream.classify --protocol linear | knn` does

A feature is a layer and what is taken from it: the mean of its patch tokens (`patch`), of its
prefix tokens, the class token or the proxies (`prefix`), or both side by side (`both`). Layers are
1-based block outputs; `norm` is the last one after the norm that was trained with it: the encoder's
final norm, before the mean, or fine-tuning's, after it. Where pre-training's norm saw something
else (SemanticMIM's, MCMAE's), it is a fresh LayerNorm after the mean, as their public code has it.

The protocol is MAE's: BatchNorm, LARS, rate 0.1 x batch / 256, batch 16384 (MCMAE's: 4096), 90
epochs, 10 of warm-up, no decay. SemanticMIM's is its Table 5, AdamW, 4e-3 at batch 1024, decay
1e-4, 100 epochs, with the frozen LayerNorm of its public code in the place of BatchNorm, at layer 7
(Sec. 4.2; the public configuration takes the last). One thing differs: those crop each image anew
in every epoch, here the features are those of the centre crop, or of `--views` augmented passes
that take turns.

  CPU:  python -m downstream.classify --protocol knn --data shapes --model tiny --checkpoint ...
  GPU:  torchrun --nproc_per_node=8 -m downstream.classify --protocol linear --layers all
        --data data/imagenet --checkpoint ... --cache features
        (8 ranks share the pass over the data, the first one trains the heads)
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from common import Normalize
from downstream import encoders, public
from downstream.scores import shares, tally, write_result
from engine import UserError

IN_MEMORY = 8 * 2**30  # bytes of features that are read into memory; more stay on disk


# --------------------------------------------------------------------------------------- features


def choose_layers(text: str | None, encoder: nn.Module) -> list[str]:
    """Layers of `--layers`: numbers, `norm`, or `all`; UserError on others."""
    depth = encoders.num_layers(encoder)
    if text is None:
        share = encoder.probe_layer
        return ["norm"] if share is None else [str(math.ceil(depth * share))]
    known = [str(n) for n in range(1, depth + 1)] + ["norm"]
    chosen = known if text == "all" else [x.strip() for x in text.split(",")]
    if wrong := [x for x in chosen if x not in known]:
        raise UserError(f"--layers {','.join(wrong)}: choose from 1 to {depth}, norm; or all")
    return list(dict.fromkeys(chosen))


def choose_rates(text: str) -> list[float]:
    """Base learning rates of `--rates`; UserError on what is no positive number."""
    try:
        rates = [float(x) for x in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < x < math.inf for x in rates):
        raise UserError(f"--rates {text}: numbers above 0 with commas between, e.g. 0.1,0.3")
    return rates


@torch.no_grad()
def features(
    encoder: nn.Module, imgs: Tensor, layers: list[str], norm: nn.Module | None = None
) -> list[tuple[str, Tensor]]:
    """Averaged tokens of some layers, one pass: [(name, (B, D)), ...], patch before prefix.

    Args:
        norm: what `norm` means after the mean (see `pooled_norm`); None: the encoder's, before it.
    """
    depth, found = encoders.num_layers(encoder), []
    outputs = encoder.forward_features(imgs, [depth if n == "norm" else int(n) for n in layers])
    for name, (tokens, prefix) in zip(layers, outputs):
        for kind, x in (("patch", tokens), ("prefix", prefix)):
            if x.shape[1]:
                final = name == "norm"
                x = (encoder.norm(x) if final and norm is None else x).float().mean(1)
                found.append((f"{name}/{kind}", norm(x) if final and norm is not None else x))
    return found


def pooled_norm(encoder: nn.Module, state: dict[str, Tensor]) -> nn.Module | None:
    """The norm that belongs after the mean of the last layer; None: the encoder's own, before it.

    It is the trained one of a fine-tuned classifier, or fresh where the encoder's was not trained
    on what its features are.

    Args:
        state: what is in the encoder's file; {} without one.
    """
    norm = nn.LayerNorm(encoder.norm.normalized_shape[0], eps=1e-6)
    if "fc_norm.weight" in state:
        norm.load_state_dict({k: state[f"fc_norm.{k}"] for k in ("weight", "bias")})
    elif encoder.trained_norm:
        return None
    return norm.to(next(encoder.parameters()).device).requires_grad_(False)


def columns(
    encoder: nn.Module, size: int, layers: list[str], kinds: str | None,
    norm: nn.Module | None = None,
) -> tuple[dict, int]:  # fmt: skip
    """Where each feature lies in a row, {"7/patch": slice}, and the width of a row."""
    device, at, where = next(encoder.parameters()).device, 0, {}
    for name, x in features(encoder, torch.zeros(1, 3, size, size, device=device), layers, norm):
        where[name] = slice(at, at := at + x.shape[1])
        if name.endswith("/prefix"):  # its layer's patches lie before it
            layer = name.partition("/")[0]
            where[f"{layer}/both"] = slice(where[f"{layer}/patch"].start, at)
    wanted = (kinds or "patch,prefix,both").split(",")
    chosen = {n: s for n, s in where.items() if n.partition("/")[2] in wanted}
    lacking = set(wanted) - {n.partition("/")[2] for n in where}
    if lacking and kinds:
        raise UserError(
            f"--features {','.join(sorted(lacking))}: choose from patch, prefix, both; "
            "an encoder without class or proxy tokens has patch alone"
        )
    return chosen, at


def extract(
    encoder: nn.Module, dataset: data.Dataset, view: int, layers: list[str], width: int,
    path: Path, cfg: engine.Config, world: engine.World, norm: nn.Module | None = None,
) -> None:  # fmt: skip
    """Write the features of a split to PATH.npy (N, width) and its labels to PATH.labels.npy.

    Ranks share the rows. An unreadable image gets label -1. `view` is the epoch whose crops a
    training split takes.
    """
    names = {path.with_suffix(".npy"): ((len(dataset), width), np.dtype(cfg.cache_dtype))}
    names[path.with_suffix(".labels.npy")] = ((len(dataset),), np.dtype(np.int64))
    if world.rank == 0:
        for name, (shape, kind) in names.items():
            np.lib.format.open_memmap(name, "w+", kind, shape).flush()
    world.maximum(0)
    rows, labels = (np.load(name, mmap_mode="r+") for name in names)
    first, last = (len(dataset) * (world.rank + i) // world.size for i in (0, 1))
    starts = range(first, last, cfg.micro_batch)
    batches = [[(view, i) for i in range(s, min(s + cfg.micro_batch, last))] for s in starts]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=data.collate, worker_init_fn=data.worker_init,
        num_workers=engine.workers(cfg, world) if len(dataset) > 2048 else 0,
    )  # fmt: skip
    normalize, finite, failed = Normalize(*cfg.statistics()).to(world.device), True, {}
    bar = tqdm(zip(starts, loader), total=len(batches), disable=world.rank > 0, unit="batch",
               desc=path.stem, mininterval=5)  # fmt: skip
    for start, batch in bar:
        if "error" in batch:
            failed = batch
            break
        with world.autocast():
            imgs = normalize(batch["rgb"].to(world.device))
            found = features(encoder, imgs, layers, norm)
        block = torch.cat([x for _, x in found], dim=1).cpu().numpy()
        with np.errstate(over="ignore"):
            rows[start : start + len(block)] = block
        finite &= bool(np.isfinite(rows[start : start + len(block)]).all())
        labels[start : start + len(block)] = batch["label"].where(batch["bad"] < 0, -1).numpy()
    engine.raise_error(failed, world)  # of any rank, on all
    for x in (rows, labels):
        x.flush()
    if world.maximum(not finite)[0]:
        raise UserError(f"features of {path.stem} are not finite; try --cache-dtype float32")


def read(path: Path, where: slice) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one feature, in memory unless they are too large, and labels; both numpy."""
    rows = np.load(path.with_suffix(".npy"), mmap_mode="r")[:, where]
    rows = np.array(rows) if rows.nbytes < IN_MEMORY else rows
    return rows, np.load(path.with_suffix(".labels.npy"))


# ----------------------------------------------------------------------------------------- linear


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled to the size of each weight matrix (arXiv 1708.03888).

    As MAE has it: the update of a matrix is trust x |p| / |g + decay p| times itself before it
    enters the momentum; biases take neither that factor nor the decay.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9,
                 trust: float = 0.001):  # fmt: skip
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    size, change = p.norm(), update.norm()
                    ratio = group["trust"] * size / change
                    update = update * ratio.where((size > 0) & (change > 0), 1.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(update)
                p.add_(momentum, alpha=-group["lr"])


class Heads(nn.Module):
    """Linear classifiers that share their input, normalised without trained parameters.

    Args:
        n: classifiers. dim: their input's width. std: of their first weights, the same for all.
        kind: "lars", MAE's BatchNorm, or "adamw", the LayerNorm of SemanticMIM's public code.
    """

    def __init__(self, n: int, dim: int, classes: int, kind: str = "lars", std: float = 0.01):
        super().__init__()
        if kind == "lars":  # frozen features do not drift: a plain average of statistics
            self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6, momentum=None)
        else:
            self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        start = torch.empty(dim, classes)
        nn.init.trunc_normal_(start, std=std)
        self.weights = nn.ParameterList(start.clone() for _ in range(n))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (n, B, C)."""
        weights, biases = torch.stack([*self.weights]), torch.stack([*self.biases])
        return torch.einsum("bd,ndc->nbc", self.norm(x.float()), weights) + biases[:, None]


def train_heads(
    rows: np.ndarray | list[np.ndarray], labels: np.ndarray, classes: int, rates: list[float],
    cfg: engine.Config, device: torch.device,
) -> Heads:  # fmt: skip
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
    schedule = dataclasses.replace(cfg, base_lr=1.0, batch_size=batch, min_lr=0.0)
    torch.manual_seed(cfg.seed)
    heads = Heads(len(rates), views[0].shape[1], classes, cfg.probe, cfg.head_std)
    heads = heads.to(device).train()
    groups = [{"params": [w, b]} for w, b in zip(heads.weights, heads.biases)]
    kind = LARS if cfg.probe == "lars" else torch.optim.AdamW
    optimizer = kind(groups, lr=0.0, weight_decay=cfg.weight_decay)
    generator = torch.Generator().manual_seed(cfg.seed)
    total = min(cfg.steps or math.inf, cfg.epochs * per_epoch)
    for step in range(int(total)):
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
        now = engine.learning_rate(schedule, step, per_epoch)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * now
        optimizer.step()
    return heads.eval()


@torch.no_grad()
def score_heads(heads: Heads, rows: np.ndarray, labels: np.ndarray, device: torch.device) -> Tensor:
    """Counts of every head, (n, C, 3)."""
    counts = 0.0
    for start in range(0, len(rows), 4096):
        x = np.ascontiguousarray(rows[start : start + 4096])
        logits = heads(torch.from_numpy(x).to(device))
        y = torch.from_numpy(labels[start : start + 4096]).to(device)
        counts = counts + torch.stack([tally(x, y) for x in logits])
    return counts.cpu()


# -------------------------------------------------------------------------------------------- knn


@torch.no_grad()
def knn(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, k: int = 20,
    temperature: float = 0.07, block: int = 16384, device: torch.device = torch.device("cpu"),
) -> Tensor:  # fmt: skip
    """Votes of the k most similar of the bank, weighted by exp(cosine / temperature).

    The bank passes once, `block` rows at a time; each query keeps its best k so far. So memory
    holds a block, the queries and their votes, whatever the size of the bank.

    Args:
        bank: (N, D); labels (N,) int64, -1 is left out; queries (Q, D).
    Returns: (Q, classes) float32 on the CPU.
    """
    usable = np.flatnonzero(labels >= 0)
    k = min(k, len(usable))
    best = torch.full((len(queries), k), -torch.inf)
    voters = torch.zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(usable), block):
        picks = usable[start : start + block]
        keys = F.normalize(torch.from_numpy(bank[picks]).to(device).float(), dim=1)
        classes_of = torch.from_numpy(labels[picks]).to(device)
        for q in range(0, len(queries), 1024):
            at = slice(q, q + 1024)
            x = torch.from_numpy(np.ascontiguousarray(queries[at])).to(device).float()
            cosine = F.normalize(x, dim=1) @ keys.T  # (q, block)
            both = torch.cat([best[at].to(device), cosine], dim=1)
            names = torch.cat([voters[at].to(device), classes_of.expand(len(x), -1)], dim=1)
            top, ids = both.topk(k, dim=1)
            best[at], voters[at] = top.cpu(), names.gather(1, ids).cpu()
    return torch.zeros(len(queries), classes).scatter_add_(1, voters, (best / temperature).exp())


# -------------------------------------------------------------------------------------------- run


def cached(
    encoder: nn.Module, layers: list[str], width: int, out: Path, cfg: engine.Config,
    world: engine.World, norm: nn.Module | None,
) -> Path:  # fmt: skip
    """Folder of the features, which are computed unless they lie there from the same encoder."""
    folder = Path(cfg.cache or out / "features")
    source = cfg.checkpoint or cfg.init
    stat = os.stat(source) if source and os.path.exists(source) else None
    fields = "data description random seed image_size crop_scale_min crop_pct views cache_dtype "
    fields += "mean std init_key"
    key = {name: getattr(cfg, name) for name in fields.split()} | {"layers": layers, "width": width}
    key |= {"bf16": world.bf16, "source": source, "file": stat and [stat.st_size, stat.st_mtime]}
    train_set, val_set = (engine.open_data(cfg, world, out, s) for s in ("train", "val"))
    if val_set is None:
        raise UserError(f"{cfg.data} has no folder val, which a probe is tested on")
    key |= {"train": len(train_set), "val": len(val_set)}

    def start() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "features.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found is not None and found != key:
            changed = ", ".join(k for k in key if found.get(k) != key[k])
            raise UserError(f"{folder} holds features of another run ({changed} differ); "
                            "choose another --cache or --output")  # fmt: skip
        return found is not None

    if not world.from_rank_0(start):
        for view in range(max(cfg.views, 1)):
            path = folder / f"train-{view}"
            extract(encoder, train_set, view, layers, width, path, cfg, world, norm)
        extract(encoder, val_set, 0, layers, width, folder / "val", cfg, world, norm)
        if world.rank == 0:
            (folder / "features.json").write_text(json.dumps(key, indent=1))
    elif world.rank == 0:
        print(f"features    from {folder}", flush=True)
    return folder


def run(cfg: engine.Config, world: engine.World) -> int:
    """Linear probe or knn of every chosen feature; rank 0 trains and writes, all ranks extract."""
    out = Path(world.from_rank_0(lambda: engine.open_folder(cfg, "classify")[0]))
    classes, description = json.loads(cfg.classes), json.loads(cfg.description)
    torch.manual_seed(cfg.seed)
    encoder = encoders.build(description)
    report, state = "encoder     fresh weights", {}
    if not (cfg.random or cfg.method):
        if cfg.checkpoint:
            state = engine.read(cfg.checkpoint, "--checkpoint")["model"]
        else:
            state = public.open_public(cfg.init, cfg.init_key).state
        report = encoders.load(encoder, description, cfg.checkpoint, cfg.init, cfg.init_key)
    encoder = encoder.to(world.device).eval().requires_grad_(False)
    layers = choose_layers(cfg.layers, encoder)
    norm = pooled_norm(encoder, state)
    where, width = columns(encoder, cfg.image_size, layers, cfg.features, norm)
    if world.rank == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
        print(f"{report}\nfeatures    {', '.join(where)}: {width} numbers an image\n"
              f"output      {out}", flush=True)  # fmt: skip
    folder = cached(encoder, layers, width, out, cfg, world, norm)
    world.maximum(0)
    if world.rank:
        return 0
    rates = choose_rates(cfg.rates) if cfg.protocol == "linear" else [None]
    table, best = [], None
    for name, at in where.items():
        rows, labels = read(folder / "val", at)
        views = [read(folder / f"train-{v}", at) for v in range(max(cfg.views, 1))]
        if cfg.protocol == "knn":
            votes = knn(*views[0], rows, len(classes), cfg.k, cfg.temperature, device=world.device)
            counts = tally(votes, torch.from_numpy(labels))[None]
        else:
            bank = [v[0] for v in views], views[0][1]
            heads = train_heads(*bank, len(classes), rates, cfg, world.device)
            counts = score_heads(heads, rows, labels, world.device)
        for rate, each in zip(rates, counts):
            row = {"features": name} | ({"rate": rate} if rate else {}) | shares(each)
            table.append(row)
            print("  ".join(f"{k} {v:.2f}" if k.startswith("top") else f"{k} {v}"
                            for k, v in row.items()), flush=True)  # fmt: skip
            if best is None or row["top1"] > best[0]["top1"]:
                best = row, each
    first = {k: v for k, v in table[0].items() if k != "images"}
    facts = {"protocol": cfg.protocol, "source": cfg.checkpoint or cfg.init or cfg.method}
    facts |= {"random": cfg.random or bool(cfg.method), "first": first, "sweep": table}
    note = "the best of the sweep, chosen on the val split itself: optimistic"
    facts |= {k: v for k, v in best[0].items() if k in ("features", "rate")}
    facts["note"] = note if len(table) > 1 else "one setting"
    write_result(out, classes, best[1], facts)
    shown = f"{best[0]['features']}: top-1 {best[0]['top1']:.2f}, top-5 {best[0]['top5']:.2f}"
    print(f"best        {shown} ({facts['note']}); {out / 'result.json'}", flush=True)
    return 0
