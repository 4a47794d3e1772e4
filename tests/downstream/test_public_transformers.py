"""Files that transformers' save_pretrained writes give its features here; it is optional."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from downstream import encoders, public
from downstream.encoders import UserError, open_encoder

pytestmark = pytest.mark.slow

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
             patch_size=8)  # fmt: skip
MAE = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
           decoder_intermediate_size=64, mask_ratio=0.0)  # fmt: skip
BEIT = dict(use_relative_position_bias=True, num_labels=7)
SHARED = dict(use_shared_relative_position_bias=True, use_absolute_position_embeddings=True)
MODELS = {  # class, options, part with the encoder
    "mae": ("ViTMAEForPreTraining", MAE, "vit"),
    "vit": ("ViTForImageClassification", dict(num_labels=7, intermediate_size=64), "vit"),
    "vit_alone": ("ViTModel", {}, None),
    "beit": ("BeitForImageClassification", BEIT, "beit"),
    "beit_mim": ("BeitForMaskedImageModeling", SHARED | dict(use_mean_pooling=False), "beit"),
    "dinov2": ("Dinov2ForImageClassification", dict(num_labels=7), "dinov2"),
    "registers": ("Dinov2WithRegistersModel", dict(num_register_tokens=3), None),
}


def make(tmp_path, name, **more):
    """A model of random weights, large enough for mistakes to show, and its file."""
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    kind, options, part = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**SIZES, **options, **more)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    model.save_pretrained(tmp_path)
    return model, getattr(model, part) if part else model, tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", MODELS)
def test_transformers__features(name, tmp_path):
    model, inner, path = make(tmp_path, name)
    encoder, description, report = open_encoder(init=path)
    assert description["method"] == ("beit" if "beit" in name else "vit")
    # the number of heads is config.json's, which the width of 32 would not give
    assert encoder.blocks[0].attn.num_heads == 4 and "does not tell" not in report
    assert ("fresh: norm (2)" if name == "beit" else "fresh: nothing") in report
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        noise = torch.arange(16.0).expand(2, -1)  # MAE shuffles by it
        out = inner(imgs, output_hidden_states=True, **({"noise": noise} if name == "mae" else {}))
        (after_first,) = encoder.forward_features(imgs, [1])
        (last,) = encoder.forward_features(imgs, [2] if name == "beit" else None)
    for (tokens, prefix), wanted in ((after_first, out.hidden_states[1]),
                                     (last, out.last_hidden_state)):  # fmt: skip
        assert_close(torch.cat([prefix, tokens], 1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_transformers__classifier(name, tmp_path):
    model, _, path = make(tmp_path, name)
    encoder, description, head = encoders.open_classifier(path)
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, prefix = encoder.forward_features(imgs, [2])[0]
        x = tokens.mean(1) if description["pool"] == "patch" else prefix[:, 0]
        norm = "norm" if name == "vit" else "fc_norm"
        eps = model.config.layer_norm_eps
        x = F.layer_norm(x, (32,), head[f"{norm}.weight"], head[f"{norm}.bias"], eps)
        logits = F.linear(x, head["head.weight"], head["head.bias"])
        assert_close(logits, model(imgs).logits, rtol=1e-5, atol=1e-4)


def test_transformers__refused_by_name(tmp_path):
    _, _, path = make(tmp_path, "dinov2", use_swiglu_ffn=True)
    with pytest.raises(UserError, match="transformers' ViTMAE.*it lacks blocks.0.mlp.fc1.weight"):
        open_encoder(init=path)
    (tmp_path / "b").mkdir()
    _, _, path = make(tmp_path / "b", "dinov2")
    with pytest.raises(UserError, match="reads 64 numbers of an encoder of width 32"):
        encoders.open_classifier(path)  # class token and mean of the patches
    (tmp_path / "c").mkdir()
    make(tmp_path / "c", "vit_alone", hidden_act="relu")
    with pytest.raises(UserError, match="computes with relu"):
        open_encoder(init=tmp_path / "c/model.safetensors")


def test_transformers__statistics(tmp_path):
    _, _, path = make(tmp_path, "vit")
    assert open_encoder(init=path)[1]["mean"] == [0.485, 0.456, 0.406]
    beside = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(beside))
    _, description, report = open_encoder(init=path)
    assert (description["mean"], description["std"]) == ([0.5] * 3, [0.25] * 3)
    assert "images less (0.5, 0.5, 0.5), by (0.25, 0.25, 0.25): as the file" in report


# --------------------------------------------------------------------------------- without it

NAMES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.register_tokens": "reg_token",
    "deit.embeddings.distillation_token": "dist_token",
    "vit.encoder.layer.11.attention.attention.query.weight": "blocks.11.attn.query.weight",
    "vit.encoder.layer.0.attention.output.dense.bias": "blocks.0.attn.proj.bias",
    "vit.encoder.layer.0.intermediate.dense.bias": "blocks.0.mlp.fc1.bias",
    "vit.encoder.layer.0.output.dense.weight": "blocks.0.mlp.fc2.weight",
    "vit.encoder.layer.0.layernorm_before.weight": "blocks.0.norm1.weight",
    "vit.encoder.layer.0.layernorm_after.weight": "blocks.0.norm2.weight",
    "vit.layernorm.weight": "norm.weight",
    "classifier.weight": "head.weight",
    "beit.encoder.layer.3.lambda_2": "blocks.3.ls2.gamma",
    "beit.encoder.layer.3.attention.attention.relative_position_bias.relative_position_bias_table":
        "blocks.3.attn.relative_position_bias_table",
    "beit.encoder.relative_position_bias.relative_position_bias_table":
        "rel_pos_bias.relative_position_bias_table",
    "beit.pooler.layernorm.bias": "fc_norm.bias",
    "dinov2.encoder.layer.0.norm1.weight": "blocks.0.norm1.weight",
    "dinov2.encoder.layer.0.mlp.fc1.weight": "blocks.0.mlp.fc1.weight",
    "dinov2.encoder.layer.0.layer_scale1.lambda1": "blocks.0.ls1.gamma",
    "decoder.decoder_pred.weight": "decoder.decoder_pred.weight",
}  # fmt: skip


def test_rename__every_name():
    assert {k: public.rename(k) for k in NAMES} == NAMES


def test_join_qkv__beits_key_has_no_bias():
    state = {f"blocks.0.attn.{k}.weight": torch.full((2, 2), i)
             for i, k in enumerate(("key", "query", "value"))}  # fmt: skip
    state |= {"blocks.0.attn.query.bias": torch.full((2,), 5),
              "blocks.0.attn.value.bias": torch.full((2,), 7)}  # fmt: skip
    joined = public.join_qkv(state)
    assert joined.keys() == {"blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"}
    assert joined["blocks.0.attn.qkv.weight"][:, 0].tolist() == [1, 1, 0, 0, 2, 2]
    assert joined["blocks.0.attn.qkv.bias"].tolist() == [5, 5, 0, 0, 7, 7]
