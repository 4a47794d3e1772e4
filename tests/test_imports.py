"""What starting a script costs: no import that only a folder of photographs needs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", ["mae", "cfmae", "semanticmim", "mcmae", "coma_dyvit"])
def test_script__imports_without_torchvision(script):
    code = f"import sys, {script}; print('torchvision' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
