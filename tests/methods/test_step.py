"""Every method's step: gradients for all; the same loss sample by sample, in bf16, compiled; AdamW.

Compiled, the switches are those that leave a single term in the loss. A compiler that leaves out
`1 * x` may then find that the loss and its detached log are one tensor, and the loss has no
gradient left. The backend below takes that liberty, as inductor does, and needs no C++ compiler.
"""

import dataclasses
import importlib

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

import engine
from data import collate
from motion import MovingScenes
from shapes import ShapeScenes

SMALL = {  # of each script: its model, and flags that make it small
    "mae": "MAE --image-size 16 --embed-dim 16 --depth 1 --num-heads 2 --decoder-depth 1",
    "cfmae": "CFMAE --image-size 16 --patch-size 4 --embed-dim 16 --depth 1 --num-heads 2 "
             "--decoder-embed-dim 16 --decoder-num-heads 2 --decoder-depth 1",
    "semanticmim": "SemanticMIM --embed-dim 32 --depth 1 --num-heads 2",
    "mcmae": "MCMAE --embed-dims 8,12,16 --depths 1,1,1 --num-heads 2 --decoder-embed-dim 16 "
             "--decoder-num-heads 2 --decoder-depth 1",
    "coma_dyvit": "CoMA --dims 8-16-32-64 --heads 1-1-2-4 --blocks 1-1-1-1 "
                  "--decoder-embed-dim 32 --decoder-depth 1",
    "videomcmae": "VideoMCMAE --image-size 32 --frames 4 --embed-dims 8,12,16 --depths 1,1,1 "
                  "--num-heads 2 --decoder-embed-dim 16 --decoder-num-heads 2 --decoder-depth 1",
}  # fmt: skip
FLAGS = {  # with which gradients must reach every parameter
    "mae": ("",),
    "cfmae": (
        "", "--decoder parallel", "--decoder no-cross-attention", "--order R-I-S", "--mix sample",
        "--masking RD", "--masking IG", "--masking SG", "--no-norm-pix-loss", "--granularities R",
        "--granularities R+S", "--granularities R+I", "--image-size 32 --patch-size 8",
        "--decoder-depth 2 --semantic-classes 133",
    ),
    "mcmae": (
        "", "--no-sparse", "--kernel-size 7", "--kernel-size 9 --no-multi-scale",
        "--no-masked-conv", "--masking token", "--no-norm-pix-loss",
        "--masking token --no-masked-conv --no-multi-scale",
    ),
    "coma_dyvit": (
        "", "--decoder convnext", "--windows 4,1", "--evaluation none", "--evaluation shared",
        "--evaluation common", "--no-norm-pix-loss --stem-mask after",
    ),
    "videomcmae": ("", "--no-sparse", "--no-multi-scale", "--norm-pix-loss"),
}  # fmt: skip
HALF = torch.tensor(0.5)  # of training


def build(line: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model whose biases and norms are not at their neutral start, and a batch of four."""
    script, _, flags = line.partition(" ")
    module, (name, *small) = importlib.import_module(script), SMALL[script].split()
    argv = ["--model", "tiny", *small, *flags.split()]
    cfg = engine.parse(module.Config, module.PRESETS, "", argv)
    torch.manual_seed(0)
    model = getattr(module, name)(cfg)
    for p in model.parameters():
        if p.ndim == 1 and p.requires_grad:
            nn.init.normal_(p, p.mean().item(), 0.2)
    if script == "videomcmae":
        scenes = MovingScenes("train", cfg.image_size, cfg.frames)
    else:
        scenes = ShapeScenes("train", cfg.image_size, max(cfg.patch_size // 4, 1))
    return model, collate([scenes[0, i] for i in range(4)])


@pytest.mark.parametrize("line", [f"{k} {x}".strip() for k, v in FLAGS.items() for x in v])
def test_forward__gradients_reach_every_parameter(line):
    model, batch = build(line)
    loss, logs = model(batch, HALF)
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("script", SMALL)
def test_forward__loss_and_logs_are_means_over_samples(script):
    model, batch = build(script)
    whole, logs = model(batch, HALF)
    parts = [model({k: v[i : i + 1] for k, v in batch.items()}, HALF) for i in range(4)]
    assert_close(torch.stack([loss for loss, _ in parts]).mean(), whole, atol=1e-6, rtol=1e-5)
    for name, value in logs.items():
        mean = torch.stack([terms[name] for _, terms in parts]).mean()
        assert_close(mean, value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("line", [*SMALL, "mcmae --no-sparse", "videomcmae --no-sparse"])
def test_forward__bf16_is_finite_and_near_fp32(line):
    model, batch = build(line)
    exact, _ = model(batch, HALF)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(batch, HALF)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("line", [*SMALL, "semanticmim --target dvae --tokenizer random"])
def test_state_dict__holds_what_is_learned_alone(line):
    """Positions that are computed would tie a checkpoint to its image size."""
    model, _ = build(line)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("script", ["mae", "mcmae", "coma_dyvit", "videomcmae"])
def test_resume__needs_no_init(script):
    module = importlib.import_module(script)
    started, resumed = (
        engine.parse(module.Config, module.PRESETS, "", ["--model", "tiny", *flags])
        for flags in (["--init", "x.pt"], ["--resume", "--output", "x"])
    )
    engine.refuse_changes(resumed, dataclasses.asdict(started), "last.pt")


class Made(Exception):
    """In the place of a run: what AdamW was given."""


@pytest.mark.parametrize("script", SMALL)
def test_main__optimizer_has_the_settings(script, tmp_path, monkeypatch):
    def made(groups, **kwargs):
        raise Made([g["weight_decay"] for g in groups], kwargs["betas"])

    monkeypatch.setattr(torch.optim, "AdamW", made)
    line = f"--data shapes --model tiny --device cpu --workers 0 --output {tmp_path / 'run'}"
    line += " --weight-decay 0.07 --beta1 0.8 --beta2 0.7"
    with pytest.raises(Made) as e:
        importlib.import_module(script).main(line.split())
    assert e.value.args == ([0.07, 0.0], (0.8, 0.7))


TRANSFER = [
    "downstream.finetune --method mae --encoder tiny",
    "downstream.finetune_clips --encoder tiny",
    "downstream.segment --method mae --encoder tiny",
    "downstream.detect --method mae --encoder tiny",
]


@pytest.mark.parametrize("line", [*SMALL, *TRANSFER])
def test_main__steps_in_bf16_at_the_schedules_rate(line, tmp_path, monkeypatch):
    """Half-way down the schedule; the order and the first weights are those of the seed."""
    if "detect" in line:
        pytest.importorskip("pycocotools")

    def steps(run, model, *_):
        run.number = 5 * run.per_epoch if run.cfg.epochs else run.total // 2
        step, seen = engine.Step(run), [run.sampler.seed, torch.initial_seed()]
        monkeypatch.setattr(type(model), "forward", lambda *_: (in_bf16(), {}))
        monkeypatch.setattr(step, "micro_batches", lambda: [{}])
        monkeypatch.setattr(step, "backward", lambda loss, logs: seen.append(loss))
        monkeypatch.setattr(step, "update", lambda lr: seen.append(lr))
        yield step
        raise Made(*seen)

    def in_bf16():
        return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")

    monkeypatch.setattr(engine.Run, "steps", steps)
    script, *flags = line.split()
    flags += "--data shapes --model tiny --device cpu --workers 0 --precision bf16 --seed 5".split()
    if "segment" in script or "detect" in script:
        flags, rate = [*flags, "--iterations", "90", "--lr", "1"], 0.5
    else:  # an epoch of warm-up, eight of a cosine
        flags += "--epochs 9 --warmup-epochs 1 --batch-size 32 --base-lr 1 --min-lr 0.025".split()
        rate = (32 / 256 + 0.025) / 2
    with pytest.raises(Made) as e:
        importlib.import_module(script).main([*flags, "--output", str(tmp_path / "run")])
    assert e.value.args == (5, 5, torch.bfloat16, pytest.approx(rate))


# --------------------------------------------------------------------------------------- compiled


def layout(node: torch.fx.Node) -> tuple:
    x = node.meta["val"]
    return x.dtype, x.shape, x.stride()


def simplified(graph: torch.fx.GraphModule, _) -> object:
    """Leave out what gives its own input back: copies, x * 1, x / 1, x + 0, one of one."""
    aten = torch.ops.aten
    neutral = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
    for node in list(graph.graph.nodes):
        same = node.target in (aten.detach.default, aten.alias.default, aten.clone.default)
        same |= node.target in neutral and node.args[1] == neutral[node.target]
        if same and layout(node) == layout(node.args[0]):
            node.replace_all_uses_with(node.args[0])
    graph.recompile()
    return make_boxed_func(graph.forward)


BACKEND = aot_autograd(
    fw_compiler=simplified,
    bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
    partition_fn=min_cut_rematerialization_partition,  # it also finds what is computed twice
)


@pytest.mark.slow
@pytest.mark.parametrize("line", [
    "mae", "cfmae --granularities R", "semanticmim", "mcmae", "coma_dyvit",
    "coma_dyvit --evaluation none", "videomcmae",
])  # fmt: skip
def test_compiled_step__equals_the_step_as_written(line):
    torch._dynamo.reset()
    (plain, batch), (model, _) = build(line), build(line)
    losses = []
    for step in (plain, torch.compile(model, backend=BACKEND)):
        loss, logs = step(batch, HALF)
        assert loss.requires_grad and not any(v.requires_grad for v in logs.values())
        loss.backward()
        losses.append({"loss": loss.detach(), **logs})
    assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    for (key, p), q in zip(plain.named_parameters(), model.parameters()):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
