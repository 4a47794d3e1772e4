"""docs/tour.ipynb: its cells run, and what is stored in it is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs" / "tour.ipynb"
CELLS = [c for c in json.loads(TOUR.read_text())["cells"] if c["cell_type"] == "code"]
DRIVER = """
import json, sys, types
shown = []
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].version_info = 9, 0  # matplotlib asks for it
display = sys.modules["IPython.display"] = types.ModuleType("IPython.display")
display.Image, display.display = (lambda path: path), shown.append
scope = {}
for cell in json.load(open("docs/tour.ipynb"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), scope)
        if "MORE" in scope:
            scope |= {"TRAIN": 20, "TEST": 10}
            scope["MORE"] = "--steps 2 --batch-size 4 --val-samples 4 --workers 0 --device cpu"
print("shown", len(shown))
"""


def test_tour__its_outputs_are_stored_and_small():
    outputs = [o for cell in CELLS for o in cell["outputs"]]
    assert not any(o["output_type"] == "error" for o in outputs)
    calls = sum("".join(cell["source"]).count("show(f") for cell in CELLS)
    calls += sum("".join(cell["source"]).count('show("') for cell in CELLS)
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == calls > 10 and TOUR.stat().st_size < 1e6
    text = "".join("".join(o.get("text", "")) for o in outputs)
    assert "finished: step 625 of 625" in text  # a training that ran there
    assert "after five minutes" in text and "pip install" not in text
    assert "/work" not in text and "/tmp" not in text


@pytest.mark.slow
def test_tour__its_cells_run(tmp_path):
    """All of them, in a folder of links to this one, with a training of two steps."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "data") and path.name[0] != ".":
            os.symlink(path, tmp_path / path.name)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lacking = done.stdout.count("pip install matplotlib")
    pictures = sum("image/png" in o.get("data", {}) for cell in CELLS for o in cell["outputs"])
    assert f"shown {pictures - lacking}\n" in done.stdout and lacking in (0, 3)
    assert "finished: step 2 of" in done.stdout and "most frequent class" in done.stdout
    assert (tmp_path / "runs/tour/cfmae/last.pt").exists() and not (ROOT / "runs/tour").is_symlink()
