"""What starting a script costs: no import that only a folder of photographs needs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_scripts__import_without_torchvision():
    names = "mae, cfmae, semanticmim, mcmae, coma_dyvit, videomcmae"
    code = f"import sys, {names}; print('torchvision' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
