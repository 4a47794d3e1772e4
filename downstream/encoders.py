"""Encoders to transfer: from our checkpoints, from public state dicts, or fresh from a preset.

    describe      what an encoder is, as plain JSON: {"method": ..., "config": {...}}
    build         the module that a description stands for, with fresh weights
    load          its weights, and a report of what was loaded, left out and missing
    open_encoder  the three in one; open_classifier, with the head of a public classifier
    layer_decay_groups   parameter groups for fine-tuning

A description is all that a run must remember of its encoder: with it the run is resumed and
evaluated without the file it started from. Such a run keeps it in the field `description` of its
Config, as JSON, and its model has the encoder as `encoder`; then its checkpoints are sources, too.
It has, beside the encoder's config:

    trained_size      (H, W) that the positions were trained at; fixed ones refer to it
    learned_position  whether they are a parameter, then of config["image_size"]
    mean, std, input  of the pixels that the encoder expects, and who says so
    options           of `make_encoder`, beyond the config; {} unless a transfer sets some

Every encoder keeps the contract of `common.ViT`. `public.py` knows the public state dicts.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

import cfmae
import coma_dyvit
import mae
import mcmae
import semanticmim
from common import IMAGENET_MEAN, IMAGENET_STD, init_weights, resize_position
from downstream import convmae, public
from engine import UserError

METHODS = {"mae": mae, "cfmae": cfmae, "semanticmim": semanticmim, "mcmae": mcmae}
METHODS["coma_dyvit"] = coma_dyvit
FOREIGN = ("norm_pre", "dist_token", "register_tokens", "rope")  # would change what a ViT computes


# ------------------------------------------------------------------------------------ description


def describe(
    checkpoint: str | Path | None = None, init: str | Path | None = None,
    method: str | None = None, model: str | None = None, key: str | None = None,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **changes,
) -> dict:  # fmt: skip
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
    if init is not None:
        out = public.describe(public.open_public(init, key), **changes)
    elif checkpoint is not None:
        out, _, _ = _open(checkpoint)
        out["config"] |= changes
    else:
        out = _preset(method, model or "base", changes)
    given = {k: list(v) for k, v in (("mean", mean), ("std", std)) if v is not None}
    source = {"input": f"{' and '.join(given)} as given; else {out['input']}"} if given else {}
    return {"options": {}, **out, **given, **source}


def _preset(method: str, model: str, changes: dict) -> dict:
    if method not in METHODS:
        raise UserError(f"--method {method}: choose from {', '.join(METHODS)}")
    script = METHODS[method]
    if model not in script.PRESETS:
        raise UserError(f"--encoder {model}: {method} has {', '.join(script.PRESETS)}")
    values = {"model": model, **script.PRESETS[model], **changes}
    if method == "semanticmim":  # an encoder needs its target's recipe, but not the tokenizer
        values = {**semanticmim.RECIPES[values.pop("target", "hog")], **values}
    cfg = _config(script, values)
    cfg.resolve()
    return _ours(method, dataclasses.asdict(cfg))


def _ours(method: str, config: dict) -> dict:
    """Description of a pre-trained encoder of ours."""
    known = all(isinstance(config.get(k), (list, tuple)) for k in ("mean", "std"))
    return {
        "method": method, "config": config, "trained_size": list(pair(config["image_size"])),
        "learned_position": False,
        "mean": list(config["mean"] if known else IMAGENET_MEAN),
        "std": list(config["std"] if known else IMAGENET_STD),
        "input": "as in pre-training" if known else "ImageNet's, as in pre-training",
    }  # fmt: skip


def _config(script: ModuleType, values: dict) -> engine.Config:
    if unknown := values.keys() - {f.name for f in dataclasses.fields(script.Config)}:
        raise UserError(f"{script.__name__} has no field {', '.join(sorted(unknown))}")
    return script.Config(**values)


def _open(path: str | Path) -> tuple[dict, dict[str, Tensor], bool]:
    """A checkpoint of ours: description, the encoder's state dict, whether it has a final norm."""
    content = engine.read(path, "--checkpoint")
    keys = {"format", "method", "config", "model"}
    if not (isinstance(content, dict) and keys <= content.keys()
            and all(isinstance(content[k], dict) for k in ("config", "model"))):  # fmt: skip
        raise UserError(f"{path} is no checkpoint of this project; public weights: --init {path}")
    if content["format"] != engine.FORMAT:
        raise UserError(f"{path} has format {content['format']}; wanted {engine.FORMAT}")
    state = {k.removeprefix("encoder."): v for k, v in content["model"].items()
             if k.startswith("encoder.")}  # fmt: skip
    run = content["config"]
    if content.get("description"):  # tools.export's
        description = content["description"]
    elif content["method"] in (*METHODS, "vit", "beit"):
        description = _ours(content["method"], run)
    else:  # a transfer's
        kept = (content.get("facts") or {}).get("description") or run.get("description")
        if not kept:
            raise UserError(f"{path}: a checkpoint of {content['method']} describes no encoder")
        kept = json.loads(kept) if isinstance(kept, str) else kept
        H, W = run["image_size"], run.get("crop_width") or run["image_size"]
        description = {**_ours(kept["method"], kept["config"]), **kept}
        description["config"]["image_size"] = H if H == W else [H, W]
    description["learned_position"] = "pos_embed" in state  # maybe since this transfer alone
    if "pos_embed" in state:
        description["trained_size"] = list(pair(description["config"]["image_size"]))
    # SemanticMIM: the norm that pre-training used saw [MASK] tokens alone; transfer starts afresh.
    has_norm = content["method"] != "semanticmim" or "decoder_norm.weight" not in content["model"]
    return json.loads(json.dumps(description)), state, has_norm


def kept_description(cfg: engine.Config) -> str | None:
    """The `description` of a run that goes on without the file its encoder came from, or None.

    Errors: UserError where the folder's run has none.
    """
    path = Path(cfg.output or "", "config.json")
    if not (cfg.resume and cfg.output and path.exists()):
        return None
    try:
        return json.loads(path.read_text())["description"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the configuration of such a run") from None


# ------------------------------------------------------------------------------- build and load


def build(
    description: dict, image_size: int | Sequence[int] | None = None, drop_path: float = 0.0,
    train_position: bool = False, **options,
) -> nn.Module:  # fmt: skip
    """Build an encoder with fresh weights, drawn as its method draws them.

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
        raise UserError(f"image size {size[0]} x {size[1]} is not divisible by the encoder's patch "
                        f"size {p}; nearest that works: {near}")  # fmt: skip
    kwargs = {"image_size": size, "drop_path": drop_path}
    kwargs |= {"trained_size": description.get("trained_size"), **description.get("options", {})}
    kwargs |= options
    if method in METHODS:
        make = {**METHODS, "mcmae": convmae}[method].make_encoder  # with what segmentation adds
        encoder = make(_config(METHODS[method], config), **kwargs)
    else:
        encoder = public.PublicViT(**{**config, **kwargs})
    (mcmae.init_hybrid if method == "mcmae" else init_weights)(encoder)
    fixed = "pos_embed" in dict(encoder.named_buffers())
    if fixed and (train_position or description.get("learned_position")):
        if isinstance(encoder, coma_dyvit.DyViT):
            raise UserError("positions cannot be trained in DyViT, which computes them")
        position = encoder.pos_embed
        del encoder.pos_embed
        encoder.pos_embed = nn.Parameter(position[None])  # (1, L, D), as timm's
    return encoder


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def num_layers(encoder: nn.Module) -> int:
    """How many layers `forward_features` counts; DyViT counts over its stages."""
    return sum(encoder.depths) if hasattr(encoder, "depths") else len(encoder.blocks)


def load(
    encoder: nn.Module, description: dict, checkpoint: str | Path | None = None,
    init: str | Path | None = None, key: str | None = None,
) -> str:  # fmt: skip
    """Load the weights of a checkpoint of ours or of a public file: all of them or nothing.

    Learned positions are resized to the grid that the encoder was built for: embeddings
    bicubically, BEiT's biases as its transfer does it (`public.spread`).

    Returns: a report of what was loaded, left out, and missing and so fresh.
    Errors: UserError listing what does not fit.
    """
    path, other, may_miss = checkpoint or init, [], set()
    if init is not None:
        found = public.open_public(init, key)
        heads = description["config"]["num_heads"]
        source = public.describe(found, num_heads=heads)
        state, other, notes = dict(found.state), found.other, list(found.notes)
        if not public.known_heads(found):
            notes.append(f"{heads} heads, which the file does not tell")
        if found.kind == "mcmae" and "pos_embed" in state and not source["learned_position"]:
            del state["pos_embed"]
            notes.append("pos_embed is the fixed one, which is computed")
        may_miss = {"norm", "pos_embed"}
    else:
        source, state, has_norm = _open(checkpoint)
        notes = []
        if not has_norm:
            state = {k: v for k, v in state.items() if not k.startswith("norm.")}
            may_miss = {"norm"}
    p = source["config"]["patch_size"]
    grid = tuple(n // p for n in pair(source["config"]["image_size"]))
    own, resized = encoder.state_dict(), {}
    for k, v in state.items() if grid != encoder.grid else ():
        if k in own and k == "pos_embed":
            resized[k] = resize_position(v.float(), grid, encoder.grid)
        elif k.endswith(public.TABLE):
            resized[k] = public.resize_table(v.float(), grid, encoder.grid)
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
        encoder, state | dict.fromkeys(other), path,
        may_miss=lambda k: k.split(".")[0] in may_miss or k not in known,
        may_stay=lambda k: k in other or k.split(".")[0] not in own_parts,
    )  # fmt: skip
    return "; ".join([f"encoder     {report}", *notes])


def open_encoder(
    checkpoint: str | Path | None = None, init: str | Path | None = None,
    method: str | None = None, model: str | None = None, random: bool = False,
    image_size: int | Sequence[int] | None = None, drop_path: float = 0.0,
    key: str | None = None, train_position: bool = False, **changes,
) -> tuple[nn.Module, dict, str]:  # fmt: skip
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
    init: str | Path, image_size: int | Sequence[int] | None = None, key: str | None = None,
    **changes,
) -> tuple[nn.Module, dict, dict[str, Tensor]]:  # fmt: skip
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


# ---------------------------------------------------------------------------------- fine-tuning


def layer_decay_groups(
    encoder: nn.Module, head_modules: Iterable[nn.Module], weight_decay: float, decay: float
) -> list[dict]:
    """Parameter groups whose `lr_scale` falls by `decay` a layer from the head down, as MAE's.

    Args:
        encoder: with `layer_ids`; the last id, the final norm's, has the full rate.
        head_modules: whatever is trained beside it, at the full rate.
        weight_decay: of weights; biases, norms, tokens and embeddings have none.
    Returns: groups for AdamW, whose `lr_scale` `engine.train` applies; frozen parameters in none.
    """
    ids, groups = encoder.layer_ids(), {}
    last = max(ids.values())
    scaled = [(name, p, decay ** (last - ids[name])) for name, p in encoder.named_parameters()]
    scaled += [(name, p, 1.0) for m in head_modules for name, p in m.named_parameters()]
    for name, p, scale in scaled:
        plain = p.ndim <= 1 or name.endswith(("_token", "_tokens", "_embed", "_bias_table"))
        if p.requires_grad:
            group = {"params": [], "weight_decay": 0.0 if plain else weight_decay}
            group = groups.setdefault((scale, plain), {**group, "lr_scale": scale})
            group["params"].append(p)
    return list(groups.values())
