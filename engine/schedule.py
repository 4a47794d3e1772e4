"""Learning rates of a step, and which parameters decay or learn at what rate."""

import math
from collections.abc import Callable, Iterable

from torch import nn


def warmup_cosine(
    step: int, peak: float, warmup: float, total: float, min_lr: float = 0.0
) -> float:
    """Rate of a step (from 0): linear warm-up to `peak`, then a cosine to `min_lr`.

    Args: `warmup` and `total` in steps, fractions included.
    """
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    done = (step - warmup) / max(total - warmup, 1)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def no_decay(name: str, ndim: int) -> bool:
    """Biases, norms, tokens and embeddings. MAE's code lets its two tokens decay, too."""
    return ndim <= 1 or name.endswith(("_token", "_tokens", "_embed", "_bias_table"))


def decay_groups(
    model: nn.Module, weight_decay: float, plain: Callable[[str, int], bool] = no_decay
) -> list[dict]:
    """Two groups: weights with decay, and those without of which `plain` (name, ndim) says so."""
    groups = ({"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0})
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[plain(name, p.ndim)]["params"].append(p)
    return list(groups)


def layer_decay_groups(
    encoder: nn.Module, head_modules: Iterable[nn.Module], weight_decay: float, decay: float
) -> list[dict]:
    """Parameter groups whose `lr_scale` falls by `decay` a layer from the head down, as MAE's.

    Args:
        encoder: with `layer_ids`; the last id, the final norm's, has the full rate.
        head_modules: whatever is trained beside it, at the full rate.
        weight_decay: of weights; biases, norms, tokens and embeddings have none.
    Returns: groups for AdamW, whose `lr_scale` `Step.update` applies; frozen parameters in none.
    """
    ids, groups = encoder.layer_ids(), {}
    last = max(ids.values())
    scaled = [(name, p, decay ** (last - ids[name])) for name, p in encoder.named_parameters()]
    scaled += [(name, p, 1.0) for m in head_modules for name, p in m.named_parameters()]
    for name, p, scale in scaled:
        plain = no_decay(name, p.ndim)
        if p.requires_grad:
            group = dict(params=[], weight_decay=0.0 if plain else weight_decay, lr_scale=scale)
            groups.setdefault((scale, plain), group)["params"].append(p)
    return list(groups.values())
