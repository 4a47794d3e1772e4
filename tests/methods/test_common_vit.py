"""common.py's parts put together: the ViT encoder."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import functional as TF

import common
from common import drop_path, init_weights, sincos_2d
from downstream import encoders
from vit import ViT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -------------------------------------------------------------------------------------- encoder


def timm_names() -> set[str]:
    """Parameters of timm's vit_base_patch16_224 with num_classes=0, the position apart."""
    block = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()
    modules = ["patch_embed.proj", "norm", *(f"blocks.{i}.{m}" for i in range(12) for m in block)]
    return {"cls_token"} | {f"{m}.{p}" for m in modules for p in ("weight", "bias")}


def small_vit(**kwargs):
    torch.manual_seed(0)
    size = kwargs.pop("image_size", (32, 32))
    model = ViT(size, 8, 24, kwargs.pop("depth", 4), 3, **kwargs).eval()
    init_weights(model)
    return model


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_vit__forward_features_equals_blocks_by_hand(size):
    model, imgs = small_vit(reg_tokens=2), torch.randn(2, 3, *size)
    h, w = size[0] // 8, size[1] // 8
    x = model.patch_embed.proj(imgs).flatten(2).transpose(1, 2) + sincos_2d(24, h, w, (4, 4))
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.reg_token.expand(2, -1, -1), x], 1)
    outputs = []
    for block in model.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
        outputs.append(x)
    some, last = [outputs[2], outputs[0], outputs[3]], [model.norm(x)]
    for layers, expected in [((3, 1, 4), some), (None, last)]:
        got = model.forward_features(imgs, layers)
        for (tokens, prefix), e in zip(got, expected, strict=True):
            assert tokens.shape == (2, h * w, 24) and prefix.shape == (2, 3, 24)
            assert_close(torch.cat([prefix, tokens], 1), e, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="33x16"):
        model.forward_features(torch.zeros(1, 3, 33, 16))


def test_vit__pyramid_is_blocks_4_6_8_12():
    model, imgs = small_vit(depth=12), torch.randn(2, 3, 16, 48)
    maps = model.forward_pyramid(imgs)
    assert model.strides == (8, 8, 8, 8)
    for got, (tokens, _) in zip(maps, model.forward_features(imgs, (4, 6, 8, 12)), strict=True):
        assert got.shape == (2, 24, 2, 6)
        assert torch.equal(got[:, :, 1, 4], tokens[:, 1 * 6 + 4])


def test_vit__attention_of_a_layer():
    model, imgs = small_vit(), torch.randn(2, 3, 16, 48)
    tokens, prefix = model.forward_features(imgs, (2,))[0]
    third = model.blocks[2]
    q, k, _ = third.attn.qkv(third.norm1(torch.cat([prefix, tokens], 1))).split(24, -1)
    got = model.attention(imgs, 3)
    assert got.shape == (2, 3, 13, 13)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        e = (q[1, :, part] @ k[1, :, part].T / 8**0.5).exp()
        assert_close(got[1, head], e / e.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_vit__drop_path_follows_the_seed():
    model, imgs = small_vit(drop_path=0.6), torch.randn(3, 3, 32, 32)
    seed = torch.tensor([11, 5, 8])
    tokens = model.forward_features(imgs, seed=seed)[0][0]
    scale, x = drop_path(seed, 4, 0.6), model.add_prefix(model.embed(imgs))
    for block, s in zip(model.blocks, scale):
        x = block(x, s)
    assert_close(tokens, model.norm(x)[:, 1:])
    assert_close(tokens[1:2], model.forward_features(imgs[1:2], seed=seed[1:2])[0][0])
    assert not torch.allclose(tokens, model.forward_features(imgs)[0][0])  # off without seeds


def test_vit__layer_ids():
    ids = small_vit(reg_tokens=2).layer_ids()
    assert ids.keys() == dict(small_vit(reg_tokens=2).named_parameters()).keys()
    assert ids["cls_token"] == ids["reg_token"] == ids["patch_embed.proj.weight"] == 0
    assert [ids[f"blocks.{i}.mlp.fc2.bias"] for i in range(4)] == [1, 2, 3, 4]
    assert ids["norm.weight"] == 5


def test_vit__has_timms_parameter_names():
    with torch.device("meta"):
        assert set(ViT().state_dict()) == timm_names()
        wide = set(ViT(class_token=False, reg_tokens=8, init_values=0.1).state_dict())
    scales = {f"blocks.{i}.ls{j}.gamma" for i in range(12) for j in (1, 2)}
    assert wide == timm_names() - {"cls_token"} | {"reg_token"} | scales


def test_vit__loads_strictly_into_timm():
    timm = pytest.importorskip("timm", reason="timm is optional; without it only names are checked")
    for prefix in (dict(class_token=True), dict(class_token=False, reg_tokens=8)):
        ours = ViT(**prefix).eval()
        init_weights(ours)
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="", **prefix)
        pos_embed = torch.zeros_like(theirs.pos_embed)
        pos_embed[0, -196:] = ours.pos_embed
        theirs.load_state_dict(ours.state_dict() | {"pos_embed": pos_embed})
        imgs = torch.randn(1, 3, 224, 224)
        tokens, prefix_tokens = ours.forward_features(imgs)[0]
        expected = theirs.eval().forward_features(imgs)
        assert_close(torch.cat([prefix_tokens, tokens], 1), expected, rtol=1e-4, atol=1e-4)


def test_sincos_2d__other_grids_are_laid_over_the_trained_one():
    for old, new in (((14, 14), (32, 32)), ((8, 8), (16, 24)), ((14, 14), (7, 10))):
        fixed = sincos_2d(64, *old).T.reshape(1, 64, *old)
        wanted = F.interpolate(fixed, new, mode="bicubic")[0].flatten(1).T
        got = sincos_2d(64, *new, old)
        inner = torch.zeros(new, dtype=torch.bool)  # bicubic flattens towards the border
        inner[2:-2, 2:-2] = True
        if new > old:
            error = (got - wanted)[inner.flatten()].norm() / wanted[inner.flatten()].norm()
            assert error < 0.02
        rows = ((torch.arange(new[0]) + 0.5) * old[0] / new[0] - 0.5)[:, None]
        assert_close(got[:: new[1], 32], rows[:, 0].sin(), atol=1e-5, rtol=0)  # row, frequency 1
    assert torch.equal(sincos_2d(64, 5, 7, (5, 7)), sincos_2d(64, 5, 7))  # exact at the same size


def test_vit__positions_refer_to_the_grid_that_was_trained():
    trained, built = small_vit(), small_vit(image_size=(64, 96), trained_size=(32, 32))
    assert torch.equal(built.pos_embed, sincos_2d(24, 8, 12, (4, 4)))
    assert torch.equal(trained.position(8, 12), built.pos_embed)
    assert torch.equal(built.position(4, 4), trained.pos_embed)


# ------------------------------------------------------------------- an encoder in somebody's hands


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (32, 32), (7, 9)])
def test_preprocess__is_torchvisions_resize_crop_and_normalise(size, shape):
    model = small_vit(image_size=size)
    rgb = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    whole = [round(n * scale) for n in shape]
    x = TF.resize(rgb.float(), whole, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    x = TF.center_crop(x, size) / 255
    x = TF.normalize(x, common.IMAGENET_MEAN, common.IMAGENET_STD)
    got = model.preprocess(rgb)
    assert got.shape == (1, 3, *size)
    # torchvision rounds half a pixel up where we round it down
    if all((a - b) % 2 == 0 for a, b in zip(whole, size)):
        assert_close(got[0], x)
    image = Image.fromarray(rgb.permute(1, 2, 0).numpy())
    assert torch.equal(model.preprocess(image), got)
    assert torch.equal(model.preprocess(torch.stack([rgb, rgb]))[1:], got)
    plain = model.preprocess(rgb, (0.0,) * 3, (1.0,) * 3)
    assert_close(plain, common.Normalize().undo(got) / 255, atol=2e-3, rtol=0)


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_preprocess__refuses_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"an image is \(3, H, W\) uint8"):
        small_vit().preprocess(image)


def test_preprocess__refuses_16_bits():
    with pytest.raises(ValueError, match="mode I;16: scale it to 8 bits a channel"):
        small_vit().preprocess(Image.new("I;16", (8, 8)))


def test_preprocess__turns_a_photograph_as_it_is_displayed(tmp_path):
    image = Image.fromarray(torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8).numpy())
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn, as a phone that was held upright writes it
    image.save(tmp_path / "photo.png", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    got = small_vit().preprocess(Image.open(tmp_path / "photo.png"))
    assert torch.equal(got, small_vit().preprocess(turned))


def test_call__is_the_last_layers_tokens_prefix_first():
    model, imgs = small_vit(reg_tokens=2), torch.randn(2, 3, 32, 32)
    ((tokens, prefix),) = model.forward_features(imgs)
    assert torch.equal(model(imgs), torch.cat([prefix, tokens], dim=1)) and prefix.shape[1] == 3


@pytest.mark.parametrize("method", ["mae", "cfmae", "semanticmim", "mcmae", "coma_dyvit"])
def test_layers__outside_the_encoder_are_an_error(method):
    encoder = encoders.build(encoders.describe(method=method, model="tiny"))
    imgs, n = torch.zeros(1, 3, 64, 64), encoder.num_layers
    for wrong in ([0], [n + 1], [1, -1]):
        with pytest.raises(ValueError, match=rf"this encoder has 1 to {n}"):
            encoder.forward_features(imgs, wrong)
    assert len(encoder.forward_features(imgs, [1, n])) == 2
    with pytest.raises(ValueError, match="image size 60x64 is not divisible by the patch size"):
        encoder(imgs[:, :, :60])
    with pytest.raises(
        ValueError, match=r"normalised, as encoder.preprocess makes them, not \[1, 3"
    ):
        encoder(imgs.to(torch.uint8))
    if method == "coma_dyvit":
        with pytest.raises(ValueError, match="DyViT has no attention matrix over patches"):
            encoder.attention(imgs, 1)
    else:
        assert encoder.attention(imgs, n).sum(-1).allclose(torch.ones(()), atol=1e-5)
