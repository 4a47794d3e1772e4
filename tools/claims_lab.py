"""Commands of this project in processes of their own: each once, what it cost, continued.

A command's folder is named after its flags and the settings that these give, so that another preset
is another run. done.json in it says that it ended, and at what cost.
"""

import argparse
import dataclasses
import datetime
import hashlib
import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # on Windows, which `Lab` refuses
    fcntl = resource = None

import engine  # before torch: it sets how threads wait

import torch

from downstream import recipes, segment_recipes
from engine import UserError
from engine.reader import read
from tools.claims_table import DATA

ROOT = Path(__file__).parent.parent


def hardware() -> str:
    """What the runs are on: GPU, or processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def launch(program: str) -> list[str]:
    """What follows `python`: a script's file, or `-m` and a module."""
    return ["-m", program] if "." in program else [f"{program}.py"]


class Lab:
    """Runs commands, each in a folder of its own, and remembers what they cost.

    Args: `args`: the command line's places of data, `runs`, `threads`, `workers`, `save_minutes`.
    """

    def __init__(self, args: argparse.Namespace):
        if fcntl is None:
            raise UserError("claims lock and time processes as Windows does not: run under WSL")
        self.runs, self.args = Path(args.runs), args
        self.places = {default: getattr(args, name) for name, (default, _) in DATA.items()}
        self.rates = {}
        self.learn()

    def learn(self, **rates: float) -> None:
        """Keep rates, CPU seconds an epoch, or of the whole program for a probe; read others'."""
        path = self.runs / "rates.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        self.rates |= known | {k: round(v, 2) for k, v in rates.items()}
        if rates:
            temporary = path.with_suffix(f".{os.getpid()}")  # others read it meanwhile
            temporary.write_text(json.dumps(self.rates, indent=1, sort_keys=True))
            os.replace(temporary, path)

    def folder(self, line: str) -> Path:
        """Where a command's files go: another place once a preset has changed.

        Args: `line`, a script's or a module's name and its flags.
        """
        program, _, flags = line.partition(" ")
        module, recipe = importlib.import_module(program), {}
        if "." not in program:
            argv = shlex.split(flags) + ["--precision", "fp32"]
            recipe = dataclasses.asdict(engine.parse(module.Config, module.PRESETS, "", argv))
        elif program == "downstream.segment":
            recipe = [getattr(segment_recipes, k) for k in ("LINEAR", "TINY", "PRESETS")]
        else:
            recipe = recipes.TINY
        text = json.dumps([program, flags, recipe], sort_keys=True)
        key = hashlib.sha1(text.encode()).hexdigest()[:10]
        return self.runs / f"{program.removeprefix('downstream.')}-{key}"

    def run(self, line: str) -> tuple[Path, dict]:
        """Run a command, unless it was; its folder, and {command, cpu_seconds, ...}.

        Another process that runs it just now is waited for.
        Errors: UserError with the command's own words.
        """
        out = self.folder(line)
        out.mkdir(parents=True, exist_ok=True)
        with open(out.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it with the process
            done = out / "done.json"
            record = json.loads(done.read_text()) if done.exists() else None
            if record is None:
                record = self.execute(line, out)
                done.write_text(json.dumps(record, indent=1))
        return out, record

    def shown(self, line: str) -> str:
        """A command as it stands in a JSON: with the default places, whatever they are here."""
        program, *flags = shlex.split(line)
        line = shlex.join(["python", *launch(program), *flags])
        return line.replace(f"{self.runs}/", "runs/claims/")

    def execute(self, line: str, out: Path) -> dict:
        """Run a command from where its folder left it; what it was, and its cost."""
        shown = self.shown(f"{line} --output {shlex.quote(str(out))}")
        program, *flags = shlex.split(line)
        given = [self.places.get(x, x) for x in flags] + ["--output", str(out)]
        probe, done = program == "downstream.probe", progress(out)
        unknown = done - spent(out)[2]  # what a run had cost that was killed with this tool
        if probe or unknown > 0.9:  # nothing to go on with, or too little left to tell a cost by
            shutil.rmtree(out, ignore_errors=True)
            done = unknown = 0.0
        if not probe:
            given += ["--resume", "--save-minutes", str(self.args.save_minutes)]
        given += ["--workers", str(self.args.workers)]
        said = f"run         {shown}" + (f", from {done:.0%} on" if done else "")
        print(said, file=sys.stderr, flush=True)  # a list or a table is not interrupted
        out.mkdir(exist_ok=True)
        cpu, wall = self.spawn([sys.executable, *launch(program), *given], out / "output.txt")
        share, args = 1 - unknown, self.args
        record = {"command": shown, "cpu_seconds": round(cpu / share, 1)}
        record |= {"wall_seconds": round(wall / share, 1), "continued_from": round(done, 3)}
        record |= {"threads": args.threads, "hardware": hardware(), "revision": revision()}
        return record | {"torch": torch.__version__, "date": datetime.date.today().isoformat()}

    def spawn(self, command: list[str], log: Path) -> tuple[float, float]:
        """CPU and wall seconds of a process that ended well; it is stopped when this one is.

        Those of earlier ones with its log, which were stopped, are among them.
        """
        usage = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # noqa: E731
        before, began, (cpu, wall, _) = usage(), time.monotonic(), spent(log.parent)
        env = os.environ | {"OMP_NUM_THREADS": str(self.args.threads)}
        with open(log, "w") as file:
            child = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                status = child.wait()
            finally:
                if child.poll() is None:  # it saves, and says how to go on
                    child.terminate()
                    child.wait()
                cpu, wall = cpu + usage() - before, wall + time.monotonic() - began
                known = json.dumps([cpu, wall, progress(log.parent)])
                (log.parent / "spent.json").write_text(known)
        if status:
            lines = log.read_text().strip().splitlines() or ["nothing"]
            told = [x.partition(": error: ")[2] for x in lines if ": error: " in x] or lines
            raise UserError(f"{shlex.join(command[1:])} ended with status {status}: {told[-1]}")
        return cpu, wall

    def cost(self, record: dict) -> float:
        return record["wall_seconds" if torch.cuda.is_available() else "cpu_seconds"]


def spent(out: Path) -> list[float]:
    """CPU and wall seconds of a run until it was stopped, and its share of the way."""
    path = out / "spent.json"
    return json.loads(path.read_text()) if path.exists() else [0.0, 0.0, 0.0]


def progress(out: Path) -> float:
    """The share of a run that its checkpoint has behind it."""
    if not (out / "last.pt").exists():
        return 0.0
    content = read(out / "last.pt", mapped=True)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    lines = [json.loads(x) for x in lines if x.endswith("}\n")]  # the last may be torn
    per_epoch = next((x["step"] / x["epoch"] for x in lines if x["epoch"]), 0)
    cfg = content["config"]
    total = cfg.get("iterations") or cfg["epochs"] * per_epoch
    total = min(cfg["steps"] or total, total)
    return min(content["step"] / total, 0.999) if total else 0.0
