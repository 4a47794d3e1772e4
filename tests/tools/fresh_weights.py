"""A fixture of the figures' tests: pytest_plugins = ["fresh_weights"]."""

import dataclasses

import pytest
import torch

import engine
from downstream.encoders import METHODS
from tools.models import model_class

TINY = {
    "mae": "--image-size 32 --embed-dim 32 --depth 2 --num-heads 2 --decoder-embed-dim 32",
    "cfmae": "--image-size 32 --embed-dim 32 --depth 2 --num-heads 2 --decoder-embed-dim 32",
    "semanticmim": "--image-size 32 --patch-size 8 --embed-dim 48 --depth 3 --num-heads 3 "
    "--proxies 2",
    "mcmae": "--image-size 32 --embed-dims 16,16,32 --num-heads 2 --decoder-depth 1",
    "coma_dyvit": "--image-size 32 --decoder-depth 1",
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A checkpoint of fresh weights, step 7, of each method: {method: path}."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for name, script in METHODS.items():
        flags = ["--model", "tiny", *TINY[name].split()]
        cfg = engine.parse(script.Config, script.PRESETS, "", flags)
        torch.manual_seed(0)
        state = {"format": engine.FORMAT, "method": name, "step": 7, "optimizer": {}, "window": {}}
        state |= {"config": dataclasses.asdict(cfg), "model": model_class(name)(cfg).state_dict()}
        paths[name] = str(folder / f"{name}.pt")
        engine.save(folder / f"{name}.pt", state)
    return paths
