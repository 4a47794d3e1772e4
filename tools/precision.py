"""Whether bf16 learns what fp32 learns, for `benchmark precision`: three runs, one seed.

    python -m tools.benchmark precision --rows mae,cfmae

All see the same samples under the same masks; the third, in fp32 by micro-batches, differs from the
first in its rounding alone, so that one sees what rounding does to a curve. The loss is smoothed, a
mean over `--window` lines of a log; given is the largest difference from fp32's, as a share of it.
"""

import argparse
from collections.abc import Sequence

from engine import UserError
from tools.scaling import train


def smooth(x: Sequence[float], window: int) -> list[float]:
    """Means over `window` neighbours: len(x) - window + 1 of them."""
    return [sum(x[i : i + window]) / window for i in range(len(x) - window + 1)]


def difference(a: Sequence[float], b: Sequence[float], window: int) -> float:
    """Largest difference of two curves, smoothed, as a share of the first."""
    pairs = zip(smooth(a, window), smooth(b, window), strict=True)
    return max(abs(y - x) / abs(x) for x, y in pairs)


def precision(args: argparse.Namespace, rows: dict) -> list[dict]:
    """Run the rows in fp32 and in bf16 and compare; `rows` are the benchmark's."""
    names, results, every = args.rows.split(","), [], max(1, args.steps // 50)
    if unknown := [name for name in names if name not in rows]:
        raise UserError(f"--rows {','.join(unknown)}: choose from {', '.join(rows)}")
    if not 1 <= args.window <= (lines := args.steps // every):
        raise UserError(f"--window {args.window}: {args.steps} steps have {lines} lines of a log")
    for row in names:
        script, own = rows[row]
        flags = [*own.split(), *args.flags.split(), "--data", "shapes", "--device", args.device]
        flags += ["--steps", str(args.steps), "--log-every", str(every), "--val-samples", "8"]
        parts = f"fp32 --micro-batch {args.micro_batch}"
        runs = {"fp32": "fp32", "rounding": parts, "bf16": "bf16"}
        found = {k: train(script, [*flags, "--precision", *v.split()]) for k, v in runs.items()}
        curves = {k: [line["loss"] for line in x["log"]] for k, x in found.items()}
        shares = {k: difference(curves["fp32"], x, args.window) for k, x in curves.items()}
        for k, curve in curves.items():
            ends, mean = smooth(curve, args.window), sum(curve) / sum(curves["fp32"]) - 1
            print(
                f"{row} {k:<9} loss {ends[0]:.4f} to {ends[-1]:.4f}, from fp32's at most "
                f"{shares[k]:.2%}, on average {mean:+.2%}; {found[k]['cpu']:.0f} CPU seconds",
                flush=True,
            )
        cpu = {k: x["cpu"] for k, x in found.items()}
        results.append({"row": row, **curves, "difference": shares, "cpu": cpu})
    return results


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rows", default="mae,cfmae", help="comma-separated, of `step`'s")
    p.add_argument("--flags", default="--model tiny", help="in quotes")
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--window", type=int, default=5, help="lines of a log, of which there are fifty")
    p.add_argument("--micro-batch", type=int, default=4, help="of the run in micro-batches")
