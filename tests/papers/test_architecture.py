"""docs/architecture.md: its example of a further method runs as it stands there."""

import importlib.util
import re
import sys
from pathlib import Path

import torch

import engine
from downstream.encoders import METHODS, open_encoder
from tools.models import load_model

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_simmim__the_page_s_script_trains_and_is_a_method(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    path = tmp_path / "simmim.py"
    path.write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1])
    spec = importlib.util.spec_from_file_location("simmim", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "simmim", module)  # its annotations are looked up there
    spec.loader.exec_module(module)
    out = tmp_path / "run"
    flags = "--data shapes --model tiny --image-size 32 --embed-dim 32 --device cpu --workers 0"
    flags += " --precision fp32 --batch-size 8 --val-samples 4 --steps 5"
    module.main([*flags.split(), "--output", str(out)])
    assert engine.load(out / "last.pt", "simmim")["step"] == 5
    assert (out / "preview-0000005.png").exists()
    monkeypatch.setitem(METHODS, "simmim", module)
    encoder, description, _ = open_encoder(checkpoint=out / "last.pt")
    assert description["method"] == "simmim"
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 32)
    method, model, step = load_model(str(out / "last.pt"))
    assert (method, type(model), step) == ("simmim", module.SimMIM, 5)
