"""Rows of logits, read once: the greatest, the distribution that options leave, a draw from it.

`scan` reads all logits in chunks of one size, several programs a row where rows are few, and keeps
of each chunk the maximum and the sum of its exponentials, of each group of `GROUP` neighbours the
maximum. What follows is one small program for each row, which reads next to nothing again:

* the greatest logit: the first place of the first chunk that has it;
* a threshold - top-k, top-p - without a sort. If the maxima of some groups alone are k tokens, or
  have the share p, then no token below the least of them is kept. So only the groups that reach it
  can hold kept tokens; among those the exact edge is found by bisection over the bits of the
  logits. The flatter a row, the more groups; in the worst case the row is read once for each step;
* a draw by inverting the cumulative sum in the order of the vocabulary, as `specdec.sampling.draw`.

Ties. Top-k keeps every token that equals the k-th. Top-p takes tokens from the likeliest downwards,
of equal ones the later, and stops when it has the share p: so does transformers where its ascending
sort is stable (torch's is not on every CPU). Equal means equal logits, before they are divided by
the temperature.

How a row is summed does not depend on how many rows there are. A row with NaN has NaN as its best.
Logits are read in their own dtype; nothing as wide as the vocabulary is written.

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

CHUNK = 4096
"""Logits that a program holds at a time, at most."""
GROUP = 64
"""Neighbours whose maximum is kept."""
WAVES = 4
"""Programs of a scan for each multiprocessor, at least, where rows are few."""
OFF = {"enable_fp_fusion": False}
"""Sums must not depend on what the compiler makes of them. Triton warns of launches without it."""
NEVER = tl.constexpr(float("-inf"))
LEAST = tl.constexpr(-(2**31))


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
def kept(x, token, weight, floor, first, min_p, SHIFT: tl.constexpr):
    """Which tokens the cuts leave, given their logits and exp((logit - best) / temperature)."""
    key = ordered(x, SHIFT)
    inside = (key > floor) | ((key == floor) & (token >= first))
    return inside & (weight >= min_p) & (x > NEVER)


@triton.jit(do_not_specialize=["scale"])
def _scan_kernel(
    LOGITS, stride, CHUNK_MAX, CHUNK_SUM, GROUP_MAX, vocab, chunks, groups, parts, scale,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    LOGITS += row.to(tl.int64) * stride
    group = tl.arange(0, CHUNK // GROUP)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for chunk in tl.range(part, chunks, parts, num_stages=3):
        at = chunk * CHUNK + place
        x = tl.load(LOGITS + at, mask=at < vocab, other=NEVER).to(tl.float32)
        most = tl.max(x, 1)
        peak = tl.max(most, 0)
        if SUMS:
            base = tl.where(peak == NEVER, 0.0, peak)
            total = tl.sum(tl.sum(tl.exp2((x - base) * scale), 1), 0)
            tl.store(CHUNK_SUM + row * chunks + chunk, total)
            here = chunk * (CHUNK // GROUP) + group
            tl.store(GROUP_MAX + row * groups + here, most, mask=here < groups)
        else:
            wrong = tl.max(tl.max((x != x).to(tl.int32), 1), 0)
            peak = tl.where(wrong > 0, float("nan"), peak)
        tl.store(CHUNK_MAX + row * chunks + chunk, peak)


@triton.jit
def _pick_kernel(
    LOGITS, stride, CHUNK_MAX, BEST, CHOICES, vocab, chunks,
    CHUNK: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * stride
    chunk = tl.arange(0, CP)
    most = tl.load(CHUNK_MAX + row * chunks + chunk, mask=chunk < chunks, other=NEVER)
    wrong = most != most
    broken = tl.max(wrong.to(tl.int32), 0) > 0
    best = tl.max(tl.where(wrong, NEVER, most), 0)
    has = tl.where(broken, wrong, most == best)
    at = tl.min(tl.where(has & (chunk < chunks), chunk, CP - 1), 0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(LOGITS + at, mask=at < vocab, other=NEVER).to(tl.float32)
    hit = tl.where(broken, x != x, x == best)
    choice = tl.min(tl.where(hit & (at < vocab), at, vocab - 1), 0)
    tl.store(BEST + row, tl.where(broken, float("nan"), best))
    tl.store(CHOICES + row, choice.to(tl.int64))


@triton.jit
def _listed_tile(
    LOGITS, LIST, start, listed, vocab, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The logits of some listed groups [TILE, GROUP], the groups, and the tokens."""
    lane = start + tl.arange(0, TILE)
    group = tl.load(LIST + lane, mask=lane < listed, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    real = (lane < listed)[:, None] & (token < vocab)
    return tl.load(LOGITS + token, mask=real, other=NEVER).to(tl.float32), group, token


@triton.jit
def _edge(
    LOGITS, LIST, listed, vocab, best, scale, wanted, low, high,
    COUNT: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The greatest key such that the listed tokens from there upwards have what is wanted.

    `low` is known to have it, or nothing has; `high` not to have it. With COUNT tokens are counted,
    otherwise their weight is summed.
    """
    while high - low > 1:
        middle = (low + high) >> 1
        got = 0.0
        for start in range(0, listed, TILE):
            x, _, _ = _listed_tile(LOGITS, LIST, start, listed, vocab, GROUP, TILE)
            value = tl.where(x > NEVER, 1.0, 0.0) if COUNT else tl.exp2((x - best) * scale)
            value = tl.where(ordered(x, SHIFT) >= middle.to(tl.int32), value, 0.0)
            got += tl.sum(tl.sum(value, 1), 0)
        enough = got >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit(do_not_specialize=["scale", "top_k", "top_p", "min_p"])
def _cut_kernel(
    LOGITS, stride, CHUNK_MAX, CHUNK_SUM, GROUP_MAX, LIST,
    BEST, NORM, FLOOR, FIRST, TOKENS, SEEDS, POSITIONS, TREE, DEPTHS,
    vocab, chunks, groups, scale, top_k, top_p, min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, DRAW: tl.constexpr,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, CP: tl.constexpr,
    GROUP: tl.constexpr, GP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * stride
    LIST += row.to(tl.int64) * groups
    chunk = tl.arange(0, CP)
    real = chunk < chunks
    most = tl.load(CHUNK_MAX + row * chunks + chunk, mask=real, other=NEVER)
    sums = tl.load(CHUNK_SUM + row * chunks + chunk, mask=real, other=0.0)
    best = tl.max(most, 0)
    base = tl.where(best == NEVER, 0.0, best)
    sums = sums * tl.exp2((most - base) * scale)
    norm = tl.sum(sums, 0)
    real_groups = tl.where((norm > 0) & (norm < float("inf")), groups, 0)  # none in a broken row
    tl.store(BEST + row, tl.where(norm != norm, float("nan"), best))
    floor = tl.full([], LEAST, tl.int64)
    first = tl.full([], 0, tl.int32)
    point = tl.full([], 0.0, tl.float64)
    if DRAW:
        tree = tl.load(TREE + row)
        position = tl.load(POSITIONS + tree) + tl.load(DEPTHS + row)
        point = uniform(tl.load(SEEDS + tree), position, position * 0 + SAMPLE)

    if TOP_K or TOP_P or MIN_P:
        # Groups that can hold a kept token: those whose maximum reaches a bound.
        group = tl.arange(0, GP)
        top = tl.load(GROUP_MAX + row * groups + group, mask=group < groups, other=NEVER)
        key = ordered(top, SHIFT)
        weight = tl.exp2((top - base) * scale)
        high = tl.max(key, 0).to(tl.int64) + 1
        bound = tl.full([], LEAST, tl.int64)
        if TOP_K or TOP_P:
            alone = tl.where(group < groups, 1.0, 0.0) if TOP_K else weight
            wanted = top_k.to(tl.float32) if TOP_K else top_p * norm
            over = high
            while over - bound > 1:
                middle = (bound + over) >> 1
                enough = tl.sum(tl.where(key >= middle.to(tl.int32), alone, 0.0), 0) >= wanted
                bound = tl.where(enough, middle, bound)
                over = tl.where(enough, over, middle)
        can = (group < real_groups) & (key >= bound.to(tl.int32))
        if MIN_P and not TOP_P:  # a share is of what min-p has not yet cut
            can = can & (weight >= min_p)
        spot = tl.cumsum(can.to(tl.int32), 0) - 1
        tl.store(LIST + spot, group, mask=can)
        listed = tl.sum(can.to(tl.int32), 0)
        tl.debug_barrier()

        if TOP_K:
            floor = _edge(
                LOGITS, LIST, listed, vocab, base, scale, top_k.to(tl.float32), bound, high,
                True, SHIFT, GROUP, TILE,
            )  # fmt: skip
            bound = floor
            if TOP_P:
                norm = 0.0
                for start in range(0, listed, TILE):
                    x, _, _ = _listed_tile(LOGITS, LIST, start, listed, vocab, GROUP, TILE)
                    value = tl.exp2((x - base) * scale)
                    norm += tl.sum(tl.sum(tl.where(ordered(x, SHIFT) >= floor, value, 0.0), 1), 0)
        if TOP_P:
            wanted = top_p * norm
            floor = _edge(
                LOGITS, LIST, listed, vocab, base, scale, wanted, bound, high,
                False, SHIFT, GROUP, TILE,
            )  # fmt: skip
            # Of the tokens at the edge, the last ones are kept, as many as are needed.
            above, each, ties = 0.0, 0.0, listed * 0
            for start in range(0, listed, TILE):
                x, _, _ = _listed_tile(LOGITS, LIST, start, listed, vocab, GROUP, TILE)
                key2 = ordered(x, SHIFT)
                value = tl.exp2((x - base) * scale)
                above += tl.sum(tl.sum(tl.where(key2 > floor, value, 0.0), 1), 0)
                each = tl.maximum(each, tl.max(tl.max(tl.where(key2 == floor, value, 0.0), 1), 0))
                ties += tl.sum(tl.sum((key2 == floor).to(tl.int32), 1), 0)
            needed = tl.ceil(tl.maximum(wanted - above, 0.0) / tl.maximum(each, 1e-30))
            needed = tl.maximum(tl.minimum(needed, ties.to(tl.float32)), 1.0).to(tl.int32)
            skipped = ties - needed
            if skipped > 0:
                seen = 0
                for start in range(0, listed, TILE):
                    x, ids, _ = _listed_tile(LOGITS, LIST, start, listed, vocab, GROUP, TILE)
                    here = tl.sum((ordered(x, SHIFT) == floor).to(tl.int32), 1)
                    upto = seen + tl.cumsum(here, 0)
                    # The group in which the first kept one lies.
                    its = (upto > skipped) & (upto - here <= skipped)
                    if tl.max(its.to(tl.int32), 0) > 0:
                        home = tl.max(tl.where(its, ids, -1), 0)
                        before = tl.max(tl.where(its, upto - here, 0), 0)
                        token = home * GROUP + tl.arange(0, GROUP)
                        y = tl.load(LOGITS + token, mask=token < vocab, other=NEVER).to(tl.float32)
                        equal = ((ordered(y, SHIFT) == floor) & (token < vocab)).to(tl.int32)
                        rank = before + tl.cumsum(equal, 0)
                        hit = (equal > 0) & (rank == skipped + 1)
                        first = tl.max(tl.where(hit, token, 0), 0)
                    seen += tl.sum(here, 0)

        total = tl.full([], 0.0, tl.float64)
        for start in range(0, listed, TILE):
            x, _, token = _listed_tile(LOGITS, LIST, start, listed, vocab, GROUP, TILE)
            value = tl.exp2((x - base) * scale)
            value = tl.where(kept(x, token, value, floor, first, min_p, SHIFT), value, 0.0)
            total += tl.sum(tl.sum(value, 1).to(tl.float64), 0)
        norm = total.to(tl.float32)
        if DRAW:
            point *= total
            home, left = 0, point
            passed = tl.full([], 0.0, tl.float64)
            open_ = 1
            for start in range(0, listed, TILE):
                if open_ > 0:
                    x, ids, token = _listed_tile(LOGITS, LIST, start, listed, vocab, GROUP, TILE)
                    value = tl.exp2((x - base) * scale)
                    value = tl.where(kept(x, token, value, floor, first, min_p, SHIFT), value, 0.0)
                    mass = tl.sum(value, 1).to(tl.float64)
                    upto = passed + tl.cumsum(mass, 0)
                    # The last group with any mass that begins at the point or before it.
                    fits = (mass > 0) & (upto - mass <= point)
                    if tl.max(fits.to(tl.int32), 0) > 0:
                        home = tl.max(tl.where(fits, ids, -1), 0)
                        left = tl.min(
                            tl.where(fits & (ids == home), point - (upto - mass), 1e300), 0
                        )
                    passed += tl.sum(mass, 0)
                    open_ = (passed <= point).to(tl.int32)
            token = home * GROUP + tl.arange(0, GROUP)
            x = tl.load(LOGITS + token, mask=token < vocab, other=NEVER).to(tl.float32)
            value = tl.exp2((x - base) * scale)
            value = tl.where(kept(x, token, value, floor, first, min_p, SHIFT), value, 0.0)
            upto = tl.cumsum(value.to(tl.float64), 0)
            fits = (value > 0) & (upto - value.to(tl.float64) <= left)
            tl.store(TOKENS + row, tl.max(tl.where(fits, token, 0), 0).to(tl.int64))
    elif DRAW:
        mass = sums.to(tl.float64)
        upto = tl.cumsum(mass, 0)
        point *= tl.sum(mass, 0)
        fits = (mass > 0) & (upto - mass <= point)
        home = tl.maximum(tl.max(tl.where(fits, chunk, -1), 0), 0)
        left = point - tl.sum(tl.where(chunk < home, mass, 0.0), 0)
        token = home * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(LOGITS + token, mask=token < vocab, other=NEVER).to(tl.float32)
        value = tl.exp2((x - base) * scale).to(tl.float64)
        upto = tl.cumsum(value, 0)
        fits = (value > 0) & (upto - value <= left)
        tl.store(TOKENS + row, tl.max(tl.where(fits, token, 0), 0).to(tl.int64))
    tl.store(NORM + row, norm)
    tl.store(FLOOR + row, floor.to(tl.int32))
    tl.store(FIRST + row, first)


def greatest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each row and its first place, as `torch.max` finds them on a CPU.

    Args:
        logits: [R, V] float32, float16 or bfloat16.

    Returns:
        [R] float32, NaN where a row has NaN, and [R] int64, which then is the first NaN.
    """
    rows, vocab = logits.shape
    chunk = chunk_of(vocab)
    chunks = triton.cdiv(vocab, chunk)
    peaks = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    _scan(logits, peaks, peaks, peaks, 0, 1.0, sums=False)
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    choices = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _pick_kernel[(rows,)](
        logits, logits.stride(0), peaks, best, choices, vocab, chunks,
        CHUNK=chunk, CP=_lanes(chunks), num_warps=4, **OFF,
    )  # fmt: skip
    return best, choices


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

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    peaks, sums = (new(rows, chunks, dtype=torch.float32) for _ in range(2))
    tops = new(rows, groups, dtype=torch.float32)
    _scan(logits, peaks, sums, tops, groups, cuts.scale, sums=True)
    out = Rows(
        logits,
        cuts,
        peaks,
        best=new(rows, dtype=torch.float32),
        norm=new(rows, dtype=torch.float32),
        floor=new(rows, dtype=torch.int32),
        first=new(rows, dtype=torch.int32),
        tokens=new(rows, dtype=torch.int64),
    )
    some = cuts.top_k > 0 or cuts.top_p < 1 or cuts.min_p > 0
    listed = new(rows, groups, dtype=torch.int32) if some else out.first
    unused = out.tokens
    _cut_kernel[(rows,)](
        logits, logits.stride(0), peaks, sums, tops, listed,
        out.best, out.norm, out.floor, out.first, out.tokens,
        unused if seeds is None else seeds, unused if positions is None else positions,
        unused if tree is None else tree, unused if depths is None else depths,
        vocab, chunks, groups, cuts.scale, cuts.top_k, cuts.top_p, cuts.min_p,
        TOP_K=cuts.top_k > 0, TOP_P=cuts.top_p < 1, MIN_P=cuts.min_p > 0, DRAW=seeds is not None,
        SHIFT=shift(logits.dtype), CHUNK=chunk, CP=_lanes(chunks), GROUP=GROUP, GP=_lanes(groups),
        TILE=chunk // GROUP, num_warps=8, **OFF,
    )  # fmt: skip
    return out


def chunk_of(vocab: int) -> int:
    """Logits of a chunk: less than usual where the whole vocabulary is small."""
    return min(CHUNK, max(GROUP, int(triton.next_power_of_2(vocab))))


def shift(dtype: torch.dtype) -> int:
    """Low bits of a float32 that numbers of a dtype do not have.

    Raises:
        TypeError: the kernels do not read that dtype.
    """
    bits = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
    if dtype not in bits:
        raise TypeError(f"logits: expected float32, float16 or bfloat16, got {dtype}")
    return bits[dtype]


def _scan(
    logits: Tensor,
    peaks: Tensor,
    totals: Tensor,
    tops: Tensor,
    groups: int,
    scale: float,
    *,
    sums: bool,
) -> None:
    rows, vocab = logits.shape
    shift(logits.dtype)
    if logits.stride(1) != 1:
        raise ValueError(f"logits: expected contiguous rows, got strides {logits.stride()}")
    chunks = peaks.shape[1]
    processors = 1
    if logits.is_cuda:
        processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    parts = max(1, min(chunks, triton.cdiv(WAVES * processors, rows)))
    _scan_kernel[(rows * parts,)](
        logits, logits.stride(0), peaks, totals, tops, vocab, chunks, groups, parts, scale,
        CHUNK=chunk_of(vocab), GROUP=GROUP, SUMS=sums, num_warps=4, **OFF,
    )  # fmt: skip


def _lanes(count: int) -> int:
    return max(16, int(triton.next_power_of_2(count)))
