"""Every command of tools/visualize.py writes its picture, and refuses bad input in one line."""

import json

import pytest
import torch
from PIL import Image
from test_visualize import fresh

from engine import UserError
from pictures import colorize
from tools import figures, model_figures, visualize


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return fresh(tmp_path_factory.mktemp("checkpoints"))


def run(tmp_path, *words):
    """Run a command and return its picture's size; below the caption it is not one colour."""
    visualize.main([*map(str, words), "--output", str(tmp_path / "sub" / "x.png")])
    with Image.open(tmp_path / "sub" / "x.png") as image:
        assert image.format == "PNG"
        low, high = image.convert("L").crop((0, image.height // 2, *image.size)).getextrema()
        assert low < high
        return image.size


# ---------------------------------------------------------------------------- every command


@pytest.mark.parametrize("method", model_figures.MODELS)
def test_reconstruct__size(tmp_path, checkpoints, method):
    width, height = run(tmp_path, "reconstruct", "--checkpoint", checkpoints[method], "--images",
                        "0,4", "--side", "100")  # fmt: skip
    rows = {"cfmae": 6, "semanticmim": 4, "mcmae": 2, "coma_dyvit": 6, "mae": 2}[method]
    assert width >= 4 * 104 and rows * 104 < height < rows * 104 + 120


def test_attention__sizes(tmp_path, checkpoints):
    sem, more = checkpoints["semanticmim"], checkpoints["cfmae"]
    flags = ("attention", "--images", "0,1", "--side", "50")
    queries = ("--query", "1,1", "proxies", "--heads")
    width, height = run(tmp_path, *flags, "--checkpoint", sem, *queries)
    assert height > 6 * 54 and width >= 4 * 54  # 2 images x 3 queries; input and 3 heads
    assert run(tmp_path, *flags, "--checkpoint", sem, more, "--depth")[1] > 2 * 54
    assert run(tmp_path, *flags, "--checkpoint", sem, "--proxy-mean", "--depth")[1] > 3 * 54
    assert run(tmp_path, *flags, "--checkpoint", sem, more, "--distance")[0] == 640
    fresh = ("--method", "cfmae", "--encoder", "tiny", "--image-size", "32")
    assert run(tmp_path, *flags, *fresh)[1] > 2 * 54
    with pytest.raises(UserError, match="hierarchical"):
        run(tmp_path, *flags, "--checkpoint", checkpoints["mcmae"])


def test_masks__counts(monkeypatch, tmp_path):
    """Each panel hides as many patches as its paper says."""
    shown = {}
    keep = lambda *args: shown.update(columns=args[2], rows=args[3])  # noqa: E731
    monkeypatch.setattr(visualize, "sheet", keep)
    visualize.main(["masks", "--images", "3", "--output", "x.png"])
    cells = dict(zip(shown["columns"], shown["rows"][0]))

    def hidden(name, side):  # share of cells that are grey throughout
        x = (cells[name] == figures.GREY).all(0).float()[None, None]
        return int((torch.nn.functional.avg_pool2d(x, side) == 1).sum())

    assert hidden("SemanticMIM", 16) == 118 and hidden("plain MIM", 16) == 79
    assert hidden("MCMAE block", 16) == 147 and hidden("MCMAE token", 4) == 3136 * 3 // 4
    assert hidden("CoMA", 32) == 30 and hidden("CoMA complement", 32) == 19
    assert hidden("MAE", 16) == 147
    for kind in ("SG", "IG", "RD"):
        sides = {"rgb": 16, "instance": 4, "semantic": 4}
        assert sum(hidden(f"CFMAE {kind}, {m}", s) for m, s in sides.items()) == 588 - 98
    visualize.main(["masks", "--over-training", "--images", "0-1", "--output", "x.png"])
    assert len(shown["rows"]) == 6 and len(shown["columns"]) == 6
    first, last = shown["rows"][0], shown["rows"][-1]
    assert any(not torch.equal(a, b) for a, b in zip(first, last))


def test_figures_without_a_model__sizes(tmp_path):
    assert run(tmp_path, "masks", "--frequency", "50")[0] >= 3 * 192
    flags = ("--method", "cfmae", "--model", "tiny", "--images", "0")
    assert run(tmp_path, "masks", *flags)[0] > 12 * 128
    assert run(tmp_path, "schedule", "--e1", "0.1", "--epochs", "100")[0] == 920
    assert run(tmp_path, "schedule", "--method", "mcmae")[0] == 460
    assert run(tmp_path, "dataset", "--images", "0-2", "--side", "40", "--palette")[1] > 3 * 44


def test_schedule__reads_a_checkpoint(tmp_path, checkpoints):
    assert run(tmp_path, "schedule", "--checkpoint", checkpoints["cfmae"])[0] == 920


def test_features__sizes(tmp_path, checkpoints):
    for method in ("cfmae", "mcmae", "coma_dyvit"):
        width, _ = run(tmp_path, "features", "--checkpoint", checkpoints[method], "--images", "0-1")
        assert width > 5 * 128  # input and four levels


def test_principal_components__svd():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8)
    found, shares = visualize.principal_components(x)
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(found.abs(), (U * S)[:, :3].abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shares, (S**2 / (S**2).sum())[:3])


def test_log__two_runs(tmp_path, monkeypatch):
    for n, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        lines = [{"step": 0, "val": {"loss": 3.0}}, {"step": 20, "loss": 2.0 - n, "lr": 1e-3},
                 {"step": 40, "loss": 1.0, "lr": 2e-3}]  # fmt: skip
        text = "".join(json.dumps(x) + "\n" for x in lines) + '{"step": 60, "lo'  # torn
        (tmp_path / name / "log.jsonl").write_text(text)
    assert run(tmp_path, "log", tmp_path / "a", tmp_path / "b" / "log.jsonl")[0] == 2 * 360
    assert run(tmp_path, "log", tmp_path / "a", "--keys", "lr")[0] == 360
    shown, name = {}, tmp_path / "a" / "log.jsonl"
    keep = lambda *args: shown.update({title: series for title, _, series in args[2]})  # noqa: E731
    monkeypatch.setattr(visualize, "chart", keep)
    visualize.main(["log", str(name), "--output", "x.png"])
    assert {s.dots: (list(s.x), list(s.y)) for s in shown["loss"]} == {
        True: ([0], [3.0]), False: ([20, 40], [2.0, 1.0])}  # fmt: skip
    assert [s.dots for s in shown["lr"]] == [False]


def test_folder_of_bare_images(tmp_path, checkpoints):
    """A folder without train/ and val/ is itself a split."""
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (70, 50), (200, 90 * i, 30)).save(tmp_path / "photos" / f"{i}.jpg")
    flags = ("--data", tmp_path / "photos", "--images", "0-1")
    for words in (("attention", checkpoints["cfmae"]), ("reconstruct", checkpoints["mcmae"])):
        height = run(tmp_path, words[0], "--checkpoint", words[1], *flags)[1]
        assert 2 * 132 < height < 2 * 132 + 120, words  # two rows of cells
    with pytest.raises(UserError, match="no maps"):
        run(tmp_path, "dataset", *flags)
    with pytest.raises(UserError, match="no instance"):
        run(tmp_path, "reconstruct", "--checkpoint", checkpoints["cfmae"], *flags)


def test_bad_input__one_line(tmp_path, checkpoints):
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "log.jsonl").write_text("{}\n")
    sem = checkpoints["semanticmim"]
    for words, match in (
        (("reconstruct", "--checkpoint", tmp_path / "none.pt"), "no such file"),
        (("reconstruct", "--checkpoint", tmp_path / "noise.pt"), "cannot be read safely"),
        (("reconstruct", "--checkpoint", sem, "--only", "semantic"), "this model has rgb"),
        (("reconstruct", "--checkpoint", sem, "--mask-ratio", "1.5"), "mask-ratio"),
        (("reconstruct", "--checkpoint", sem, "--patches", "a-b"), "numbers and ranges"),
        (("reconstruct", "--checkpoint", sem, "--images", "9999999"), "numbered from 0"),
        (("attention",), "--checkpoint"),
        (("attention", "--checkpoint", sem, "--layer", "9"), "outside 1 to 3"),
        (("attention", "--checkpoint", sem, "--image-size", "33"), "not divisible"),
        (("features", "--checkpoint", tmp_path / "none.pt"), "no such file"),
        (("masks", "--method", "cfmae", "--mask-ratio", "0.1"), "mask-ratio"),
        (("masks", "--data", tmp_path / "nowhere"), "no folder"),
        (("masks", "--over-training", "--granularities", "R"), "over-training"),
        (("masks", "--over-training", "2"), "0 to 1"),
        (("masks", "--frequency", "0"), "above 0"),
        (("attention", "--checkpoint", sem, "--layer", "0"), "outside 1 to 3"),
        (("reconstruct", "--checkpoint", sem, "--images", "0-99999999999"), "numbered from 0"),
        (("reconstruct", "--checkpoint", sem, "--images", "5-3"), "numbers and ranges"),
        (("log", tmp_path / "none"), "cannot read the log"),
        (("log", tmp_path), "no lines"),
        (("dataset", "--wrong"), "unrecognized"),
        (("paint",), "invalid choice"),
    ):
        with pytest.raises(UserError, match=match):
            run(tmp_path, *words)


# -------------------------------------------------------------------------------- drawing


def test_colorize__stable():
    ids = torch.arange(256, dtype=torch.uint8).view(16, 16)
    colours = colorize(ids).flatten(1).T
    assert len({tuple(c.tolist()) for c in colours}) > 250
    assert torch.equal(colours[[7, 200]], colorize(torch.tensor([[7, 200]]))[:, 0].T)


def test_ticks__round_numbers():
    assert figures.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert figures.ticks(-3, 12) == pytest.approx([-2.5, 0, 2.5, 5, 7.5, 10])
    assert figures.ticks(1e-5, 9e-5) == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5])


def test_chart__dots_are_not_joined(tmp_path):
    shares = []
    for dots in (False, True):
        panel = ("loss", "step", [figures.Series("", [0, 1], [0.0, 1.0], dots=dots)])
        figures.chart(tmp_path / "x.png", "", [panel])
        with Image.open(tmp_path / "x.png") as image:
            colours = dict((c, n) for n, c in image.getcolors(2**20))
        shares.append(colours[tuple(bytes.fromhex(figures.COLOURS[0][1:]))])
    assert 0 < shares[1] < shares[0] / 10


def test_numbers__ranges():
    assert figures.numbers("3,17-20", 21, "x") == [3, 17, 18, 19, 20]
