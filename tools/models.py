"""Models and encoders of checkpoints, and masks by a script's name, for tools/visualize.py."""

import argparse
import contextlib
import typing
from unittest import mock

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from common import Normalize
from downstream.encoders import METHODS, open_encoder
from engine import UserError
from tools.charts import peek


def model_class(method: str) -> type[nn.Module]:
    """What a script pre-trains, decoder included: what its `reconstruct` takes."""
    return typing.get_type_hints(METHODS[method].reconstruct)["model"]


def read(path: str) -> tuple[str, engine.Config, dict]:
    """Method, settings and content of a pre-training checkpoint; UserError where it is none."""
    method = peek(path).get("method", "cfmae")
    if method not in METHODS:
        raise UserError(f"{path} is of {method}; wanted a checkpoint of {', '.join(METHODS)}")
    checkpoint = engine.load(path, method)
    cfg = engine.load_config(path, METHODS[method].Config, checkpoint["config"])
    return method, cfg, checkpoint


def check_finite(model: nn.Module, path: str) -> nn.Module:
    """The model; UserError where a weight is NaN or infinite: no picture could be drawn."""
    for name, p in model.state_dict().items():
        if p.is_floating_point() and not p.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; this run has diverged")
    return model


def load_model(path: str) -> tuple[str, nn.Module, int]:
    """Rebuild a whole pre-training model, decoder included: method, model, step.

    Errors: UserError where the file is no checkpoint of a pre-training script.
    """
    method, cfg, checkpoint = read(path)
    model = model_class(method)(cfg).eval()
    engine.load_weights(model, checkpoint["model"], path)
    return method, check_finite(model, path), checkpoint["step"]


def own_mask(method: str, cfg: engine.Config, batch: dict, progress: float = 1.0) -> Tensor:
    """What a script hides of a batch at a moment of training: (B, N) or (B, M, N) bool."""
    found = METHODS[method].make_mask(cfg, batch, torch.tensor(progress))
    return found[0] if isinstance(found, tuple) else found  # CFMAE's come with logs


def hiding(method: str, mask: Tensor) -> contextlib.AbstractContextManager:
    """Let a script's `make_mask`, which its `reconstruct` asks, answer with this mask meanwhile."""
    script = METHODS[method]
    make = script.make_mask

    def answer(*args) -> Tensor | tuple:
        found = make(*args)
        return (mask, *found[1:]) if isinstance(found, tuple) else mask

    return mock.patch.object(script, "make_mask", answer)


def open_encoders(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The encoders that --checkpoint, --init (any number) and --method name, by their captions.

    `encoder.normalize` makes of uint8 images what each was trained with.
    """
    sources = [{"checkpoint": path} for path in args.checkpoint or ()]
    heads = {} if args.num_heads is None else {"num_heads": args.num_heads}
    sources += [{"init": path, **heads} for path in args.init or ()]
    sources += [{"method": args.method, "model": args.encoder}] if args.method else []
    if not sources:
        raise UserError("name a --checkpoint, an --init or a --method to look at")
    found = {}
    for source in sources:
        encoder, description, _ = open_encoder(**source, random=args.random)
        words = " ".join(dict.fromkeys([description["method"], *map(str, source.values())]))
        step = f", step {peek(source['checkpoint'])['step']}" if "checkpoint" in source else ""
        fresh = args.random or "method" in source
        encoder = check_finite(encoder.eval(), words)
        encoder.normalize = Normalize(description["mean"], description["std"])
        found[words + (", fresh weights" if fresh else step)] = encoder
    return found


def image_size(args: argparse.Namespace, encoder: nn.Module) -> tuple[int, int]:
    """(H, W): --image-size, or what the encoder was trained with."""
    p, n = encoder.patch_size, args.image_size
    step = max(encoder.strides)
    if n is not None and (n < 1 or n % step):
        near = engine.nearest(n, step)
        raise UserError(f"--image-size {n} is not divisible by {step}; nearest: {near}")
    return (n, n) if n else tuple(p * k for k in encoder.grid)


def letters(encoders: dict[str, nn.Module]) -> list[str]:
    """What tells several encoders apart in a picture: "A: ", "B: "; nothing for one alone."""
    return [f"{chr(65 + n)}: " if len(encoders) > 1 else "" for n in range(len(encoders))]


def key(encoders: dict[str, nn.Module]) -> str:
    """What the letters stand for."""
    return "; ".join(letter + name for letter, name in zip(letters(encoders), encoders))
