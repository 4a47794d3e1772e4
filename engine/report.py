"""What a run says of itself: at its start its settings and what they will cost, at its end what was
learned and what to do next.
"""

import json
import math
import shlex
import time

import torch
from torch import nn

from engine.step import throw_away


def screen(run: object, model: nn.Module) -> str:
    """What a run begins with: model, data, batch, rate, length, device, folder."""
    cfg, world = run.cfg, run.world
    million = {
        n: sum(p.numel() for p in m.parameters() if p.requires_grad) / 1e6
        for n, m in (("all", model), ("encoder", model.encoder))
    }
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    threads = "" if device != "CPU" else f", {torch.get_num_threads()} threads a rank"
    threads += ", its MPS is not used" if torch.backends.mps.is_available() else ""
    val = f"{len(run.val_set)} {cfg.SAMPLES}" if run.val_set else "none, so nothing is evaluated"
    lines = {
        "method": f"{run.method}, preset {cfg.model}, {cfg.image_size} pixels",
        "parameters": f"{million['all']:.2f} M, of which the encoder {million['encoder']:.2f} M",
        "data": f"{cfg.data}: train {len(run.train_set)} {cfg.SAMPLES}, val {val}; "
        f"{len(run.train_set.classes)} classes; {', '.join(run.train_set.granularities)}",
        "batch": f"{cfg.batch_size} = {world.size} ranks x {run.accum} steps x {run.micro}",
        "rate": f"{cfg.base_lr * cfg.batch_size / 256:.3g} = {cfg.base_lr} x batch / 256",
        "length": f"{run.total} steps, {run.total / run.per_epoch:g} epochs of {run.per_epoch}"
        + (f", stopping after {cfg.steps} steps" if cfg.steps else ""),
        "device": f"{device}{threads}, {'bf16' if world.bf16 else 'fp32'}, "
        f"{world.workers(cfg.workers)} loader processes a rank",
        "output": str(run.out),
    }
    return "\n".join(f"{k:<11} {v}" for k, v in lines.items())


def warn_of_size(run: object) -> None:
    """Say what a large model will need of a CPU: memory, and time as a few samples take it."""
    million = sum(p.numel() for p in run.model.parameters()) / 1e6
    if run.device.type != "cpu" or million <= 20:
        return
    batch = run.collate(
        [run.train_set[pair] for pair in run.sampler.indices(0)[: min(run.micro, 4)]]
    )
    if "error" in batch:  # the loop says which
        return
    count = len(batch["seed"])
    seconds, kept = trial(run, batch)
    left, share = run.stop - run.number, run.cfg.batch_size / run.world.size / count
    hours = left * share * seconds / 3600
    units = ((72, 24, "days"), (2, 1, "hours"), (0, 1 / 60, "minutes"))
    length = next(f"{hours / unit:,.0f} {name}" for least, unit, name in units if hours >= least)
    print(f"warning     {million:.0f} M parameters on a CPU: weights, gradients and AdamW take "
          f"{16 * million / 1024:.1f} GiB, what {run.micro} samples keep for the backward pass "
          f"{kept / count * run.micro / 2**30:.1f} GiB (--micro-batch), and the {left} steps about "
          f"{length}, as a trial of {count} samples has it. --model tiny is made for a CPU",
          flush=True)  # fmt: skip


def trial(run: object, batch: dict) -> tuple[float, int]:
    """Seconds of a forward and backward pass, and the bytes that the first keeps for the second."""
    weights, kept = {p.data_ptr() for p in run.model.parameters()}, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        throw_away(run, run.model, batch)
    seconds = time.perf_counter() - began
    return seconds, sum(size for at, size in kept.items() if at not in weights)


# How `evaluate` of the scripts calls what scores without having learned anything of an image.
GUESSES = ("_flat", "_mean_colour", "_visible", "_position", "_nearest", "_frequent", "_other")


def learned(run: object) -> str:
    """What the val split says of a run, in words, from its log's first and last look at it."""
    if run.val_set is None:
        return f"\nlearned     not measured: {run.cfg.data} has no val split beside train"
    out = run.out
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    looks = [record["val"] for line in lines if "val" in (record := json.loads(line))]
    if len(looks) < 2:
        return ""
    first, last = looks[0], looks[-1]
    words, guesses = f"\nlearned     loss {first['loss']:.4g} -> {last['loss']:.4g}", {}
    for k, v in last.items():
        for ending in (x for x in GUESSES if k.endswith(x)):
            found = guesses.setdefault(k.removesuffix(ending), [])
            found.append(f"{ending[1:].replace('_', ' ')} {v:.3g}")
    for k, found in guesses.items():
        own = "" if k == "loss" else f"; {k} {last.get(k, math.nan):.3g}"
        words += f"{own} (by guesses that learn nothing: {', '.join(found)})"
    return f"{words}, on held-out {run.cfg.SAMPLES}"


def following(run: object) -> str:
    """What to do with a pre-trained model: commands, which run where there are classes."""
    tiny = " --model tiny" if run.cfg.model == "tiny" else ""  # of the next task's presets, too
    folder, note = shlex.quote(run.cfg.data), ""
    if run.val_set is None or len(run.train_set.classes) < 2:
        folder = "DATA"
        note = "\n            (DATA: train and val, two or more class folders in each)"
    words = {"last": shlex.quote(str(run.last)), "data": f"--data {folder}{tiny}"}
    own = run.cfg.data != "shapes"  # which pictures are of by default
    words["images"] = f" --data {shlex.quote(run.cfg.data)}" if own else ""
    package = __name__.removesuffix("engine.report")  # "" in a checkout
    commands = [f"python -m {package}{line.format(**words)}" for line in run.then]
    return "next        " + "\n            ".join(commands) + note
