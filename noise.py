"""A sample's randomness: numbers that depend on its seed, on their purpose, and on nothing else.

So masks, augmentation and drop path are the same on any number of ranks and workers, in any
micro-batch, and after any interruption.
"""

import torch
from torch import Tensor

# A stream is a purpose. Draws of two purposes must not share numbers, and without streams a short
# draw would be a prefix of a longer one. DROP_PATH_2 is for a second stack of blocks.
STREAMS = range(9)
MASK, DIRICHLET, INSTANCES, MIX, DROP_PATH, AUGMENT, PREVIEW, DROPOUT, DROP_PATH_2 = STREAMS


def _mix(h: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64 (two-round xor-shift-multiply, full avalanche).

    Both multipliers are below 2**31, so products stay below 2**63 and nothing overflows.
    """
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return h ^ (h >> 15)


def uniform(seed: Tensor, n: int, stream: int) -> Tensor:
    """Draw `n` numbers a sample that depend on nothing but (seed, stream, position).

    Args:
        seed: (B,) int64, one a sample, non-negative.
        n: how many.
        stream: one of the named integers above.
    Returns: (B, n) float32 in the open interval (0, 1), on the seed's device.
    """
    position = torch.arange(n, device=seed.device)
    h = _mix((seed & 0xFFFFFFFF) ^ _mix(torch.full_like(seed, stream + 1)))
    h = _mix(h ^ (seed >> 32))  # (B,)
    h = _mix(_mix(h[:, None] ^ _mix(position + 0x9E3779B9)[None]) + position & 0xFFFFFFFF)
    # 23 bits and a half: the largest value, 1 - 2**-24, is exact in fp32, so 1 is never reached.
    return ((h >> 9).float() + 0.5) * 2.0**-23
