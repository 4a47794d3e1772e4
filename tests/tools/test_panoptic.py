"""Recipes panoptic and paper, on tiny models of transformers' real classes with random weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import engine
import files
from tools import grounded, panoptic, pseudo_label
from tools.panoptic import segment, tables

pytestmark = pytest.mark.slow

CPU = engine.World("cpu", "fp32")


def images():
    draw = torch.Generator().manual_seed(1)
    sizes = [(50, 70), (50, 70), (90, 60)]
    return [torch.randint(0, 256, (3, *s), generator=draw, dtype=torch.uint8) for s in sizes]


def naive(classes, masks, size):
    """Mask2Former's panoptic inference, a pixel at a time: query of each pixel, classes."""
    scores, labels = classes.softmax(-1).max(-1)
    kept = [q for q in range(len(scores)) if labels[q] < classes.shape[1] - 1 and scores[q] > 0.8]
    inside = F.interpolate(masks[None], size, mode="bilinear")[0].sigmoid()
    won, out = {q: [] for q in kept}, np.full(size, -1)
    for at in np.ndindex(size):
        if kept:
            won[max(kept, key=lambda q: float(scores[q] * inside[q][at]))].append(at)
    for q in kept:
        sure = int((inside[q] >= 0.5).sum())
        if won[q] and sure and len(won[q]) / sure > 0.8:
            for at in won[q]:
                if inside[q][at] >= 0.5:
                    out[at] = q
    return out, labels


def queries(seed, n=8, sure=12):
    """Logits of queries whose masks are blobs that overlap."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.rand(n, 2, 1, 1, generator=draw) * 12
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    far = (y - centres[:, 0]).square() + (x - centres[:, 1]).square()
    masks = 4 - far.sqrt() * (0.6 + torch.rand(n, 1, 1, generator=draw))
    return torch.randn(n, 5, generator=draw) * sure, masks


@pytest.mark.parametrize("seed", range(6))
def test_segment__equals_a_naive_loop(seed):
    classes, masks = queries(seed)
    owner, labels = segment(classes, masks, (20, 18))
    wanted, classes_of = naive(classes, masks, (20, 18))
    kept = [q for q in range(8) if classes_of[q] < 4 and classes[q].softmax(-1).max() > 0.8]
    back = np.array([*kept, -1])[owner.numpy()]
    assert np.array_equal(back, wanted) and labels.tolist() == classes_of[kept].tolist()
    assert (wanted >= 0).any()


def test_segment__no_query_is_sure():
    owner, labels = segment(torch.zeros(4, 5), torch.ones(4, 6, 6), (7, 8))
    assert owner.shape == (7, 8) and (owner == -1).all() and len(labels) == 0
    instance, semantic = tables(owner, labels, 80)
    assert (instance == 255).all() and (semantic == 255).all()


def test_segment__agrees_with_transformers_where_it_is_sure():
    tf = pytest.importorskip("transformers")
    classes, masks = queries(3)
    masks = F.interpolate(masks[None], (384, 384), mode="bilinear")[0]  # what it computes at
    made = type(
        "Out", (), {"class_queries_logits": classes[None], "masks_queries_logits": masks[None]}
    )
    post = tf.Mask2FormerImageProcessor().post_process_panoptic_segmentation
    (theirs,) = post(made, threshold=0.8, label_ids_to_fuse=set())
    owner, labels = segment(classes, masks, (384, 384))
    names = {s["id"]: s["label_id"] for s in theirs["segments_info"]}
    pairs = set()
    for mine, other in zip(owner.flatten().tolist(), theirs["segmentation"].flatten().tolist()):
        assert mine < 0 or int(labels[mine]) == names[int(other)]
        pairs |= {(mine, other)} if mine >= 0 else set()
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) > 1


def test_tables__things_by_area_stuff_is_background_no_segment_is_unlabelled():
    owner = torch.tensor([[0, 1, 1, -1], [2, 2, 2, 3]])
    instance, semantic = tables(owner, torch.tensor([7, 79, 80, 3]), 80)
    assert semantic.tolist() == [[7, 79, 79, 255], [80, 80, 80, 3]]
    assert instance.tolist() == [[2, 1, 1, 255], [0, 0, 0, 3]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformers")
    import tiny_segmenters as tiny

    top = tmp_path_factory.mktemp("models")
    made = {"panoptic": tiny.panoptic(top / "p"), "boxes": tiny.detector(top / "d")}
    return made | {"hq": tiny.segmenter(top / "s"), "sam": tiny.segmenter(top / "t", hq=False)}


def test_panoptic__is_the_model_alone_with_its_own_processor(models):
    import transformers as tf

    found = panoptic.Panoptic(str(models["panoptic"]), 80, CPU)
    assert found.names[:2] == ["LABEL_0", "LABEL_1"] and len(found.names) == 133
    model = tf.Mask2FormerForUniversalSegmentation.from_pretrained(models["panoptic"]).eval()
    processor = tf.Mask2FormerImageProcessor.from_pretrained(models["panoptic"])
    maps = found.label([found.prepare(x, "a.jpg") for x in images()])
    labelled = 0
    for rgb, (instance, semantic) in zip(images(), maps):
        with torch.no_grad():
            out = model(**processor(images=rgb, return_tensors="pt"))
        size = tuple(rgb.shape[1:])
        owner, labels = segment(out.class_queries_logits[0], out.masks_queries_logits[0], size)
        wanted = tables(owner, labels, 80)
        assert np.array_equal(instance, wanted[0]) and np.array_equal(semantic, wanted[1])
        labelled += (semantic != 255).sum()
    assert labelled > 0 and found.label([]) == []


def test_panoptic__large_images_get_maps_of_their_own_size(models, monkeypatch):
    found = panoptic.Panoptic(str(models["panoptic"]), 80, CPU)
    rgb = images()[0]
    whole = found.label([found.prepare(rgb)])[0][1]
    monkeypatch.setattr(panoptic, "LARGEST", 35)
    small = found.label([found.prepare(rgb)])[0][1]
    assert small.shape == whole.shape == (50, 70) and (small == whole).mean() > 0.9
    assert np.array_equal(small[::2], small[1::2]) and np.array_equal(small[:, ::2], small[:, 1::2])


def test_panoptic__padding_is_cut_off():
    found = object.__new__(panoptic.Panoptic)
    found.things = 80
    masks = torch.full((2, 16, 16), -9.0)
    masks[0, 4:8] = masks[1, :4] = 9  # the padding below row 8 belongs to nobody
    classes = torch.zeros(2, 134)
    classes[0, 1] = classes[1, 100] = 20
    x = panoptic.Input(torch.zeros(3, 64, 64), (32, 64), (20, 40))
    instance, semantic = found.maps(x, classes, masks)
    assert semantic.shape == (20, 40) and (semantic[:9] == 100).all() and (semantic[11:] == 1).all()
    assert (instance[:9] == 0).all() and (instance[11:] == 1).all()


def test_load__says_what_is_missing(models, tmp_path):
    import transformers as tf

    load = lambda path: panoptic.Panoptic(str(path), 80, CPU)  # noqa: E731
    with pytest.raises(engine.UserError, match=r"--panoptic-model \S+none: .*takes a folder") as e:
        load(tmp_path / "none")
    assert "\n" not in str(e.value)
    with pytest.raises(engine.UserError, match="AutoModelForUniversalSegmentation"):
        load(models["hq"])
    model = tf.Mask2FormerForUniversalSegmentation.from_pretrained(models["panoptic"])
    state = {k: v for k, v in model.state_dict().items() if "class_predictor" not in k}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    tf.Mask2FormerImageProcessor().save_pretrained(tmp_path / "part")
    with pytest.raises(engine.UserError, match="no weights for 2 tensors, e.g. class_predictor"):
        load(tmp_path / "part")


# ------------------------------------------------------------------------------------------ paper


def test_prompts__names_of_folders_files_and_imagenet(tmp_path):
    assert grounded.prompts(["sea_lion", "n01443537"], None) == {"sea_lion": "sea lion."}
    names = tmp_path / "names.txt"
    names.write_text("n01443537\tgoldfish, Carassius auratus\nn01742172 boa constrictor\n\n")
    found = grounded.prompts(["n01443537", "n01742172", "n02000000"], str(names))
    assert found == {"n01443537": "goldfish.", "n01742172": "boa constrictor."}
    names.write_text("n01443537\n")
    with pytest.raises(engine.UserError, match="every line is FOLDER name"):
        grounded.prompts(["n01443537"], str(names))
    with pytest.raises(engine.UserError, match="--class-names .*No such file"):
        grounded.prompts([], str(tmp_path / "none"))
    pytest.importorskip("torchvision")
    whole = grounded.prompts([f"n{i:08d}" for i in range(1000, 0, -1)], None)
    assert whole["n00000001"] == "tench." and whole["n00001000"] == "toilet tissue."


@pytest.mark.parametrize(
    "scores, kept",
    [
        ([0.6, 0.55, 0.3], [0, 1]),  # the highest threshold that leaves any
        ([0.45, 0.42, 0.38], [0, 1]),
        ([0.29, 0.26, 0.1], [0, 1]),
        ([0.26, 0.2, 0.1], [0]),
        ([0.25, 0.2, 0.1], []),
        ([], []),
    ],
)
def test_boxes__threshold_is_lowered_until_something_is_found(scores, kept):
    corners = torch.tensor([[0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1], [0.1, 0.6, 0.4, 0.9]])
    found = grounded.boxes(torch.tensor(scores), corners[: len(scores)])
    assert sorted(found.tolist()) == kept


def test_boxes__repetitions_go_and_the_best_stay():
    at = torch.arange(40.0)[:, None] / 100
    corners = torch.cat([at, at, at + 0.1, at + 0.1], 1)
    corners[39] = corners[38] + 0.001
    scores = torch.linspace(0.6, 0.99, 40)
    found = grounded.boxes(scores, corners).tolist()
    assert found == [39, *range(37, 6, -1)] and len(found) == grounded.MOST == 32


def test_paint__small_masks_lie_on_large_ones():
    masks = np.zeros((4, 6, 6), bool)
    masks[0, 2:4, 2:4], masks[1], masks[2, :5] = True, True, True
    ids = grounded.paint(masks)
    assert (ids[2:4, 2:4] == 3).all() and ids[5, 5] == 1 and ids[0, 0] == 2
    assert np.unique(ids).tolist() == [1, 2, 3] and not grounded.paint(masks[:0]).any()


@pytest.mark.parametrize("masks", ["hq", "sam"])
def test_grounded__equals_the_models_used_one_image_and_box_at_a_time(masks, models):
    import transformers as tf

    base = panoptic.Panoptic(str(models["panoptic"]), 80, CPU)
    texts = {"a": "fish.", "b": "boa constrictor."}
    paths = str(models["boxes"]), str(models[masks])
    recipe = grounded.Grounded(base, *paths, texts, CPU)
    names = ["a/0.jpg", "b/1.jpg", "2.jpg"]
    inputs = [recipe.prepare(x, name) for x, name in zip(images(), names)]
    assert [x.prompt for x in inputs] == ["fish.", "boa constrictor.", recipe.default]
    assert recipe.default.startswith("label_0. label_1.")
    found = recipe.label(inputs)
    auto = tf.AutoModelForZeroShotObjectDetection.from_pretrained(paths[0]).eval()
    reader = tf.AutoProcessor.from_pretrained(paths[0])
    painter = tf.AutoModelForMaskGeneration.from_pretrained(paths[1]).eval()
    brush = tf.AutoProcessor.from_pretrained(paths[1])
    counts = []
    for rgb, x, (instance, semantic) in zip(images(), inputs, found):
        (h, w) = size = tuple(rgb.shape[1:])
        with torch.no_grad():
            given = reader(images=rgb, text=x.prompt, return_tensors="pt")
            out = auto(**given)
            (best,) = reader.post_process_grounded_object_detection(
                out, given.input_ids, threshold=0.25, target_sizes=[size]
            )
            level = next(t for t in grounded.THRESHOLDS if (best["scores"] > t).any())
            corners = best["boxes"][best["scores"] > level]
            scale = torch.tensor([w, h, w, h])
            corners = corners.maximum(torch.zeros(4)).minimum(scale)
            kept = grounded.boxes(best["scores"][best["scores"] > level], corners / scale)
            painted = []
            for box in corners[kept]:
                given = brush(images=rgb, input_boxes=[[box.tolist()]], return_tensors="pt")
                made = painter(**given, multimask_output=False)
                sizes = given["original_sizes"], given["reshaped_input_sizes"]
                painted.append(brush.post_process_masks(made.pred_masks, *sizes)[0][0, 0].numpy())
        wanted = grounded.paint(np.stack(painted))
        assert (instance == wanted).mean() > 0.99  # boxes are rounded otherwise on the way
        assert instance.shape == semantic.shape == size
        counts.append(len(kept))
        (alone,) = base.label([x.panoptic])
        assert np.array_equal(semantic, alone[1])
    assert len(set(counts)) > 1, counts


def test_grounded__an_image_in_which_nothing_is_found_is_all_background(models):
    base = panoptic.Panoptic(str(models["panoptic"]), 80, CPU)
    paths = str(models["boxes"]), str(models["sam"])
    recipe = grounded.Grounded(base, *paths, {}, CPU)
    inputs = [recipe.prepare(x, "a.jpg") for x in images()]
    box = torch.tensor([[0.1, 0.1, 0.8, 0.9]])
    none = recipe.segment(inputs, [torch.zeros(0, 4), box, torch.zeros(0, 4)])
    assert not none[0].any() and not none[2].any() and none[1].any()
    assert not any(x.any() for x in recipe.segment(inputs, [torch.zeros(0, 4)] * 3))


@pytest.mark.parametrize("recipe", ["panoptic", "paper"])
def test_main__labels_a_folder_with_models_from_disk(recipe, models, tmp_path, capsys):
    for i, rgb in enumerate(images()):
        path = tmp_path / f"in/train/fish/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(path)
    flags = ["--recipe", recipe, "--workers", "0", "--device", "cpu", "--batch-size", "2"]
    for flag in ("panoptic", "boxes"):
        flags += [f"--{flag}-model", str(models[flag])]
    flags += ["--masks-model", str(models["hq"]), "--output", str(tmp_path / "out")]
    assert pseudo_label.main([str(tmp_path / "in"), *flags]) == 0
    said = capsys.readouterr().out
    assert "train: 3 images labelled" in said
    assert ("prompts: names of 1 class folders, e.g. 'fish.'" in said) == (recipe == "paper")
    base = panoptic.Panoptic(str(models["panoptic"]), 80, CPU)
    for i, rgb in enumerate(images()):
        path = tmp_path / f"out/train/semantic/fish/{i}.png"
        maps = base.label([base.prepare(rgb)])[0]
        found = files.decode_map(files.read_bytes(str(path)))
        assert np.array_equal(found, maps[1])
    with pytest.raises(engine.UserError, match="things was 80, is 3"):
        pseudo_label.main([str(tmp_path / "in"), *flags, "--things", "3"])
