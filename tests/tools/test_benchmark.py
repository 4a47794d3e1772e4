"""The benchmark's own arithmetic; times are never asserted."""

import argparse
import json
import os
import shlex
import sys

import engine  # first: it sets how threads wait

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import shapes
from engine import UserError
from tools import benchmark, memory, peers, precision, scaling, stopwatch

pytestmark = pytest.mark.slow

MATRIX_PEAK = stopwatch.matrix_peak
STEP = dict(command="step", method=None, model="base", flags="--model tiny --image-size 32",
            precision="fp32", device="cpu", compile=False, batch_size=2, steps=1, warmup=0,
            details=True, json=None, rounds=1, peers=None)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Products of 2048 x 2048 and a million names take longer than all else here."""
    monkeypatch.setattr(stopwatch, "matrix_peak", lambda *_: 1e12)
    monkeypatch.setattr(benchmark, "file_list", lambda: {})


def options(**changes):
    return argparse.Namespace(**{**STEP, **changes})


def count_flops(run):
    """FLOPs of a forward pass, and of it with its backward pass."""
    with stopwatch.flop_counter() as counter:
        loss = run()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def test_parse__commands_of_the_docstring():
    lines = [line.strip() for line in benchmark.__doc__.splitlines()]
    found = [line for line in lines if line.startswith("python -m tools.benchmark ")]
    for line in found:
        benchmark.parse(shlex.split(line, comments=True)[3:])
    assert len(found) == 10


@pytest.mark.parametrize("layer, shape, by_hand", [
    (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 5, 7), 2 * 2 * 16 * 5 * 7 * 8 * 9),
    (nn.Conv2d(8, 16, 3, padding=1, groups=4), (2, 8, 5, 7), 2 * 2 * 16 * 5 * 7 * 2 * 9),
    (nn.Linear(6, 10), (4, 6), 2 * 4 * 6 * 10),
])  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
def test_flop_counter__counts_a_layer_by_hand(layer, shape, by_hand, grad):
    x = torch.randn(shape, requires_grad=grad)
    # the input's gradient, where it is wanted, and the weight's cost as much each as the output
    assert count_flops(lambda: layer(x).sum()) == (by_hand, (2 + grad) * by_hand)


def test_parts__books_forward_and_backward_on_the_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder_pred = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return F.mse_loss(self.decoder_pred(self.encoder(x)), x)

    with stopwatch.Parts(cuda=False) as parts:
        Model()(torch.randn(4, 8)).backward()
    shares = parts.shares()
    assert set(shares) == {"encoder", "decoder", "masks, loss"}
    assert sum(shares.values()) == pytest.approx(1)
    # two linear layers each way, forward and backward: neither part has forward operators alone
    owners = [span[0] for span in parts.spans]
    assert owners.count("encoder") > 2 and owners.count("decoder") > 2
    operators = parts.shares(1)
    assert sum(operators.values()) == pytest.approx(1)
    assert {"addmm", "mm", "mse_loss", "mse_loss_backward"} <= set(operators)


def test_parts__a_share_is_of_the_time_between_an_operator_s_ends():
    parts = stopwatch.Parts(cuda=False)
    parts.spans = [("encoder", "mm", 0, 3), ("decoder", "mm", 3, 4), ("encoder", "gelu", 4, 8)]
    assert parts.shares() == {"encoder": 7 / 8, "decoder": 1 / 8}
    assert parts.shares(1) == {"mm": 0.5, "gelu": 0.5}


ROWS = benchmark.ROWS | benchmark.VIDEO


@pytest.mark.parametrize("row", [r for r in ROWS if not r.startswith("beit")])
def test_one__every_row_runs(row):
    size = 64 if row == "semanticmim-80" else 32  # or nothing is visible
    result = stopwatch.one(options(rows=row, flags=f"--model tiny --image-size {size}"), ROWS)
    assert result["row"] == row and len(result["times"]) == 1
    assert result["flops_step"] > 1.5 * result["flops"] > 0
    for name in ("parts", "operators"):
        assert sum(result[name].values()) == pytest.approx(1) and result[name]["optimizer"] > 0


def test_one__counts_the_script_s_own_forward_pass():
    import mae

    args = options(rows="mae", steps=2, warmup=1)
    result = stopwatch.one(args, benchmark.ROWS)
    cfg = engine.parse(mae.Config, mae.PRESETS, "", args.flags.split())
    batch = data.collate([shapes.ShapeScenes("train", 32, 2, ("rgb",))[0, i] for i in range(2)])
    model = mae.MAE(cfg)
    flops = count_flops(lambda: model(batch, torch.tensor(0.5))[0])
    assert [2 * result[k] for k in ("flops", "flops_step")] == list(flops)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(result["times"]) == len(result["cpu"]) == 2  # warm-up is not among them


def test_one__a_peer_goes_through_the_same_loop(monkeypatch):
    class Small(peers.Peer):
        def make(self):
            self.model = nn.Conv2d(3, 4, 16, 16)

        def loss(self, imgs, rgb):
            return self.model(imgs).square().mean()

    model, asked = Small(), []
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(peers, "build", lambda name, clones: asked.append(clones) or model)
    result = stopwatch.one(options(rows="peer-hiera", peers="DIR"), benchmark.ROWS)
    assert asked == ["DIR"]
    assert result["row"] == "peer-hiera" and result["flops"] == 2 * 196 * 768 * 4
    assert all((a != b).all() for a, b in zip(before, model.parameters()))  # AdamW took its steps


def block(tokens, dim, out=0, queries=0):
    """Forward FLOPs of a transformer block; some of Hiera's widen and pool their queries."""
    out, queries = out or dim, queries or tokens
    qkv, widen = 6 * tokens * dim * out, 2 * tokens * dim * out * (out != dim)
    return qkv + widen + 4 * queries * tokens * out + (2 + 16) * queries * out**2


def by_hand(kind):
    """Forward FLOPs that the published model's matrix products and convolutions ask of an image."""
    patches, n = 2 * 196 * 768**2, 196 if kind == "Hiera" else 197  # which has no class token
    decoder = 8 * block(n, 512) + 2 * n * 512 * 768
    if kind == "MAE":
        return patches + 12 * block(50, 768) + 2 * 50 * 768 * 512 + decoder
    if kind == "Hiera":  # 19 of 49 units are visible; of 64 tokens first, of 4 at last
        unit = 2 * block(64, 96) + block(64, 96, 192, 16) + 2 * block(16, 192)
        unit += block(16, 192, 384, 4) + 2 * 4 * (16 * 96 + 4 * 192) * 768  # fusion heads
        late = 15 * block(76, 384) + block(76, 384, 768) + 2 * block(76, 768)
        return 2 * 56**2 * 147 * 96 + 19 * unit + late + 2 * 76 * 768 * 512 + decoder
    vit = patches + 12 * block(197, 768)
    if "SemanticMIM" in kind:  # 8 proxies and 78 patches; 118 masks read proxies and one another
        second = 768**2 * (2 * 118 + 4 * 126 + 2 * 118 + 16 * 118) + 4 * 118 * 126 * 768
        vit = patches + 12 * (block(86, 768) + second)
    if kind in ("MaskFeat", "SemanticMIM"):
        return vit + 2 * (197 if kind == "MaskFeat" else 118) * 768 * 108
    tokenizer, width = 2 * 112**2 * 147 * 256 + 2 * 14**2 * 2048 * 8192, 256
    for side, out in ((112, 256), (56, 512), (28, 1024), (14, 2048)):
        for i in (width, out):  # the inputs of two blocks; the first may widen
            weights = 9 * (i + out // 2) * out // 4 + out // 4 * out + i * out * (i != out)
            tokenizer += 2 * side**2 * weights
        width = out
    return vit + 2 * (75 if kind == "BEiT" else 118) * 768 * 8192 + tokenizer


def by_hand_multimae():
    """98 of 3 x 196 tokens and a global one; four decoders of 256, one of whose queries are 196."""
    patches = 2 * 196 * 768 * (768 + 256 + 16 * 64)  # RGB, depth, 4 x 4 classes embedded in 64
    decoder = 2 * 99 * 768 * 256 + 2 * 196 * 256**2 + 2 * 99 * 2 * 256**2  # context, q, k and v
    decoder += 4 * 196 * 99 * 256 + (2 + 16) * 196 * 256**2 + 2 * block(196, 256)
    heads = 2 * 196 * 256 * (768 + 256 + 16 * 133 + 768)
    return patches + 12 * block(99, 768) + 4 * decoder + heads


def by_hand_convmae():
    """Stages 1 and 2 and what the decoder takes of them over all patches, stage 3 over 49."""
    stages = sum(2 * n * c * (into + 2 * 10 * c + 2 * 25)
                 for n, c, into in ((56**2, 256, 48), (28**2, 384, 4 * 256)))  # fmt: skip
    tokens = 2 * 196 * 768 * (16 * 256 + 4 * 384) + 2 * 196 * 768 * (4 * 384 + 768)
    decoder = 2 * 49 * 768 * 512 + 8 * block(196, 512) + 2 * 196 * 512 * 768
    return stages + tokens + 11 * block(49, 768) + decoder


CLONES = os.environ.get("PEERS", "")  # a folder of clones, as --peers takes it
KINDS = {"peer-hiera": "Hiera", "peer-mmpretrain-maskfeat": "MaskFeat",
         "peer-mmpretrain-beit": "BEiT", "peer-semanticmim": "SemanticMIM",
         "peer-semanticmim-dvae": "SemanticMIM, dVAE"}  # fmt: skip
HAND = {"peer-multimae": by_hand_multimae, "peer-convmae": by_hand_convmae}


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers__are_the_published_models(name):
    if what := peers.missing(name, CLONES):
        pytest.skip(what)
    model = peers.build(name, CLONES)
    rgb = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    losses = []

    def run():
        losses.append(model({"rgb": rgb}, torch.tensor(0.5))[0])
        return losses[0]

    flops = count_flops(run)[0] / 2
    assert losses[0].isfinite() and losses[0].shape == ()
    wanted = HAND[name]() if name in HAND else by_hand(KINDS.get(name, "MAE"))
    assert flops == pytest.approx(wanted, rel=0.02)
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    dead = {n for n, g in trained.items() if g is None or not (g.isfinite().all() and g.any())}
    unused = {"mask_token", "vit.head.weight", "vit.head.bias"} if name == "peer-lightly" else ()
    assert dead == {f"encoder.{n}" for n in unused}  # lightly's encoder keeps them for other uses
    with torch.autocast("cpu", torch.bfloat16):
        assert run().isfinite()


@pytest.mark.parametrize("name, module, pip", [
    ("peer-transformers", "transformers", "transformers"),
    ("peer-vit-pytorch", "vit_pytorch", "vit-pytorch"),
    ("peer-mmpretrain-beit", "mmpretrain", "mmpretrain mmcv-lite"),
])  # fmt: skip
def test_build__says_what_a_peer_lacks(monkeypatch, name, module, pip):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(UserError, match=f"{name}: .*; pip install {pip}$"):
        peers.build(name)


def test_missing__names_the_clone(tmp_path):
    url = "https://github.com/Alpha-VL/ConvMAE"
    words = f"peer-convmae: no folder DIR/ConvMAE; git clone {url} there, --peers DIR"
    assert peers.missing("peer-convmae", "") == words
    at = str(tmp_path)
    assert peers.missing("peer-convmae", at).endswith(f"git clone {url} there, --peers {at}")
    (tmp_path / "ConvMAE").mkdir()
    assert "no folder" not in (peers.missing("peer-convmae", at) or "")


def test_imports_of__a_clone_leaves_nothing_behind(tmp_path):
    """Two clones have a `util.pos_embed` each; np.float is there while one loads."""
    pytest.importorskip("timm")
    for name in "ab":
        (tmp_path / name / "util").mkdir(parents=True)
        (tmp_path / name / "util" / "pos_embed.py").write_text(f"which = {name!r}\n")
        (tmp_path / name / "models_mae.py").write_text(
            "import numpy\nfrom timm.models.vision_transformer import Block\n"
            "from util.pos_embed import which\n"
            "x = numpy.float(1)\nblock = Block(64, 2, 4.0, qkv_bias=True, qk_scale=None)\n"
        )
    before = set(sys.modules), [*sys.path]
    for name in "ab":
        with peers.imports_of(tmp_path / name):
            import models_mae

            assert models_mae.which == name and not models_mae.block.attn.fused_attn
    after = {m for m in set(sys.modules) - before[0] if not m.startswith("timm")}
    assert not {m for m in after if m.split(".")[0] in ("util", "utils", "models_mae")}
    assert sys.path == before[1] and "float" not in vars(peers.np)


def stand_in(args, rows, **_):
    """What `child` returns, without a process."""
    mine = rows == "mae"
    return {"row": rows, "times": [2.0 if mine else 1.0], "cpu": [1.5 if mine else 0.5], "peak": 1,
            "parameters": 1, "flops": 1, "flops_step": 1, "parts": {"optimizer": 0.1},
            "operators": {"gelu": 0.1, "mm": 0.9}, "matrix_peak": 1}  # fmt: skip


LIBRARIES = ["transformers", "lightly", "vit-pytorch", "mmpretrain-mae"]  # that have a MAE


def test_step__leaves_out_peers_that_are_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "child", stand_in)
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    results = benchmark.step(options(rows="mae", peers=""))
    assert [r["row"] for r in results] == ["mae"]
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("left out peer-")]
    assert len(lines) == len(LIBRARIES) + 1 and "; git clone " in lines[-1]
    assert all("; pip install " in x for x in lines[:-1])


def test_step__times_the_peers_of_its_rows_that_are_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "child", stand_in)
    monkeypatch.setattr(peers, "find_spec", lambda module: module != "lightly" or None)
    for clone in ("mae", "hiera"):  # none of the chosen rows is compared with the second
        (tmp_path / clone).mkdir()
    results = benchmark.step(options(rows="mae", peers=str(tmp_path)))
    wanted = [f"peer-{x}" for x in LIBRARIES if x != "lightly"]
    assert [r["row"] for r in results] == ["mae", *wanted, "peer-mae-authors"]
    said = capsys.readouterr().out
    assert "MAE / mmpretrain's MAE: 3.000 of its CPU seconds, 2.000 of its time" in said
    assert "| 1.50 (1.50-1.50) |" in said  # CPU seconds of a step
    assert "\nmae: mm 90.0%, gelu 10.0%\n" in said  # the dearest first


def test_step__without_peers_there_are_those_that_rows_name(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "child", stand_in)
    monkeypatch.setattr(peers, "find_spec", lambda module: True)
    assert [r["row"] for r in benchmark.step(options(rows="mae"))] == ["mae"]
    (tmp_path / "ConvMAE").mkdir()
    named = benchmark.step(options(rows="mcmae,peer-convmae,peer-lightly", peers=str(tmp_path)))
    assert [r["row"] for r in named] == ["mcmae", "peer-convmae", "peer-lightly"]


def test_ratios__name_rows_that_exist():
    known = {*benchmark.ROWS, *benchmark.VIDEO, *peers.PEERS}
    named = {r for _, a, b, _ in benchmark.RATIOS for r in (a, b)}
    assert named <= known and {*peers.PEERS} <= named  # --peers chooses by what is compared


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there is nothing to refuse")
def test_device__never_falls_back_in_silence(monkeypatch):
    monkeypatch.setattr(benchmark, "child", lambda *_, **__: pytest.fail("started"))
    for command in (benchmark.step, benchmark.memory):
        with pytest.raises(UserError, match="--device cpu works anywhere"):
            command(options(rows="mae", device="cuda"))


def test_step__writes_a_table(capsys):
    results = benchmark.step(options(rows="mae"))
    assert "| mae |" in capsys.readouterr().out
    assert results[0]["images_per_s"] == pytest.approx(2 / results[0]["times"][0])
    json.dumps(results)


def test_loader__times_all_parts(capsys):
    args = argparse.Namespace(data=None, count=4, feed=100.0, short_side=230)
    rows = benchmark.loader(args)
    everything, reduced = tuple(data.GRANULARITIES), "packed, short side 230"
    assert [(r["source"], r["granularities"]) for r in rows] == [
        ("folder", ("rgb",)), ("folder", everything), ("folder, palette maps", everything),
        ("packed", ("rgb",)), ("packed", everything), (reduced, ("rgb",)), (reduced, everything),
    ]  # fmt: skip
    for r in rows:
        assert set(r["parts"]) == {"read", "decode", "crop", "collate"}
        assert r["images_per_s"] > 0 and abs(sum(r["parts"].values()) - 1) < 1e-9
    assert rows[0]["classic"] > 0 and rows[0]["bare_decode"] > 0
    assert ("cuda_decode" in rows[0]) == torch.cuda.is_available()
    assert rows[0]["bytes"] == rows[3]["bytes"] < rows[1]["bytes"] == rows[4]["bytes"]
    assert 0 <= rows[0]["enlarged"] == rows[4]["enlarged"] < rows[6]["enlarged"] < 1
    assert "cores feed 100 images/s" in capsys.readouterr().out


def photographs(root, broken=(), kind="jpg"):
    """A folder of four images, some of which are not."""
    (root / "train").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (70, 50), (200, 60 * i, 30)).save(root / "train" / f"{i}.{kind}")
    for i in broken:
        (root / "train" / f"{i}.{kind}").write_bytes(b"\xff\xd8\xff")
    return argparse.Namespace(data=str(root), count=4, feed=None, short_side=40)


def test_loader__leaves_out_what_cannot_be_read(capsys, tmp_path):
    rgb, *_ = benchmark.loader(photographs(tmp_path / "some", broken=[0, 2]))
    assert rgb["images_per_s"] > 0
    said = capsys.readouterr().out
    assert "left out 2 images that cannot be read, e.g. 0.jpg" in said and "2 images; PIL" in said
    with pytest.raises(UserError, match="none of 4 images can be read, e.g. 0.jpg"):
        benchmark.loader(photographs(tmp_path / "none", broken=range(4)))


def test_loader__png(capsys, tmp_path):
    rgb, *_ = benchmark.loader(photographs(tmp_path, kind="png"))
    assert rgb["classic"] > 0 and "bare_decode" not in rgb
    assert "no bare decode_jpeg" in capsys.readouterr().out


@pytest.mark.parametrize("words, match", [
    ("memory --rows nothere", "^--rows nothere: choose from mae"),
    ("memory --rows peer-lightly", "^peer-lightly: no module lightly, timm; pip install lightly"),
    ("step --rows mae,", "choose from mae"),
    ("step --batch-size 0", "--batch-size 0: wanted 1 or more"),
    ("step --steps 0", "--steps 0"), ("step --rounds 0", "--rounds 0"),
    ("scaling --rows nothere", "^--rows nothere: choose from mae"),
    ("scaling --batches 8,0", "--batches: invalid numbers value: '8,0'"),
    ("scaling --runs 2", "--runs: invalid splits value: '2'"),
    ("precision --rows nothere", "^--rows nothere: choose from mae"),
    ("precision --steps 4", "^--window 5: 4 steps have 4 lines of a log"),
    ("step --warmup -1", "--warmup -1: wanted 0 or more"), ("loader --count 0", "--count 0"),
])  # fmt: skip
def test_main__bad_input_is_one_line(monkeypatch, words, match):
    monkeypatch.setattr(benchmark, "child", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=match):
        benchmark.main(words.split())


@pytest.mark.parametrize("stderr, message", [
    ("benchmark: error: --model huge: choose\n  from these\n", "mae: --model huge: choose\n  from"),
    ("Traceback (most recent call last):\n  File x\nKeyError: 'rgb'\n", "mae: KeyError: 'rgb'"),
    ("", "mae: status 3"),
])  # fmt: skip
def test_child__says_what_went_wrong(monkeypatch, stderr, message):
    done = argparse.Namespace(returncode=3, stderr=stderr)
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError) as error:
        benchmark.child(options(), rows="mae")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("most", [5, 8, 37, 100])
def test_memory__finds_the_largest_micro_batch(monkeypatch, most):
    def child(args, batch_size, **_):
        return {"peak": 100 + 10 * batch_size} if batch_size <= most else None

    monkeypatch.setattr(benchmark, "child", child)
    monkeypatch.setattr(memory, "available", lambda: 1e9)
    (row, _) = benchmark.memory(options(rows="mae"))
    assert most - max(1, most // 16) <= row["micro_batch"] <= most


def test_memory__on_a_cpu_stops_before_memory_runs_out(monkeypatch):
    def child(args, batch_size, **_):
        assert 100 + 10 * batch_size < 1000, "the system would have killed this"
        return {"peak": 100 + 10 * batch_size}

    monkeypatch.setattr(benchmark, "child", child)
    monkeypatch.setattr(memory, "available", lambda: 1000.0)
    (row, _) = benchmark.memory(options(rows="mae"))
    assert 70 <= row["micro_batch"] <= 80  # 0.9 x 1000 MiB are 80 samples


def test_file_list__counts_bytes(capsys):
    found = memory.file_list(2000)
    each = len("n00000999/n00000999_1999.JPEG") + 4  # a name, padded to the longest, and a label
    assert found["files"] == 2000 and found["open_s"] > 0 and found["bytes"] == 2000 * each
    assert f"{each}.0 bytes each" in capsys.readouterr().out


def test_matrix_peak__is_a_rate():
    """Ten products of 2 x 2048^3 operations; the fixture above has the name in `stopwatch`."""
    assert 1e9 < MATRIX_PEAK(torch.device("cpu"), torch.float32) < 1e14


# ------------------------------------------------------------------------------ growth, precision


def test_scaling__measures_batches_sizes_and_runs(monkeypatch, capsys):
    asked = []

    def child(args, rows, batch_size, flags, **_):
        asked.append((rows, batch_size, flags.split()[-1]))
        pixels = batch_size * int(flags.split()[-1]) ** 2
        x = pixels / 1e4
        return {"cpu": [99.0, x, 0.0], "times": [x], "peak": 50 + x}

    def train(script, flags, ranks):  # 5 seconds to begin with, and 2 a step
        asked.append((script, ranks, flags[flags.index("--workers") + 1]))
        n = int(flags[flags.index("--steps") + 1])
        log = [{"loss": 1.0, "peak_memory_mib": 100.0 + n}]
        return {"log": log, "cpu": 5 + 2 * n, "seconds": 6 + 3 * n}

    monkeypatch.setattr(benchmark, "child", child)
    monkeypatch.setattr(scaling, "train", train)
    words = "scaling --rows cfmae --batches 8,16 --sizes 100,200 --batch 8 --size 100"
    args = benchmark.parse([*words.split(), "--runs", "1x0,2x1"])
    results = args.run(args)
    steps = [("cfmae", 8, "100"), ("cfmae", 16, "100"), ("cfmae", 8, "100"), ("cfmae", 8, "200")]
    assert asked == steps + [("cfmae", 1, "0")] * 2 + [("cfmae", 2, "1")] * 2
    assert [r["cpu"] for r in results] == [8, 16, 8, 32, 2, 2]  # of a step, starting left out
    assert results[-1] | {"seconds": 3, "ranks": 2, "peak": 123} == results[-1]
    said = capsys.readouterr().out
    assert "| 16 | 16.000 | 16.000 | 1000.00 | 66 | 1.00 |" in said  # each further image: 1 MiB


def test_train__runs_a_script_to_its_end():
    flags = "--data shapes --model tiny --image-size 32 --batch-size 2 --steps 2 --log-every 1 "
    flags += "--val-samples 2 --workers 0 --device cpu"
    found = scaling.train("mae", flags.split())
    assert [line["step"] for line in found["log"]] == [1, 2] and found["cpu"] > 0.5
    with pytest.raises(UserError, match="^mae --steps 0: .*steps"):
        scaling.train("mae", ["--steps", "0"])


def test_precision__compares_smoothed_losses(monkeypatch, capsys):
    assert precision.smooth([1, 2, 6, 4], 2) == [1.5, 4, 5]
    assert precision.difference([1, 1, 2, 2], [1, 1, 2.2, 2.2], 2) == pytest.approx(0.1)
    assert precision.difference([1, 1, 1], [0.7, 1.3, 0.7], 2) == pytest.approx(0)  # noise cancels

    def train(script, flags):
        p = flags[flags.index("--precision") + 1]
        loss = 2.01 if p == "bf16" else 2.002 if "--micro-batch" in flags else 2.0
        return {"log": [{"loss": loss}] * 6, "cpu": 1.0}

    monkeypatch.setattr(precision, "train", train)
    args = benchmark.parse(["precision", "--rows", "cfmae", "--steps", "60"])
    (found,) = args.run(args)
    wanted = {"fp32": 0, "rounding": 0.001, "bf16": 0.005}
    assert found["difference"] == pytest.approx(wanted)
    out = capsys.readouterr().out
    assert "cfmae bf16      loss 2.0100 to 2.0100, from fp32's at most 0.50%" in out
    assert "on average +0.10%; 1 CPU seconds" in out
