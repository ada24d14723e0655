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
    return signed_words((1 << bits) - 1)


def tree_words(parents: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Depths and ancestors of the nodes of many trees, worked out on the device.

    Args:
        parents: [B, N] int64 of each tree, -1 for roots.
        depth: of the deepest node, at most.

    Returns:
        [B, N] int64 depths, and [B, N, ceil(N / 32)] int32 words.
    """
    nodes = parents.shape[1]
    word = torch.arange(-(-nodes // WORD_BITS), device=parents.device)
    up = torch.arange(nodes, device=parents.device).expand_as(parents)
    depths = torch.zeros_like(parents)
    words = torch.zeros_like(parents)[:, :, None]
    for _ in range(depth + 1):
        here = (up >= 0)[:, :, None] & (up[:, :, None] // WORD_BITS == word)
        words = words + (1 << up[:, :, None] % WORD_BITS).where(here, 0)
        up = parents.gather(1, up.clamp_min(0)).where(up >= 0, -1)
        depths = depths + (up >= 0)
    return depths, signed_words(words)


def signed_words(words: Tensor) -> Tensor:
    """Words of 32 bits as int32, given in int64: the top bit is the sign there."""
    return (words - ((words >> (WORD_BITS - 1)) << WORD_BITS)).int()
