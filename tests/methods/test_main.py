"""What each script's `main` hands to the optimizer."""

import importlib

import pytest
import torch

SCRIPTS = "mae cfmae semanticmim mcmae coma_dyvit videomcmae".split()


class Made(Exception):
    """In the place of a run: what AdamW was given."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_main__optimizer_has_the_settings(name, tmp_path, monkeypatch):
    def made(groups, **kwargs):
        raise Made([g["weight_decay"] for g in groups], kwargs["betas"])

    monkeypatch.setattr(torch.optim, "AdamW", made)
    line = f"--data shapes --model tiny --device cpu --workers 0 --output {tmp_path / 'run'}"
    line += " --weight-decay 0.07 --beta1 0.8 --beta2 0.7"
    with pytest.raises(Made) as e:
        importlib.import_module(name).main(line.split())
    assert e.value.args == ([0.07, 0.0], (0.8, 0.7))
