"""--help of every program: at most 40 flags, in groups, and none that only the program sets; and
what starting a script costs: no import that only a folder of photographs needs.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = "mae cfmae semanticmim mcmae coma_dyvit videomcmae".split()
TRANSFERS = [
    f"downstream.{name}" for name in "finetune finetune_clips probe segment detect".split()
]


@pytest.mark.parametrize("name", PROGRAMS + TRANSFERS)
def test_help__at_most_forty_flags(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z0-9-]+)", text, re.M)
    assert stop.value.code == 0 and 20 < len(flags) <= 40, len(flags)
    assert re.search(r"^  tiny: --", text, re.M) and not re.search(r"^  \w+: *$", text, re.M)
    assert not {"--description"} & set(flags)
    assert all(f"\n{group}:\n" in text for group in ("data", "optimisation", "run"))


@pytest.mark.slow
def test_scripts__import_without_torchvision():
    code = f"import sys, {', '.join(PROGRAMS)}; print('torchvision' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root) == b"False\n"
