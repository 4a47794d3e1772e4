"""Names and shapes of public tensors in ours: transformers' in timm's, timm's in PublicViT's."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor

from downstream.public_vit import TABLE

TRANSFORMERS = [  # its names and timm's, in this order
    (r"^(vit|beit|dinov2|dinov2_with_registers|deit)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"\.attention\.attention\.(relative_position_bias\.)?", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1.gamma"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def rename(name: str) -> str:
    """timm's name for one of transformers'."""
    for theirs, timms in TRANSFORMERS:
        name = re.sub(theirs, timms, name)
    return name


def join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make timm's one projection of query, key and value; BEiT's key has no bias."""
    out, parts = dict(state), ("query", "key", "value")
    for i in range(count(state, "blocks")):
        for x in ("weight", "bias"):
            own = [out.pop(f"blocks.{i}.attn.{part}.{x}", None) for part in parts]
            if own[0] is not None and own[2] is not None:
                key = torch.zeros_like(own[0]) if own[1] is None else own[1]
                out[f"blocks.{i}.attn.qkv.{x}"] = torch.cat([own[0], key, own[2]])
    return out


def our_names(state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """A ViT's or BEiT's tensors with the names and shapes of `PublicViT`."""
    computed = (".q_bias", ".v_bias", "relative_position_index", "rel_pos_bias." + TABLE)
    out = {
        re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v
        for k, v in state.items()
        if not k.endswith(computed)
    }
    for i in range(count(state, "blocks")):
        attn = f"blocks.{i}.attn."
        if attn + "qkv.bias" not in state and attn + "qkv.weight" in state:
            zeros = torch.zeros(len(state[attn + "qkv.weight"]) // 3)
            q, v = (state.get(f"{attn}{k}_bias", zeros) for k in "qv")
            out[attn + "qkv.bias"] = torch.cat([q, zeros, v])  # a key's would change nothing
        if "rel_pos_bias." + TABLE in state:  # shared in pre-training; BEiT's transfer copies it
            out[attn + TABLE] = state["rel_pos_bias." + TABLE]
    if "pos_embed" in state:
        tokens = [k for k in ("cls_token", "reg_token") if k in state]
        rows, prefix = state["pos_embed"].shape[1], sum(state[k].shape[1] for k in tokens)
        fits = [n for n in (prefix, 1, 0) if n <= prefix and is_square(rows - n)]
        if not fits:
            raise engine.UserError(
                f"--init {path}: pos_embed has {rows} rows, which are no square grid "
                f"and {prefix} tokens before it"
            )
        own, out["pos_embed"] = state["pos_embed"].split([fits[0], rows - fits[0]], dim=1)
        for k in tokens:
            n = min(state[k].shape[1], own.shape[1])
            out[k] = torch.cat([state[k][:, :n] + own[:, :n], state[k][:, n:]], dim=1)
            own = own[:, n:]
    return out


def is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def count(state: Iterable[str], blocks: str) -> int:
    """Blocks in a state dict: one more than the largest number after `blocks`."""
    return 1 + max((int(k.split(".")[1]) for k in state if k.startswith(blocks + ".")), default=-1)
