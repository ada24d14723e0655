"""The one pass over rows of logits: maxima, sums of exponentials, and the greatest logit.

All logits are read once, in their own dtype, in chunks of one size, several programs a row where
rows are few; of each chunk, and of groups of neighbours in it, the maximum and the sum are kept.
The greatest logit is then in the first chunk that has it. How a row is summed does not depend on
how many rows there are.

Letters: R rows, V vocabulary, C chunks of a row, G groups of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Logits that a program holds at a time, at most."""
GROUP = 32
"""Neighbours whose maximum and sum are kept."""
WAVES = 4
"""Programs of a scan for each multiprocessor, at least, where rows are few."""
OFF = {"enable_fp_fusion": False}
"""Sums must not depend on what the compiler makes of them. Triton warns of launches without it."""
NEVER = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["scale"])
def _scan_kernel(
    LOGITS, stride, CHUNK_MAX, CHUNK_SUM, GROUP_MAX, GROUP_SUM,
    vocab, chunks, groups, parts, scale,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr, GROUPS: tl.constexpr,
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
            sums = tl.sum(tl.exp2((x - base) * scale), 1)
            tl.store(CHUNK_SUM + row * chunks + chunk, tl.sum(sums, 0))
            if GROUPS:
                here = chunk * (CHUNK // GROUP) + group
                tl.store(GROUP_MAX + row * groups + here, most, mask=here < groups)
                tl.store(GROUP_SUM + row * groups + here, sums, mask=here < groups)
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
    scan(logits, peaks)
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    choices = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _pick_kernel[(rows,)](
        logits, logits.stride(0), peaks, best, choices, vocab, chunks,
        CHUNK=chunk, CP=lanes(chunks), num_warps=4, **OFF,
    )  # fmt: skip
    return best, choices


def scan(
    logits: Tensor,
    peaks: Tensor,
    sums: Tensor | None = None,
    tops: Tensor | None = None,
    shares: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    """Writes the peaks [R, C] and what else is given: sums [R, C], and tops and shares [R, G]."""
    rows, vocab = logits.shape
    shift(logits.dtype)
    if logits.stride(1) != 1:
        raise ValueError(f"logits: expected contiguous rows, got strides {logits.stride()}")
    chunks = peaks.shape[1]
    parts = parts_of(rows, chunks, logits.device)
    _scan_kernel[(rows * parts,)](
        logits, logits.stride(0), peaks, peaks if sums is None else sums,
        peaks if tops is None else tops, peaks if shares is None else shares,
        vocab, chunks, 0 if tops is None else tops.shape[1], parts, scale,
        CHUNK=chunk_of(vocab), GROUP=GROUP, SUMS=sums is not None, GROUPS=tops is not None,
        num_warps=4, **OFF,
    )  # fmt: skip


def parts_of(rows: int, chunks: int, device: torch.device) -> int:
    """Programs that work on one row."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(chunks, -(-WAVES * processors // rows)))


def lanes(count: int) -> int:
    """What holds so many numbers in a program."""
    return max(16, int(triton.next_power_of_2(count)))


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
