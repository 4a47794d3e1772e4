"""Whether bf16 learns what fp32 learns, for `benchmark precision`: two runs, one seed.

    python -m tools.benchmark precision --rows mae,cfmae

Both see the same samples under the same masks. Of either the loss is smoothed, a mean over
`--window` lines of its log; given is the largest difference of the two, as a share of fp32's.
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
    for row in names:
        script, own = rows[row]
        flags = [*own.split(), *args.flags.split(), "--data", "shapes", "--device", args.device]
        flags += ["--steps", str(args.steps), "--log-every", str(every), "--val-samples", "8"]
        found = {p: train(script, [*flags, "--precision", p]) for p in ("fp32", "bf16")}
        fp32, bf16 = ([line["loss"] for line in found[p]["log"]] for p in found)
        share = difference(fp32, bf16, args.window)
        ends = [smooth(x, args.window) for x in (fp32, bf16)]
        print(
            f"{row}: loss {ends[0][0]:.4f} to {ends[0][-1]:.4f} in fp32, {ends[1][0]:.4f} to "
            f"{ends[1][-1]:.4f} in bf16; smoothed, they differ by at most {share:.2%}", flush=True
        )  # fmt: skip
        cpu = {p: x["cpu"] for p, x in found.items()}
        results.append({"row": row, "fp32": fp32, "bf16": bf16, "difference": share, "cpu": cpu})
    return results


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `precision` to the benchmark's commands."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("precision", description=__doc__, formatter_class=raw)
    p.add_argument("--rows", default="mae,cfmae", help="comma-separated, of `step`'s")
    p.add_argument("--flags", default="--model tiny", help="in quotes")
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--window", type=int, default=5, help="lines of a log, of which there are fifty")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return p
