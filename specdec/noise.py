"""Counter-based random numbers: a pure function of request seed, absolute position and purpose.

A token's randomness does not depend on how the run was cut into steps, batches or trees, so a run
with speculation can be compared token by token with a run without. Below `generate()` nothing
draws from a `torch.Generator`.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number decides. Numbers of different purposes are independent.

    Purposes are spaced so that the rank of a sibling or the index of a node can be added to them.
    """

    SAMPLE = 0
    ACCEPT = 1 << 16
    DRAFT = 2 << 16
    SEED = 3 << 16


def uniform(seeds: Tensor, positions: Tensor, purpose: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits.

    Args:
        seeds: int64, broadcast against positions.
        positions: int64, absolute position of the token that the number decides. A number that
            decides nothing for good, so that another step will decide the same position, is keyed
            by the position of its step's root instead, which no other step has.
        purpose: a `Purpose`, plus the rank of the sibling, or the node, where several numbers are
            needed; int64 if a tensor.

    Returns:
        float64 of the broadcast shape.
    """
    return _shift(_hash(seeds, positions, purpose), 11).double() * 2.0**-53


def split_seeds(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """One seed for each request of a batch, [count] int64."""
    index = torch.arange(count, dtype=torch.int64, device=device)
    wrapped = (seed + 2**63) % 2**64 - 2**63  # any Python integer, as a signed one of 64 bits
    return _hash(torch.full_like(index, wrapped), index, Purpose.SEED)


def _hash(seeds: Tensor, positions: Tensor, purpose: int | Tensor) -> Tensor:
    return _mix(_mix(_mix(seeds) + positions) + purpose)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea, Flood 2014, figure 13), on int64 that wraps around."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
