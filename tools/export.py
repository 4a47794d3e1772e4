"""Export a checkpoint: its encoder, its encoder under timm's names, or all of its weights.

    encoder  a small checkpoint with the encoder alone; --checkpoint takes it everywhere
    timm     a plain state dict for timm's VisionTransformer, position embedding written out: plain
             ViTs, so CFMAE (its RGB branch), SemanticMIM (proxies are register tokens), MAE; BEiT
             for timm's Beit. A fine-tuned classifier keeps its norm and head
    full     a plain state dict of the whole model, decoder included, without optimizer

It takes checkpoints of pre-training and of transfer, and says what it wrote and how that loads. A
name that ends in .safetensors gets Hugging Face's file format, all others torch's. The plain state
dicts carry the number of heads, mean and deviation of pixels, which --init reads.

  python -m tools.export runs/cfmae/last.pt encoder.pt
  python -m tools.export runs/cfmae/last.pt vit.safetensors --format timm
"""

import argparse
import collections
import math
import re
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from downstream import encoders
from downstream.source import open_source
from engine import UserError
from vit import ViT
from engine.reader import write_safetensors

# timm's names of the usual sizes, for 224 pixels, by (width, depth, heads, patch size).
TIMM = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}
MAPS = ("instance_embed.", "semantic_embed.")  # CFMAE's, beside the RGB branch


def timm_state(
    encoder: nn.Module, head: dict[str, Tensor] | None = None, pool: str = ""
) -> dict[str, Tensor]:
    """State dict of a plain ViT or BEiT under timm's names, ready for a strict load.

    timm adds `pos_embed` to the prefix tokens, too; ours have no position, so their rows are zero.

    Args:
        head: `fc_norm.*` and `head.*` of a fine-tuned classifier; None: the encoder alone.
        pool: timm's `global_pool`: "avg", "token" or, without head, "".
    """
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(MAPS)}
    if getattr(encoder, "relative", False):  # BEiT: a key's bias changes nothing, timm has none
        for k in [k for k in state if k.endswith("qkv.bias")]:
            q, _, v = state.pop(k).chunk(3)
            state |= {k.replace("qkv.bias", "q_bias"): q, k.replace("qkv.bias", "v_bias"): v}
        state = {re.sub(r"ls([12])\.gamma$", r"gamma_\1", k): v for k, v in state.items()}
    if encoder.pos_embed is not None:
        L = encoder.grid[0] * encoder.grid[1]
        position = encoder.position(*encoder.grid).detach().reshape(1, L, encoder.embed_dim)
        zeros = position.new_zeros(1, encoder.num_prefix, encoder.embed_dim)
        state["pos_embed"] = torch.cat([zeros, position], dim=1)  # (1, P + L, D)
    if head:  # after the mean of the patches, or of the class token
        state = {k: v for k, v in state.items() if not k.startswith("norm.")} | head
        if pool == "token":
            state = {re.sub("^fc_norm", "norm", k): v for k, v in state.items()}
    return state


def timm_head(encoder: nn.Module, content: dict) -> tuple[dict[str, Tensor] | None, str, str]:
    """The head of a fine-tuned checkpoint for `timm_state`: (head, pool, why there is none)."""
    head = {k: v for k, v in content["model"].items() if k.split(".")[0] in ("fc_norm", "head")}
    if content["method"] != "classify" or len(head) != 4:
        return None, "", ""
    cfg = content["config"]
    if cfg.get("granularities") not in (None, "R"):
        return None, "", "the head reads label maps, too, and is left out"
    if cfg.get("pool", "patch") == "patch":
        return head, "avg", ""
    if encoder.num_prefix == 1 and hasattr(encoder, "cls_token"):
        return head, "token", ""
    return None, "", "timm has no mean over prefix tokens, which the head reads: it is left out"


def timm_constructor(encoder: nn.Module, classes: int = 0, pool: str = "") -> str:
    """The line of Python that builds the model in timm which `timm_state` fits."""
    block, p = encoder.blocks[0], encoder.patch_size
    size = (encoder.grid[0] * p, encoder.grid[1] * p)
    shape = {"embed_dim": encoder.embed_dim, "depth": len(encoder.blocks)}
    shape |= {"num_heads": block.attn.num_heads, "patch_size": p}
    ratio = block.mlp.fc1.out_features / encoder.embed_dim
    options, whole = {}, {"img_size": size, **shape, "mlp_ratio": ratio}
    if getattr(encoder, "relative", False):
        start, options = "timm.models.Beit(", {**whole, "use_rel_pos_bias": True}
        options["use_abs_pos_emb"] = encoder.pos_embed is not None
    elif (name := TIMM.get(tuple(shape.values()))) and ratio == 4:
        start = f'timm.create_model("{name}", '
        options = {} if size == (224, 224) else {"img_size": size}
    else:
        start, options = "timm.models.VisionTransformer(", whole
    if not hasattr(encoder, "cls_token"):
        options["class_token"] = False
    if hasattr(encoder, "reg_token"):
        options["reg_tokens"] = encoder.reg_token.shape[1]
    if not isinstance(block.ls1, nn.Identity):
        options["init_values"] = 1e-5  # any number: there is layer scale, and its values are loaded
    # without head: the features of all tokens after the norm, which other pooling would move
    options |= {"global_pool": pool, "num_classes": classes}
    return start + ", ".join(f"{k}={v!r}" for k, v in options.items()).replace("'", '"') + ")"


def as_checkpoint(encoder: nn.Module, description: dict, step: int) -> dict:
    """A checkpoint of the encoder alone.

    The scripts' own load_encoder knows the config alone: there positions refer to its size.
    """
    H, W = description["trained_size"]
    return {
        "format": engine.FORMAT,
        "method": description["method"],
        "config": {**description["config"], "image_size": H if H == W else [H, W]},
        "description": description,
        "step": step,
        "model": {f"encoder.{k}": v for k, v in encoder.state_dict().items()},
        "optimizer": {},
        "window": {},
    }


def loading(out: Path, make: str = "") -> str:
    """A line of Python that loads a state dict into the model that another one makes."""
    if out.suffix == ".safetensors":
        return f'{make}import safetensors.torch; safetensors.torch.load_model(model, "{out}")'
    return f'{make}model.load_state_dict(torch.load("{out}", weights_only=True))'


def with_facts(state: dict[str, Tensor], description: dict) -> dict[str, Tensor]:
    """A state dict that tells what its shapes do not, see `engine.reader.told`."""
    state = collections.OrderedDict(state)
    told = {k: description[k] for k in ("mean", "std")}
    told |= {k: v for k, v in description["config"].items() if k == "num_heads"}
    state._metadata = {"": told}
    return state


def write(out: Path, content: dict) -> None:
    """Write a checkpoint or a state dict in the format that its suffix names."""
    if out.suffix != ".safetensors":
        return engine.save(out, content)
    try:
        with engine.writing(out):
            write_safetensors(out, content)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def as_timm(
    encoder: nn.Module, description: dict, content: dict, out: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, str, list[str]]:
    """What `export` writes for timm: state dict, the head in it, how it loads, notes."""
    head, pool, why_not = timm_head(encoder, content)
    classes = len(head["head.bias"]) if head else 0
    load = loading(out, f"model = {timm_constructor(encoder, classes, pool)}; ")
    notes = [why_not] if why_not else []
    if encoder.norm.eps != 1e-6:
        notes.append(f"norms add {encoder.norm.eps} to the variance, timm's 1e-06")
    mean, std = (tuple(description[k]) for k in ("mean", "std"))
    notes.append(f"images in [0, 1], less {mean}, divided by {std}")
    return timm_state(encoder, head, pool), head, load, notes


def export(checkpoint: str | Path, out: str | Path, form: str = "encoder") -> str:
    """Write `out` from a checkpoint of ours; `form` is encoder, timm or full.

    Returns: what was written, what was left out, and how it loads.
    Errors: UserError; then nothing was written.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; name a new file")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent} to write {out.name} to")
    encoder, description, _ = encoders.open_encoder(checkpoint=checkpoint)
    content, method = open_source(checkpoint).content, description["method"]
    source, step = content["model"], content.get("step", 0)
    left = [k for k in source if not k.startswith("encoder.")]
    notes = []
    if form == "full":
        state = written = with_facts(source, description)
        what, left = "whole model", []
        load = loading(out)
        notes.append(f"model is that of {content['method']} with the checkpoint's config")
    elif form == "timm":
        if not isinstance(encoder, ViT) or len(set(encoder.strides)) > 1:
            raise UserError(
                f"{checkpoint} holds an encoder of {method} that is no plain ViT: it "
                "has no names in timm; --format encoder keeps ours"
            )
        state, head, load, notes = as_timm(encoder, description, content, out)
        what = f"{'classifier' if head else 'encoder'} under timm's names"
        written, left = with_facts(state, description), [k for k in left if k not in (head or ())]
        inner = (k.removeprefix("encoder.") for k in source)
        left += [k for k in inner if k.startswith(MAPS)]
        left += ["norm.weight", "norm.bias"] if head else []
    else:
        written = as_checkpoint(encoder, description, step)
        state = written["model"]
        what = "encoder"
        load = f'--checkpoint {out}; downstream.encoders.open_encoder(checkpoint="{out}")'
    if form != "full" and method == "semanticmim" and "decoder_norm.weight" in source:
        notes.append("the final norm is a fresh one: pre-training's saw [MASK] tokens alone")
    write(out, written)
    counts = collections.Counter(k.split(".")[0] for k in left).items()
    numbers = sum(math.prod(v.shape) for v in state.values())
    lines = {
        "exported": f"{checkpoint}, {content['method']}, step {step}: {what}",
        "wrote": f"{out}: {len(state)} tensors, {numbers:,} parameters, "
        f"{out.stat().st_size / 1e6:.1f} MB",
        "left out": ", ".join(f"{k} ({n})" for k, n in counts) or "nothing",
        "loads by": load,
    }
    lines |= {"note": "; ".join(notes)} if notes else {}
    return "\n".join(f"{k:<11} {v}" for k, v in lines.items())


def main() -> None:
    parser = engine.Parser(
        prog="python -m tools.export", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkpoint", help="of any method, or of a transfer")
    parser.add_argument("out", help="file to write; must not exist")
    parser.add_argument("--format", default="encoder", choices=["encoder", "timm", "full"])
    args = parser.parse_args()
    print(export(args.checkpoint, args.out, args.format))


if __name__ == "__main__":
    engine.command("export", main)
