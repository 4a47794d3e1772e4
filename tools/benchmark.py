"""Time and memory of the training step and of the loader, on the machine at hand.

    python -m tools.benchmark step                                # every row below, batch 32
    python -m tools.benchmark step --rows mae,cfmae --precision bf16 --rounds 3 --json out.json
    python -m tools.benchmark step --method mcmae --model large --flags=--no-sparse
    python -m tools.benchmark step --rows mae --peers             # beside other libraries' models
    python -m tools.benchmark step --rows mae,mcmae --peers DIR   # and their authors' clones in DIR
    python -m tools.benchmark loader --data data/imagenet --feed 1500   # a folder, and its shards
    python -m tools.benchmark scaling --rows mae                  # how time and memory grow
    python -m tools.benchmark precision --rows mae,cfmae          # does bf16 learn what fp32 does?
    python -m tools.benchmark memory --rows mae,cfmae
    python -m tools.benchmark detect --rows mcmae,torchvision     # at 1024, batch 1

`step` times a script's own loop around a batch that is there already: forward, backward, clipping
where the recipe has it, AdamW (tools/stopwatch.py). Each row runs in a process of its own, so that
its peak memory is its own; the rows take turns for `--rounds` rounds, so that a machine's drift
meets all of them. Median of all steps, with the smallest and the largest, by the clock and in CPU
seconds; on a CPU, ratios and shares are of those, as other work does not change them. Of that:

    forward GFLOP   torch.utils.flop_counter, of an image; 2 a multiply-add
    share of peak   forward and backward FLOPs over the time, over the rate of a matrix product at
                    this precision on this device (2048^3 on a CPU, 8192^3 on CUDA)
    parts           of one more step, operator by operator, forward and backward; and where the time
                    goes by kind of operator

`--peers` adds, of other people's models (tools/peers.py), those that a chosen row is compared with,
unless --rows names some itself. `memory` finds the largest micro-batch that fits (tools/memory.py),
`scaling` how a step grows (tools/scaling.py), `loader` times what feeds one (tools/loader.py),
`detect` detection's step (tools/benchmark_detect.py).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch

from engine import UserError
from engine.ranks import World
from tools import benchmark_detect, peers, precision, scaling, stopwatch
from tools.loader import loader
from tools.memory import file_list, largest_batch

ROWS = {  # name: (script, its flags); DALLE is a file of random weights
    "mae": ("mae", ""),
    "mae-60": ("mae", "--mask-ratio 0.6"),
    "cfmae": ("cfmae", ""),
    "mcmae": ("mcmae", ""),
    "mcmae-dense": ("mcmae", "--no-sparse"),
    "coma": ("coma_dyvit", "--evaluation frozen"),
    "coma-none": ("coma_dyvit", "--evaluation none"),
    "coma-common": ("coma_dyvit", "--evaluation common"),
    "coma-shared": ("coma_dyvit", "--evaluation shared"),
    "semanticmim": ("semanticmim", ""),
    "semanticmim-plain": ("semanticmim", "--proxies 0"),
    "semanticmim-80": ("semanticmim", "--mask-ratio 0.8"),
    "beit": ("semanticmim", "--model base-beit --tokenizer DALLE"),
    "beit-plain": ("semanticmim", "--model base-beit --tokenizer DALLE --proxies 0"),
}
PLAIN = {name: row for name, row in ROWS.items() if "DALLE" not in row[1]}  # a script's own flags
VIDEO = {  # rows of clips, which are many times as dear: by name alone
    "video": ("videomcmae", ""),
    "video-dense": ("videomcmae", "--no-sparse"),
    "videomae": ("tools.videomae", ""),
}
SCRIPTS = sorted({script for script, _ in (*ROWS.values(), *VIDEO.values())})
RATIOS = (  # what is compared: its time over the other's, and what we want that to be at most
    ("CFMAE / MAE", "cfmae", "mae", 1.2),
    ("MCMAE / MAE", "mcmae", "mae", 1.25),
    ("MCMAE sparse / dense", "mcmae", "mcmae-dense", 1 / 1.25),
    ("CoMA frozen / MAE at 60 %", "coma", "mae-60", 0.9),
    ("CoMA none / MAE at 60 %", "coma-none", "mae-60", 0.65),
    ("CoMA common / MAE at 60 %", "coma-common", "mae-60", None),
    ("CoMA shared / MAE at 60 %", "coma-shared", "mae-60", None),
    ("SemanticMIM / plain, HOG", "semanticmim", "semanticmim-plain", 1.05),
    ("SemanticMIM / plain, dVAE", "beit", "beit-plain", 1.05),
    ("VideoMCMAE sparse / dense", "video", "video-dense", None),
    ("VideoMCMAE / VideoMAE's layout", "video", "videomae", None),
    ("MAE / transformers' MAE", "mae", "peer-transformers", None),
    ("MAE / lightly's MAE", "mae", "peer-lightly", None),
    ("MAE / vit-pytorch's MAE", "mae", "peer-vit-pytorch", None),
    ("MAE / mmpretrain's MAE", "mae", "peer-mmpretrain-mae", None),
    ("MAE / its authors'", "mae", "peer-mae-authors", None),
    ("CFMAE / MultiMAE", "cfmae", "peer-multimae", None),
    ("MCMAE / its authors' ConvMAE", "mcmae", "peer-convmae", None),
    ("MCMAE dense / its authors' ConvMAE", "mcmae-dense", "peer-convmae", None),
    ("CoMA frozen / Hiera's MAE", "coma", "peer-hiera", None),
    ("CoMA none / Hiera's MAE", "coma-none", "peer-hiera", None),
    ("CoMA shared / Hiera's MAE", "coma-shared", "peer-hiera", None),
    ("SemanticMIM, HOG / its authors'", "semanticmim", "peer-semanticmim", None),
    ("SemanticMIM, dVAE / its authors'", "beit", "peer-semanticmim-dvae", None),
    ("plain, HOG / mmpretrain's MaskFeat", "semanticmim-plain", "peer-mmpretrain-maskfeat", None),
    ("plain, dVAE / mmpretrain's BEiT", "beit-plain", "peer-mmpretrain-beit", None),
)


def child(args: argparse.Namespace, **changes: object) -> dict | None:
    """Time one row in a process of its own; None where memory did not suffice."""
    given = {k: v for k, v in vars(args).items() if k != "run"} | changes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        given["json"] = str(path)
        job = subprocess.run(
            [sys.executable, "-m", "tools.benchmark", "one", json.dumps(given)],
            capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        if path.exists():
            return json.loads(path.read_text())
    words = "out of memory", "can't allocate memory"
    if job.returncode == -9 or any(w in job.stderr for w in words):
        return None
    said = job.stderr.strip().removeprefix("benchmark: error: ") or f"status {job.returncode}"
    said = said.splitlines()[-1] if "Traceback" in said else said
    raise UserError(f"{given['rows'] or given['method']}: {said}")


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def choose_rows(args: argparse.Namespace, default: Sequence[str]) -> list[str]:
    """The rows that the flags name, [""] for --method; UserError where one cannot run here."""
    rows = [""] if args.method else args.rows.split(",") if args.rows else [*default]
    known = (*ROWS, *VIDEO, *peers.PEERS)
    if unknown := [r for r in rows if r not in known and not args.method]:
        raise UserError(f"--rows {','.join(unknown)}: choose from {', '.join(known)}")
    named = args.peers is None or any(r in peers.PEERS for r in rows)
    more = {b: a for _, a, b, _ in RATIOS if a in rows and b in peers.PEERS and not named}
    lacking = {p: peers.missing(p, args.peers or "") for p in (*rows, *more) if p in peers.PEERS}
    for row, line in lacking.items():
        if line and row in rows:
            raise UserError(line)
        if line:
            print(f"left out {line}", flush=True)
    return rows + [p for p in more if not lacking[p]]


def time_rows(args: argparse.Namespace, rows: Sequence[str]) -> list[dict]:
    """Time the rows in turns: one dict each, with the times of all rounds."""
    found: dict[str, dict] = {}
    for turn in range(args.rounds):
        for row in rows:
            result = child(args, rows=row, details=turn == 0)
            if result is None:
                raise UserError(f"{row}: not enough memory for batch {args.batch_size}")
            kept = found.setdefault(row, result)
            if turn:
                kept["times"] += result["times"]
                kept["cpu"] += result["cpu"]
            times, cpu = (" ".join(f"{t:.3f}" for t in result[k]) for k in ("times", "cpu"))
            print(f"round {turn + 1}, {result['row']}: {times} s, of the CPU {cpu} s", flush=True)
    return list(found.values())


def step(args: argparse.Namespace) -> list[dict]:
    """Time the chosen rows, print the table and the ratios."""
    rows, device = choose_rows(args, ROWS), World(args.device, args.precision).device
    found, cuda = time_rows(args, rows), device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    how = f"batch {args.batch_size}, {args.rounds} x {args.steps} steps"
    how += ", compiled" if args.compile else ""
    print(f"\n{name}, torch {torch.__version__}, {args.precision}, {how}\n")
    print(table_line(HEAD), table_line(["---"] * len(HEAD)), sep="\n")
    for r in found:
        r |= {"median": statistics.median(r["times"]), "batch_size": args.batch_size}
        r["cpu_median"] = statistics.median(r["cpu"])
        r |= {"device": name, "precision": args.precision, "compile": args.compile}
        r |= {"torch": torch.__version__, "images_per_s": args.batch_size / r["median"]}
        flops = r["flops_step"] * args.batch_size
        r["share"] = flops / r["median" if cuda else "cpu_median"] / r["matrix_peak"]
        print(table_line(cells(r)))
    unit = "GFLOP/s" if cuda else "GFLOP a CPU second"
    print(f"\nmatrix product: {found[0]['matrix_peak'] / 1e9:.0f} {unit}")
    medians = {r["row"]: r for r in found}
    for what, a, b, bound in RATIOS:
        if a in medians and b in medians:
            time, cpu = (medians[a][k] / medians[b][k] for k in ("median", "cpu_median"))
            words = "" if cuda else f"{cpu:.3f} of its CPU seconds, "
            wanted = f", wanted at most {bound:.2f}" if bound else ""
            print(f"{what}: {words}{time:.3f} of its time{wanted}")
    for r in found:
        dearest = sorted(r["operators"].items(), key=lambda x: -x[1])[:SHOWN]
        print(f"{r['row']}: {', '.join(f'{k} {v:.1%}' for k, v in dearest)}")
    return found


SHOWN = 12  # operators, of all that a step has
HEAD = (
    "row", "parameters, M", "forward GFLOP", "step, ms (min-max)", "images/s",
    "CPU s a step (min-max)", "share of peak",
    "peak memory, MiB", "encoder / decoder / other / optimizer, %",
)  # fmt: skip


def cells(r: dict) -> list[str]:
    """A row of the table, as HEAD names its columns."""
    times, parts = r["times"], r["parts"]
    ends = parts.get("encoder", 0), parts.get("decoder", 0), parts["optimizer"]
    split = [f"{100 * x:.0f}" for x in (*ends[:2], 1 - sum(ends), ends[2])]
    ms = f"{1e3 * r['median']:.0f} ({1e3 * min(times):.0f}-{1e3 * max(times):.0f})"
    cpu = f"{r['cpu_median']:.2f} ({min(r['cpu']):.2f}-{max(r['cpu']):.2f})"
    return [
        r["row"], f"{r['parameters'] / 1e6:.1f}", f"{r['flops'] / 1e9:.2f}", ms,
        f"{r['images_per_s']:.2f}", cpu, f"{r['share']:.0%}", f"{r['peak']:.0f}", " / ".join(split),
    ]  # fmt: skip


def memory(args: argparse.Namespace) -> list[dict]:
    """Find the largest micro-batch that fits, and what 1.28 million file names take."""
    cuda, results = World(args.device, args.precision).device.type == "cuda", []
    for row in choose_rows(args, ("mae", "cfmae", "mcmae", "coma", "semanticmim")):

        def peak_of(n: int, row: str = row) -> float | None:
            found = child(args, rows=row, batch_size=n, steps=1, warmup=1, details=False)
            return found and found["peak"]

        largest, peaks = largest_batch(peak_of, cuda)
        name = row or args.method
        results.append({"row": name, "micro_batch": largest, "peaks": peaks})
        shown = ", ".join(f"{n}: {p:.0f} MiB" for n, p in sorted(peaks.items()))
        print(f"{name}, {args.precision}: largest micro-batch {largest} ({shown})")
    return [*results, file_list()]


def step_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rows", help=f"comma-separated, of {', '.join((*ROWS, *VIDEO))}")
    p.add_argument("--method", choices=SCRIPTS)
    p.add_argument("--model", default="base", help="preset, with --method")
    p.add_argument("--flags", default="", help='more flags for the scripts: --flags="--a 1 --b"')
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--compile", action="store_true")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--steps", type=int, default=3, help="timed steps a round")
    p.add_argument("--warmup", type=int, default=2, help="steps before them")
    p.add_argument("--rounds", type=int, default=2)
    words = "also others' models, and those that are cloned in DIR (tools/peers.py)"
    p.add_argument("--peers", metavar="DIR", nargs="?", const="", help=words)


def loader_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", help="folder of images; default: scenes written as JPEG")
    p.add_argument("--count", type=int, default=200, help="images")
    p.add_argument("--short-side", type=int, default=256, help="of what is packed reduced")
    p.add_argument("--feed", type=float, help="images/s of a step, to count the cores for it")


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = engine.Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add_flags, words in (
        ("step", step, step_flags, stopwatch.__doc__),
        ("memory", memory, step_flags, memory.__doc__),
        ("loader", loader, loader_flags, loader.__doc__),
        ("scaling", lambda args: scaling.scaling(args, child, PLAIN), scaling.add_flags,
         scaling.__doc__),
        ("precision", lambda args: precision.precision(args, PLAIN), precision.add_flags,
         precision.__doc__),
        ("detect", lambda args: benchmark_detect.run(args, child), benchmark_detect.add_flags,
         benchmark_detect.__doc__),
    ):  # fmt: skip
        p = commands.add_parser(name, description=words, formatter_class=raw)
        p.set_defaults(run=run)
        add_flags(p)
        if name != "loader":
            p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        p.add_argument("--json", help="write the results there")
    args = parser.parse_args(argv)
    for name, least in {"batch_size": 1, "steps": 1, "rounds": 1, "count": 1, "warmup": 0}.items():
        if (n := getattr(args, name, least)) < least:
            parser.error(f"--{name.replace('_', '-')} {n}: wanted {least} or more")
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["one"]:
        args = argparse.Namespace(**json.loads(argv[1]))
        detect = args.command == "detect"
        found = benchmark_detect.one(args) if detect else stopwatch.one(args, ROWS | VIDEO)
        Path(args.json).write_text(json.dumps(found))
        return 0
    args = parse(argv)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    results = args.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    engine.command("benchmark", main)
