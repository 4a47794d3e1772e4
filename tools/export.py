"""Export a checkpoint: its encoder, its encoder under timm's names, or all of its weights.

    encoder  a small checkpoint with the encoder alone; --checkpoint takes it everywhere
    timm     a plain state dict for timm's VisionTransformer, position embedding written out: plain
             ViTs, so CFMAE (its RGB branch), SemanticMIM (proxies are register tokens), MAE
    full     a plain state dict of the whole model, decoder included, without optimizer

It takes checkpoints of pre-training and of transfer, and says what it wrote and how that loads.

  python -m tools.export runs/cfmae/last.pt encoder.pt
  python -m tools.export runs/cfmae/last.pt vit.pth --format timm
"""

import argparse
import collections
import math
import sys
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from common import IMAGENET_MEAN, IMAGENET_STD, ViT
from downstream import encoders
from engine import UserError

# timm's names of the usual sizes, for 224 pixels, by (width, depth, heads, patch size).
TIMM = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}
MAPS = (["instance_embed"], ["semantic_embed"])  # CFMAE's, beside the RGB branch


def timm_state(encoder: nn.Module) -> dict[str, Tensor]:
    """State dict of a plain ViT under timm's names, ready for a strict load.

    timm adds `pos_embed` to the prefix tokens, too; ours have no position, so their rows are zero.
    """
    L = encoder.grid[0] * encoder.grid[1]
    position = encoder.position(*encoder.grid).detach().reshape(1, L, encoder.embed_dim)
    state = {k: v for k, v in encoder.state_dict().items() if k.split(".")[:1] not in MAPS}
    zeros = position.new_zeros(1, encoder.num_prefix, encoder.embed_dim)
    return state | {"pos_embed": torch.cat([zeros, position], dim=1)}  # (1, P + L, D)


def timm_constructor(encoder: nn.Module) -> str:
    """The line of Python that builds the model in timm which `timm_state` fits."""
    block, p = encoder.blocks[0], encoder.patch_size
    size = (encoder.grid[0] * p, encoder.grid[1] * p)
    shape = {"embed_dim": encoder.embed_dim, "depth": len(encoder.blocks)}
    shape |= {"num_heads": block.attn.num_heads, "patch_size": p}
    ratio = block.mlp.fc1.out_features / encoder.embed_dim
    options = {}
    if not hasattr(encoder, "cls_token"):
        options["class_token"] = False
    if hasattr(encoder, "reg_token"):
        options["reg_tokens"] = encoder.reg_token.shape[1]
    if not isinstance(block.ls1, nn.Identity):
        options["init_values"] = 1e-5  # any number: there is layer scale, and its values are loaded
    # the features of all tokens after the final norm, as ours; another pooling moves the norm
    options |= {"global_pool": "", "num_classes": 0}
    name = TIMM.get(tuple(shape.values()))
    if name and ratio == 4:
        options |= {} if size == (224, 224) else {"img_size": size}
        start = f'timm.create_model("{name}", '
    else:
        start = "timm.models.VisionTransformer("
        options = {"img_size": size, **shape, "mlp_ratio": ratio, **options}
    return start + ", ".join(f"{k}={v!r}" for k, v in options.items()).replace("'", '"') + ")"


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
    content, method = engine.read(checkpoint, "CHECKPOINT"), description["method"]
    source, step = content["model"], content.get("step", 0)
    left = [k for k in source if not k.startswith("encoder.")]
    notes = []
    if form == "full":
        state = written = source
        what, left = "whole model", []
        load = f'model.load_state_dict(torch.load("{out}", weights_only=True))'
        notes.append(f"model is that of {content['method']} with the checkpoint's config")
    elif form == "timm":
        if not isinstance(encoder, ViT) or getattr(encoder, "relative", False):
            raise UserError(f"{checkpoint} holds an encoder of {method} that is no plain ViT: it "
                            "has no names in timm; --format encoder keeps ours")  # fmt: skip
        state = written = timm_state(encoder)
        left += [k.removeprefix("encoder.") for k in source if k.split(".")[1:2] in MAPS]
        what = "encoder under timm's names"
        load = f"model = {timm_constructor(encoder)}; "
        load += f'model.load_state_dict(torch.load("{out}", weights_only=True))'
        notes.append(f"images in [0, 1], less {IMAGENET_MEAN}, divided by {IMAGENET_STD}")
    else:
        state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
        written = {"format": engine.FORMAT, "method": method, "config": description["config"],
                   "step": step, "model": state, "optimizer": {}, "window": {}}  # fmt: skip
        what = "encoder"
        load = f'--checkpoint {out}; downstream.encoders.open_encoder(checkpoint="{out}")'
    if form != "full" and method == "semanticmim" and "decoder_norm.weight" in source:
        notes.append("the final norm is a fresh one: pre-training's saw [MASK] tokens alone")
    engine.save(out, written)
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
    def run() -> int:
        parser = engine.Parser(
            prog="python -m tools.export", description=__doc__, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("checkpoint", help="of any method, or of a transfer")
        parser.add_argument("out", help="file to write; must not exist")
        parser.add_argument("--format", default="encoder", choices=["encoder", "timm", "full"])
        args = parser.parse_args(sys.argv[1:])
        print(export(args.checkpoint, args.out, args.format))
        return 0

    engine.command("export", run)


if __name__ == "__main__":
    main()
