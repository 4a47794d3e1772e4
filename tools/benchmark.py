"""Time and memory of the training step and of the loader, on the machine at hand.

    python -m tools.benchmark step                                # every row below, batch 32
    python -m tools.benchmark step --rows mae,cfmae --precision bf16 --rounds 3 --json out.json
    python -m tools.benchmark step --method mcmae --model large --flags "--no-sparse"
    python -m tools.benchmark step --rows mae --peers             # beside other libraries' models
    python -m tools.benchmark step --rows mcmae,peer-convmae --peers-from DIR  # the authors' own
    python -m tools.benchmark loader --data data/imagenet --feed 1500
    python -m tools.benchmark memory --rows mae,cfmae

`step` times what the run does with a batch that is there already: forward, backward, clipping where
the recipe has it, AdamW. Each row runs in a process of its own, so that its peak memory is its own;
the rows take turns for `--rounds` rounds, so that a machine's drift meets all of them. Median of
all steps, with the smallest and the largest. Of that:

    forward GFLOP   torch.utils.flop_counter, of an image; 2 a multiply-add
    share of peak   forward and backward FLOPs over the time, over the rate of a matrix product at
                    this precision on this device (2048^3 on a CPU, 8192^3 on CUDA)
    parts           one more step, in which a dispatch mode times each operator and asks which
                    module it belongs to, forward or backward. Shares, as it slows the step
"""

import argparse
import importlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from torch.utils.module_tracker import ModuleTracker

import data
import shapes
import targets
from engine import UserError
from tools import peers
from tools.loader import loader

ROWS = {  # name: (script, its flags)
    "mae": ("mae", ""),
    "mae-60": ("mae", "--mask-ratio 0.6"),
    "cfmae": ("cfmae", ""),
    "mcmae": ("mcmae", ""),
    "mcmae-dense": ("mcmae", "--no-sparse"),
    "coma": ("coma_dyvit", "--evaluation frozen"),
    "coma-none": ("coma_dyvit", "--evaluation none"),
    "coma-shared": ("coma_dyvit", "--evaluation shared"),
    "semanticmim": ("semanticmim", ""),
    "semanticmim-plain": ("semanticmim", "--proxies 0"),
    "semanticmim-80": ("semanticmim", "--mask-ratio 0.8"),
    "beit": ("semanticmim", "--model base-beit --tokenizer random"),
    "beit-plain": ("semanticmim", "--model base-beit --tokenizer random --proxies 0"),
}
RATIOS = (  # what is compared: its time over the other's, and what we want that to be at most
    ("CFMAE / MAE", "cfmae", "mae", 1.2),
    ("MCMAE / MAE", "mcmae", "mae", 1.25),
    ("MCMAE sparse / dense", "mcmae", "mcmae-dense", 1 / 1.25),
    ("CoMA frozen / MAE at 60 %", "coma", "mae-60", 0.9),
    ("CoMA none / MAE at 60 %", "coma-none", "mae-60", 0.65),
    ("CoMA shared / MAE at 60 %", "coma-shared", "mae-60", None),
    ("SemanticMIM / plain, HOG", "semanticmim", "semanticmim-plain", 1.05),
    ("SemanticMIM / plain, dVAE", "beit", "beit-plain", 1.05),
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
    ("plain, HOG / mmpretrain's MaskFeat", "semanticmim-plain", "peer-mmpretrain-maskfeat", None),
    ("plain, dVAE / mmpretrain's BEiT", "beit-plain", "peer-mmpretrain-beit", None),
)


# ------------------------------------------------------------------------------------------- step


def random_tokenizer(path: Path) -> None:
    """Write a state dict with the shapes of DALL-E's image encoder, and random values."""
    torch.save(targets.random_state(256, 2, 8192), path)


def build(script: str, flags: list[str]) -> tuple[engine.Config, nn.Module]:
    """The Config and model that a script makes of its flags; `--tokenizer random` is ours."""
    module = importlib.import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        if "random" in flags:
            random_tokenizer(Path(folder, "tokenizer.pth"))
            flags = [f"{folder}/tokenizer.pth" if f == "random" else f for f in flags]
        cfg = engine.parse(module.Config, module.PRESETS, "", flags)
        make = {"mae": "MAE", "cfmae": "CFMAE", "semanticmim": "SemanticMIM", "mcmae": "MCMAE",
                "coma_dyvit": "CoMA"}[script]  # fmt: skip
        torch.manual_seed(0)
        return cfg, getattr(module, make)(cfg)


def scenes(cfg: engine.Config, size: int) -> dict[str, torch.Tensor]:
    """A batch of ShapeScenes, with the granularities that the method asks for."""
    granularities = getattr(cfg, "names", ("rgb",))
    scenes = shapes.ShapeScenes("train", cfg.image_size, max(cfg.patch_size // 4, 1), granularities)
    return data.collate([scenes[0, i] for i in range(size)])


def backward_of_convolution(grad, x, w, _bias, _stride, _pad, _dil, transposed, *rest, **_) -> int:
    """FLOPs of a convolution's backward; flop_counter's own takes a grouped one for a dense one."""
    (_, _, wanted), dims = rest[-3:], (x, w, grad)
    return sum(wanted[:2]) * conv_flop_count(*dims, transposed=transposed)


def count_flops(run: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """FLOPs of a forward pass, and of it with its backward pass."""
    mapping = {torch.ops.aten.convolution_backward: backward_of_convolution}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        loss = run()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


class Parts(TorchDispatchMode):
    """Times every operator and books it on the part of the model that it belongs to."""

    def __init__(self, cuda: bool):
        super().__init__()
        self.cuda, self.tracker, self.spans = cuda, ModuleTracker(), []

    def __enter__(self):
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.tracker.__exit__(*args)

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        began = self.now()
        out = func(*args, **(kwargs or {}))
        owners = [p.partition(".")[2] for p in self.tracker.parents]  # "" is the model itself
        names = ("encoder", "decoder", "evaluation")
        part = next((n for n in names if any(o.startswith(n) for o in owners)), "masks, loss")
        self.spans.append((part, began, self.now()))
        return out

    def shares(self) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
        total = defaultdict(float)
        for part, a, b in self.spans:
            total[part] += a.elapsed_time(b) if self.cuda else b - a
        whole = sum(total.values())
        return {k: v / whole for k, v in sorted(total.items())}


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a square matrix product in ten, FLOP/s."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times[2:])


def on_cuda(args: argparse.Namespace) -> bool:
    """Whether --device means CUDA here; UserError where it asks for a device that is not there."""
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        raise UserError("--device cuda: torch sees no CUDA device; --device cpu works anywhere")
    return found and args.device != "cpu"


def one(args: argparse.Namespace) -> dict:
    """Time one row in this process."""
    cuda = on_cuda(args)
    device = torch.device("cuda" if cuda else "cpu")
    bf16 = args.precision == "bf16"
    if not cuda:
        engine.keep_freed_memory()
    if args.rows in peers.PEERS:
        cfg, model = engine.Config(), peers.build(args.rows, args.peers_from)
    else:
        script, flags = ROWS.get(args.rows) or (args.method, f"--model {args.model}")
        cfg, model = build(script, f"{flags} {args.flags}".split())
    model = model.to(device)
    step_model = torch.compile(model) if args.compile else model
    batch = engine.to_device(scenes(cfg, args.batch_size), device)
    optimizer = cfg.optimizer(engine.parameter_groups(model, cfg.weight_decay))
    progress = engine.ramp(0.5, device)

    def forward(model: nn.Module = step_model, batch: dict = batch) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(batch, progress)[0]

    def update() -> None:
        if cfg.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        if hasattr(model, "follow"):
            model.follow()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    times, updates = [], []
    for _ in range(args.warmup + args.steps):
        began = clock()
        forward().backward()
        middle = clock()
        update()
        end = clock()
        times.append(end - began)
        updates.append(end - middle)
    times, updates = times[args.warmup :], updates[args.warmup :]
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"row": args.rows or f"{args.method}-{args.model}", "times": times, "peak": peak}
    if args.details:
        few = {k: v[:2] for k, v in batch.items()}
        flops, whole = (n / 2 for n in count_flops(lambda: forward(model, few)))
        with Parts(cuda) as parts:
            forward(model).backward()
        rest = statistics.median(updates) / statistics.median(times)
        shares = {k: v * (1 - rest) for k, v in parts.shares().items()} | {"optimizer": rest}
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rate = matrix_peak(device, torch.bfloat16 if bf16 else torch.float32)
        result |= {"parameters": count, "flops": flops, "flops_step": whole, "parts": shares,
                   "matrix_peak": rate}  # fmt: skip
    return result


def child(args: argparse.Namespace, **changes: object) -> dict | None:
    """Run `one` in a process of its own; None where memory did not suffice."""
    given = vars(args) | changes
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
    known = (*ROWS, *peers.PEERS)
    if unknown := [r for r in rows if r not in known and not args.method]:
        raise UserError(f"--rows {','.join(unknown)}: choose from {', '.join(known)}")
    lacking = {p: line for p in peers.PEERS if (line := peers.missing(p, args.peers_from))}
    for row in lacking:
        if row in rows:
            raise UserError(lacking[row])
        if args.peers:
            print(f"left out {lacking[row]}", flush=True)
    return rows + [p for p in peers.PEERS if args.peers and p not in rows and p not in lacking]


def step(args: argparse.Namespace) -> list[dict]:
    """Time the chosen rows in turns, print the table and the ratios."""
    rows = choose_rows(args, ROWS)
    found: dict[str, dict] = {}
    for turn in range(args.rounds):
        for row in rows:
            result = child(args, rows=row, details=turn == 0)
            if result is None:
                raise UserError(f"{row}: not enough memory for batch {args.batch_size}")
            kept = found.setdefault(row, result)
            if turn:
                kept["times"] += result["times"]
            times = " ".join(f"{t:.3f}" for t in result["times"])
            print(f"round {turn + 1}, {result['row']}: {times} s", flush=True)
    cuda = on_cuda(args)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    how = f"{args.rounds} x {args.steps} steps" + (", compiled" if args.compile else "")
    where = f"{name}, torch {torch.__version__}, {args.precision}"
    print(f"\n{where}, batch {args.batch_size}, {how}\n")
    head = ("row", "parameters, M", "forward GFLOP", "step, ms (min-max)", "images/s",
            "share of peak", "peak memory, MiB", "encoder / decoder / other / optimizer, %")
    print(table_line(head), table_line(["---"] * len(head)), sep="\n")
    for r in found.values():
        times, parts = r["times"], r["parts"]
        r |= {"median": statistics.median(times), "batch_size": args.batch_size, "device": name,
              "precision": args.precision, "torch": torch.__version__, "compile": args.compile}
        r["images_per_s"] = args.batch_size / r["median"]
        r["share"] = r["flops_step"] * r["images_per_s"] / r["matrix_peak"]
        ends = parts.get("encoder", 0), parts.get("decoder", 0), parts["optimizer"]
        split = [f"{100 * x:.0f}" for x in (*ends[:2], 1 - sum(ends), ends[2])]
        ms = f"{1e3 * r['median']:.0f} ({1e3 * min(times):.0f}-{1e3 * max(times):.0f})"
        print(table_line([
            r["row"], f"{r['parameters'] / 1e6:.1f}", f"{r['flops'] / 1e9:.2f}", ms,
            f"{r['images_per_s']:.2f}", f"{r['share']:.0%}", f"{r['peak']:.0f}", " / ".join(split),
        ]))  # fmt: skip
    print(f"\nmatrix product: {next(iter(found.values()))['matrix_peak'] / 1e9:.0f} GFLOP/s")
    for what, a, b, bound in RATIOS:
        if a in found and b in found:
            wanted = f", wanted at most {bound:.2f}" if bound else ""
            print(f"{what}: {found[a]['median'] / found[b]['median']:.3f} of its time{wanted}")
    return list(found.values())


# ----------------------------------------------------------------------------------------- memory


def memory(args: argparse.Namespace) -> list[dict]:
    """Find the largest micro-batch that fits, and what 1.28 million file names take."""
    cuda = on_cuda(args)
    results = []
    for row in choose_rows(args, ("mae", "cfmae", "mcmae", "coma", "semanticmim")):
        peaks: dict[int, float] = {}

        def fits(n: int, row: str = row, peaks: dict = peaks) -> bool:
            if not cuda and len(peaks) > 1:  # a CPU kills what asks for too much: stop before
                (a, pa), (b, pb) = sorted(peaks.items())[-2:]
                if pa + (pb - pa) / (b - a) * (n - a) > 0.9 * available():
                    return False
            result = child(args, rows=row, batch_size=n, steps=1, warmup=1, details=False)
            if result:
                peaks[n] = result["peak"]
            return result is not None

        low, high = 0, 8
        while fits(high):
            low, high = high, 2 * high
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        results.append({"row": row or args.method, "micro_batch": low, "peaks": peaks})
        shown = ", ".join(f"{n}: {p:.0f} MiB" for n, p in sorted(peaks.items()))
        print(f"{row or args.method}, {args.precision}: largest micro-batch {low} ({shown})")
    count = 1_281_167
    name = b"n%08d/n%08d_%d.JPEG"
    names = np.array([name % (i % 1000, i % 1000, i) for i in range(count)])
    labels = np.arange(count, dtype=np.int32) % 1000
    with tempfile.TemporaryDirectory() as folder:
        files = data.FileList(names, labels, {"rgb": "train"}, [])
        files.save(folder)
        began = time.perf_counter()
        data.FileList.open(folder)
        opened = time.perf_counter() - began
    size = names.nbytes + labels.nbytes
    print(f"file list of {count} names: {size / 2**20:.1f} MiB, {size / count:.1f} bytes each, "
          f"opened in {1e3 * opened:.1f} ms")
    return results + [{"files": count, "bytes": len(files.block), "open_s": opened}]


def available() -> float:
    """Memory that this machine can still give, MiB."""
    for line in io.StringIO(Path("/proc/meminfo").read_text()):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    raise UserError("this system does not say how much memory it has left")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["one"]:
        args = argparse.Namespace(**json.loads(argv[1]))
        Path(args.json).write_text(json.dumps(one(args)))
        return 0
    raw = argparse.RawDescriptionHelpFormatter
    parser = engine.Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("step", "memory"):
        p = commands.add_parser(name)
        p.add_argument("--rows", help=f"comma-separated, of {', '.join(ROWS)}")
        p.add_argument("--method", choices=sorted({script for script, _ in ROWS.values()}))
        p.add_argument("--model", default="base", help="preset, with --method")
        p.add_argument("--flags", default="", help="more flags for the scripts, in quotes")
        p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
        p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        p.add_argument("--compile", action="store_true")
        p.add_argument("--batch-size", type=int, default=32)
        p.add_argument("--steps", type=int, default=3, help="timed steps a round")
        p.add_argument("--warmup", type=int, default=2, help="steps before them")
        p.add_argument("--rounds", type=int, default=2)
        p.add_argument("--peers", action="store_true", help="also other libraries' models")
        p.add_argument("--peers-from", metavar="DIR", help="clones of mae, MultiMAE, ConvMAE")
    p = commands.add_parser("loader")
    p.add_argument("--data", help="folder of images; default: scenes written as JPEG")
    p.add_argument("--count", type=int, default=200, help="images")
    p.add_argument("--feed", type=float, help="images/s of a step, to count the cores for it")
    for p in commands.choices.values():
        p.add_argument("--json", help="write the results there")
    args = parser.parse_args(argv)
    for name, least in {"batch_size": 1, "steps": 1, "rounds": 1, "count": 1, "warmup": 0}.items():
        if (n := getattr(args, name, least)) < least:
            parser.error(f"--{name.replace('_', '-')} {n}: wanted {least} or more")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    results = {"step": step, "loader": loader, "memory": memory}[args.command](args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    engine.command("benchmark", main)
