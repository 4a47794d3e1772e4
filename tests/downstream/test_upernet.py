"""UperNet, the linear probe and their loss, against loops and the papers' parameter counts."""

import types

import pictures
import pytest
import torch
import torch.nn.functional as F
from downstream import encoders
from downstream.segment import evaluate, make_optimizer, reconstruct
from downstream.upernet import POOL_SCALES, Neck, Probe, Segmenter, UperNet, pixel_loss, pool
from torch import nn

METHODS = ("cfmae", "semanticmim", "mcmae", "coma_dyvit")


def tiny(method, size=(32, 64), **kwargs):
    torch.manual_seed(0)
    encoder = encoders.build(encoders.describe(method=method, model="tiny"), size, 0.1)
    return Segmenter(encoder, 5, dim=16, aux_dim=8, **kwargs)


def batch(size=(32, 64), B=2):
    draw = torch.Generator().manual_seed(1)
    rgb = torch.randint(256, (B, 3, *size), generator=draw, dtype=torch.uint8)
    labels = torch.randint(5, (B, *size), generator=draw, dtype=torch.uint8)
    return {"rgb": rgb, "semantic": labels, "seed": torch.arange(B)}


@pytest.mark.slow
def test_UperNet__on_a_plain_vit_b_has_the_163_million_parameters_of_mcmaes_table_3():
    """Rounded; MCMAE's own 153 are in test_paper_numbers_mcmae.py. Other widths are far from it."""
    rgb = {"granularities": "R"}
    with torch.device("meta"):
        encoder = encoders.build(encoders.describe(method="cfmae", model="base", **rgb))
        model = Segmenter(encoder, 150)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(162.50, abs=0.005)


@pytest.mark.parametrize("size", [(6, 6), (16, 7), (1, 2), (13, 20)])
@pytest.mark.parametrize("cells", POOL_SCALES)
def test_pool__is_adaptive_average_pooling(size, cells):
    x = torch.randn(2, 3, *size)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            torch.testing.assert_close(pool(x, cells), F.adaptive_avg_pool2d(x, cells))


def conv_bn_relu(layers, x):
    conv, bn, _ = layers
    x = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
    shape = (1, -1, 1, 1)
    x = (x - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
    return (x * bn.weight.view(shape) + bn.bias.view(shape)).clamp(min=0)


def at_size_of(x, y):
    return nn.Upsample(size=y.shape[2:], mode="bilinear", align_corners=False)(x)


def test_UperNet__is_pyramid_pooling_and_a_feature_pyramid():
    torch.manual_seed(0)
    head, dims, sizes = UperNet((4, 6, 8, 10), False, 5, 12, 7), (4, 6, 8, 10), (24, 12, 6, 3)
    for m in head.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    maps = [torch.randn(2, d, n, n + 2) for d, n in zip(dims, sizes)]
    deep = maps[3]
    parts = [deep]
    for layers, s in zip(head.psp.convs, (1, 2, 3, 6)):
        (h, w), cells = deep.shape[2:], torch.empty(2, 10, s, s)
        for i in range(s):
            for j in range(s):
                rows = slice(i * h // s, -(-(i + 1) * h // s))
                cols = slice(j * w // s, -(-(j + 1) * w // s))
                cells[:, :, i, j] = deep[:, :, rows, cols].mean((2, 3))
        parts.append(at_size_of(conv_bn_relu(layers, cells), deep))
    p4 = conv_bn_relu(head.psp.bottleneck, torch.cat(parts, 1))
    p3 = conv_bn_relu(head.lateral[2], maps[2]) + at_size_of(p4, maps[2])
    p2 = conv_bn_relu(head.lateral[1], maps[1]) + at_size_of(p3, maps[1])
    p1 = conv_bn_relu(head.lateral[0], maps[0]) + at_size_of(p2, maps[0])
    outputs = [conv_bn_relu(f, p) for f, p in zip(head.output, (p1, p2, p3))]
    fused = torch.cat([outputs[0], *(at_size_of(p, p1) for p in (*outputs[1:], p4))], 1)
    expected = head.classifier(conv_bn_relu(head.fuse, fused))
    (actual,) = head.eval()(maps)
    assert actual.shape == (2, 5, 24, 26)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    head.dropout = 0.0
    _, aux = head(maps, torch.arange(2))
    expected = head.aux_classifier(conv_bn_relu(head.aux_conv, maps[2]))  # stride 16
    torch.testing.assert_close(aux, expected, rtol=1e-4, atol=1e-5)


def test_init_head__classifiers_are_small_and_convolutions_he_normal():
    torch.manual_seed(0)
    head, probe = UperNet((60,) * 4, True, 90, 50, 40), Probe(500, 40)
    for layer in (head.classifier, head.aux_classifier, probe.classifier):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()
    for (layer, *_), dim in ((head.fuse, 50), (head.aux_conv, 40)):  # 3 x 3; ReLU halves
        assert layer.weight.std().item() == pytest.approx((2 / (9 * dim)) ** 0.5, rel=0.05)
    bound = (60 * 4) ** -0.5  # torch's for 60 channels out, 2 x 2
    for layer in (head.neck.scales[0][0], head.neck.scales[1]):
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.any()


def test_Neck__gives_a_plain_vit_four_strides():
    x, neck = torch.randn(2, 4, 6, 8), Neck(4).eval()
    assert [m.shape[2:] for m in neck([x] * 4)] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert isinstance(neck.scales[0][1], nn.BatchNorm2d)  # its arithmetic: test_detect_model.py


@pytest.mark.parametrize("labelled", [True, False])
def test_pixel_loss__is_a_mean_over_samples_of_means_over_pixels(labelled):
    """Over a sample's labelled pixels; or over all, mmsegmentation's, where the others are 0."""
    logits, labels = torch.randn(3, 4, 2, 3), torch.randint(4, (3, 4, 6), dtype=torch.uint8)
    labels[0, :2], labels[2] = 255, 255  # the last has no label at all
    full = F.interpolate(logits, (4, 6), mode="bilinear")
    losses = []
    for x, y in zip(full, labels):
        at = [(i, j) for i in range(4) for j in range(6) if y[i, j] != 255]
        terms = [-x[:, i, j].log_softmax(0)[int(y[i, j])] for i, j in at]
        losses.append(sum(terms) / (len(terms) if labelled else 24) if terms else torch.zeros(()))
    torch.testing.assert_close(pixel_loss(logits, labels, labelled), sum(losses) / 3)
    half = logits.bfloat16()  # of a step in bf16; the loss is fp32's, resizing too
    assert torch.equal(pixel_loss(half, labels), pixel_loss(half.float(), labels))


def test_Segmenter__drop_path_comes_from_the_samples_seeds():
    model, b = tiny("mae"), batch()
    model.encoder.drop_path = 0.9
    maps = model.features(model.normalize(b["rgb"]), b["seed"])
    whole = model.features(model.normalize(b["rgb"]))
    assert not torch.allclose(maps[3], whole[3])
    for x, y in zip(model.predict(b["rgb"], b["seed"]), model.head(maps, b["seed"])):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_Segmenter__every_trained_parameter_gets_a_gradient(method):
    model = tiny(method)
    total, logs = model(batch(), torch.zeros(()))
    total.backward()
    grads = {n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad}
    assert all(grads.values())
    b = batch()
    b["semantic"][0, :20] = 255
    total, logs = model(b, torch.zeros(()))
    main, aux = model.head(model.features(model.normalize(b["rgb"]), b["seed"]), b["seed"])
    main, aux = (pixel_loss(x, b["semantic"], labelled=False) for x in (main, aux))
    torch.testing.assert_close(logs["loss_main"], main)
    torch.testing.assert_close(total, main + 0.4 * aux)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.split(".")[1] for n in frozen} <= {"norm", "instance_embed", "semantic_embed"}
    assert model.eval().logits(batch()["rgb"]).shape == (2, 5, 32, 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_Segmenter__probe_reads_a_frozen_layer_as_a_map(method):
    model, b = tiny(method, layer=2, loss_size=16), batch()
    (maps,) = model.features(model.normalize(b["rgb"]))
    ((tokens, _),) = model.encoder.forward_features(model.normalize(b["rgb"]), [2])
    w = maps.shape[3]
    assert maps.shape[3] == 2 * maps.shape[2]
    torch.testing.assert_close(maps[1, :, 1, 3], tokens[1, w + 3])
    model(b, torch.zeros(()))[0].backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained == ["head.classifier.weight", "head.classifier.bias"]


def test_Segmenter__probe_takes_the_loss_at_a_smaller_size():
    model, b = tiny("cfmae", layer=2, loss_size=16), batch()
    b["semantic"][0, :20] = 255
    x = model.head(model.features(model.normalize(b["rgb"])))[0]
    labels = b["semantic"][:, 1::2, 1::2]  # nearest-exact at half the size
    expected = pixel_loss(F.interpolate(x, (16, 32), mode="bilinear"), labels, labelled=True)
    torch.testing.assert_close(model(b, torch.zeros(()))[0], expected)


@pytest.mark.slow
def test_Segmenter__dropout_comes_from_the_samples_seeds_in_training_alone():
    head, seed = UperNet((4, 4, 4, 4), True, 3, 400, 100, dropout=0.25).eval(), torch.arange(8)
    maps = [torch.randn(8, 4, 4, 4) for _ in range(4)]
    kept = []
    head.classifier.register_forward_pre_hook(lambda m, x: kept.append(x[0]))
    first, again, (plain,) = head(maps, seed), head(maps, seed), head(maps)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    dropped, whole = kept[0].flatten(2), kept[2].flatten(2)
    alive = whole.amax(2) > 0
    zero = dropped.amax(2) == 0
    assert 0.2 < zero[alive].float().mean() < 0.3 and not torch.equal(zero[0], zero[1])
    torch.testing.assert_close(dropped[~zero], whole[~zero] / 0.75)
    assert not torch.equal(first[0], plain)


class OneSize(nn.Module):
    """An encoder for one image size alone, with BatchNorm; the last layer has no part in maps."""

    patch_size, grid, strides = 4, (2, 3), (4, 4, 4, 4)

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.Linear(6, 6)

    def forward_pyramid(self, imgs, seed=None):
        assert imgs.shape[2:] == (8, 12)
        x = self.conv(imgs)
        return [x + self.norm(x.mean((2, 3), keepdim=True))] * 4  # one value cannot be trained on


def test_Segmenter__is_built_without_a_trace_in_the_encoder():
    encoder = OneSize()
    model = Segmenter(encoder, 5, dim=16, aux_dim=8)
    assert encoder.norm.num_batches_tracked == 0 and encoder.training
    assert not encoder.norm.running_mean.any() and encoder.conv.weight.grad is None
    assert all(p.device.type == "cpu" for p in model.parameters())
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"last.weight", "last.bias"} and model.head.lateral[0][0].in_channels == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_make_optimizer__rate_falls_by_the_layer_and_small_parameters_do_not_decay(method):
    model = tiny(method)
    ids, of = model.encoder.layer_ids(), {}
    cfg = dict(protocol="upernet", weight_decay=0.05, layer_decay=0.5, beta1=0.9, beta2=0.999)
    for group in make_optimizer(types.SimpleNamespace(**cfg), model).param_groups:
        of |= {id(p): group for p in group["params"]}
    top = max(ids.values())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in of
            continue
        layer = ids.get(name.removeprefix("encoder."), top)
        assert of[id(p)]["lr_scale"] == 0.5 ** (top - layer), name
        small = p.ndim == 1 or name.endswith(("pos_embed", "cls_token", "reg_token"))
        assert of[id(p)]["weight_decay"] == (0 if small else 0.05), name
    scales = {g["lr_scale"] for g in of.values()}
    assert {1.0, 0.5, 0.5**top} <= scales  # head, last block, stem


@pytest.mark.slow
@pytest.mark.parametrize("layer", [None, 2])
def test_evaluate__is_the_loss_and_the_mean_of_the_samples_accuracies(layer):
    """Without dropout and auxiliary loss, as often as it is asked."""
    model, b = tiny("cfmae", layer=layer, loss_size=16).eval(), batch()
    b["semantic"][0, :20] = 255
    found = evaluate(model, b)
    labels = b["semantic"][:, 1::2, 1::2]  # 16 x 32 of 32 x 64
    (x,) = model.predict(b["rgb"])
    torch.testing.assert_close(found["loss"], pixel_loss(x, labels, labelled=layer is not None))
    pred, shares = F.interpolate(x, (16, 32), mode="bilinear").argmax(1), []
    for p, y in zip(pred, labels):
        at = [(i, j) for i in range(16) for j in range(32) if y[i, j] != 255]
        shares.append(sum(int(p[i, j] == y[i, j]) for i, j in at) / len(at))
    assert found["pixel_accuracy"].item() == pytest.approx(sum(shares) / 2)
    assert torch.equal(found["loss"], evaluate(model, b)["loss"])
    b["semantic"][1] = 255  # no label at all
    assert evaluate(model, b)["pixel_accuracy"].item() == pytest.approx(shares[0] / 2)


@pytest.mark.slow
def test_reconstruct__is_what_the_picture_shows(tmp_path):
    model, b = tiny("cfmae").eval(), batch()
    b["semantic"][0, :20] = 255
    found = reconstruct(model, b)
    rgb, hidden, over = found["image"]
    labels, none, pred = found["labels"]
    assert hidden is None and none is None and torch.equal(rgb, b["rgb"])
    assert torch.equal(labels, b["semantic"]) and torch.equal(pred, model.logits(rgb).argmax(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.logits(rgb).dtype == torch.float32  # what windows and scores add up
    assert over.shape == rgb.shape and over.dtype == torch.uint8 and not torch.equal(over, rgb)
    columns = pictures.columns(found)
    assert list(columns) == ["image", "image: prediction", "labels", "labels: prediction"]
    assert torch.equal(columns["labels"][0, :, :20], torch.zeros(3, 20, 64, dtype=torch.uint8))
    pictures.contact_sheet(columns, tmp_path / "x.png", "caption")
