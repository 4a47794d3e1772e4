"""macOS and Windows, which this was never run on: what Linux alone has is not needed to train."""

import ast
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import engine
import pytest
import tiny_run
from tools import claims_lab, pack

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "engine", "downstream", "tools")
CODE = [p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*.py"))]
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}

# What Windows' Python has not, and how it and macOS start processes.
WITHOUT = """
import multiprocessing, os, signal, sys
sys.modules |= dict.fromkeys("fcntl grp pwd resource termios".split())
for module, names in ((os, "sched_getaffinity getuid mkfifo"),
                      (signal, "sigwait sigwaitinfo sigtimedwait pthread_sigmask SIGKILL")):
    for name in names.split():
        hasattr(module, name) and delattr(module, name)
multiprocessing.set_start_method("spawn", force=True)
"""


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules__import_nothing_that_windows_lacks(path):
    """At their top; inside functions, and in a `try`, it is."""
    for node in ast.parse(path.read_text()).body:
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not POSIX & {x.partition(".")[0] for x in names}, ast.unparse(node)


@pytest.mark.slow
def test_run__where_processes_start_afresh(tmp_path):
    """As on macOS and Windows: a loader process gets the data set and the collation pickled."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    flags = "--data shapes --model tiny --steps 2 --batch-size 2 --val-samples 2 --workers 1"
    done = subprocess.run(
        [sys.executable, "cfmae.py", *flags.split(), "--device", "cpu", "--output", tmp_path / "x"],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished: step 2 of" in done.stdout and "1 loader processes" in done.stdout
    assert '"peak_memory_mib": 0.0' in (tmp_path / "x/log.jsonl").read_text()


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ("passive", "2000")),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
    ],
)
def test_import__sets_how_threads_wait_unless_the_user_has(given, expected, monkeypatch):
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    for name in names:
        monkeypatch.setenv(name, "")  # restored in the end, whatever the import does
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(engine)
    assert tuple(map(os.environ.get, names)) == expected


def test_pack__without_fcntl_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(engine.UserError, match="pack under WSL"), pack.alone(tmp_path):
        pass


def test_claims__without_fcntl_is_one_line(monkeypatch):
    monkeypatch.setattr(claims_lab, "fcntl", None)
    with pytest.raises(engine.UserError, match="under WSL"):
        claims_lab.Lab(None)


def test_device__a_mac_is_told_that_its_cpu_is_used(tmp_path, monkeypatch, capsys):
    there = functools.cache(lambda: True)  # as torch's own
    monkeypatch.setattr("torch.backends.mps.is_available", there)
    assert tiny_run.train(tmp_path, "--steps", 1) == 0
    assert "threads a rank, its MPS is not used, fp32" in capsys.readouterr().out
