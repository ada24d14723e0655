"""Uniform numbers inside kernels: the same as `specdec.noise` computes in torch, bit by bit."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

SAMPLE, ACCEPT = tl.constexpr(0), tl.constexpr(1 << 16)
"""The purposes of `specdec.noise` that verification draws for."""


@triton.jit
def _mix(x):
    """SplitMix64 (Steele, Lea, Flood 2014, figure 13)."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform(seed, position, purpose):
    """Uniform numbers in [0, 1) with 53 random bits, float64, from int64 tensors."""
    seed = seed.to(tl.uint64, bitcast=True)
    position = position.to(tl.uint64, bitcast=True)
    purpose = purpose.to(tl.uint64, bitcast=True)
    hashed = _mix(_mix(_mix(seed) + position) + purpose)
    return (hashed >> 11).to(tl.float64) * 1.1102230246251565e-16
