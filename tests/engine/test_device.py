"""What a GPU would refuse, or wait for, found without one: steps on pretended tensors.

FakeTensorMode works out devices and shapes and computes no values. So it raises where a constant
lies on another device, and where a step reads a value, which a device would have to be waited for.
It knows no backward pass there, which here is torch's own: what that consists of, a CPU tells.
"""

import contextlib
import importlib
from unittest import mock

import engine  # first: it sets how threads wait

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import mae
from test_cuda import PRETRAINING, TRANSFER

FLAGS = "--data shapes --model tiny --device cpu --workers 0 --batch-size 4 --val-samples 4".split()
FLAGS += ["--precision", "fp32"]
aten = torch.ops.aten


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


def first_step(command, out):
    """(model, batch) as the script's own main makes them."""

    def steps(run, model, *_):
        batch = run.collate([run.train_set[pair] for pair in run.sampler.indices(0)[:2]])
        raise Reached(model, batch)

    script, *flags = command.split()
    with mock.patch.object(engine.Run, "steps", steps), pytest.raises(Reached) as reached:
        importlib.import_module(script).main([*flags, *FLAGS, "--output", str(out)])
    return reached.value.args


@pytest.fixture(scope="module", params=PRETRAINING + TRANSFER)
def step(request, tmp_path_factory):
    return first_step(request.param, tmp_path_factory.mktemp("run"))


class Copies(TorchDispatchMode):
    """Raises where something is copied from the host in a step, which waits until it is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kinds = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
        if func.overloadpacket in (aten._to_copy, aten.copy_) and len(kinds) > 1:
            raise RuntimeError("copied from the host")
        return out


@contextlib.contextmanager
def in_bf16():
    """Autocast of a GPU, whose lists are not a CPU's; torch.autocast needs one to be there."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def pretend(model, batch, precision=contextlib.nullcontext):
    """Loss and logs of a step on a GPU that is not there."""
    with FakeTensorMode() as mode, Copies(), precision():

        def fake(x):
            return torch.empty_like(mode.from_tensor(x), device="cuda")

        state = {k: fake(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
        batch = {k: fake(v) for k, v in batch.items()}
        return functional_call(model, state, (batch, torch.empty((), device="cuda")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("precision", [contextlib.nullcontext, in_bf16])
def test_step__stays_on_the_device_and_reads_no_value(step, precision):
    loss, logs = pretend(*step, precision)
    assert loss.ndim == 0 and loss.dtype == torch.float32
    assert {x.device.type for x in (loss, *logs.values())} == {"cuda"}


def test_in_bf16__multiplies_in_bf16():
    with FakeTensorMode(), in_bf16():
        x = torch.empty(2, 2, device="cuda")
        assert (x @ x).dtype == torch.bfloat16 and x.sum().dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(
    "line, error",
    [
        (lambda mask: mask & torch.ones(mask.shape, dtype=torch.bool), RuntimeError),
        (lambda mask: mask & torch.tensor([True]).to(mask.device), RuntimeError),
        (lambda mask: mask & bool(mask.any()), DataDependentOutputException),
    ],
    ids=["constant on the CPU", "constant copied", "value read"],
)
def test_pretend__sees_what_a_gpu_would_refuse(tmp_path, monkeypatch, line, error):
    model, batch = first_step("mae", tmp_path)
    make = mae.make_mask
    monkeypatch.setattr(mae, "make_mask", lambda *args: line(make(*args)))
    with pytest.raises(error):
        pretend(model, batch)


# What a GPU refuses with --deterministic: torch.use_deterministic_algorithms has the list, the
# longest in torch 2.6. It is of modules; these are their operators. A bilinear resize is none of
# them, as torch has another way for it then.
REFUSED = set(
    "histc kthvalue median put_ scatter_reduce scatter_reduce_ grid_sampler_2d_backward "
    "avg_pool3d_backward max_pool3d_with_indices_backward _adaptive_avg_pool2d_backward "
    "_adaptive_avg_pool3d_backward adaptive_max_pool2d_backward max_unpool2d max_unpool3d "
    "upsample_linear1d_backward upsample_bicubic2d_backward upsample_trilinear3d_backward "
    "_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward reflection_pad1d_backward "
    "reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward "
    "replication_pad2d_backward replication_pad3d_backward _ctc_loss_backward".split()
)


class Refused(TorchDispatchMode):
    """Notes the operators that a GPU would refuse."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        refused = name in REFUSED
        refused |= name == "cumsum" and args[0].is_floating_point()
        refused |= name == "nll_loss2d_forward" and args[3] != 0  # unless it is not summed up
        self.names |= {name} if refused else set()
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_step__has_deterministic_operators_alone(step):
    model, batch = step
    with Refused() as refused:
        loss, _ = model(batch, torch.tensor(0.5))
        loss.backward()
    model.zero_grad()
    assert not refused.names


def test_refused__are_seen():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    with Refused() as refused:
        x.cumsum(0)
        F.cross_entropy(x, torch.zeros(2, 4, 4, dtype=torch.long))
        F.pad(F.adaptive_avg_pool2d(x, 2), (1, 1, 1, 1), mode="reflect").sum().backward()
    assert len(refused.names) == 4
