"""What a GPU would refuse, or wait for, found without one: steps on pretended tensors.

FakeTensorMode works out devices and shapes and computes no values. So it raises where a constant
lies on another device, and where a step reads a value, which a device would have to be waited for.
It knows no backward pass there, which here is torch's own.
"""

import importlib

import engine  # first: it sets how threads wait

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call

import mae
from test_cuda import PRETRAINING, TRANSFER

FLAGS = "--data shapes --model tiny --device cpu --workers 0 --batch-size 4 --val-samples 4".split()
FLAGS += ["--precision", "fp32"]


def possible():
    """Whether this torch indexes a pretended tensor of a GPU without one; 2.6 does not."""
    try:
        with FakeTensorMode():
            return torch.empty(2, device="cuda")[:, None].ndim == 2
    except RuntimeError:
        return False


pytestmark = pytest.mark.skipif(not possible(), reason="this torch cannot pretend without CUDA")


class Reached(Exception):
    """Carries a model and a batch out of a script's main, at its first step."""


@pytest.fixture
def first_step(monkeypatch, tmp_path):
    """`first_step(command)` is (model, batch) as the script's own main makes them."""

    def steps(run, model, *_):
        batch = run.collate([run.train_set[pair] for pair in run.sampler.indices(0)[:2]])
        raise Reached(model, batch)

    def first_step(command):
        script, *flags = command.split()
        monkeypatch.setattr(engine.Run, "steps", steps)
        with pytest.raises(Reached) as reached:
            importlib.import_module(script).main([*flags, *FLAGS, "--output", str(tmp_path)])
        return reached.value.args

    return first_step


def pretend(model, batch):
    """Loss and logs of a step on a GPU that is not there."""
    with FakeTensorMode() as mode:

        def fake(x):
            return torch.empty_like(mode.from_tensor(x), device="cuda")

        state = {k: fake(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
        batch = {k: fake(v) for k, v in batch.items()}
        return functional_call(model, state, (batch, torch.empty((), device="cuda")))


@pytest.mark.slow
@pytest.mark.parametrize("command", PRETRAINING + TRANSFER)
def test_step__stays_on_the_device_and_reads_no_value(first_step, command):
    model, batch = first_step(command)
    loss, logs = pretend(model, batch)
    assert loss.ndim == 0 and loss.dtype == torch.float32
    assert {x.device.type for x in (loss, *logs.values())} == {"cuda"}


@pytest.mark.parametrize(
    "line, error",
    [
        (lambda mask: mask & torch.ones(mask.shape, dtype=torch.bool), RuntimeError),
        (lambda mask: mask & bool(mask.any()), DataDependentOutputException),
    ],
    ids=["constant on the CPU", "value read"],
)
def test_pretend__sees_what_a_gpu_would_refuse(first_step, monkeypatch, line, error):
    model, batch = first_step("mae")
    make = mae.make_mask
    monkeypatch.setattr(mae, "make_mask", lambda *args: line(make(*args)))
    with pytest.raises(error):
        pretend(model, batch)
