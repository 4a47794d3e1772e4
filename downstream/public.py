"""Public encoders: what their state dicts hold.

    open_public     tensors of a file under our names, and what else it tells
    describe        the architecture, read off the shapes
    classifier      the norm and the linear layer of a fine-tuned one

`public_names.py` has their names in ours. `public_vit.py` computes MAE's and timm's ViT and BEiT;
ConvMAE is `mcmae.Encoder`, whose names are the same.

Kinds are told apart by their keys. Wrappers around a state dict ("model", "state_dict", MoCo's
"module.base_encoder.", ...) are taken off. Decoders and mask tokens are not of an encoder.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import engine  # before torch: it sets how threads wait

from torch import Tensor

import mcmae
from common import IMAGENET_MEAN, IMAGENET_STD, is_sincos
from downstream.public_names import count, join_qkv, our_names, rename
from downstream.public_vit import TABLE
from engine import UserError, reader
from engine.reader import read_once

STEM, STEM1 = "patch_embed.proj.weight", "patch_embed1.proj.weight"
KINDS = (
    f"ViT as timm and MAE name it ({STEM}, blocks.0.attn.qkv.weight, ...), BEiT (the same, with "
    f"blocks.0.attn.q_bias, blocks.0.gamma_1, ...), ConvMAE ({STEM1}, blocks1.0.conv1.weight, "
    "...), transformers' ViTMAE, ViT, Beit, Dinov2 as save_pretrained writes them "
    "(embeddings.cls_token, encoder.layer.0.layernorm_before.weight, ...)"
)
# Public ViTs have heads of 64 features, but for these widths (so400m, ViT-H, ViT-g, ViT-G).
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


# ------------------------------------------------------------------------------------------ files


class Public(NamedTuple):
    """What a public file holds."""

    path: str | Path
    kind: str  # "vit", "beit", "mcmae"
    state: dict[str, Tensor]  # under our names
    other: list[str]  # keys of other networks in the file
    facts: dict  # what the file, or config.json beside it, tells of itself
    notes: list[str]  # for the report: which of several models was taken


def open_public(path: str | Path, key: str | None = None) -> Public:
    """Read a public state dict.

    Args:
        key: of the model, where the file holds several: of what is around its state dict, or of its
            names ("base_encoder"); None: the one that public code would use.
    Errors: UserError where it is of no known kind.
    """
    content, name = read_once(path, "--init"), f"--init {path}"
    if isinstance(content, dict) and {"format", "method", "config", "model"} <= content.keys():
        raise UserError(f"{name} is a checkpoint of this project: --checkpoint {path}")
    try:
        (state, note), key = engine.unwrap(content, name, key), None
    except UserError:
        state, note = engine.unwrap(content, name)
        if not any(key in k.split(".") for k in state):
            raise
    first = ", ".join(list(state)[:6])
    if any("embeddings.patch_embeddings.projection.weight" in k for k in state):
        # BEiT's head for pre-training has a `layernorm`, too: the model's own, deeper, comes last
        state = {rename(k): state[k] for k in sorted(state, key=lambda k: k.count("."))}
        state = join_qkv(state)
    prefixes = [k.removesuffix(s) for k in state for s in (STEM, STEM1) if k.endswith(s)]
    chosen = [p for p in prefixes if key is None or key in p.split(".")]
    if prefixes and not chosen:
        raise UserError(f"{name}: no encoder in {key!r}, but in {', '.join(prefixes)}")
    prefix = (chosen or [""])[0]
    other = [k for k in state if not k.startswith(prefix)]  # e.g. MoCo's momentum encoder
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    notes = [note] if note else []
    if more := [p.rstrip(".") for p in prefixes if p != prefix]:
        notes.append(f"{prefix.rstrip('.') or 'the names alone'} taken, not {', '.join(more)}")
    facts = told(path, content)
    if facts.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{name} computes with {facts['hidden_act']}; only gelu is known here")
    if {STEM1, "blocks1.0.conv1.weight", "blocks3.0.attn.qkv.weight"} <= own.keys():
        return Public(path, "mcmae", own, other, facts, notes)
    block = [f"blocks.0.{k}.weight" for k in ("norm1", "attn.qkv", "mlp.fc1")]
    if lacking := [k for k in (STEM, *block) if k not in own]:
        raise UserError(
            f"{name} is of no known kind: {KINDS}; it lacks {lacking[0]}; its first keys: {first}"
        )
    beit = any(k.endswith((".q_bias", ".gamma_1", TABLE)) for k in own)
    return Public(path, "beit" if beit else "vit", our_names(own, path), other, facts, notes)


def told(path: str | Path, content: object) -> dict:
    """What a file tells of its model, and what lies beside it where transformers and timm save."""
    found = [reader.told(content)]
    for k in ("args", "config") if isinstance(content, dict) else ():
        inner = content.get(k, {})
        found.append(inner if isinstance(inner, dict) else getattr(inner, "__dict__", {}))
    for name in ("config.json", "preprocessor_config.json"):
        beside = Path(path).parent / name
        if str(path).endswith((".safetensors", ".bin")) and beside.is_file():
            try:
                inner = json.loads(beside.read_text())
                found += [inner, *(inner.get(k) or {} for k in ("pretrained_cfg", "model_args"))]
            except (ValueError, AttributeError) as e:
                raise UserError(f"{beside}, beside --init {path}, is no JSON object: {e}") from None
    return {k: v for facts in found for k, v in facts.items()}


def statistics(found: Public) -> tuple[list[float], list[float], str]:
    """Mean and standard deviation of the pixels that an encoder expects, and who says so."""
    facts, half = found.facts, [0.5, 0.5, 0.5]
    for mean, std in (("mean", "std"), ("image_mean", "image_std")):
        given = facts.get(mean), facts.get(std)
        if all(isinstance(x, list) and len(x) == 3 for x in given):
            return *given, "as the file or config.json beside it says"
    name = "/".join(Path(found.path).parts[-2:]).lower()
    if word := re.search("augreg|orig_in21k|siglip", name):  # timm's default for a ViT
        return half, half, f"as timm has it for {word[0]}"
    if found.kind == "beit" and not re.search("beit_?v?2", name):
        return half, half, "as BEiT; version 2 has ImageNet's"
    return list(IMAGENET_MEAN), list(IMAGENET_STD), "ImageNet's; nothing else is known of the file"


def describe(found: Public, **changes) -> dict:
    """Read the architecture off the shapes of what `open_public` returns; `changes` win.

    Returns: as `encoders.describe`.
    Errors: UserError where the number of heads is neither given nor to be guessed from the width.
    """
    path, kind, state = found.path, found.kind, found.state
    shape = {k: tuple(v.shape) for k, v in state.items()}
    dim = shape["blocks3.0.norm1.weight" if kind == "mcmae" else "blocks.0.norm1.weight"][0]
    table = shape.get("blocks.0.attn." + TABLE)
    heads = known_heads(found) or HEADS.get(dim, dim // 64 if dim % 64 == 0 else 0)
    heads = changes.get("num_heads", heads)
    if heads < 1 or dim % heads:
        raise UserError(
            f"--init {path}: how many heads make a width of {dim} is not in the file; "
            "heads of 64 features do not divide it: --num-heads N"
        )
    sizes = sizes_of_mcmae if kind == "mcmae" else sizes_of_vit
    config = {"num_heads": heads, **sizes(found, shape)}
    if "pos_embed" in shape:
        side = math.isqrt(shape["pos_embed"][1])
    else:
        side = (math.isqrt(table[0] - 3) + 1) // 2 if table else 224 // config["patch_size"]
    size, learned = side * config["patch_size"], config.get("absolute")
    if kind == "mcmae":
        config = dataclasses.asdict(mcmae.Config(**config))
        learned = "pos_embed" in state and not is_sincos(state["pos_embed"])
    mean, std, source = statistics(found)
    return {
        "method": kind,
        "config": {**config, "image_size": size, **changes},
        "trained_size": [size, size],
        "learned_position": learned,
        "mean": mean,
        "std": std,
        "input": source,
    }


def sizes_of_mcmae(found: Public, shape: dict[str, tuple]) -> dict:
    stems = [shape[f"patch_embed{i}.proj.weight"] for i in (1, 2, 3)]
    hidden = [shape[f"blocks{i}.0.mlp.fc1.weight"][0] for i in (1, 2, 3)]
    sizes = {
        "embed_dims": [s[0] for s in stems],
        "depths": [count(shape, f"blocks{i}") for i in (1, 2, 3)],
        "mlp_ratios": [n // s[0] for n, s in zip(hidden, stems)],
    }
    config = {k: ",".join(map(str, v)) for k, v in sizes.items()}
    kernel = shape["blocks1.0.attn.weight"][-1]
    return config | {"patch_size": 4 * stems[0][-1], "kernel_size": kernel}


def sizes_of_vit(found: Public, shape: dict[str, tuple]) -> dict:
    depth, (hidden, dim) = count(shape, "blocks"), shape["blocks.0.mlp.fc1.weight"]
    scale = 0.1 if found.kind == "beit" and depth <= 12 else 1e-5  # to begin with, BEiT-B; others
    return {
        "patch_size": shape[STEM][-1],
        "embed_dim": dim,
        "depth": depth,
        "mlp_ratio": hidden / dim,
        "init_values": scale if "blocks.0.ls1.gamma" in shape else None,
        "class_token": "cls_token" in shape,
        "reg_tokens": shape.get("reg_token", (1, 0))[1],
        "absolute": found.kind == "vit" or "pos_embed" in shape,
        "relative": "blocks.0.attn." + TABLE in shape,
        "norm_eps": found.facts.get("layer_norm_eps", 1e-6),  # transformers': 1e-12, but Dinov2
    }


def known_heads(found: Public) -> int:
    """The number of attention heads, where the file tells it; else 0."""
    table = found.state.get("blocks.0.attn." + TABLE)
    told = [found.facts.get(k) for k in ("num_attention_heads", "num_heads")]
    return table.shape[1] if table is not None else next((n for n in told if type(n) is int), 0)


def classifier(found: Public) -> tuple[dict[str, Tensor], str]:
    """The head of a fine-tuned public classifier.

    Returns: `head.*` and what comes before it; the tokens that it reads: "patch", their mean, then
        `fc_norm.*` (MAE, ConvMAE, BEiT), or "prefix", the class token after `norm.*` (timm).
    Errors: UserError where there is none, or it is of another form.
    """
    state, name = found.state, f"--init {found.path}"
    if not {"head.weight", "head.bias"} <= state.keys():
        raise UserError(f"{name} has no head and so is no classifier; to make one: fine-tune it")
    pool = "patch" if "fc_norm.weight" in state else "prefix"
    norm = "fc_norm" if pool == "patch" else "norm"
    if (
        f"{norm}.weight" not in state
        or pool == "prefix"
        and ("cls_token" not in state or "reg_token" in state)
    ):
        raise UserError(
            f"{name}: its head reads neither the mean of the patches, normalised by "
            "fc_norm, nor the class token alone, normalised by norm"
        )
    wanted, width = state["head.weight"].shape[1], state[f"{norm}.weight"].shape[0]
    if wanted != width:
        raise UserError(f"{name}: its head reads {wanted} numbers of an encoder of width {width}")
    return {k: v for k, v in state.items() if k.split(".")[0] in (norm, "head")}, pool
