"""Charts of logs, schedules, distances and results: matplotlib draws them, where it is there."""

import csv
import importlib
import json
import sys

import pytest
import torch
from PIL import Image
from test_visualize_commands import run

import engine
from engine import UserError
from tools import charts, masks, visualize
from tools.charts import Series

pytestmark = pytest.mark.slow


pytest_plugins = ["fresh_weights"]


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the last chart, {title: (axis, series)}, which is not drawn."""
    shown = {}

    def keep(path, caption, panels, *_, **__):
        shown.clear()
        shown.update({title: (axis, series) for title, axis, series in panels})

    for module in (charts, masks):
        monkeypatch.setattr(module, "chart", keep)
    return shown


@pytest.fixture
def logs(tmp_path):
    for n, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        lines = [{"step": 0, "val": {"loss": 3.0}}, {"step": 20, "loss": 2.0 - n, "lr": 1e-3},
                 {"step": 40, "loss": 1.0, "lr": 2e-3}]  # fmt: skip
        text = "".join(json.dumps(x) + "\n" for x in lines) + '{"step": 60, "lo'  # torn
        (tmp_path / name / "log.jsonl").write_text(text)
    return tmp_path


# ------------------------------------------------------------------------------------ drawing


def test_chart__sizes(tmp_path, checkpoints, logs):
    pytest.importorskip("matplotlib")
    both = checkpoints["semanticmim"], checkpoints["cfmae"]
    distance = ("attention", "--images", "0", "--distance", "--checkpoint", *both)
    assert run(tmp_path, *distance)[0] == 640
    assert run(tmp_path, "schedule", "--e1", "0.1", "--epochs", "100", "--palette")[0] == 920
    assert run(tmp_path, "schedule", "--method", "mcmae")[0] == 460
    assert run(tmp_path, "schedule", "--checkpoint", checkpoints["cfmae"])[0] == 920
    assert run(tmp_path, "log", logs / "a", logs / "b" / "log.jsonl")[0] == 2 * 360
    assert run(tmp_path, "log", logs / "a", "--keys", "lr")[0] == 360


def test_chart__dots_are_not_joined(tmp_path):
    pytest.importorskip("matplotlib")
    shares = []
    for dots in (False, True):
        panel = ("loss", "step", [Series("", [0, 1], [0.0, 1.0], dots=dots)])
        charts.chart(tmp_path / "x.png", "", [panel])
        with Image.open(tmp_path / "x.png") as image:
            colours = dict((c, n) for n, c in image.getcolors(2**20))
        shares.append(colours[tuple(bytes.fromhex(charts.COLOURS[0][1:]))])
    assert 0 < shares[1] < shares[0] / 10


def test_chart__long_names_stay_inside(tmp_path):
    """A legend or a caption of long paths ends before the edge, which stays white."""
    pytest.importorskip("matplotlib")
    name = "runs/with/a/long/name/" * 6
    lines = [Series(f"{i} {name}", [0, 1], [0.0, i], i) for i in range(3)]
    charts.chart(tmp_path / "x.png", f"of {name}" * 3, [("loss", "step", lines)], size=(640, 360))
    with Image.open(tmp_path / "x.png") as image:
        right, left = (image.convert("L").crop((x, 0, x + 2, image.height)) for x in (638, 0))
    assert right.getextrema() == left.getextrema() == (255, 255)


def test_chart__leaves_out_what_is_not_finite(tmp_path):
    pytest.importorskip("matplotlib")
    y = [1.0, float("nan"), float("inf"), 2.0]
    charts.chart(tmp_path / "x.png", "", [("loss", "step", [Series("a", [0, 1, 2, 3], y)])])
    charts.chart(tmp_path / "y.png", "", [("loss", "step", [Series("a", [0], [float("nan")])])])


def test_matplotlib__missing_is_one_line(tmp_path, checkpoints, logs, monkeypatch):
    """Also before the attention of many images is computed; sheets need none."""
    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    monkeypatch.setattr("tools.attention.attentions", lambda *_: pytest.fail("too late"))
    distance = ("attention", "--distance", "--checkpoint", checkpoints["cfmae"])
    for words in (("schedule",), ("log", logs / "a"), distance):
        with pytest.raises(UserError, match="pip install matplotlib$"):
            run(tmp_path, *words)
    run(tmp_path, "dataset", "--images", "0")


# --------------------------------------------------------------------------------------- logs


def test_log__values(logs, drawn):
    visualize.main(["log", str(logs / "a" / "log.jsonl"), "--output", "x.png"])
    assert {s.dots: (list(s.x), list(s.y)) for s in drawn["loss"][1]} == {
        True: ([0], [3.0]), False: ([20, 40], [2.0, 1.0])}  # fmt: skip
    assert [s.dots for s in drawn["lr"][1]] == [False]


def test_log__beside_a_healthy_run(logs, drawn):
    visualize.main(["log", str(logs / "a"), "--healthy", "mae", "--output", "x.png"])
    ours, healthy = ([s for s in drawn["loss"][1] if s.colour == n] for n in (0, 1))
    assert [s.label for s in ours] == ["", "a"] and list(ours[1].y) == [2.0, 1.0]
    assert [s.label for s in healthy] == ["", "healthy mae"] and healthy[0].dots
    assert list(healthy[1].x)[:2] == [20, 40] and healthy[1].x[-1] == 625


def test_log__as_a_table(logs, tmp_path):
    out = tmp_path / "x.csv"
    visualize.main(["log", str(logs / "a"), str(logs / "b"), "--output", str(out)])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(r["run"], r["step"]) for r in rows][:3] == [("a", "0"), ("a", "20"), ("a", "40")]
    assert [r["loss"] for r in rows[:3]] == ["", "2.0", "1.0"] and rows[0]["val/loss"] == "3.0"
    assert {r["run"] for r in rows} == {"a", "b"} and rows[1]["val/loss"] == ""


def test_log__a_panel_for_each_run(logs, drawn):
    runs = [str(logs / "a"), str(logs / "b")]
    visualize.main(["log", *runs, "--apart", "--keys", "loss", "--output", "x.png"])
    assert {k: [list(s.y) for s in v[1]] for k, v in drawn.items()} == {
        "a: loss": [[3.0], [2.0, 1.0]], "b: loss": [[3.0], [1.0, 1.0]]}  # fmt: skip
    assert not any(s.label for _, series in drawn.values() for s in series)


@pytest.mark.parametrize("method", [p.stem for p in sorted(charts.CURVES.glob("*.jsonl"))])
def test_curves__are_whole_runs_that_learned(method):
    """Of the tiny preset as it is: 20,000 scenes, or 10,000 clips, its epochs and batch, a line
    each 20 steps."""
    script = importlib.import_module(method)
    cfg = engine.parse(script.Config, script.PRESETS, "", ["--model", "tiny"])
    lines = charts.read_log(charts.CURVES / f"{method}.jsonl")
    steps = [r["step"] for r in lines if "loss" in r]
    total = cfg.epochs * ((10_000 if cfg.SAMPLES == "clips" else 20_000) // cfg.batch_size)
    assert steps == [*range(20, total, 20), total] and cfg.data == "shapes"
    val = [r["val"]["loss"] for r in lines if "val" in r]
    assert val[-1] < 0.7 * val[0] and lines[-1]["step"] == total


def test_log__bad_input(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n")
    (tmp_path / "list.jsonl").write_text("[{}\n5}\n")
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)))
    for name, match in (
        ("none", "cannot read the log .*none: No such file"), ("", "holds no lines of a run's log"),
        ("list.jsonl", "holds no lines"), ("noise", "holds no lines"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            run(tmp_path, "log", tmp_path / name)
    healthy = ("--healthy", "mae", "--keys", "none")
    with pytest.raises(UserError, match="--keys none: the log has .*loss"):
        run(tmp_path, "log", charts.CURVES / "mae.jsonl", *healthy)


def test_log__without_the_curves(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "CURVES", tmp_path)
    (tmp_path / "mae.jsonl").write_text("")
    for found in ("mae$", "no curves$"):
        with pytest.raises(UserError, match=f"--healthy cfmae: {tmp_path} has {found}"):
            run(tmp_path, "log", logs / "a", "--healthy", "cfmae")
        (tmp_path / "mae.jsonl").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ results


@pytest.fixture
def sweep(tmp_path, checkpoints):
    """Results of four SemanticMIM runs, ratios .4 and .6 (twice), and of a snapshot of mcmae's."""
    found = []

    def result(name, of, **facts):
        path = tmp_path / name / "result.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"random": False, **facts, "source": str(of)}))
        found.append(str(path))

    for i, (ratio, top1) in enumerate(((0.6, 30.0), (0.4, 20.0), (0.6, 34.0))):
        state = torch.load(checkpoints["semanticmim"], weights_only=True)
        state["config"] |= {"mask_ratio": ratio, "epochs": 100 * (i + 1)}
        engine.save(tmp_path / f"run-{i}.pt", state)
        result(f"s{i}", tmp_path / f"run-{i}.pt", protocol="linear", top1=top1, epochs=90)
    result("random", tmp_path / "run-0.pt", protocol="linear", top1=5.0, random=True)
    snapshot = tmp_path / "epoch-0040.pt"
    engine.save(snapshot, torch.load(checkpoints["mcmae"], weights_only=True))
    result("m", snapshot, protocol="upernet", mIoU=0.4)
    return found


def results(files, *words):
    visualize.main(["results", *files, *words, "--output", "x.png"])


def test_results__points(sweep, drawn):
    """A panel a protocol; a line a method, through means; pre-training's values, not transfer's."""
    results(sweep, "--x", "mask_ratio")
    assert list(drawn) == ["linear: top-1, %", "upernet: mIoU"]
    axis, (dots, line, other, _) = drawn["linear: top-1, %"]
    assert axis == "mask_ratio" and dots.dots and not line.dots
    assert list(zip(dots.x, dots.y)) == [(0.6, 30.0), (0.4, 20.0), (0.6, 34.0)]
    assert (line.label, line.x, line.y) == ("semanticmim", [0.4, 0.6], [20.0, 32.0])
    assert (list(other.x), list(other.y), other.colour) == ([0.6], [5.0], 1)
    assert drawn["linear: top-1, %"][1][3].label == "semanticmim, fresh weights"
    results(sweep[:3], "--x", "epochs")
    assert drawn["linear: top-1, %"][1][1].x == [100, 200, 300]
    results(sweep[4:], "--x", "epochs")  # a snapshot has its own epoch
    assert drawn["upernet: mIoU"][1][1].x == [40]
    results(sweep[:3], "--x", "step", "--by", "mask_ratio,proxies")
    labels = [s.label for s in drawn["linear: top-1, %"][1] if s.label]
    assert labels == [f"semanticmim, mask_ratio {r}, proxies 2" for r in (0.6, 0.4)]


def test_results__parameters(sweep, drawn, checkpoints):
    results([sweep[0], sweep[4]], "--x", "parameters")
    for title, method in (("linear: top-1, %", "semanticmim"), ("upernet: mIoU", "mcmae")):
        state = torch.load(checkpoints[method], weights_only=True)["model"].items()
        count = sum(v.numel() for k, v in state if k.startswith("encoder."))
        axis, series = drawn[title]
        assert series[1].x == [pytest.approx(count / 1e6)] and "encoder" in axis


def test_results__bad_input(sweep, drawn, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "gone.json").write_text(json.dumps({"source": "runs/gone.pt", "top1": 1.0}))
    (tmp_path / "public.json").write_text(json.dumps({"source": __file__, "top1": 1.0}))
    for files, x, match in (
        ([tmp_path / "none"], "epochs", "cannot read the result .*none: No such file"),
        ([tmp_path / "list.json"], "epochs", "is no result.json"),
        ([__file__], "epochs", "is no result.json"),
        ([tmp_path / "gone.json"], "epochs", "gone.pt, is not here"),
        ([tmp_path / "public.json"], "epochs", "has no epochs, but parameters"),
        (sweep, "mask-ratio", "has no mask-ratio, but .*mask_ratio"),
        (sweep, "target", "target 'hog' and top1 30.0 are not both numbers"),
        ([*sweep, "--metric", "top5"], "epochs", "top5 None are not both .* one of top1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            results([str(f) for f in files], "--x", x)


def test_results__draws(sweep, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(tmp_path, "results", *sweep, "--x", "mask_ratio")[0] == 2 * 420
