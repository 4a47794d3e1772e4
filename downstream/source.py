"""Files that hold an encoder: checkpoints of ours, public state dicts.

METHODS       the scripts
open_source   either kind of file, read once in a process -> Source
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import engine  # before torch: it sets how threads wait

from torch import Tensor

import cfmae
import coma_dyvit
import mae
import mcmae
import semanticmim
from common import IMAGENET_MEAN, IMAGENET_STD
from downstream import public
from engine import UserError
from engine.reader import read_once

METHODS = {
    "mae": mae,
    "cfmae": cfmae,
    "semanticmim": semanticmim,
    "mcmae": mcmae,
    "coma_dyvit": coma_dyvit,
}


class Source(NamedTuple):
    """What a file tells of its encoder."""

    path: str | Path
    description: dict  # as `encoders.describe` returns it; here for the caller to change
    state: dict[str, Tensor]  # of the encoder, under its names
    other: tuple[str, ...] = ()  # names in the file beside it
    may_miss: frozenset[str] = frozenset()  # parts that the file need not have
    notes: tuple[str, ...] = ()  # for the report
    content: dict = {}  # a checkpoint of ours, whole

    @property
    def facts(self) -> dict:
        """What a transfer's checkpoint keeps: description, classes. Older ones: in its config."""
        config = self.content.get("config", {})
        kept = {k: config.get(k) for k in ("description", "classes")}
        kept = {k: json.loads(v) for k, v in kept.items() if isinstance(v, str)}
        return kept | (self.content.get("facts") or {})


def open_source(
    checkpoint: str | Path | None = None,
    init: str | Path | None = None,
    key: str | None = None,
    **changes,
) -> Source:
    """Open a checkpoint of ours, or a public file, the state dict under `key` in it.

    Args: `changes`: fields of the encoder's config to override, e.g. num_heads.
    Errors: UserError.
    """
    return _public(init, key, changes) if init is not None else _ours(checkpoint, changes)


def _public(path: str | Path, key: str | None, changes: dict) -> Source:
    found = public.open_public(path, key)
    description = {"options": {}, **public.describe(found, **changes)}
    state, notes = dict(found.state), list(found.notes)
    if not public.known_heads(found):
        notes.append(f"{description['config']['num_heads']} heads, which the file does not tell")
    if found.kind == "mcmae" and "pos_embed" in state and not description["learned_position"]:
        del state["pos_embed"]
        notes.append("pos_embed is the fixed one, which is computed")
    may_miss = frozenset({"norm", "pos_embed"})
    return Source(path, description, state, tuple(found.other), may_miss, tuple(notes))


def _ours(path: str | Path, changes: dict) -> Source:
    content = read_once(path)
    keys = {"format", "method", "config", "model"}
    if not (
        isinstance(content, dict)
        and keys <= content.keys()
        and all(isinstance(content[k], dict) for k in ("config", "model"))
    ):
        raise UserError(f"{path} is no checkpoint of this project; public weights: --init {path}")
    if content["format"] != engine.FORMAT:
        raise UserError(f"{path} has format {content['format']}; wanted {engine.FORMAT}")
    prefix, weights = "encoder.", content["model"].items()
    state = {k.removeprefix(prefix): v for k, v in weights if k.startswith(prefix)}
    # SemanticMIM: the norm that pre-training used saw [MASK] tokens alone; transfer starts afresh.
    has_norm = content["method"] != "semanticmim" or "decoder_norm.weight" not in content["model"]
    if not has_norm:
        state = {k: v for k, v in state.items() if not k.startswith("norm.")}
    source = Source(
        path, {}, state, may_miss=frozenset(() if has_norm else {"norm"}), content=content
    )
    description = {"options": {}, **_described(source)}
    description["learned_position"] = "pos_embed" in state  # maybe since this transfer alone
    if "pos_embed" in state:
        description["trained_size"] = list(pair(description["config"]["image_size"]))
    description = json.loads(json.dumps(description))  # plain, and nobody else's
    description["config"] |= changes
    return source._replace(description=description)


def _described(source: Source) -> dict:
    """The description of a checkpoint's encoder; positions as pre-training had them."""
    content, run = source.content, source.content["config"]
    if content.get("description"):  # tools.export's
        return content["description"]
    if content["method"] in (*METHODS, "vit", "beit"):
        return describe_config(content["method"], run)
    kept = source.facts.get("description")  # a transfer's
    if not kept:
        raise UserError(f"{source.path}: a checkpoint of {content['method']} describes no encoder")
    H, W = run["image_size"], run.get("crop_width") or run["image_size"]
    description = {**describe_config(kept["method"], kept["config"]), **kept}
    size = {"image_size": H if H == W else [H, W]}
    return {**description, "config": {**description["config"], **size}}


def describe_config(method: str, config: dict) -> dict:
    """Description of a pre-trained encoder of ours from its run's config."""
    known = all(isinstance(config.get(k), (list, tuple)) for k in ("mean", "std"))
    return {
        "method": method,
        "config": config,
        "trained_size": list(pair(config["image_size"])),
        "learned_position": False,
        "mean": list(config["mean"] if known else IMAGENET_MEAN),
        "std": list(config["std"] if known else IMAGENET_STD),
        "input": "as in pre-training" if known else "ImageNet's, as in pre-training",
    }


def make_config(script: ModuleType, values: dict) -> object:
    """The Config of a script; UserError naming fields that it has not."""
    if unknown := values.keys() - {f.name for f in dataclasses.fields(script.Config)}:
        raise UserError(f"{script.__name__} has no field {', '.join(sorted(unknown))}")
    return script.Config(**values)


def describe_preset(method: str, model: str, changes: dict) -> dict:
    """Description of a fresh encoder of a method's preset."""
    if method not in METHODS:
        raise UserError(f"--method {method}: choose from {', '.join(METHODS)}")
    script = METHODS[method]
    if model not in script.PRESETS:
        raise UserError(f"--encoder {model}: {method} has {', '.join(script.PRESETS)}")
    values = {"model": model, **script.PRESETS[model], **changes}
    if values.get("target") == "dvae":  # an encoder needs its target's recipe, but no tokenizer
        values = {"tokenizer": "random", **values}
    cfg = make_config(script, values)
    cfg.resolve()
    return {"options": {}, **describe_config(method, dataclasses.asdict(cfg))}


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
