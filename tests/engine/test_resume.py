"""The run as a whole: neither the split over ranks, micro-batches and workers nor interruption
changes its result. Every run here is a `tiny_run`, which crosses epochs and curriculum phases.
"""

import functools
import os
import signal

import pytest
import tiny_run
import torch
from cfmae import CFMAE
from tiny_run import STEPS, Diverging, Interrupted, checkpoint, lines, same_result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs with one rank, two micro-batches, two ranks; and two ranks of which one was stopped."""
    at = tmp_path_factory.mktemp("runs")
    tiny_run.train(at / "one")
    tiny_run.train(at / "micro", "--micro-batch", 4)
    on_rank_1 = functools.partial(Interrupted, step=25, micro=0, rank=1)
    tiny_run.spawn(
        2, at / "store",
        (at / "two", (), CFMAE, 0),
        (at / "two-signal", ("--micro-batch", 2), on_rank_1, 143),
        (at / "bad", (), Diverging, "step 15 is not finite (loss inf, loss_rgb inf, fine 1)"),
    )  # fmt: skip
    return at


def assert_same_curve(a, b):
    a, b = lines(a), lines(b)
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(4, STEPS + 1, 4))
    for key in ("loss", "loss_rgb", "loss_instance", "loss_semantic", "lr"):
        assert [r[key] for r in a] == pytest.approx([r[key] for r in b], rel=1e-5, abs=0), key
    norms = [[r["grad_norm"] for r in x] for x in (a, b)]  # AdamW forgives a wrong scale
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# ------------------------------------------------------------------------- invariant 1: the split


@pytest.mark.parametrize("other", ["two", "micro"])
def test_train__curve_is_that_of_one_rank_and_one_micro_batch(runs, other):
    assert_same_curve(runs / "one", runs / other)
    curve = lines(runs / "one")
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]  # a run that stands still is easy to repeat
    assert {0.0, 1.0} <= {r["a_SG"] for r in curve}  # and the masks changed on the way


def test_train__workers_change_no_bit(runs, tmp_path):
    tiny_run.train(tmp_path, "--workers", 2)
    assert same_result(runs / "one", tmp_path)
    assert lines(runs / "one") == lines(tmp_path)


def test_train__a_log_line_is_the_mean_over_its_steps_and_micro_batches(runs, tmp_path):
    tiny_run.train(tmp_path, "--log-every", 1, "--steps", 12)
    each, window = lines(tmp_path), lines(runs / "micro")
    for i in range(3):
        mean = sum(r["loss"] for r in each[4 * i : 4 * i + 4]) / 4
        assert window[i]["loss"] == pytest.approx(mean, rel=1e-5)


# ----------------------------------------------------------------------- invariant 2: interruption


def test_resume__same_bits_and_same_log(runs, tmp_path):
    tiny_run.train(tmp_path, "--steps", 24)  # within the fifth epoch
    with open(tmp_path / "log.jsonl", "a") as f:  # of steps that a crash lost; the last line torn
        f.write('{"step": 28, "loss": 0.0}\n{"step": 32, "val": {"loss": 0.0}')
    tiny_run.train(tmp_path, "--resume")
    assert same_result(runs / "one", tmp_path)
    assert lines(runs / "one") == lines(tmp_path)


def test_resume__three_ranks_same_bits_and_same_log(tmp_path):
    """With three ranks the order of a sum counts: DDP changes it after its first backward pass."""
    whole, resumed, flags = tmp_path / "whole", tmp_path / "resumed", ("--batch-size", 9)
    tiny_run.spawn(
        3, tmp_path / "store",
        (whole, (*flags, "--steps", 16), CFMAE, 0),
        (resumed, (*flags, "--steps", 8), CFMAE, 0),
        (resumed, (*flags, "--steps", 16, "--resume", "--workers", 1), CFMAE, 0),
    )  # fmt: skip
    assert same_result(whole, resumed)
    assert lines(whole) == lines(resumed)


@pytest.mark.parametrize("micro", [0, 1])
def test_stop__drops_the_unfinished_step(runs, tmp_path, micro):
    build = functools.partial(Interrupted, step=21, micro=micro)
    handler = signal.getsignal(signal.SIGTERM)
    assert tiny_run.train(tmp_path, "--micro-batch", 4, build=build) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path)["step"] == 21 + (micro == 1)  # the last one completes it
    assert signal.getsignal(signal.SIGTERM) == handler
    tiny_run.train(tmp_path, "--resume", "--micro-batch", 4)
    assert same_result(runs / "micro", tmp_path)
    assert lines(runs / "micro") == lines(tmp_path)  # nothing of the dropped step is in a line


class Normed(Interrupted):
    """The model with a BatchNorm, whose running means stand in no loss."""

    def __init__(self, cfg, step=STEPS):
        super().__init__(cfg, step, micro=0)
        self.norm = torch.nn.BatchNorm2d(3, affine=False)

    def forward(self, batch, progress):
        self.norm(batch["rgb"].float())
        return super().forward(batch, progress)


def test_stop__drops_what_the_unfinished_step_did_to_batchnorm(tmp_path):
    whole, stopped, flags = tmp_path / "whole", tmp_path / "stopped", ("--micro-batch", 4)
    tiny_run.train(whole, *flags, "--steps", 8, build=Normed)
    tiny_run.train(stopped, *flags, "--steps", 8, build=functools.partial(Normed, step=5))
    assert checkpoint(stopped)["step"] == 5
    tiny_run.train(stopped, *flags, "--steps", 8, "--resume", build=Normed)
    assert same_result(whole, stopped)


def test_stop__all_ranks_agree_and_the_split_may_change(runs):
    out = runs / "two-signal"  # rank 1 alone saw the signal
    assert checkpoint(out)["step"] == 25
    tiny_run.train(out, "--resume")  # one rank, one micro-batch
    assert_same_curve(runs / "one", out)


def test_stop__ctrl_c_reaches_the_workers_too(runs, tmp_path):
    with tiny_run.start(tmp_path, "--workers", 1) as process:
        tiny_run.wait_for(tmp_path, 4, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output and "stopped" in output, output
    assert 4 <= checkpoint(tmp_path)["step"] < STEPS
    tiny_run.train(tmp_path, "--resume")
    assert same_result(runs / "one", tmp_path)


def test_kill__resumes_from_the_last_save(runs, tmp_path):
    with tiny_run.start(tmp_path, "--save-minutes", 0) as process:
        tiny_run.wait_for(tmp_path, 12, process)
        tiny_run.kill(process)
    assert 11 <= checkpoint(tmp_path)["step"] < STEPS
    tiny_run.train(tmp_path, "--resume")
    assert same_result(runs / "one", tmp_path)
    assert lines(runs / "one") == lines(tmp_path)


def test_torchrun__sigterm_then_resume(runs, tmp_path):
    with tiny_run.start(tmp_path, ranks=2) as process:
        tiny_run.wait_for(tmp_path, 4, process)
        process.terminate()  # torchrun passes it on to both ranks
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "stopped" in output, output
    assert 4 <= checkpoint(tmp_path)["step"] < STEPS
    tiny_run.train(tmp_path, "--resume")  # one rank goes on; ranks themselves are tested above
    assert_same_curve(runs / "two", tmp_path)
