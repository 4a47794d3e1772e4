"""Kill a run again and again, resume it each time, and compare with the run that was let alone.

    python tests/campaign_kill.py                          SIGKILL, one process
    python tests/campaign_kill.py --ranks 2                SIGKILL to torchrun and all below it
    python tests/campaign_kill.py --ranks 2 --signal TERM  SIGTERM to torchrun, two micro-batches

The run saves after every step. Of the SIGKILLs a third come while the program still starts, a third
at a random moment of training, a third as soon as the temporary file of a save is seen. The last
line says how many came when, whether weights and optimizer are bit for bit the same, and how much a
number in the log differs at most (with ranks, a mean over them is rounded once more where a run is
resumed). Takes about ten seconds a kill; exit status 1 where anything differs.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import tiny_run

FLAGS = ["--epochs", 60]  # 300 steps


def moment(kind: str, out: Path, process, draw: random.Random) -> None:
    """Wait for the moment to strike, or for the end of the process."""
    if kind == "start":
        time.sleep(draw.uniform(0, 4))
        return
    size = log_size(out)
    while log_size(out) == size and process.poll() is None:  # a line is written: it trains
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 1))
    while kind == "save" and process.poll() is None and not (out / "last.pt.tmp").exists():
        pass


def log_size(out: Path) -> int:
    path = out / "log.jsonl"
    return path.stat().st_size if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, term = random.Random(args.seed), args.signal == "TERM"
    flags = [*FLAGS, *(["--micro-batch", 2] if term else ["--save-minutes", 0])]
    at = Path(tempfile.mkdtemp(prefix="campaign-kill-"))
    with tiny_run.start(at / "whole", *flags, ranks=args.ranks) as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    out, kinds, torn, kills = at / "killed", {}, 0, 0
    while True:
        began = time.time()
        kind = "train" if term else ["train", "save", "start"][kills % 3]
        with tiny_run.start(out, *flags, "--resume", ranks=args.ranks) as process:
            if kills < args.kills:
                moment(kind, out, process, draw)
            if kills >= args.kills or process.poll() is not None:
                output, _ = process.communicate()
                break
            if term:
                process.send_signal(signal.SIGTERM)
                output, _ = process.communicate(timeout=60)
                assert "stopped; continue" in output, output
            else:
                tiny_run.kill(process)
        kills += 1
        kinds[kind] = kinds.get(kind, 0) + 1
        torn += (out / "last.pt.tmp").exists() and (out / "last.pt.tmp").stat().st_mtime > began
        step = tiny_run.checkpoint(out)["step"] if (out / "last.pt").exists() else "none"
        print(f"{args.signal} {kills} ({kind}): checkpoint at step {step}", flush=True)
    assert process.returncode == 0, output
    same = tiny_run.same_result(at / "whole", out)
    pairs = zip(tiny_run.lines(at / "whole"), tiny_run.lines(out), strict=True)
    log = max(abs(a[k] - b[k]) / max(abs(a[k]), 1e-9) for a, b in pairs for k in a)
    print(
        f"{args.ranks} ranks, {kills} x SIG{args.signal} {kinds}, {torn} amid a save: "
        f"weights and optimizer {'same' if same else 'DIFFER'}, log within {log:.1g}"
    )
    return 0 if same and log <= (0 if args.ranks == 1 else 1e-6) else 1


if __name__ == "__main__":
    sys.exit(main())
