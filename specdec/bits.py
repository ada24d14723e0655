"""Who is whose ancestor, as bits: Python integers on the host, int32 words on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD_BITS = 32


def ancestor_bits(parents: Sequence[int]) -> tuple[int, ...]:
    """For every node an integer whose bit j says that node j is an ancestor, itself included."""
    bits: list[int] = []
    for node, parent in enumerate(parents):
        bits.append(1 << node | (bits[parent] if parent >= 0 else 0))
    return tuple(bits)


def ancestor_words(bits: Sequence[int], nodes: int) -> Tensor:
    """Packs Python integers of `nodes` bits into int32 words: [R, ceil(nodes / 32)], on the CPU."""
    width = -(-nodes // WORD_BITS)
    # In this byte order a word with the top bit set is a negative int32.
    packed = bytearray(b"".join(b.to_bytes(4 * width, "little") for b in bits))
    words = torch.frombuffer(packed, dtype=torch.uint8)
    return words.view(torch.int32).view(len(bits), width)


def chain_words(nodes: Tensor, count: int) -> Tensor:
    """The words of nodes of chains: every node up to the own one is an ancestor.

    Args:
        nodes: [R] int64, places within chains of at most `count` nodes.

    Returns:
        [R, ceil(count / 32)] int32.
    """
    first = torch.arange(0, count, WORD_BITS, device=nodes.device)
    bits = (nodes[:, None] - first + 1).clamp(0, WORD_BITS)
    words = (1 << bits) - 1  # in 64 bits; the top one is the sign in 32
    return (words - ((words >> (WORD_BITS - 1)) << WORD_BITS)).int()
