"""Which path of each tree is kept: acceptance rules, one program for each tree.

`match` follows what the target chose. `reject` works out the law of `specdec.laws.sibling_law` and
decides by it, from the root down or from the leaves up. A draft names the few tokens that it could
draw, so the law is worked out on those, the children that were chosen, and all other tokens
together; what is wide as the vocabulary is only the last draw, from what the rejected children left
of one row. Nothing here waits for the device or depends on values, so a CUDA graph can hold it.

Letters: B trees, R rows (nodes of all trees), N nodes of one tree, W words of ancestor bits, K
candidates that a draft names, D nodes of the longest path, V vocabulary, E exceptions of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.noise import ACCEPT, SAMPLE, uniform
from specdec.kernels.scan import NEVER, OFF, chunk_of, shift
from specdec.kernels.vocab import Rows, kept, ordered

DETERMINISTIC, WITHOUT_REPLACEMENT = tl.constexpr(0), tl.constexpr(2)
"""Values of `specdec.ProposalLaw`."""
ROUNDING = tl.constexpr(1e-6)
"""A share of a row below this is what rounding left of nothing."""


@dataclass(frozen=True)
class Forest:
    """B trees as rows of tensors, all contiguous; see `specdec.batch.TreeBatch`, whose fields they
    are.
    """

    tokens: Tensor  # [R] int64
    parents: Tensor  # [R] int64, within the own tree, -1 for roots; parents precede children
    depths: Tensor  # [R] int64
    ancestors: Tensor  # [R, W] int32
    offsets: Tensor  # [B] int64, first row of each tree
    laws: Tensor  # [R] int8
    draft_probs: Tensor | None  # [R, K] float32
    draft_tokens: Tensor | None  # [R, K] int64
    nodes: int  # of the largest tree
    longest: int  # D, nodes of a path at most


@dataclass(frozen=True)
class Decision:
    """What a rule decided for each tree."""

    paths: Tensor  # [B, D] int64 node indices, the root first, -1 behind the last
    next_tokens: Tensor  # [B] int64
    continued: Tensor  # [B] bool, the last node of the path had children
    healthy: Tensor  # [B] bool, every node of the path had a token to go on with


@triton.jit
def _tree(TOKENS, PARENTS, OFFSETS, tree, trees, rows, NP: tl.constexpr):
    """A tree's first row, its nodes, which of them are real, their tokens and parents."""
    start = tl.load(OFFSETS + tree)
    end = tl.load(OFFSETS + tree + 1, mask=tree + 1 < trees, other=rows)
    node = tl.arange(0, NP)
    real = node < end - start
    token = tl.load(TOKENS + start + node, mask=real, other=-1)
    parent = tl.load(PARENTS + start + node, mask=real, other=-1).to(tl.int32)
    return start, node, real, token, parent


@triton.jit
def _finish(
    PATHS, CONTINUED, HEALTHY, DEPTHS, ANCESTORS, BEST, tree, width,
    start, node, real, parent, last,
    SAMPLED: tl.constexpr, W: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Writes the path to a tree's node `last`, and whether it can and could go on."""
    on_path = tl.zeros([NP], tl.int32)
    for word in tl.static_range(W):
        bits = tl.load(ANCESTORS + (start + last) * W + word)
        on_path |= tl.where(node // 32 == word, bits >> (node % 32), 0) & 1
    on_path = real & (on_path != 0)
    place = tl.arange(0, DP)
    tl.store(PATHS + tree * width + place, place.to(tl.int64) * 0 - 1, mask=place < width)
    tl.debug_barrier()
    depth = tl.load(DEPTHS + start + node, mask=on_path, other=0)
    tl.store(PATHS + tree * width + depth, node.to(tl.int64), mask=on_path)
    best = tl.load(BEST + start + node, mask=on_path, other=0.0)
    good = best > NEVER  # greedy decoding may follow an infinite score, nothing is drawn by one
    if SAMPLED:
        good = good & (best < float("inf"))
    tl.store(HEALTHY + tree, tl.min(tl.where(on_path & (good == 0), 0, 1), 0))
    tl.store(CONTINUED + tree, tl.max((real & (parent == last)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["trees", "rows", "width"])
def _match_kernel(
    TOKENS, PARENTS, DEPTHS, ANCESTORS, OFFSETS, CHOICES, BEST,
    PATHS, NEXT, CONTINUED, HEALTHY, trees, rows, width,
    SAMPLED: tl.constexpr, W: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    tree = tl.program_id(0)
    start, node, real, token, parent = _tree(TOKENS, PARENTS, OFFSETS, tree, trees, rows, NP)
    chosen = tl.load(CHOICES + start + tl.maximum(parent, 0), mask=real, other=-2)
    matched = real & ((parent < 0) | (token == chosen))
    missed = tl.zeros([NP], tl.int32)
    for word in tl.static_range(W):
        bits = tl.sum(tl.where(matched & (node // 32 == word), 1 << (node % 32), 0), 0)
        above = tl.load(ANCESTORS + (start + node) * W + word, mask=real, other=-1)
        missed |= above & ~bits
    depth = tl.load(DEPTHS + start + node, mask=real, other=0).to(tl.int32)
    top = tl.max(tl.where(real & (missed == 0), depth * NP + (NP - 1 - node), -1), 0)
    last = NP - 1 - top % NP
    tl.store(NEXT + tree, tl.load(CHOICES + start + last))
    _finish(
        PATHS, CONTINUED, HEALTHY, DEPTHS, ANCESTORS, BEST, tree, width,
        start, node, real, parent, last, SAMPLED, W, NP, DP,
    )  # fmt: skip


@triton.jit
def _chance(
    LOGITS, token, mask, best, norm, floor, first, scale, min_p, SHIFT: tl.constexpr
):  # fmt: skip
    """Probabilities of some tokens in one row."""
    x = tl.load(LOGITS + token, mask=mask, other=NEVER).to(tl.float32)
    weight = tl.exp2((x - best) * scale)
    return tl.where(kept(x, token, weight, floor, first, min_p, SHIFT), weight / norm, 0.0)


@triton.jit
def _siblings(
    LOGITS, stride, BEST, NORM, FLOOR, FIRST, LAWS, DRAFT_PROBS, DRAFT_TOKENS, candidates,
    scale, min_p, start, node, token, kid, parent_node, w,
    DRAWN: tl.constexpr, SHIFT: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The law of one node's children, tried in order, as `specdec.laws.sibling_law` has it.

    Returns:
        [NP] chances and [NP] ranks of the children; the weight left for the node itself; and the
        residual: [KP] named tokens with [KP] their shares (token -1 where none is named), [NP]
        children whose token is used up, and what other tokens' probabilities are multiplied by.
    """
    row = start + parent_node
    LOGITS += row * stride
    best, norm = tl.load(BEST + row), tl.load(NORM + row)
    floor, first = tl.load(FLOOR + row), tl.load(FIRST + row)
    law = tl.load(LAWS + row)
    usable = (best > NEVER) & (best < float("inf"))  # false for NaN
    column = tl.arange(0, KP)
    name = tl.full([KP], -1, tl.int64)
    share = tl.zeros([KP], tl.float32)
    if DRAWN:
        here = row * candidates + column
        share = tl.load(DRAFT_PROBS + here, mask=column < candidates, other=0.0).to(tl.float32)
        name = tl.load(DRAFT_TOKENS + here, mask=share > 0, other=-1)
    rest = _chance(LOGITS, name, name >= 0, best, norm, floor, first, scale, min_p, SHIFT)
    own = _chance(LOGITS, token, kid, best, norm, floor, first, scale, min_p, SHIFT)
    outside = tl.maximum(1.0 - tl.sum(rest, 0), 0.0)  # of the target's own probabilities
    outside = tl.where(outside < ROUNDING, 0.0, outside)
    factor = outside * 0.0 + 1.0
    chances = tl.zeros([NP], tl.float32)
    ranks = tl.zeros([NP], tl.int32)
    gone = tl.zeros([NP], tl.int32)
    rank = 0
    child = tl.where(usable, tl.min(tl.where(kid, node, NP), 0), NP)
    while child < NP:
        this = node == child
        mine = tl.sum(tl.where(this, token, 0), 0)
        at = name == mine
        lumped = tl.max(at.to(tl.int32), 0) + tl.max(tl.where(token == mine, gone, 0), 0) == 0
        alone = tl.where(lumped, tl.sum(tl.where(this, own, 0.0), 0), 0.0)
        mass = w * (tl.sum(tl.where(at, rest, 0.0), 0) + factor * alone)
        odds = tl.sum(tl.where(at, share, 0.0), 0)
        drawn = (law != DETERMINISTIC) & (tl.sum(share, 0) > 0)
        ratio = tl.minimum(mass / tl.maximum(odds, 1e-37), 1.0)
        ratio = tl.where(odds > 0, ratio, tl.where(mass > 0, 1.0, 0.0))
        left = tl.where(drawn, tl.maximum(w * rest - share, 0.0), tl.where(at, 0.0, w * rest))
        others = tl.where(drawn, outside, tl.maximum(outside - alone, 0.0))
        others = tl.where(others < ROUNDING, 0.0, others)
        total = tl.sum(left, 0) + w * factor * others
        failing = total + tl.maximum(1.0 - w, 0.0)
        chances = tl.where(this, tl.where(drawn, ratio, mass), chances)
        ranks = tl.where(this, rank, ranks)
        if DRAWN:
            once = tl.where(at, 0.0, share)
            size = tl.sum(once, 0)
            once = tl.where(size > 0, once / tl.maximum(size, 1e-37), 0.0)
            share = tl.where(law == WITHOUT_REPLACEMENT, once, share)
        some = total > 0
        over = tl.where(some, total, 1.0)
        used = tl.where(some & (drawn == 0) & (alone > 0), child, NP)
        gone = tl.where(node == used, 1, gone)
        rest = tl.where(some, left / over, rest)
        factor = tl.where(some, w * factor / over, factor)
        outside = tl.where(some, others, outside)
        w = tl.where(failing > 0, total / tl.where(failing > 0, failing, 1.0), 1.0)
        rank += 1
        child = tl.min(tl.where(kid & (node > child), node, NP), 0)
    return chances, ranks, w, name, rest, gone, factor


@triton.jit(do_not_specialize=["trees", "rows", "width", "candidates", "scale", "min_p"])
def _reject_kernel(
    TOKENS, PARENTS, DEPTHS, ANCESTORS, OFFSETS, LAWS, DRAFT_PROBS, DRAFT_TOKENS, candidates,
    LOGITS, stride, BEST, NORM, FLOOR, FIRST, SEEDS, POSITIONS,
    LAST, FACTOR, EXCEPT, SHARES, PATHS, CONTINUED, HEALTHY, trees, rows, width, scale, min_p,
    LEAVES: tl.constexpr, DRAWN: tl.constexpr, SHIFT: tl.constexpr,
    W: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    tree = tl.program_id(0)
    start, node, real, token, parent = _tree(TOKENS, PARENTS, OFFSETS, tree, trees, rows, NP)
    seed, position = tl.load(SEEDS + tree), tl.load(POSITIONS + tree)
    one = start.to(tl.float32) * 0.0 + 1.0
    last = start.to(tl.int32) * 0
    if LEAVES:
        # A node's chance to end the path does not depend on decisions: all chances first.
        entered = tl.where(node == 0, 1.0, 0.0)
        accept = tl.zeros([NP], tl.float32) + 1.0
        count = tl.sum(real.to(tl.int32), 0)
        for inner in range(count):
            kid = real & (parent == inner)
            if tl.max(kid.to(tl.int32), 0) > 0:
                weight = tl.sum(tl.where(node == inner, entered, 0.0), 0)
                chances, _, weight, _, _, _, _ = _siblings(
                    LOGITS, stride, BEST, NORM, FLOOR, FIRST, LAWS, DRAFT_PROBS, DRAFT_TOKENS,
                    candidates, scale, min_p, start, node, token, kid, inner, weight,
                    DRAWN, SHIFT, NP, KP,
                )  # fmt: skip
                entered = tl.where(kid, chances, entered)
                accept = tl.where(kid, chances, tl.where(node == inner, weight, accept))
        purposes = (node + ACCEPT).to(tl.int64)
        tries = uniform(seed, position + purposes * 0, purposes)
        ends = real & ((tries >= accept.to(tl.float64)) == 0)
        # Which nodes have one that ends the path below them, or end it themselves.
        below = tl.zeros([NP], tl.int32)
        lane = tl.arange(0, 32)
        for word in range(W):
            bits = tl.sum(tl.where(ends & (node // 32 == word), 1 << (node % 32), 0), 0)
            row = start + word * 32 + lane
            end = (bits >> lane) & 1
            at = ANCESTORS + row[:, None] * W + (node // 32)[None, :]
            above = tl.load(at, mask=(end > 0)[:, None] & real[None, :], other=0)
            below |= tl.max((above >> (node % 32)[None, :]) & 1, 0)
        # Post-order: the first child with such a node comes before its siblings and its parent.
        step = tl.min(tl.where(real & (parent == 0) & (below > 0), node, NP), 0)
        while step < NP:
            last = step
            step = tl.min(tl.where(real & (parent == last) & (below > 0), node, NP), 0)
        weight = tl.sum(tl.where(node == last, entered, 0.0), 0)
        _, _, _, name, rest, gone, factor = _siblings(
            LOGITS, stride, BEST, NORM, FLOOR, FIRST, LAWS, DRAFT_PROBS, DRAFT_TOKENS,
            candidates, scale, min_p, start, node, token, real & (parent == last), last, weight,
            DRAWN, SHIFT, NP, KP,
        )  # fmt: skip
    else:
        name = tl.full([KP], -1, tl.int64)
        rest = tl.zeros([KP], tl.float32)
        gone = tl.zeros([NP], tl.int32)
        factor = one
        walking = 1
        while walking > 0:
            kid = real & (parent == last)
            chances, ranks, _, name, rest, gone, factor = _siblings(
                LOGITS, stride, BEST, NORM, FLOOR, FIRST, LAWS, DRAFT_PROBS, DRAFT_TOKENS,
                candidates, scale, min_p, start, node, token, kid, last, one,
                DRAWN, SHIFT, NP, KP,
            )  # fmt: skip
            here = position + tl.load(DEPTHS + start + last)
            purposes = (ranks + ACCEPT).to(tl.int64)
            hits = kid & (uniform(seed, here + purposes * 0, purposes) < chances.to(tl.float64))
            step = tl.min(tl.where(hits, node, NP), 0)
            walking = (step < NP).to(tl.int32)
            last = tl.where(step < NP, step, last)
    tl.store(LAST + tree, start + last)
    tl.store(FACTOR + tree, factor)
    column = tl.arange(0, KP)
    at = tree * (KP + NP)
    tl.store(EXCEPT + at + column, name)
    tl.store(SHARES + at + column, rest)
    tl.store(EXCEPT + at + KP + node, tl.where(gone > 0, token, -1))
    tl.store(SHARES + at + KP + node, gone.to(tl.float32) * 0.0)
    _finish(
        PATHS, CONTINUED, HEALTHY, DEPTHS, ANCESTORS, BEST, tree, width,
        start, node, real, parent, last, True, W, NP, DP,
    )  # fmt: skip


@triton.jit
def _shares(
    LOGITS, BEST, NORM, FLOOR, FIRST, FACTOR, EXCEPT, SHARES, tree, row, entries, scale, min_p,
    SHIFT: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Of a row that is drawn from: [EP] tokens with shares of their own, and these; what all other
    probabilities are multiplied by; and how much the shares differ from what that would give.
    """
    factor = tl.load(FACTOR + tree)
    entry = tl.arange(0, EP)
    name = tl.load(EXCEPT + tree * entries + entry, mask=entry < entries, other=-1)
    share = tl.load(SHARES + tree * entries + entry, mask=entry < entries, other=0.0)
    usual = _chance(
        LOGITS, name, name >= 0, tl.load(BEST + row), tl.load(NORM + row),
        tl.load(FLOOR + row), tl.load(FIRST + row), scale, min_p, SHIFT,
    )  # fmt: skip
    return name, share, factor, tl.where(name >= 0, share - factor * usual, 0.0)


@triton.jit(do_not_specialize=["scale", "min_p"])
def _masses_kernel(
    LOGITS, stride, PEAKS, BEST, NORM, FLOOR, FIRST, LAST, FACTOR, EXCEPT, SHARES, MASSES,
    entries, vocab, chunks, scale, min_p,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """How likely it is that the next token lies in a chunk, one program for each."""
    tree, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    row = tl.load(LAST + tree)
    LOGITS += row * stride
    floor = tl.load(FLOOR + row)
    mass = 0.0
    if ordered(tl.load(PEAKS + row * chunks + chunk), SHIFT) >= floor:
        name, _, factor, change = _shares(
            LOGITS, BEST, NORM, FLOOR, FIRST, FACTOR, EXCEPT, SHARES, tree, row, entries,
            scale, min_p, SHIFT, EP,
        )  # fmt: skip
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        p = _chance(
            LOGITS, token, token < vocab, tl.load(BEST + row), tl.load(NORM + row),
            floor, tl.load(FIRST + row), scale, min_p, SHIFT,
        )  # fmt: skip
        mass = factor * tl.sum(p, 0)
        mass += tl.sum(tl.where((name >= 0) & (name // CHUNK == chunk), change, 0.0), 0)
    tl.store(MASSES + tl.program_id(0), tl.maximum(mass, 0.0))


@triton.jit(do_not_specialize=["scale", "min_p"])
def _residual_kernel(
    LOGITS, stride, BEST, NORM, FLOOR, FIRST, SEEDS, POSITIONS, DEPTHS,
    LAST, FACTOR, EXCEPT, SHARES, MASSES, NEXT, entries, vocab, chunks, scale, min_p,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, CP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Draws from a row in which some tokens have shares of their own."""
    tree = tl.program_id(0)
    row = tl.load(LAST + tree)
    LOGITS += row * stride
    name, share, factor, _ = _shares(
        LOGITS, BEST, NORM, FLOOR, FIRST, FACTOR, EXCEPT, SHARES, tree, row, entries,
        scale, min_p, SHIFT, EP,
    )  # fmt: skip
    chunk = tl.arange(0, CP)
    masses = tl.load(MASSES + tree * chunks + chunk, mask=chunk < chunks, other=0.0).to(tl.float64)
    position = tl.load(POSITIONS + tree) + tl.load(DEPTHS + row)
    point = uniform(tl.load(SEEDS + tree), position, position * 0 + SAMPLE) * tl.sum(masses, 0)
    upto = tl.cumsum(masses, 0)
    fits = (masses > 0) & (upto - masses <= point)
    home = tl.maximum(tl.max(tl.where(fits, chunk, -1), 0), 0)
    left = point - tl.sum(tl.where(chunk < home, masses, 0.0), 0)
    token = home * CHUNK + tl.arange(0, CHUNK)
    p = _chance(
        LOGITS, token, token < vocab, tl.load(BEST + row), tl.load(NORM + row),
        tl.load(FLOOR + row), tl.load(FIRST + row), scale, min_p, SHIFT,
    )  # fmt: skip
    p = factor * p
    entry = tl.arange(0, EP)
    inside = (name >= 0) & (name // CHUNK == home)
    turn = tl.min(tl.where(inside, entry, EP), 0)
    while turn < EP:
        mine = tl.sum(tl.where(entry == turn, name, 0), 0)
        p = tl.where(token == mine, tl.sum(tl.where(entry == turn, share, 0.0), 0), p)
        turn = tl.min(tl.where(inside & (entry > turn), entry, EP), 0)
    value = p.to(tl.float64)
    upto = tl.cumsum(value, 0)
    fits = (value > 0) & (upto - value <= left)
    tl.store(NEXT + tree, tl.max(tl.where(fits, token, 0), 0).to(tl.int64))


def match(forest: Forest, choices: Tensor, best: Tensor, *, sampled: bool) -> Decision:
    """Keeps the deepest node whose whole path the target chose.

    Node i is accepted when `ancestors[i] & ~matched == 0`; of equally deep ones the first is taken.

    Args:
        forest: the trees.
        choices: [R] int64, the target's token after each node.
        best: [R] float32, the greatest logit of each row, NaN if any is.
        sampled: whether an infinite logit leaves no token, as it does for sampling.
    """
    decision = _decision(forest)
    count = len(forest.offsets)
    _match_kernel[(count,)](
        forest.tokens, forest.parents, forest.depths, forest.ancestors, forest.offsets,
        choices, best, decision.paths, decision.next_tokens, decision.continued, decision.healthy,
        count, len(forest.tokens), forest.longest,
        SAMPLED=sampled, W=forest.ancestors.shape[1], NP=_lanes(forest.nodes),
        DP=_lanes(forest.longest), num_warps=max(1, _lanes(forest.nodes) // 64), **OFF,
    )  # fmt: skip
    return decision


def reject(
    forest: Forest, rows: Rows, seeds: Tensor, positions: Tensor, *, leaves: bool
) -> Decision:
    """Accepts and rejects the children of nodes, and draws from what the rejected ones leave.

    Args:
        forest: the trees. Children that were drawn have their draft probabilities there, by name.
        rows: the target's distributions after each node.
        seeds, positions: [B] int64, of each request, and the position that follows its root.
        leaves: from the leaves up (traversal, block verification) or from the root down
            (multi-round rejection, with and without replacement; token-level rejection).
    """
    decision = _decision(forest)
    count, device = len(forest.offsets), forest.tokens.device
    probs, names = forest.draft_probs, forest.draft_tokens
    nodes = _lanes(forest.nodes)
    candidates = 0 if probs is None else probs.shape[1]
    wide = _lanes(candidates)
    last = torch.empty(count, dtype=torch.int64, device=device)
    factor = torch.empty(count, dtype=torch.float32, device=device)
    exceptions = torch.empty(count, wide + nodes, dtype=torch.int64, device=device)
    shares = torch.empty(count, wide + nodes, dtype=torch.float32, device=device)
    logits, cuts = rows.logits, rows.cuts
    _reject_kernel[(count,)](
        forest.tokens, forest.parents, forest.depths, forest.ancestors, forest.offsets, forest.laws,
        rows.best if probs is None else probs, forest.tokens if names is None else names,
        candidates, logits, logits.stride(0), rows.best, rows.norm, rows.floor, rows.first,
        seeds, positions, last, factor, exceptions, shares,
        decision.paths, decision.continued, decision.healthy,
        count, len(forest.tokens), forest.longest, cuts.scale, cuts.min_p,
        LEAVES=leaves, DRAWN=probs is not None, SHIFT=shift(logits.dtype),
        W=forest.ancestors.shape[1], NP=nodes, KP=wide, DP=_lanes(forest.longest),
        num_warps=max(1, max(nodes, wide) // 64), **OFF,
    )  # fmt: skip
    chunks, chunk = rows.peaks.shape[1], chunk_of(logits.shape[1])
    masses = torch.empty(count, chunks, dtype=torch.float32, device=device)
    _masses_kernel[(count * chunks,)](
        logits, logits.stride(0), rows.peaks, rows.best, rows.norm, rows.floor, rows.first,
        last, factor, exceptions, shares, masses,
        wide + nodes, logits.shape[1], chunks, cuts.scale, cuts.min_p,
        SHIFT=shift(logits.dtype), CHUNK=chunk, EP=_lanes(wide + nodes), num_warps=4, **OFF,
    )  # fmt: skip
    _residual_kernel[(count,)](
        logits, logits.stride(0), rows.best, rows.norm, rows.floor, rows.first,
        seeds, positions, forest.depths, last, factor, exceptions, shares, masses,
        decision.next_tokens, wide + nodes, logits.shape[1], chunks, cuts.scale, cuts.min_p,
        SHIFT=shift(logits.dtype), CHUNK=chunk, CP=_lanes(chunks), EP=_lanes(wide + nodes),
        num_warps=8, **OFF,
    )  # fmt: skip
    return decision


def _decision(forest: Forest) -> Decision:
    count, device = len(forest.offsets), forest.tokens.device
    return Decision(
        torch.empty(count, forest.longest, dtype=torch.int64, device=device),
        torch.empty(count, dtype=torch.int64, device=device),
        torch.empty(count, dtype=torch.bool, device=device),
        torch.empty(count, dtype=torch.bool, device=device),
    )


def _lanes(count: int) -> int:
    return max(16, int(triton.next_power_of_2(count)))
