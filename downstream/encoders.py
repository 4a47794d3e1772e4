"""Encoders to transfer: from our checkpoints, from public state dicts, or fresh from a preset.

    describe      what an encoder is, as plain JSON: {"method": ..., "config": {...}}
    build         the module that a description stands for, with fresh weights
    load          its weights, and a report of what was loaded, left out and missing
    open_encoder  the three in one; open_classifier, with the head of a public classifier

A description is all that a run must remember of its encoder: with it the run is resumed and
evaluated without the file it started from. Such a run keeps it among the `facts` of its
checkpoints, and its model has the encoder as `encoder`; then its checkpoints are sources, too.
It has, beside the encoder's config:

    trained_size      (H, W) that the positions were trained at; fixed ones refer to it
    learned_position  whether they are a parameter, then of config["image_size"]
    mean, std, input  of the pixels that the encoder expects, and who says so
    options           of `make_encoder`, beyond the config; {} unless a transfer sets some

Every encoder keeps the contract of `vit.ViT`. `source.py` reads the files.
"""

from collections.abc import Sequence
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

import coma_dyvit
import mcmae
from common import init_weights, resize_position
from downstream import convmae, public
from downstream.public_vit import TABLE, PublicViT, resize_table
from downstream.source import METHODS, describe_preset, make_config, open_source, pair
from engine import UserError
from engine.reader import forget

FOREIGN = ("norm_pre", "dist_token", "register_tokens", "rope")  # would change what a ViT computes


# ------------------------------------------------------------------------------------ description


def describe(
    checkpoint: str | Path | None = None,
    init: str | Path | None = None,
    method: str | None = None,
    model: str | None = None,
    key: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **changes,
) -> dict:
    """Describe the encoder of one source, in plain JSON types.

    Args:
        checkpoint: one of ours, of pre-training or of a transfer.
        init, key: a public state dict; which of several in that file (see `public.open_public`).
        method, model: a key of METHODS and the name of one of its presets.
        mean, std: three numbers each, of pixels in [0, 1]; None: what the source tells.
        changes: fields of the config to override, e.g. granularities="R" (CFMAE without the map
            embeddings, which images alone would not train), num_heads (of --init, where the file
            does not tell).
    Returns: {"method": a key of METHODS, "vit" or "beit", "config": {...}, ...}: see above.
    Errors: UserError.
    """
    if sum(source is not None for source in (checkpoint, init, method)) != 1:
        raise UserError("where is the encoder from? give one of --checkpoint, --init, --method")
    if model is not None and method is None:
        raise UserError(f"--encoder {model} is a preset of --method, which is not given")
    for name, value in (("num_heads", changes.get("num_heads")), ("init_key", key)):
        if value is not None and init is None:
            raise UserError(f"{engine.flag(name)} is for --init: other sources know their own")
    if method is not None:
        out = describe_preset(method, model or "base", changes)
    else:
        out = open_source(checkpoint, init, key, **changes).description
    given = {k: list(v) for k, v in (("mean", mean), ("std", std)) if v is not None}
    source = {"input": f"{' and '.join(given)} as given; else {out['input']}"} if given else {}
    return {**out, **given, **source}


def kept_facts(cfg: object) -> dict | None:
    """The facts of the run that `cfg` continues, without the file its encoder came from, or None.

    Errors: UserError where the folder's checkpoint describes no encoder.
    """
    path = Path(cfg.output or "", "last.pt")
    if not (cfg.resume and cfg.output and path.exists()):
        return None
    source = open_source(path)
    forget()
    return {"description": source.description, **source.facts}


# ------------------------------------------------------------------------------- build and load


def build(
    description: dict,
    image_size: int | Sequence[int] | None = None,
    drop_path: float = 0.0,
    train_position: bool = False,
    **options,
) -> nn.Module:
    """Build an encoder with fresh weights: MCMAE's as its public code has them, others' as MAE's.

    Args:
        description: as `describe` returns it.
        image_size: (H, W) or one number, for which it keeps positions; None = as described.
        drop_path: the last block's rate.
        train_position: make fixed positions a parameter, as public fine-tuning does (MAE,
            ConvMAE). It starts as they are; checkpoints have it. Learned ones are trained anyway.
        options: of `make_encoder`, over those in the description.
    Errors: UserError where the patch size does not divide the image size.
    """
    method, config = description["method"], description["config"]
    size, p = pair(image_size or config["image_size"]), config["patch_size"]
    if any(n < p or n % p for n in size):
        near = " x ".join(str(max(round(n / p), 1) * p) for n in size)
        raise UserError(
            f"image size {size[0]} x {size[1]} is not divisible by the encoder's patch "
            f"size {p}; nearest that works: {near}"
        )
    kwargs = {"image_size": size, "drop_path": drop_path}
    kwargs |= {"trained_size": description.get("trained_size"), **description.get("options", {})}
    kwargs |= options
    if method in METHODS:
        make = {**METHODS, "mcmae": convmae}[method].make_encoder  # with what segmentation adds
        encoder = make(make_config(METHODS[method], config), **kwargs)
    else:
        encoder = PublicViT(**{**config, **kwargs})
    (mcmae.init_hybrid if method == "mcmae" else init_weights)(encoder)
    fixed = "pos_embed" in dict(encoder.named_buffers())
    if fixed and (train_position or description.get("learned_position")):
        if isinstance(encoder, coma_dyvit.DyViT):
            raise UserError("positions cannot be trained in DyViT, which computes them")
        encoder.learn_position()
    return encoder


def load(
    encoder: nn.Module,
    description: dict,
    checkpoint: str | Path | None = None,
    init: str | Path | None = None,
    key: str | None = None,
) -> str:
    """Load the weights of a checkpoint of ours or of a public file: all of them or nothing.

    Learned positions are resized to the grid that the encoder was built for: embeddings
    bicubically, BEiT's biases as its transfer does it (`public_vit.spread`).

    Returns: a report of what was loaded, left out, and missing and so fresh.
    Errors: UserError listing what does not fit.
    """
    heads = {} if init is None else {"num_heads": description["config"]["num_heads"]}
    source = open_source(checkpoint, init, key, **heads)
    state, notes, config = dict(source.state), list(source.notes), source.description["config"]
    grid = tuple(n // config["patch_size"] for n in pair(config["image_size"]))
    own, resized = encoder.state_dict(), {}
    for k, v in state.items() if grid != encoder.grid else ():
        if k in own and k == "pos_embed":
            resized[k] = resize_position(v.float(), grid, encoder.grid)
        elif k.endswith(TABLE):
            resized[k] = resize_table(v.float(), grid, encoder.grid)
    if resized:
        state |= resized
        notes.append("positions resized from {}x{} to {}x{}".format(*grid, *encoder.grid))
    mean, std = (", ".join(f"{x:.4g}" for x in description[k]) for k in ("mean", "std"))
    notes.append(f"images less ({mean}), by ({std}): {description['input']}")
    # What this run adds to the source's encoder (trained positions, options) starts afresh.
    with torch.device("meta"):
        known = build({**description, "options": {}, "learned_position": False}).state_dict()
    parts = {k.split(".")[0] for k in own}
    if init is not None:  # heads and decoders stay there, and nothing that an encoder computes
        own_parts = {*FOREIGN, *parts}
    else:
        own_parts = {k.split(".")[0] for k in state} - {"instance_embed", "semantic_embed"}
    report = engine.load_weights(
        encoder,
        state | dict.fromkeys(source.other),
        source.path,
        may_miss=lambda k: k.split(".")[0] in source.may_miss or k not in known,
        may_stay=lambda k: k in source.other or k.split(".")[0] not in own_parts,
    )
    forget()  # the weights are in the encoder
    return "; ".join([f"encoder     {report}", *notes])


def open_encoder(
    checkpoint: str | Path | None = None,
    init: str | Path | None = None,
    method: str | None = None,
    model: str | None = None,
    random: bool = False,
    image_size: int | Sequence[int] | None = None,
    drop_path: float = 0.0,
    key: str | None = None,
    train_position: bool = False,
    **changes,
) -> tuple[nn.Module, dict, str]:
    """Describe, build and load: (encoder, description, report).

    Args:
        random: fresh weights for the architecture of `checkpoint` or `init`.
        image_size, drop_path, train_position: as `build` takes them; all others as `describe`.
    Returns: in the description, `image_size` is the one that the encoder was built for.
    """
    description = describe(checkpoint, init, method, model, key, **changes)
    size = pair(image_size or description["config"]["image_size"])
    encoder = build(description, size, drop_path, train_position)
    if method or random:
        name = checkpoint or init or f"{method} {description['config']['model']}"
        report = f"encoder     {name}: fresh weights"
    else:
        report = load(encoder, description, checkpoint, init, key)
    description["config"]["image_size"] = size[0] if size[0] == size[1] else list(size)
    if isinstance(encoder.pos_embed, nn.Parameter):  # now they are of this grid
        description |= {"learned_position": True, "trained_size": list(size)}
    return encoder, description, report


def open_classifier(
    init: str | Path,
    image_size: int | Sequence[int] | None = None,
    key: str | None = None,
    **changes,
) -> tuple[nn.Module, dict, dict[str, Tensor]]:
    """A public classifier, fine-tuned: MAE's, ConvMAE's, BEiT's, timm's and transformers' ViT.

    Args: as `open_encoder`.
    Returns: the encoder; its description, with `pool` and `report`, a line; `head.*` and the norm
        before it. With pool "patch" logits are head(fc_norm(mean of the patches)), with "prefix"
        head(norm(class token)), of the last block's output before the encoder's own norm.
    Errors: UserError, also where the file has no head or one of another form.
    """
    head, pool = public.classifier(public.open_public(init, key))
    encoder, description, report = open_encoder(
        init=init, image_size=image_size, key=key, **changes
    )
    tokens = "mean of the patches" if pool == "patch" else "class token"
    report += f"; with its head: {tokens}, norm, {len(head['head.bias'])} classes"
    return encoder, {**description, "pool": pool, "report": report}, head
