"""The scripts as an installed package: a name of its own, whatever lies beside the user's."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "masked_image_modelling"
CODE = f"""
import data  # the user's
from {NAME} import mae
from {NAME}.engine.field import arg
assert mae.engine.Run.__module__ == "{NAME}.engine.run" and arg is mae.arg
assert data.mine and not {{"engine", "files", "common", "tools"}} & set(__import__("sys").modules)
print(mae.__file__)
"""
MORE = f"""
import {NAME}.downstream.finetune as finetune  # which says import engine.config
from {NAME}.engine.field import arg
assert finetune.data.__name__ == "{NAME}.data" and finetune.engine.config.arg is arg
"""


@pytest.fixture
def folder(tmp_path):
    """A user's own folder, where modules have the names of ours."""
    (tmp_path / "own").mkdir()
    for name in "files engine common tools noise".split():
        (tmp_path / "own" / f"{name}.py").write_text("raise RuntimeError('the user\\'s')")
    (tmp_path / "own" / "data.py").write_text("mine = True")
    return tmp_path / "own"


def run(python, folder, *words, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    command = [python, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_package__neither_takes_nor_hides_the_users_modules(folder):
    place = folder.parent / "site"
    place.mkdir()
    os.symlink(ROOT, place / NAME)
    assert run(sys.executable, folder, "-c", CODE, PYTHONPATH=str(place)).strip() == str(
        place / NAME / "mae.py"
    )


def test_package__every_folder_with_code_is_in_it():
    words = (ROOT / "pyproject.toml").read_text()
    packages = words.partition("packages = [")[2].partition("]")[0]
    found = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert {x.strip(' ",\n') for x in packages.split(",")} - {""} == {
        NAME,
        *(f"{NAME}.{name}" for name in found),
    }


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-e",)])
def test_pip__installs_what_python_m_runs(flags, folder):
    """Of a copy, as pip writes build/; torch is that of this environment."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools before 77 does not know pyproject.toml's license")
    venv, copy = folder.parent / "venv", folder.parent / "copy"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    names = [x for x in names if x.endswith(("py", "toml", "LICENSE")) and (ROOT / x).exists()]
    if not names:
        pytest.skip("no git checkout")
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "this.pth").write_text(sysconfig.get_path("purelib"))
    pip = "-m pip install -q --no-deps --no-build-isolation --no-index --no-compile".split()
    run(python, folder, *pip, *flags, copy)
    home = copy if flags else site / NAME
    code = CODE if flags else CODE + MORE
    assert run(python, folder, "-c", code).strip() == str(home / "mae.py")
    assert flags or not [p.name for p in home.iterdir() if p.name in ("tests", "docs", "build")]
    if flags:
        return
    flags = "--data shapes --model tiny --steps 1 --batch-size 2 --val-samples 2 --workers 1"
    said = run(
        python, folder, "-m", f"{NAME}.mae", *flags.split(), "--device", "cpu", "--output", "out"
    )
    assert (folder / "out" / "last.pt").exists()
    assert said.count(f"python -m {NAME}.") == 2 and f"next        python -m {NAME}.tools." in said
