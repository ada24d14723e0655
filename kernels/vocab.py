"""Rows of logits, read once: the distribution that sampling options leave, and a draw from it.

`scan` leaves the maximum and the sum of the exponentials of each chunk; a draw without cuts is made
from these sums and one chunk.

A threshold - top-k, top-p, min-p - is found without a sort, from the maximum and the sum of each
group of `GROUP` neighbours:

* a bound below which no token can be kept, by one small program for each row. If the maxima of k
  groups reach a logit, so does the k-th token. And of a group with the sum S whose maximum has the
  weight w or more, tokens of such weights have at least S - (GROUP - 1) w; if those of all groups
  have the share p, then no token below w is kept;
* the candidates, tokens that reach the bound, in the order of the vocabulary, by several programs a
  row. Groups that have none are not read;
* the exact edge among them, by bisection over the bits of the logits, by one program a row; then
  their sum, and a draw by inverting the cumulative sum in the order of the vocabulary, as
  `specdec.sampling.draw`. If more than a quarter of the vocabulary are candidates, they are not
  gathered, and every step of the bisection reads the row.

Ties. Top-k keeps every token that equals the k-th. Top-p takes tokens from the likeliest downwards,
of equal ones the later, and stops when it has the share p: so does transformers where its ascending
sort is stable (torch's is not on every CPU). Equal means equal logits, before they are divided by
the temperature.

A row with NaN has NaN as its best. Nothing as wide as the vocabulary is written but the candidates
of rows that are nearly flat.

Letters: R rows, V vocabulary, C chunks of a row, G groups of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.noise import SAMPLE, uniform
from specdec.kernels.options import Cuts
from specdec.kernels.scan import GROUP, NEVER, OFF, chunk_of, lanes, parts_of, scan, shift

MOST_PARTS = 8
"""Programs that gather the candidates of a row, at most."""
TILE = 2048
"""Candidates that a program holds at a time, at most."""
GATHERED = 4
"""Candidates are gathered if they are at most one in so many tokens."""
LEAST, GREATEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Rows:
    """Rows of logits and what is kept of each.

    A token is kept if the ordered bits of its logit exceed `floor`, or equal it and the token is
    not before `first`; and if it is not cut by `min_p`.
    """

    logits: Tensor  # [R, V], the last dimension contiguous
    cuts: Cuts
    peaks: Tensor  # [R, C] float32, the greatest logit of each chunk
    best: Tensor  # [R] float32, the greatest logit; NaN if any is
    norm: Tensor  # [R] float32, sum over kept tokens of exp((logit - best) / temperature)
    floor: Tensor  # [R] int32
    first: Tensor  # [R] int32
    tokens: Tensor  # [R] int64, drawn if seeds were given


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """Integers in the order of float32 numbers; SHIFT drops bits that their dtype does not have."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one number
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def number(key, SHIFT: tl.constexpr):
    """The number that has such a key."""
    bits = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kept(x, token, weight, floor, first, min_p, SHIFT: tl.constexpr):
    """Which tokens the cuts leave, given their logits and exp((logit - best) / temperature)."""
    key = ordered(x, SHIFT)
    inside = (key > floor) | ((key == floor) & (token >= first))
    return inside & (weight >= min_p) & (x > NEVER)


@triton.jit
def _total(CHUNK_MAX, CHUNK_SUM, row, chunks, scale, CP: tl.constexpr):
    """The greatest logit of a row, a number to subtract, and [CP] the sums of its chunks."""
    chunk = tl.arange(0, CP)
    most = tl.load(CHUNK_MAX + row * chunks + chunk, mask=chunk < chunks, other=NEVER)
    sums = tl.load(CHUNK_SUM + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    best = tl.max(most, 0)
    base = tl.where(best == NEVER, 0.0, best)
    return best, base, sums * tl.exp2((most - base) * scale)


@triton.jit
def _point(SEEDS, POSITIONS, TREE, DEPTHS, row):
    """A row's uniform number."""
    tree = tl.load(TREE + row)
    position = tl.load(POSITIONS + tree) + tl.load(DEPTHS + row)
    return uniform(tl.load(SEEDS + tree), position, position * 0 + SAMPLE)


@triton.jit(do_not_specialize=["scale"])
def _whole_kernel(
    LOGITS, stride, CHUNK_MAX, CHUNK_SUM, BEST, NORM, FLOOR, FIRST, TOKENS,
    SEEDS, POSITIONS, TREE, DEPTHS, vocab, chunks, scale,
    DRAW: tl.constexpr, CHUNK: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Rows of which nothing is cut."""
    row = tl.program_id(0)
    best, base, sums = _total(CHUNK_MAX, CHUNK_SUM, row, chunks, scale, CP)
    norm = tl.sum(sums, 0)
    tl.store(BEST + row, tl.where(norm != norm, float("nan"), best))
    tl.store(NORM + row, norm)
    tl.store(FLOOR + row, LEAST)
    tl.store(FIRST + row, 0)
    if DRAW:
        chunk = tl.arange(0, CP)
        mass = sums.to(tl.float64)
        upto = tl.cumsum(mass, 0)
        point = _point(SEEDS, POSITIONS, TREE, DEPTHS, row) * tl.sum(mass, 0)
        fits = (mass > 0) & (upto - mass <= point)
        home = tl.maximum(tl.max(tl.where(fits, chunk, -1), 0), 0)
        left = point - tl.sum(tl.where(chunk < home, mass, 0.0), 0)
        token = home * CHUNK + tl.arange(0, CHUNK)
        at = LOGITS + row.to(tl.int64) * stride + token
        x = tl.load(at, mask=token < vocab, other=NEVER).to(tl.float32)
        value = tl.exp2((x - base) * scale).to(tl.float64)
        upto = tl.cumsum(value, 0)
        fits = (value > 0) & (upto - value <= left)
        tl.store(TOKENS + row, tl.max(tl.where(fits, token, 0), 0).to(tl.int64))


@triton.jit(do_not_specialize=["scale", "top_k", "top_p", "min_p"])
def _bound_kernel(
    CHUNK_MAX, CHUNK_SUM, GROUP_MAX, GROUP_SUM, BEST, NORM, BOUND, LIST, LISTED,
    chunks, groups, scale, top_k, top_p, min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, SHIFT: tl.constexpr,
    CHUNK: tl.constexpr, CP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """A key that no token is kept below, from the maxima and sums of groups; who reaches it."""
    row = tl.program_id(0)
    best, base, sums = _total(CHUNK_MAX, CHUNK_SUM, row, chunks, scale, CP)
    norm = tl.sum(sums, 0)
    tl.store(BEST + row, tl.where(norm != norm, float("nan"), best))
    tl.store(NORM + row, norm)
    bound = ordered(norm * 0.0 + NEVER, SHIFT).to(tl.int64)
    group = tl.arange(0, GP)
    real = group < groups
    top = tl.load(GROUP_MAX + row * groups + group, mask=real, other=NEVER)
    key = ordered(top, SHIFT)
    if TOP_K or TOP_P:
        peak = tl.load(CHUNK_MAX + row * chunks + group * GROUP // CHUNK, mask=real, other=NEVER)
        share = tl.load(GROUP_SUM + row * groups + group, mask=real, other=0.0)
        share = share * tl.exp2((peak - base) * scale)
        single = tl.exp2((top - base) * scale)
        wanted = top_k.to(tl.float32) if TOP_K else top_p * norm
        over = tl.max(key, 0).to(tl.int64) + 1
        while over - bound > 1:
            middle = (bound + over) >> 1
            if TOP_K:
                has = tl.where(real, 1.0, 0.0)
            else:
                least = tl.exp2((number(middle.to(tl.int32), SHIFT) - base) * scale)
                has = tl.maximum(single, share - (GROUP - 1) * least)
            enough = tl.sum(tl.where(key >= middle.to(tl.int32), has, 0.0), 0) >= wanted
            bound = tl.where(enough, middle, bound)
            over = tl.where(enough, over, middle)
    sound = (norm > 0) & (norm < float("inf"))  # no token of a broken row is a candidate
    bound = tl.where(sound, bound, GREATEST)
    can = real & (key >= bound.to(tl.int32))
    if MIN_P:
        can = can & (tl.exp2((top - best) * scale) >= min_p)
    place = tl.cumsum(can.to(tl.int32), 0) - 1
    tl.store(BOUND + row, bound.to(tl.int32))
    tl.store(LIST + row.to(tl.int64) * groups + place, group, mask=can)
    tl.store(LISTED + row, tl.sum(can.to(tl.int32), 0))


@triton.jit(do_not_specialize=["scale", "min_p"])
def _gather_kernel(
    LOGITS, stride, BEST, BOUND, LIST, LISTED, VALUES, NAMES, COUNTS,
    vocab, groups, parts, room, scale, min_p,
    MIN_P: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The candidates in a part of a row's listed groups: logits and tokens, and how many."""
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    LOGITS += row.to(tl.int64) * stride
    LIST += row.to(tl.int64) * groups
    VALUES += tl.program_id(0).to(tl.int64) * room
    NAMES += tl.program_id(0).to(tl.int64) * room
    best, bound, listed = tl.load(BEST + row), tl.load(BOUND + row), tl.load(LISTED + row)
    each = tl.cdiv(listed, parts)
    end = tl.minimum(part * each + each, listed)
    count = row * 0
    for start in range(part * each, end, MANY):
        nth = start + tl.arange(0, MANY)
        group = tl.load(LIST + nth, mask=nth < end, other=0)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        real = (nth < end)[:, None] & (token < vocab)
        raw = tl.load(LOGITS + token, mask=real, other=NEVER)
        x = raw.to(tl.float32)
        can = (ordered(x, SHIFT) >= bound) & (x > NEVER)
        if MIN_P:
            can = can & (tl.exp2((x - best) * scale) >= min_p)
        within = tl.cumsum(can.to(tl.int32), 1)
        found = tl.sum(can.to(tl.int32), 1)
        place = (count + tl.cumsum(found, 0) - found)[:, None] + within - 1
        tl.store(VALUES + place, raw, mask=can & (place < room))
        tl.store(NAMES + place, token, mask=can & (place < room))
        count += tl.sum(found, 0)
    tl.store(COUNTS + tl.program_id(0), count)


@triton.jit
def _tile(
    LOGITS, VALUES, NAMES, start, count, whole, bound, SHIFT: tl.constexpr, TILE: tl.constexpr
):
    """[TILE] logits of candidates, and their tokens; of the whole row if none were gathered."""
    at = start + tl.arange(0, TILE)
    if whole:
        x = tl.load(LOGITS + at, mask=at < count, other=NEVER).to(tl.float32)
        token = at
    else:
        x = tl.load(VALUES + at, mask=at < count, other=NEVER).to(tl.float32)
        token = tl.load(NAMES + at, mask=at < count, other=0)
    return tl.where(ordered(x, SHIFT) >= bound, x, NEVER), token


@triton.jit
def _weighed(x, base, scale, COUNTED: tl.constexpr):
    """What candidates count: 1, or their weight."""
    return tl.where(x > NEVER, 1.0, 0.0) if COUNTED else tl.exp2((x - base) * scale)


@triton.jit
def _edge(
    LOGITS, VALUES, NAMES, count, whole, bound, base, scale, wanted, low, high,
    COUNTED: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The greatest key such that the candidates from there upwards have what is wanted.

    `low` is known to have it, or nothing has; `high` not to have it. If COUNTED, candidates are
    counted, otherwise their weight is summed.
    """
    # Most rows have few candidates, which stay in registers.
    x, _ = _tile(LOGITS, VALUES, NAMES, 0, count, whole, bound, SHIFT, TILE)
    first_keys, first_values = ordered(x, SHIFT), _weighed(x, base, scale, COUNTED)
    while high - low > 1:
        middle = (low + high) >> 1
        got = tl.sum(tl.where(first_keys >= middle.to(tl.int32), first_values, 0.0), 0)
        for start in range(TILE, count, TILE):
            x, _ = _tile(LOGITS, VALUES, NAMES, start, count, whole, bound, SHIFT, TILE)
            value = _weighed(x, base, scale, COUNTED)
            got += tl.sum(tl.where(ordered(x, SHIFT) >= middle.to(tl.int32), value, 0.0), 0)
        enough = got >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit(do_not_specialize=["scale", "top_k", "top_p", "min_p"])
def _cut_kernel(
    LOGITS, stride, VALUES, NAMES, COUNTS, BEST, NORM, BOUND, FLOOR, FIRST, TOKENS,
    SEEDS, POSITIONS, TREE, DEPTHS, vocab, parts, room, most, scale, top_k, top_p, min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, DRAW: tl.constexpr,
    SHIFT: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """The exact edge among a row's candidates, their sum, and a draw."""
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * stride
    VALUES += row.to(tl.int64) * parts * room
    NAMES += row.to(tl.int64) * parts * room
    best, norm, bound = tl.load(BEST + row), tl.load(NORM + row), tl.load(BOUND + row)
    base = tl.where(best == NEVER, 0.0, best)
    part = tl.arange(0, PP)
    counts = tl.load(COUNTS + row * parts + part, mask=part < parts, other=0)
    count = tl.sum(counts, 0)
    whole = count > most
    if whole:
        count = vocab
    elif parts > 1:  # one list of all parts; nothing is moved behind where it was
        ends = tl.cumsum(counts, 0)
        for start in range(0, count, TILE):
            at = start + tl.arange(0, TILE)
            old = at
            for p in tl.static_range(PARTS):
                end = tl.sum(tl.where(part == p, ends, 0), 0)
                gap = tl.sum(tl.where((part == p) & (part < parts), room - counts, 0), 0)
                old += tl.where(at >= end, gap, 0)
            value = tl.load(VALUES + old, mask=at < count)
            name = tl.load(NAMES + old, mask=at < count)
            tl.debug_barrier()
            tl.store(VALUES + at, value, mask=at < count)
            tl.store(NAMES + at, name, mask=at < count)
        tl.debug_barrier()

    floor = bound.to(tl.int64)
    high = ordered(base, SHIFT).to(tl.int64) + 1
    first = tl.full([], 0, tl.int32)
    if TOP_K:
        floor = _edge(
            LOGITS, VALUES, NAMES, count, whole, bound, base, scale, top_k.to(tl.float32),
            floor, high, True, SHIFT, TILE,
        )  # fmt: skip
        if TOP_P:
            norm = 0.0
            for start in range(0, count, TILE):
                x, _ = _tile(LOGITS, VALUES, NAMES, start, count, whole, bound, SHIFT, TILE)
                value = tl.exp2((x - base) * scale)
                norm += tl.sum(tl.where(ordered(x, SHIFT) >= floor, value, 0.0), 0)
    if TOP_P:
        wanted = top_p * norm
        floor = _edge(
            LOGITS, VALUES, NAMES, count, whole, bound, base, scale, wanted,
            floor, high, False, SHIFT, TILE,
        )  # fmt: skip
        # Of the tokens at the edge, the last ones are kept, as many as are needed.
        above, each, ties = 0.0, 0.0, count * 0
        for start in range(0, count, TILE):
            x, _ = _tile(LOGITS, VALUES, NAMES, start, count, whole, bound, SHIFT, TILE)
            key = ordered(x, SHIFT)
            value = tl.exp2((x - base) * scale)
            above += tl.sum(tl.where(key > floor, value, 0.0), 0)
            each = tl.maximum(each, tl.max(tl.where(key == floor, value, 0.0), 0))
            ties += tl.sum((key == floor).to(tl.int32), 0)
        needed = tl.ceil(tl.maximum(wanted - above, 0.0) / tl.maximum(each, 1e-30))
        needed = tl.maximum(tl.minimum(needed, ties.to(tl.float32)), 1.0).to(tl.int32)
        skipped = ties - needed
        if skipped > 0:
            seen = 0
            for start in range(0, count, TILE):
                x, token = _tile(LOGITS, VALUES, NAMES, start, count, whole, bound, SHIFT, TILE)
                equal = (ordered(x, SHIFT) == floor).to(tl.int32)
                hit = (equal > 0) & (seen + tl.cumsum(equal, 0) == skipped + 1)
                first = tl.maximum(first, tl.max(tl.where(hit, token, 0), 0))
                seen += tl.sum(equal, 0)

    total = tl.full([], 0.0, tl.float64)
    for start in range(0, count, TILE):
        x, token = _tile(LOGITS, VALUES, NAMES, start, count, whole, bound, SHIFT, TILE)
        value = tl.exp2((x - base) * scale)
        value = tl.where(kept(x, token, value, floor, first, min_p, SHIFT), value, 0.0)
        total += tl.sum(value.to(tl.float64), 0)
    if DRAW:
        point = _point(SEEDS, POSITIONS, TREE, DEPTHS, row) * total
        passed_by = tl.full([], 0.0, tl.float64)
        drawn = tl.full([], 0, tl.int32)
        for start in range(0, count, TILE):
            x, token = _tile(LOGITS, VALUES, NAMES, start, count, whole, bound, SHIFT, TILE)
            value = tl.exp2((x - base) * scale)
            value = tl.where(kept(x, token, value, floor, first, min_p, SHIFT), value, 0.0)
            mass = value.to(tl.float64)
            upto = passed_by + tl.cumsum(mass, 0)
            # The last token with any mass that begins at the point or before it.
            fits = (mass > 0) & (upto - mass <= point)
            drawn = tl.maximum(drawn, tl.max(tl.where(fits, token, 0), 0))
            passed_by += tl.sum(mass, 0)
        tl.store(TOKENS + row, drawn.to(tl.int64))
    tl.store(NORM + row, total.to(tl.float32))
    tl.store(FLOOR + row, floor.to(tl.int32))
    tl.store(FIRST + row, first)


def distributions(
    logits: Tensor,
    cuts: Cuts,
    *,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tree: Tensor | None = None,
    depths: Tensor | None = None,
) -> Rows:
    """What the cuts keep of each row, and a token drawn from it if seeds are given.

    Args:
        logits: [R, V] float32, float16 or bfloat16, the last dimension contiguous.
        cuts: the same for all rows.
        seeds, positions: [B] int64, of each request, and the position that follows its root.
        tree, depths: [R] int64, the request of each row, and how far below its root it lies.
    """
    rows, vocab = logits.shape
    device = logits.device
    chunk = chunk_of(vocab)
    chunks, groups = triton.cdiv(vocab, chunk), triton.cdiv(vocab, GROUP)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    out = Rows(
        logits,
        cuts,
        peaks=new(rows, chunks),
        best=new(rows),
        norm=new(rows),
        floor=new(rows, dtype=torch.int32),
        first=new(rows, dtype=torch.int32),
        tokens=new(rows, dtype=torch.int64),
    )
    sums = new(rows, chunks)
    unused = out.tokens
    noise = (
        unused if seeds is None else seeds, unused if positions is None else positions,
        unused if tree is None else tree, unused if depths is None else depths,
    )  # fmt: skip
    if not cuts.any:
        scan(logits, out.peaks, sums, scale=cuts.scale)
        _whole_kernel[(rows,)](
            logits, logits.stride(0), out.peaks, sums, out.best, out.norm, out.floor, out.first,
            out.tokens, *noise, vocab, chunks, cuts.scale,
            DRAW=seeds is not None, CHUNK=chunk, CP=lanes(chunks), num_warps=8, **OFF,
        )  # fmt: skip
        return out
    tops, shares = new(rows, groups), new(rows, groups)
    scan(logits, out.peaks, sums, tops, shares, scale=cuts.scale)
    bound, listed = (new(rows, dtype=torch.int32) for _ in range(2))
    lists = new(rows, groups, dtype=torch.int32)
    has = {"TOP_K": cuts.top_k > 0, "TOP_P": cuts.top_p < 1, "SHIFT": shift(logits.dtype)}
    early = cuts.min_p > 0 and cuts.top_p == 1  # a share is of what min-p has not yet cut
    _bound_kernel[(rows,)](
        out.peaks, sums, tops, shares, out.best, out.norm, bound, lists, listed,
        chunks, groups, cuts.scale, cuts.top_k, cuts.top_p, cuts.min_p, MIN_P=early,
        CHUNK=chunk, CP=lanes(chunks), GROUP=GROUP, GP=lanes(groups), num_warps=8, **has, **OFF,
    )  # fmt: skip
    parts = min(MOST_PARTS, parts_of(rows, chunks, device))
    most = max(1, vocab // GATHERED)
    room = min(most, triton.cdiv(groups, parts) * GROUP)
    values = new(rows, parts, room, dtype=logits.dtype)
    names = new(rows, parts, room, dtype=torch.int32)
    counts = new(rows, parts, dtype=torch.int32)
    _gather_kernel[(rows * parts,)](
        logits, logits.stride(0), out.best, bound, lists, listed, values, names, counts,
        vocab, groups, parts, room, cuts.scale, cuts.min_p,
        MIN_P=early, SHIFT=shift(logits.dtype), GROUP=GROUP, MANY=64, num_warps=4, **OFF,
    )  # fmt: skip
    _cut_kernel[(rows,)](
        logits, logits.stride(0), values, names, counts, out.best, out.norm, bound,
        out.floor, out.first, out.tokens, *noise, vocab, parts, room, most,
        cuts.scale, cuts.top_k, cuts.top_p, cuts.min_p,
        DRAW=seeds is not None, TILE=min(chunk, TILE), PARTS=MOST_PARTS, PP=lanes(MOST_PARTS),
        num_warps=8, **has, **OFF,
    )  # fmt: skip
    return out
