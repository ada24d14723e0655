"""What surrounds the forward in a captured step: where a tree's rows lie, and which path is kept.

Everything is read from and written to device tensors of fixed shape, one program for each request,
so that a CUDA graph can hold a whole step and the next one begins where it ended.

Letters: B requests, N nodes of each tree (fillers included), R = B * N rows, W words of ancestor
bits, S sequences of the cache, T room for a text, D nodes of a path.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

EMITTED, DRAFTED, ACCEPTED, FLAGS, TOKENS = map(tl.constexpr, range(5))
"""Columns of a request's report; its tokens follow, then the nodes of its path."""
CONTINUED, FAILED = tl.constexpr(1), tl.constexpr(2)
"""Flags: the last node of the path had children; a node of the path had no next token."""


@triton.jit
def _slot(TABLE, width, sequence, place, PAGE: tl.constexpr, mask):
    page = tl.minimum(place // PAGE, width - 1)
    page = tl.load(TABLE + sequence * width + page, mask=mask, other=0)
    return page * PAGE + place % PAGE


# One compilation serves trees of all sizes.
@triton.jit(do_not_specialize=["width", "N"])
def _place_kernel(
    SEQUENCES, LENGTHS, LIMITS, PARENTS, TABLE, width,
    ROW_SEQUENCES, DEPTHS, ANCESTORS, SLOTS, POSITIONS, N,
    NP: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    node = tl.arange(0, NP)
    real = node < N
    row = request * N + node
    sequence = tl.load(SEQUENCES + request)
    prefix = tl.load(LENGTHS + sequence)
    depth = tl.zeros([NP], tl.int32)
    up = tl.load(PARENTS + row, mask=real, other=-1)
    going = tl.max((up >= 0).to(tl.int32), 0)
    for word in tl.static_range(W):
        own = tl.where(node // 32 == word, 1 << (node % 32), 0)
        tl.store(ANCESTORS + row * W + word, own, mask=real)
    while going > 0:
        above = up >= 0
        depth += above.to(tl.int32)
        for word in tl.static_range(W):
            at = ANCESTORS + row * W + word
            seen = tl.load(at, mask=real, other=0)
            bit = tl.where(above & (up // 32 == word), 1 << (up % 32), 0)
            tl.store(at, seen | bit, mask=real)
        up = tl.load(PARENTS + request * N + up, mask=real & above, other=-1)
        going = tl.max((up >= 0).to(tl.int32), 0)
    tl.store(DEPTHS + row, depth.to(tl.int64), mask=real)
    tl.store(ROW_SEQUENCES + row, sequence + tl.zeros([NP], tl.int64), mask=real)
    tl.store(SLOTS + row, _slot(TABLE, width, sequence, prefix + node, PAGE, real), mask=real)
    last = tl.load(LIMITS + request) - 1
    tl.store(POSITIONS + row, tl.minimum(prefix + depth, last), mask=real)


@triton.jit(do_not_specialize=["width", "text_width", "report_width", "moves", "N"])
def _accept_kernel(
    SEQUENCES, LENGTHS, LIMITS, TEXT, text_width, TEXT_LENGTHS, TABLE, width,
    TOKENS_, PARENTS, DEPTHS, ANCESTORS, COUNTS, CHOICES, BEST,
    SOURCES, TARGETS, moves, REPORT, report_width, N,
    NP: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    node = tl.arange(0, NP)
    row = request * N + node
    sequence = tl.load(SEQUENCES + request)
    prefix = tl.load(LENGTHS + sequence)
    limit = tl.load(LIMITS + request)
    known = tl.load(TEXT_LENGTHS + request)
    count = tl.load(COUNTS + request)
    real = node < count
    token = tl.load(TOKENS_ + row, mask=real, other=-1)
    parent = tl.load(PARENTS + row, mask=real, other=-1)
    depth = tl.load(DEPTHS + row, mask=real, other=0).to(tl.int32)
    chosen = tl.load(CHOICES + request * N + tl.maximum(parent, 0), mask=real, other=-2)
    matched = real & ((parent < 0) | (token == chosen))

    # A node is accepted if no ancestor is unmatched; the deepest one ends the path.
    missed = tl.zeros([NP], tl.int32)
    for word in tl.static_range(W):
        bits = tl.sum(tl.where(matched & (node // 32 == word), 1 << (node % 32), 0), 0)
        above = tl.load(ANCESTORS + row * W + word, mask=real, other=-1)
        missed |= above & ~bits
    accepted = real & (missed == 0)
    key = tl.where(accepted, depth * NP + (NP - 1 - node), -1)
    top = tl.max(key, 0)
    end = NP - 1 - top % NP
    path_depth = top // NP
    on_path = tl.zeros([NP], tl.int32)
    for word in tl.static_range(W):
        bits = tl.load(ANCESTORS + (request * N + end) * W + word)
        on_path |= tl.where(node // 32 == word, bits >> (node % 32), 0) & 1
    on_path = real & (on_path != 0)

    # Token d of the path has depth d; the target's choice after the end follows.
    emitted = tl.minimum(path_depth + 1, tl.maximum(limit - known, 0)).to(tl.int32)
    text = TEXT + request.to(tl.int64) * text_width + known - 1
    report = REPORT + request * report_width
    kept = on_path & (depth >= 1) & (depth <= emitted)
    tl.store(text + depth, token.to(tl.int32), mask=kept)
    tl.store(report + TOKENS + depth - 1, token.to(tl.int32), mask=kept)
    next_token = tl.load(CHOICES + request * N + end).to(tl.int32)
    if path_depth < emitted:
        tl.store(text + path_depth + 1, next_token)
        tl.store(report + TOKENS + path_depth, next_token)
    best = tl.load(BEST + row, mask=on_path, other=0.0).to(tl.float32)
    needed = on_path & (depth < emitted)
    failed = tl.max((needed & ((best > float("-inf")) == 0)).to(tl.int32), 0)
    continued = tl.max((real & (parent == end)).to(tl.int32), 0)
    tl.store(report + TOKENS + moves + 1 + depth, node, mask=on_path)
    tl.store(report + EMITTED, emitted)
    tl.store(report + DRAFTED, count.to(tl.int32) - 1)
    tl.store(report + ACCEPTED, path_depth)
    tl.store(report + FLAGS, continued * CONTINUED + failed * FAILED)

    # Rows of the path move to the committed end; the others stay, within the trash page.
    stays = request.to(tl.int64) * moves
    tl.store(SOURCES + stays + node, tl.zeros([NP], tl.int64), mask=node < moves)
    tl.store(TARGETS + stays + node, tl.zeros([NP], tl.int64), mask=node < moves)
    tl.debug_barrier()
    moved = on_path & (depth < emitted)
    here = _slot(TABLE, width, sequence, prefix + node, PAGE, moved)
    there = _slot(TABLE, width, sequence, prefix + depth, PAGE, moved)
    tl.store(SOURCES + stays + depth, here, mask=moved)
    tl.store(TARGETS + stays + depth, there, mask=moved)
    length = known + emitted
    tl.debug_barrier()
    if sequence > 0:
        tl.store(LENGTHS + sequence, prefix + emitted)
        tl.store(TEXT_LENGTHS + request, length)
    if length >= limit:  # nothing more of it is written anywhere
        tl.store(SEQUENCES + request, (sequence * 0).to(tl.int64))


def place(
    sequences: Tensor,
    lengths: Tensor,
    limits: Tensor,
    parents: Tensor,
    page_table: Tensor,
    page_size: int,
    *,
    row_sequences: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> None:
    """Works out what a forward needs to know of trees that are given by their parents.

    Args:
        sequences: [B] int64, numbers in the cache; 0 for requests that are over.
        lengths: [S] int64, committed tokens of each sequence.
        limits: [B] int64, tokens of each text, at most; no position lies behind the last.
        parents: [R] int32, index within the own tree, -1 for roots. Parents precede children.
        page_table: [S, pages] int64.
        page_size: tokens in a page.
        row_sequences: [R] int64, filled with the sequence of each row.
        depths: [R] int64, filled.
        ancestors: [R, W] int32, filled with the bits of each node and its ancestors; W a power of
            two, with room for N bits.
        slots: [R] int64, filled with the place of each row's key and value.
        positions: [R] int64, filled.
    """
    requests, nodes = len(sequences), len(parents) // len(sequences)
    _place_kernel[(requests,)](
        sequences, lengths, limits, parents, page_table, page_table.shape[1],
        row_sequences, depths, ancestors, slots, positions, nodes,
        NP=32 * ancestors.shape[1], W=ancestors.shape[1], PAGE=page_size,
        num_warps=ancestors.shape[1],
    )  # fmt: skip


def accept(
    sequences: Tensor,
    lengths: Tensor,
    limits: Tensor,
    text: Tensor,
    text_lengths: Tensor,
    page_table: Tensor,
    page_size: int,
    *,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    counts: Tensor,
    choices: Tensor,
    best: Tensor,
    sources: Tensor,
    targets: Tensor,
    report: Tensor,
) -> None:
    """Keeps the deepest node whose whole path the target chose, and begins the next step.

    Node i is accepted when `ancestors[i] & ~matched == 0`. The texts and the committed lengths
    grow; a request whose text is full gets sequence 0, so that later steps leave all of it alone.

    Args:
        sequences, lengths, limits, page_table, page_size: as for `place`; the first two change.
        text: [B, T] int32, grows.
        text_lengths: [B] int64, grow. The root of a tree is the last token of its text.
        tokens, parents, depths, ancestors: of the trees, [R] int64, [R] int32, [R] int64 and
            [R, W] int32.
        counts: [B] int32, nodes of each tree that are not fillers.
        choices: [R] int64, the target's token after each node.
        best: [R], a score of that choice; minus infinity or NaN means that there is none.
        sources, targets: [B, D] int64, filled with the slots between which rows move; D is at least
            the depth of the deepest node plus 1.
        report: [B, 5 + 2 * D] int32, filled: 4 numbers, see `EMITTED` to `FLAGS`; the tokens, at
            most D + 1; the path's nodes from the root down, as many as were accepted and one.
    """
    requests, nodes = len(sequences), len(parents) // len(sequences)
    _accept_kernel[(requests,)](
        sequences, lengths, limits, text, text.shape[1], text_lengths,
        page_table, page_table.shape[1],
        tokens, parents, depths, ancestors, counts, choices.contiguous(), best.contiguous(),
        sources, targets, sources.shape[1], report, report.shape[1], nodes,
        NP=32 * ancestors.shape[1], W=ancestors.shape[1], PAGE=page_size,
        num_warps=ancestors.shape[1],
    )  # fmt: skip
