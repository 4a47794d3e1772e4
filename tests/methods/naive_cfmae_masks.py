"""CFMAE's masks as loops over one sample at a time, with dicts and sorted lists.

They follow appendix C of the paper and docs/decisions.md; from the code they take random numbers
and how many patches a granularity hides, which has a test of its own.
"""

import math
from collections import Counter
from fractions import Fraction

import torch


def scenes(B: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Region ids (B, N) of instances and semantics; corner cases first, then random boxes."""
    g = torch.Generator().manual_seed(0)
    instance, semantic = torch.zeros(2, B, side, side, dtype=torch.int64)
    for b in range(B):
        for k in range(1, 1 + torch.randint(1, 17, (), generator=g)):
            (y, x), (h, w) = torch.randint(0, side, (2, 2), generator=g).clamp(max=side - 1)
            instance[b, y : y + h // 2 + 1, x : x + w // 2 + 1] = k if k < 16 or b % 2 else 255
            semantic[b, y : y + w, x : x + h] = torch.randint(0, 133, (), generator=g)
    instance[0], semantic[0] = 0, 7  # no instance, one region
    instance[1], semantic[1] = 255, 255  # nothing labelled
    instance[2], semantic[2] = 1, 0  # an object fills the image
    instance[3] = torch.arange(side**2).view(side, side) % 16 + 1  # objects fill it together
    semantic[3] = torch.arange(side**2).view(side, side) % 133  # many regions of a patch or two
    instance[4] = 0
    instance[4, 2, 3] = 9  # an object smaller than its quota
    return instance.flatten(1), semantic.flatten(1)


def naive_semantic(n: int, semantic: list, noise: list, u: float) -> set:
    """Region after region, and at random within: every time that n / N more add up to one."""
    hidden, debt = set(), Fraction(int(u * len(semantic)), len(semantic))
    for i in sorted(range(len(semantic)), key=lambda i: (semantic[i], noise[i], i)):
        debt += Fraction(n, len(semantic))
        if debt >= 1:
            debt -= 1
            hidden.add(i)
    return hidden


def naive_objects(u: list, instance: list) -> set:
    """Patches of the chosen instances: u[0] draws how many, u[k] is instance k's ticket."""
    area = Counter(k for k in instance if 1 <= k <= 16)
    take = int(u[0] * len(area)) + 1
    tickets = sorted(area, key=lambda k: math.log(u[k]) / area[k], reverse=True)
    return {i for i, k in enumerate(instance) if k in tickets[:take]}


def naive_on_objects(n: int, area: int, N: int, alpha: float) -> int:
    share = max(math.floor(alpha * n), math.ceil(Fraction(n * area, N)))
    return max(min(share, area), n - (N - area))


def naive_mask(cfg, u, n, progress, instance, semantic):
    """Hidden patches of one sample: list of a set for each granularity, and the chosen objects."""
    N, names = len(instance), (cfg.masking.split("-") if "-" in cfg.masking else [cfg.masking] * 3)
    up = lambda a, b: min(max((progress - a) / (b - a), 0), 1)  # noqa: E731
    second, third = up(cfg.e1, cfg.e2), up(cfg.e3, cfg.e4)
    weight = Counter()
    for name, a in zip(names, (1 - second, second - third, third)):
        weight[name] += a
    objects, result = naive_objects(u["instances"], instance), []
    for noise, count in zip(u["noise"], n):

        def hide(groups, quota, noise=noise):
            return {i for k, members in groups.items()
                    for i in sorted(members, key=lambda i: (noise[i], i))[: quota[k]]}  # fmt: skip

        everything = range(N)
        sides = {True: objects, False: set(everything) - objects}
        on = naive_on_objects(count, len(objects), N, cfg.alpha)
        kinds = {
            "RD": hide({0: everything}, {0: count}),
            "SG": naive_semantic(count, semantic, noise, u["mix"][1]),
            "IG": hide(sides, {True: on, False: count - on}),
        }
        if cfg.mix == "score":
            score = {i: sum(weight[k] for k in kinds if i in kinds[k]) for i in everything}
            hidden = set(sorted(everything, key=lambda i: (-score[i], noise[i], i))[:count])
        else:
            below = u["mix"][0] < weight["SG"], u["mix"][0] < weight["SG"] + weight["IG"]
            hidden = kinds["SG" if below[0] else "IG" if below[1] else "RD"]
        result.append(hidden)
    return result, objects
