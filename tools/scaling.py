"""How time and memory of a step grow, for `benchmark scaling`.

    python -m tools.benchmark scaling --rows mae,cfmae
    python -m tools.benchmark scaling --rows mae --flags "--model base" --batches 8,32,128 --runs ""

Over batches at one image size, and over image sizes at one batch, a step is timed as `benchmark
step` does it, on a batch that is there already. What is linear has one figure in the two columns
that are of an image or a patch: attention alone, L x L a sample, grows faster than its patches.

`--runs` names whole runs of the script, RANKSxWORKERS: loader, ranks' agreement and all. Each is
run twice, for a few steps and for `--run-steps` more, and what is given is the difference, so that
starting and the evaluations at both ends are not in it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import engine  # noqa: F401 - before torch: it sets how threads wait

from engine import UserError

ROOT = Path(__file__).parent.parent
FIRST = 3  # steps of the shorter run
HEAD = "CPU s a step", "s a step", "CPU ms each", "memory, MiB", "MiB each further one"


def train(script: str, flags: list[str], ranks: int = 1) -> dict:
    """Run a script to its end: its log's lines, CPU seconds of all its processes, and seconds.

    Errors: UserError with the last line that it said.
    """
    import resource  # not on Windows

    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *launch * (ranks > 1), f"{script}.py", "--output", f"{out}/run"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        job = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if job.returncode:
            said = job.stderr.strip().splitlines() or [f"status {job.returncode}"]
            raise UserError(f"{script} {' '.join(flags)}: {said[-1]}")
        log = [json.loads(line) for line in Path(out, "run", "log.jsonl").read_text().splitlines()]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"log": [x for x in log if "loss" in x], "cpu": cpu, "seconds": seconds}


def whole_run(script: str, flags: list[str], ranks: int, workers: int, steps: int) -> dict:
    """CPU seconds and seconds of a step of a run, and rank 0's most memory, MiB."""
    flags = [*flags, "--workers", str(workers), "--val-samples", "8"]
    short, long = (
        train(script, [*flags, "--steps", str(n)], ranks) for n in (FIRST, FIRST + steps)
    )
    found = {k: (long[k] - short[k]) / steps for k in ("cpu", "seconds")}
    return found | {"ranks": ranks, "workers": workers, "peak": long["log"][-1]["peak_memory_mib"]}


def series(found: list[dict], what: str, units: Callable[[dict], float]) -> None:
    """Print a table of steps of growing size; `units`, how much of `what` one has: "images"."""
    if not found:
        return
    print(f"\n| {what} | {' | '.join(HEAD)} |\n|{'---|' * (1 + len(HEAD))}")
    for i, r in enumerate(found):
        n, before = units(r), found[i - 1]
        each = f"{1e3 * r['cpu'] / n:.2f}"
        more = f"{(r['peak'] - before['peak']) / (n - units(before)):.2f}" if i else ""
        row = f"{r['cpu']:.3f}", f"{r['seconds']:.3f}", each, f"{r['peak']:.0f}", more
        print(f"| {n} | {' | '.join(row)} |", flush=True)


def scaling(args: argparse.Namespace, child: Callable, rows: dict) -> list[dict]:
    """Measure all of it; `child` times a step in a process of its own, `rows` are its table."""
    names, given = args.rows.split(","), args.flags
    if unknown := [name for name in names if name not in rows]:
        raise UserError(f"--rows {','.join(unknown)}: choose from {', '.join(rows)}")

    def steps(row: str, batch: int, size: int) -> dict:
        flags = f"{given} --image-size {size}"
        r = child(args, rows=row, batch_size=batch, flags=flags, details=False)
        if r is None:
            raise UserError(f"{row}: not enough memory for batch {batch} at {size}")
        r |= {"cpu": statistics.median(r["cpu"]), "seconds": statistics.median(r.pop("times"))}
        return {**r, "batch": batch, "size": size}

    results = []
    for row in names:
        print(f"\n{row} {given}, {args.precision}: at {args.size} pixels; with {args.batch} images")
        found = [steps(row, n, args.size) for n in args.batches]
        series(found, "images", lambda r: r["batch"])
        found += (larger := [steps(row, args.batch, n) for n in args.sizes])
        series(larger, "patches of 16 x 16", lambda r: r["batch"] * r["size"] ** 2 // 256)
        script, own = rows[row]
        flags = [*own.split(), *given.split(), "--data", "shapes", "--device", args.device]
        flags += ["--image-size", str(args.size), "--batch-size", str(args.batch)]
        flags += ["--precision", args.precision]
        line = "\n| ranks | workers | CPU s a step | s a step | memory of rank 0, MiB |\n"
        print(line + "|---" * 5 + "|" if args.runs else "")
        for ranks, workers in args.runs:
            r = whole_run(script, flags, ranks, workers, args.run_steps)
            cells = ranks, workers, f"{r['cpu']:.3f}", f"{r['seconds']:.3f}", f"{r['peak']:.0f}"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            found.append({"row": row, **r})
        results += found
    return results


def numbers(text: str) -> list[int]:
    """Positive numbers of a list with commas; ValueError."""
    found = [int(n) for n in text.split(",") if n]
    if any(n < 1 for n in found):
        raise ValueError
    return found


def splits(text: str) -> list[tuple[int, int]]:
    """(ranks, workers) of "1x0,2x1"; ValueError."""
    found = [tuple(int(n) for n in x.split("x")) for x in text.split(",") if x]
    if any(len(x) != 2 or x[0] < 1 or x[1] < 0 for x in found):
        raise ValueError
    return found


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rows", default="mae", help="comma-separated, of `step`'s")
    p.add_argument("--flags", default="--model tiny --patch-size 16", help="in quotes")
    p.add_argument("--batches", type=numbers, default="8,16,32,64,128,256", help="at --size")
    p.add_argument(
        "--sizes", type=numbers, default="128,224,320,448", help="pixels, with --batch images"
    )
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--runs", type=splits, default="1x0,1x1,1x2,2x0,2x1", help="RANKSxWORKERS")
    p.add_argument("--run-steps", type=int, default=20)
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--steps", type=int, default=3, help="timed steps")
    p.add_argument("--warmup", type=int, default=1, help="steps before them")
    p.set_defaults(method=None, model="base", compile=False, peers=None)
