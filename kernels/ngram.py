"""Prompt lookup on the device: `specdec.drafters.NGram` as one program for each text.

Every earlier occurrence of the last token is in one node of the growing tree at a time: the
deepest one whose path it continues. The occurrences of a node that go on with the same token are a
candidate; the likeliest candidate joins the tree and takes its occurrences along.

Letters: B texts, T room for a text, N nodes of a tree, M occurrences that vote.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["text_width", "max_depth", "N"])
def _draft_kernel(
    TEXT, text_width, LENGTHS, PLACES, TOKENS, PARENTS, COUNTS, max_depth, decay, N,
    NP: tl.constexpr, M: tl.constexpr, MAX_NGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    TEXT += request.to(tl.int64) * text_width
    PLACES += request * M
    length = tl.load(LENGTHS + request).to(tl.int32)
    root = tl.load(TEXT + length - 1)

    # The last M occurrences of the root's token, the latest first.
    found = 0
    high = length - 1
    while (high > 0) & (found < M):
        end = high - 1 - tl.arange(0, BLOCK)
        hit = (end >= 0) & (tl.load(TEXT + end, mask=end >= 0, other=-1) == root)
        rank = found + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(PLACES + rank, end, mask=hit & (rank < M))
        found += tl.sum(hit.to(tl.int32), 0)
        high -= BLOCK
    tl.debug_barrier()
    index = tl.arange(0, M)
    here = index < found
    end = tl.load(PLACES + index, mask=here, other=0)

    # A vote counts twice for each further token that agrees before it.
    agrees = here
    votes = tl.full([M], 2.0, tl.float32)
    for back in tl.static_range(1, MAX_NGRAM):
        if back < length - 1:
            own = tl.load(TEXT + length - 1 - back)
            agrees = agrees & (end >= back)
            agrees = agrees & (tl.load(TEXT + end - back, mask=agrees, other=-1) == own)
            votes = tl.where(agrees, votes * 2, votes)
    votes = tl.where(here, votes, 0.0)

    node = tl.zeros([M], tl.int32)
    depth = tl.zeros([M], tl.int32)
    chance = tl.full([M], 1.0, tl.float32)
    total = tl.zeros([M], tl.float32) + tl.sum(votes, 0)
    open_ = here & (end + 1 < length) & (depth < max_depth)
    token = tl.load(TEXT + end + 1, mask=open_, other=-1)
    # The (node, token) pair of an occurrence, -1 if nothing follows it.
    pair = tl.where(open_, token.to(tl.int64) * NP + node, -1)
    together = tl.sum(tl.where(pair[:, None] == pair[None, :], votes[None, :], 0.0), 1)
    value = tl.where(open_, chance * together / total * decay, -1.0)

    nodes = tl.arange(0, NP)
    row = request * N + nodes
    tl.store(TOKENS + row, tl.zeros([NP], tl.int64) + root, mask=nodes < N)
    tl.store(PARENTS + row, tl.where(nodes == 0, -1, 0), mask=nodes < N)
    tl.debug_barrier()
    count = 1
    best, leader = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    while (count < N) & (best > 0):
        taken = tl.max(tl.where(index == leader, pair, -1), 0)
        tl.store(TOKENS + request * N + count, taken // NP)
        tl.store(PARENTS + request * N + count, (taken % NP).to(tl.int32))
        moves = pair == taken
        chance = tl.where(moves, best, chance)
        total = tl.where(moves, together, total)
        depth = tl.where(moves, depth + 1, depth)
        node = tl.where(moves, count, node)
        open_ = open_ & ((moves == 0) | ((end + 1 + depth < length) & (depth < max_depth)))
        follows = tl.load(TEXT + end + 1 + depth, mask=moves & open_, other=0)
        token = tl.where(moves, follows, token)
        pair = tl.where(open_, token.to(tl.int64) * NP + node, -1)
        sums = tl.sum(tl.where(pair[:, None] == pair[None, :], votes[None, :], 0.0), 1)
        together = tl.where(moves, sums, together)
        value = tl.where(moves, chance * together / total * decay, value)
        value = tl.where(open_, value, -1.0)
        count += 1
        best, leader = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(COUNTS + request, count)


def draft(
    text: Tensor,
    lengths: Tensor,
    places: Tensor,
    *,
    tokens: Tensor,
    parents: Tensor,
    counts: Tensor,
    max_ngram: int,
    max_depth: int,
    decay: float,
) -> None:
    """The likeliest tree of each text, by the votes of what followed its last tokens before.

    Args:
        text: [B, T] int32.
        lengths: [B] int64, tokens of each text; the last one is the root.
        places: [B, M] int32, scratch; M, a power of two, is how many of the latest occurrences
            vote.
        tokens: [B * N] int64, filled; fillers repeat the root.
        parents: [B * N] int32, filled: index within the own tree, -1 for roots, 0 for fillers.
        counts: [B] int32, filled with the nodes that are not fillers.
        max_ngram: tokens to compare before an occurrence, at most.
        max_depth: tokens to copy behind an occurrence, at most.
        decay: factor on the chance of every further token.
    """
    requests, nodes = len(lengths), len(tokens) // len(lengths)
    _draft_kernel[(requests,)](
        text, text.shape[1], lengths, places, tokens, parents, counts, max_depth, decay, nodes,
        NP=max(64, triton.next_power_of_2(nodes)), M=places.shape[1],
        MAX_NGRAM=max_ngram, BLOCK=1024, num_warps=4,
    )  # fmt: skip
