"""Time and memory of a training step of detection, beside torchvision's Mask R-CNN, for `benchmark
detect`.

Ours is `downstream.detect`'s own model, loss and optimizer of each row; torchvision's is
`maskrcnn_resnet50_fpn_v2` with fresh weights, its own losses, in AdamW, with no layer frozen. Both
get the same scenes at the same size, so the same objects; torchvision's own resize is turned off.
Rows take turns, as in `benchmark step`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor

from downstream import detect
from downstream.detect_recipes import PRESETS, Config
from downstream.mask_rcnn import unpack
from downstream.objects import Scenes, collate
from engine import UserError
from engine.ranks import World, peak_memory
from shapes import SHAPES

PEER = "torchvision"
ROWS = ("mae", "cfmae", "semanticmim", "mcmae", "coma_dyvit", PEER)


def ours(args: argparse.Namespace, world: World) -> tuple:
    """Model, optimizer and loss of a batch, as `downstream.detect` has them."""
    given = ["--method", args.rows, "--encoder", args.model, "--image-size", str(args.size)]
    cfg = engine.parse(Config, PRESETS, "", [*given, *args.flags.split()])
    model = detect.build(cfg, args.classes).to(world.device)
    return model, detect.make_optimizer(cfg, model), lambda batch: model(batch, None)[0]


def theirs(args: argparse.Namespace, world: World) -> tuple:
    """The same of torchvision's maskrcnn_resnet50_fpn_v2."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    model = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=args.classes + 1,
        trainable_backbone_layers=5, min_size=args.size, max_size=args.size,
    ).to(world.device).train()  # fmt: skip

    def loss(batch: dict[str, Tensor]) -> Tensor:
        width, targets = batch["rgb"].shape[3], []
        for boxes, labels, masks in zip(batch["boxes"], batch["labels"], batch["masks"]):
            n = int((labels > 0).sum())
            target = {"boxes": boxes[:n], "labels": labels[:n]}
            targets.append({**target, "masks": unpack(masks[:n], width).byte()})
        return sum(model(list(batch["rgb"] / 255), targets).values())

    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), loss


def one(args: argparse.Namespace) -> dict:
    """Time the one of --rows in this process: seconds of each step, peak memory, parameters."""
    torch.manual_seed(0)
    world = World(args.device, args.precision)
    cuda = world.device.type == "cuda"
    if not cuda:
        engine.keep_freed_memory()
    model, optimizer, loss_of = (theirs if args.rows == PEER else ours)(args, world)
    scenes, times, used = Scenes("train", args.size, True), [], []
    batch = world.to_device(collate([scenes[0, i] for i in range(args.batch_size)]))
    for i in range(args.warmup + args.steps):
        began, cpu = time.perf_counter(), time.process_time()
        batch["seed"] = batch["seed"] + i
        with world.autocast():
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        used.append(time.process_time() - cpu)  # of all threads; the same on a shared machine
    peak = peak_memory(world.device)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    timed = {"times": times[args.warmup :], "cpu": used[args.warmup :]}
    return {"row": args.rows, **timed, "peak": peak, "parameters": count}


def run(args: argparse.Namespace, child: Callable) -> list[dict]:
    """Time the chosen rows in turns, each by `child` in a process of its own; print a table."""
    rows, found = args.rows.split(",") if args.rows else list(ROWS), {}
    if unknown := [r for r in rows if r not in ROWS]:
        raise UserError(f"--rows {','.join(unknown)}: choose from {', '.join(ROWS)}")
    if args.classes < len(SHAPES):
        raise UserError(f"--classes {args.classes}: scenes have {len(SHAPES)}")
    for turn in range(args.rounds):
        for row in rows:
            result = child(args, rows=row)
            if result is None:
                raise UserError(f"{row}: not enough memory for batch {args.batch_size}")
            kept = found.setdefault(row, {**result, "times": [], "cpu": []})
            for name in ("times", "cpu"):
                kept[name] += result[name]
            shown = " ".join(f"{t:.2f}" for t in result["times"])
            print(f"round {turn + 1}, {row}: {shown} s", flush=True)
    device = World(args.device, args.precision).device
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}, torch {torch.__version__}, {args.precision}, {args.size} pixels, batch "
          f"{args.batch_size}\n\n| row | parameters, M | step, s (min-max) | CPU time, s | "
          "images/s | peak memory, MiB |\n|---|---|---|---|---|---|")  # fmt: skip
    for r in found.values():
        r["median"] = statistics.median(r["times"])
        r |= {"images_per_s": args.batch_size / r["median"], "size": args.size, "device": name}
        low, high, cpu = min(r["times"]), max(r["times"]), statistics.median(r["cpu"])
        print(f"| {r['row']} | {r['parameters'] / 1e6:.1f} | {r['median']:.2f} ({low:.2f}-"
              f"{high:.2f}) | {cpu:.2f} | {r['images_per_s']:.3f} | {r['peak']:.0f} |")  # fmt: skip
    return list(found.values())


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rows", help=f"comma-separated, of {', '.join(ROWS)}")
    p.add_argument("--model", default="base", help="preset of the encoders")
    p.add_argument("--flags", default="", help="more flags for downstream.detect, in quotes")
    p.add_argument("--size", type=int, default=1024, help="pixels")
    p.add_argument("--classes", type=int, default=80, help="of the heads; scenes have ten")
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--steps", type=int, default=3, help="timed steps a round")
    p.add_argument("--warmup", type=int, default=1, help="steps before them")
    p.add_argument("--rounds", type=int, default=1)
