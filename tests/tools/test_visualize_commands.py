"""Every command of tools/visualize.py writes its picture, and refuses bad input in one line."""

import argparse
import json

import pytest
import torch
from PIL import Image

from downstream.encoders import METHODS
from engine import UserError
from pictures import colorize, columns, hide
from tools import figures, masks, visualize

pytestmark = pytest.mark.slow


pytest_plugins = ["fresh_weights"]


def run(tmp_path, *words):
    """Run a command and return its picture's size; below the caption it is not one colour."""
    visualize.main([*map(str, words), "--output", str(tmp_path / "sub" / "x.png")])
    with Image.open(tmp_path / "sub" / "x.png") as image:
        assert image.format == "PNG"
        low, high = image.convert("L").crop((0, image.height // 2, *image.size)).getextrema()
        assert low < high
        return image.size


def photographs(folder, count):
    """Plain ones, whose green is 90 times their number."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (70, 50), (200, 90 * i, 30)).save(folder / f"{i}.jpg")
    return folder


# ---------------------------------------------------------------------------- every command


@pytest.mark.parametrize("method", METHODS)
def test_reconstruct__size(tmp_path, checkpoints, method):
    width, height = run(tmp_path, "reconstruct", "--checkpoint", checkpoints[method], "--images",
                        "0,4", "--side", "100")  # fmt: skip
    rows = {"cfmae": 6, "semanticmim": 4, "mae": 2, "mcmae": 2, "coma_dyvit": 6}[method]
    assert width >= 4 * 104 and rows * 104 < height < rows * 104 + 120


def test_attention__sizes(tmp_path, checkpoints):
    sem, more = checkpoints["semanticmim"], checkpoints["cfmae"]
    flags = ("attention", "--images", "0,1", "--side", "50")
    queries = ("--query", "1,1", "proxies", "--heads")
    width, height = run(tmp_path, *flags, "--checkpoint", sem, *queries)
    assert height > 6 * 54 and width >= 4 * 54  # 2 images x 3 queries; input and 3 heads
    assert run(tmp_path, *flags, "--checkpoint", sem, more, "--depth")[1] > 2 * 54
    assert run(tmp_path, *flags, "--checkpoint", sem, "--proxy-mean", "--depth")[1] > 3 * 54
    fresh = ("--method", "cfmae", "--encoder", "tiny", "--image-size", "32")
    assert run(tmp_path, *flags, *fresh)[1] > 2 * 54
    with pytest.raises(UserError, match="hierarchical"):
        run(tmp_path, *flags, "--checkpoint", checkpoints["coma_dyvit"])
    assert run(tmp_path, *flags, "--checkpoint", checkpoints["mcmae"])[1] > 2 * 54  # its stage 3


def test_masks__counts(monkeypatch):
    """Each panel hides as many patches as its paper says."""
    shown = {}
    keep = lambda *args: shown.update(columns=args[2], rows=args[3])  # noqa: E731
    monkeypatch.setattr(masks, "sheet", keep)
    visualize.main(["masks", "--images", "3", "--output", "x.png"])
    cells = dict(zip(shown["columns"], shown["rows"][0]))

    def hidden(name, side):  # cells that are hatched throughout
        x = cells[name]
        x = (x == hide(x, torch.ones(x.shape[1:], dtype=torch.bool))).all(0).float()[None, None]
        return int((torch.nn.functional.avg_pool2d(x, side) == 1).sum())

    assert hidden("MAE", 16) == 147
    assert hidden("SemanticMIM", 16) == 118 and hidden("plain MIM", 16) == 79
    assert hidden("MCMAE block", 16) == 147 and hidden("MCMAE token", 4) == 3136 * 3 // 4
    assert hidden("CoMA", 32) == 30 and hidden("CoMA complement", 32) == 19
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
    assert 6 * 132 < run(tmp_path, "masks", *flags)[0] < 6 * 132 + 80
    assert run(tmp_path, "dataset", "--images", "0-2", "--side", "40", "--palette")[1] > 3 * 44


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


def test_masks__methods_below_each_other(tmp_path, monkeypatch):
    """Each method begins a band of its own, with the image beside its masks."""
    shown, tiny = {}, ("--image-size", "64")
    keep = lambda *args: shown.update(columns=args[2], rows=args[3], bands=args[8])  # noqa: E731
    with monkeypatch.context() as m:
        m.setattr(masks, "sheet", keep)
        run_masks = [*("masks", "--images", "0", *tiny, "--output", "x.png")]
        visualize.main(run_masks)
    starts = [sum(shown["bands"][:i]) for i in range(len(shown["bands"]))]
    assert shown["bands"] == [2, 6, 6, 3, 3, 3] and sum(shown["bands"]) == len(shown["columns"])
    assert [shown["columns"][i] for i in starts] == ["rgb", "rgb", "CFMAE IG, rgb", *3 * ["rgb"]]
    assert all(cell is not None for cell in shown["rows"][0])
    width, height = run(tmp_path, *run_masks[:-2])
    assert width < 900 and 6 * 132 < height < 6 * (132 + 40) + 60


def test_folder_of_bare_images(tmp_path, checkpoints):
    """A folder without train/ and val/ is itself a split."""
    flags = ("--data", photographs(tmp_path / "photos", 2), "--images", "0-1")
    for words in (("attention", checkpoints["cfmae"]), ("reconstruct", checkpoints["mcmae"])):
        height = run(tmp_path, words[0], "--checkpoint", words[1], *flags)[1]
        assert 2 * 132 < height < 2 * 132 + 120, words  # two rows of cells
    with pytest.raises(UserError, match="no maps"):
        run(tmp_path, "dataset", *flags)
    with pytest.raises(UserError, match="no instance and semantic maps; with --only rgb"):
        run(tmp_path, "reconstruct", "--checkpoint", checkpoints["cfmae"], *flags)


def test_one_photograph(tmp_path, checkpoints):
    """--data is a file: that image alone, with every command that needs no maps."""
    flags = ("--data", photographs(tmp_path, 2) / "1.jpg")
    cfmae, mcmae = checkpoints["cfmae"], checkpoints["mcmae"]
    for words in (
        ("attention", "--checkpoint", cfmae),
        ("features", "--checkpoint", mcmae),
        ("reconstruct", "--checkpoint", mcmae, "--side", 100),
        ("masks", "--method", "mcmae", "--image-size", "64"),
    ):
        assert 100 < run(tmp_path, *words, *flags)[1] < 260, words  # one row
    args = argparse.Namespace(data=str(tmp_path / "1.jpg"), split="val", images=None, seed=0)
    ((name, batch),) = figures.open_images(args, 64, 8)
    assert name == "1.jpg" and abs(int(batch["rgb"][0, 1, 5, 5]) - 90) < 3
    with pytest.raises(UserError, match="1.jpg has no instance and semantic map"):
        run(tmp_path, "reconstruct", "--checkpoint", cfmae, *flags)
    with pytest.raises(UserError, match="no maps"):
        run(tmp_path, "dataset", *flags)


def test_reconstruct__of_rgb_alone_needs_no_maps(tmp_path, checkpoints, monkeypatch):
    """Maps that are hidden whole may be missing: the prediction is the same, the truth black."""
    (tmp_path / "photos").mkdir()
    Image.effect_mandelbrot((64, 64), (-2, -1.2, 1, 1.2), 9).convert("RGB").save(
        tmp_path / "photos" / "a.png"
    )
    shown = []
    monkeypatch.setattr("tools.reconstruct.sheet", lambda *args: shown.append(args[3]))
    flags = ("--checkpoint", checkpoints["cfmae"], "--output", tmp_path / "x.png")
    folder, hidden = tmp_path / "photos", ("--hide", "semantic", "instance")
    for data, only in ((folder, ("--only", "rgb")), (folder / "a.png", hidden)):
        visualize.main([*map(str, ("reconstruct", *flags, "--data", data, *only))])
    with_maps = tmp_path / "maps" / "val"
    for name in ("rgb", "instance", "semantic"):
        (with_maps / name).mkdir(parents=True)
        Image.new("L", (64, 64), 3).save(with_maps / name / "a.png")
    (with_maps / "rgb" / "a.png").write_bytes((tmp_path / "photos/a.png").read_bytes())
    flags = (*flags, "--data", tmp_path / "maps", "--only", "rgb")
    visualize.main([*map(str, ("reconstruct", *flags))])
    for rows in shown[:2]:
        assert len(rows) == 3 == len(shown[2])
        for row, other in zip(rows, shown[2]):
            assert torch.equal(row[2], other[2])
        black = [int(row[0].max()) == 0 for row in rows]
        assert sum(black) == 2 and not any(int(row[0].max()) == 0 for row in shown[2])


def test_unreadable_image__does_not_end_a_sheet(tmp_path, checkpoints, capsys):
    """It is left out with a line, once, and no other image is shown twice in its place."""
    figures.left_out.cache_clear()
    folder = photographs(tmp_path / "photos", 3)
    (folder / "1.jpg").write_bytes(b"noise")
    flags = ("--data", folder, "--images", "0-2")
    height = run(tmp_path, "reconstruct", "--checkpoint", checkpoints["mcmae"], *flags)[1]
    assert 2 * 132 < height < 2 * 132 + 120  # two rows
    assert capsys.readouterr().err.count("left out: 1.jpg") == 1
    with pytest.raises(UserError, match="none of the images 1 of .* can be read"):
        run(tmp_path, "masks", "--method", "mcmae", *flags[:2], "--images", "1")


def test_bad_input__one_line(tmp_path, checkpoints):
    (tmp_path / "noise.pt").write_bytes(b"noise")
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
        (("dataset", "--wrong"), "unrecognized"),
        (("schedule", "--checkpoint", sem, "--epochs", "9"), "unrecognized"),
        (("paint",), "invalid choice"),
    ):
        with pytest.raises(UserError, match=match):
            run(tmp_path, *words)


# -------------------------------------------------------------------------------- drawing


def test_colorize__each_id_has_a_colour_of_its_own_always():
    ids = torch.arange(256, dtype=torch.uint8).view(16, 16)
    colours = colorize(ids).flatten(1).T
    assert len(colours.unique(dim=0)) == 256
    assert torch.equal(colours[[7, 200]], colorize(torch.tensor([[7, 200]]))[:, 0].T)


def test_hide__differs_from_every_visible_colour():
    """Also from the dark grey of a label map's background, in each patch, at every size."""
    ids = torch.arange(256, dtype=torch.uint8).view(16, 16)
    palette = {tuple(c.tolist()) for c in colorize(ids).flatten(1).T}
    for side in (32, 56, 64, 224):
        x = colorize(torch.zeros(side, side, dtype=torch.uint8))
        hidden = torch.zeros(side, side, dtype=torch.bool)
        hidden[: side // 2] = True
        found = hide(x, hidden)
        assert torch.equal(found[:, side // 2 :], x[:, side // 2 :])
        colours = found[:, : side // 2].flatten(1).unique(dim=1).T
        assert len(colours) == 2 and not {tuple(c.tolist()) for c in colours} & palette
        light = (found[0, : side // 2].unfold(0, 4, 4).unfold(1, 4, 4) == 240).flatten(2)
        assert light.any(-1).all()  # no patch of 4 x 4 is one dark colour


def key(tmp_path, ids, folder="."):
    """What a sheet of one label map says beside the colours."""
    args = argparse.Namespace(data=str(tmp_path / folder) if folder != "shapes" else folder)
    return figures.legend(args, [torch.tensor(ids, dtype=torch.uint8)])


def test_legend__names(tmp_path):
    ids = [[0, 7, 7], [255, 12, 0]]
    found = key(tmp_path, ids, "shapes")
    assert list(found) == ["semantic maps:", "sky", "square", "crescent", "unlabelled"]
    assert found["square"] == tuple(colorize(torch.tensor([[7]]))[:, 0, 0].tolist())
    assert list(key(tmp_path, ids)) == ["semantic maps:", "class 0", "class 7", "class 12",
                                        "unlabelled"]  # fmt: skip
    names = [f"thing {i}" for i in range(8)]
    (tmp_path / "categories.json").write_text(json.dumps([{"name": n} for n in names]))
    assert list(key(tmp_path, ids))[1:4] == ["thing 0", "thing 7", "class 12"]
    (tmp_path / "classes.txt").write_text("wall\nfloor\n")
    assert list(key(tmp_path, ids))[1:3] == ["wall", "class 7"]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "categories.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="categories.json: wanted a list"):
        key(tmp_path, ids, "coco")
    assert figures.legend(argparse.Namespace(data="nowhere"), []) == {}


def test_legend__the_largest_of_many(tmp_path):
    ids = torch.arange(1, 41).repeat_interleave(torch.arange(1, 41)).view(1, -1)
    found = list(key(tmp_path, ids.tolist()))
    assert found == ["semantic maps:", *(f"class {i}" for i in range(11, 41)), "and 10 more"]


def test_numbers__ranges():
    assert figures.numbers("3,17-20", 21, "x") == [3, 17, 18, 19, 20]


def test_columns__what_is_hidden_is_hatched():
    """Visible patches are the truth's, hidden ones hatched, or predicted; label maps in colour."""
    rgb = torch.randint(0, 255, (2, 3, 16, 24), dtype=torch.uint8)
    ids = torch.randint(0, 9, (2, 8, 12), dtype=torch.uint8)
    hidden = torch.rand(2, 4, 6) < 0.5
    entries = {"rgb": (rgb, hidden, 255 - rgb), "semantic": (ids, hidden, ids + 1)}
    found = columns({**entries, "whole": (rgb, None, 255 - rgb), "alone": (rgb, hidden, None)})
    kinds = ("", ": visible", ": prediction")
    assert list(found) == [
        *(f"{name}{kind}" for name in ("rgb", "semantic") for kind in kinds),
        "whole", "whole: prediction", "alone", "alone: visible",
    ]  # fmt: skip
    pairs = {"rgb": (rgb, 255 - rgb), "semantic": (colorize(ids), colorize(ids + 1))}
    for name, (truth, pred) in pairs.items():
        gone = figures.enlarge(hidden, truth.shape[2:])[:, None]  # (B, 1, H, W)
        assert torch.equal(found[name], truth)
        assert torch.equal(found[f"{name}: prediction"], pred.where(gone, truth))
        seen = found[f"{name}: visible"]
        assert torch.equal(seen.where(~gone, 0), truth.where(~gone, 0))
        grey = (seen == seen[:, :1]) & ((seen == 160) | (seen == 240))
        assert (grey | ~gone).all()
    assert torch.equal(found["whole: prediction"], 255 - rgb)
