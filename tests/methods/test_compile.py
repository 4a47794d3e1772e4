"""`--compile`: each method, compiled, has the loss and the gradients of the method as written.

The switches are those that leave a single term in the loss. A compiler that leaves out `1 * x` may
then find that the loss and its detached log are one tensor, and the loss has no gradient left. The
backend below takes that liberty, as inductor does, and needs no C++ compiler.
"""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

import cfmae
import coma_dyvit
import engine
import mae
import mcmae
import semanticmim
from data import collate
from shapes import ShapeScenes

pytestmark = pytest.mark.slow

CASES = [
    (cfmae, "CFMAE", "--granularities R"),
    (semanticmim, "SemanticMIM", ""),
    (mcmae, "MCMAE", ""),
    (coma_dyvit, "CoMA", "--evaluation none"),
    (coma_dyvit, "CoMA", ""),
    (mae, "MAE", ""),
]


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


TINY = {  # each at its smallest
    "cfmae": "--image-size 16 --patch-size 4 --embed-dim 16 --depth 1 --num-heads 2 "
             "--decoder-embed-dim 16 --decoder-num-heads 2 --decoder-depth 1",
    "semanticmim": "--embed-dim 32 --depth 1 --num-heads 2",
    "mcmae": "--depths 1,1,1 --decoder-depth 1",
    "coma_dyvit": "--blocks 1-1-1-1 --decoder-depth 1",
    "mae": "--image-size 16 --embed-dim 16 --depth 1 --num-heads 2 --decoder-depth 1",
}  # fmt: skip


def build(script, name: str, line: str) -> torch.nn.Module:
    line = f"--model tiny {TINY[script.__name__]} {line}"
    cfg = engine.parse(script.Config, script.PRESETS, "", line.split())
    torch.manual_seed(0)
    return getattr(script, name)(cfg)


@pytest.mark.parametrize("script, name, line", CASES, ids=lambda x: getattr(x, "__name__", x))
def test_compiled_step__equals_the_step_as_written(script, name, line):
    torch._dynamo.reset()
    models = build(script, name, line), build(script, name, line)
    cfg = models[0].cfg
    scenes = ShapeScenes("train", cfg.image_size, max(cfg.patch_size // 4, 1))
    batch = collate([scenes[0, i] for i in range(2)])
    steps = models[0], torch.compile(models[1], backend=BACKEND)
    losses = []
    for step in steps:
        loss, logs = step(batch, torch.tensor(0.5))
        assert loss.requires_grad and not any(v.requires_grad for v in logs.values())
        loss.backward()
        losses.append({"loss": loss.detach(), **logs})
    assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    for (key, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
