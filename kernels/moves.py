"""Rows of K and V into and within a paged store, in Triton: each operation is one launch.

`specdec.kernels.cache` says the same in torch. The launchers work on the current device, and
neither allocate (but for a result) nor wait, so that a CUDA graph can hold them.

Letters: L layers, P pages, S slots of a page, Hq/Hkv query and key/value heads, Dk/Dv head dims,
R rows, B paths (one for each sequence), N rows of a path. A slot is `page * S + offset`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.ahead import dependent
from specdec.kernels.layers import UNFUSED

FLOAT = torch.float32

TILE = 2048
"""Elements that a program holds of each tensor."""


@triton.jit
def _write(
    PAGES, slot, X, x_head, x_dim, heads,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Some heads of one row `X` into its slot."""
    dims = tl.arange(0, DP)
    real = (heads < H)[:, None] & (dims < D)[None, :]
    x = tl.load(X + heads[:, None] * x_head + dims[None, :] * x_dim, mask=real)
    at = PAGES + slot * (H * D) + heads[:, None] * D + dims[None, :]
    tl.store(at, x.to(PAGES.dtype.element_ty), mask=real)


@triton.jit
def _rotate(
    OUT, place, X, x_head, x_dim, COS, SIN, heads,
    H: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    HALF_P: tl.constexpr, REST_P: tl.constexpr,
):  # fmt: skip
    """Some heads of one row `X`, rotated, into row `place` of `OUT`."""
    HALF: tl.constexpr = ROTARY // 2
    x_dtype: tl.constexpr = X.dtype.element_ty
    out_dtype: tl.constexpr = OUT.dtype.element_ty
    X += heads[:, None] * x_head
    OUT += place * (H * D) + heads[:, None] * D
    # Torch computes, and rounds, in the wider of the two dtypes.
    dtype: tl.constexpr = COS.dtype.element_ty
    half = tl.arange(0, HALF_P)
    inside = half < HALF
    real = (heads < H)[:, None] & inside[None, :]
    low = tl.load(X + half[None, :] * x_dim, mask=real, other=0.0).to(tl.float32)
    high = tl.load(X + (half[None, :] + HALF) * x_dim, mask=real, other=0.0).to(tl.float32)
    cos_low = tl.load(COS + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(SIN + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(COS + half + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(SIN + half + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    # Torch rounds each product before it adds the two.
    new_low = (low * cos_low).to(dtype).to(tl.float32) - (high * sin_low).to(dtype).to(tl.float32)
    new_high = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(
        tl.float32
    )
    new_low = new_low.to(dtype).to(x_dtype).to(out_dtype)
    new_high = new_high.to(dtype).to(x_dtype).to(out_dtype)
    tl.store(OUT + half[None, :], new_low, mask=real)
    tl.store(OUT + (half[None, :] + HALF), new_high, mask=real)
    if ROTARY < D:
        rest = ROTARY + tl.arange(0, REST_P)
        real = (heads < H)[:, None] & (rest < D)[None, :]
        x = tl.load(X + rest[None, :] * x_dim, mask=real)
        tl.store(OUT + rest[None, :], x.to(out_dtype), mask=real)


@triton.jit
def _move(
    PAGES, SOURCES, TARGETS, path, layer, part, count, layer_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of all rows of a path, in one layer.

    Blocks of rows follow one another, and within a block a barrier parts the reads of all threads
    from their writes. So what is written too early could only be the source of a row in a later
    block. There is none: by position within the sequence, targets do not lie behind their sources
    and sources rise, so a target lies before the sources of all later rows.
    """
    PAGES += layer.to(tl.int64) * layer_stride
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    for first in tl.range(0, count, ROWS, num_stages=1):
        step = first + tl.arange(0, ROWS)
        at = path.to(tl.int64) * count + step
        source = tl.load(SOURCES + at, mask=step < count, other=0)
        target = tl.load(TARGETS + at, mask=step < count, other=0)
        moves = (source != target)[:, None] & (columns < WIDTH)[None, :]
        rows = tl.load(PAGES + source[:, None] * WIDTH + columns[None, :], mask=moves)
        tl.debug_barrier()
        tl.store(PAGES + target[:, None] * WIDTH + columns[None, :], rows, mask=moves)


@triton.jit
def _write_kernel(
    KEY_PAGES, VALUE_PAGES, SLOTS, K, V,
    k_row, k_head, k_dim, v_row, v_head, v_dim,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    slot = tl.load(SLOTS + row)
    _write(KEY_PAGES, slot, K + row * k_row, k_head, k_dim, heads, HKV, DK, DKP)
    _write(VALUE_PAGES, slot, V + row * v_row, v_head, v_dim, heads, HKV, DV, DVP)


@triton.jit
def _rotate_kernel(
    OUT, KEY_PAGES, VALUE_PAGES, SLOTS, Q, K, V, COS, SIN,
    q_row, q_head, q_dim, k_row, k_head, k_dim, v_row, v_head, v_dim,
    HQ: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    ROTARY: tl.constexpr, HALF_P: tl.constexpr, REST_P: tl.constexpr,
    DVP: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of a row, the first programs take blocks of query heads, the others those of K and V."""
    QUERY_BLOCKS: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    COS += row * ROTARY
    SIN += row * ROTARY
    if block < QUERY_BLOCKS:
        heads = (block * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        x = Q + row * q_row
        _rotate(OUT, row, x, q_head, q_dim, COS, SIN, heads, HQ, DK, ROTARY, HALF_P, REST_P)
    else:
        heads = ((block - QUERY_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        slot = tl.load(SLOTS + row)
        x = K + row * k_row
        _rotate(KEY_PAGES, slot, x, k_head, k_dim, COS, SIN, heads, HKV, DK, ROTARY, HALF_P, REST_P)
        _write(VALUE_PAGES, slot, V + row * v_row, v_head, v_dim, heads, HKV, DV, DVP)


@triton.jit
def _move_kernel(
    KEY_PAGES, VALUE_PAGES, SOURCES, TARGETS, count, key_layer, value_layer,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first programs of a path and layer take columns of K, the others columns of V."""
    KEY_PARTS: tl.constexpr = (KEY_WIDTH + COLUMNS - 1) // COLUMNS
    path, layer, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if part < KEY_PARTS:
        _move(
            KEY_PAGES, SOURCES, TARGETS, path, layer, part, count, key_layer,
            KEY_WIDTH, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _move(
            VALUE_PAGES, SOURCES, TARGETS, path, layer, part - KEY_PARTS, count, value_layer,
            VALUE_WIDTH, ROWS, COLUMNS,
        )  # fmt: skip


def write_rows(
    key_pages: Tensor, value_pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Writes the new K and V rows of one layer in place.

    Args:
        key_pages, value_pages: [P, S, Hkv, Dk] and [P, S, Hkv, Dv], contiguous, of any floating
            dtype; in float8_e4m3fn, rows beyond its range are undefined.
        slots: [R] int64, contiguous.
        keys, values: [R, Hkv, Dk] and [R, Hkv, Dv] with any strides, cast to the dtype of the
            pages.
    """
    rows, heads, dk = keys.shape
    dv = values.shape[2]
    block = _head_block(heads, max(dk, dv))
    _write_kernel[(rows, triton.cdiv(heads, block))](
        key_pages, value_pages, slots, keys, values, *keys.stride(), *values.stride(),
        HKV=heads, DK=dk, DV=dv,
        DKP=triton.next_power_of_2(dk), DVP=triton.next_power_of_2(dv), BLOCK_H=block,
        **UNFUSED,
    )  # fmt: skip


def rotate_and_write(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Rotates the new queries and keys of one layer, and writes keys and values in place.

    The rotation is that of Llama: `x * cos + rotate_half(x) * sin` over the first Drot dimensions,
    with x1, x2 the halves of these and `rotate_half(x) = (-x2, x1)`; the other dimensions stay.
    Products and sums are rounded as by transformers' `apply_rotary_pos_emb`, to the same bits.

    Args:
        query: [R, Hq, Dk] in float32, float16 or bfloat16, with any strides.
        key_pages, value_pages, slots, keys, values: as for `write_rows`; keys in the dtype of the
            query.
        cos, sin: [R, Drot], contiguous, in the dtype of the query or float32, Drot even and at most
            Dk.

    Returns:
        [R, Hq, Dk], the rotated query.

    Raises:
        ValueError: `cos` has no width that fits.
        TypeError: dtypes do not go together.
    """
    rows, heads, dk = query.shape
    kv_heads, dv = values.shape[1:]
    rotary = cos.shape[1]
    if rotary % 2 or not 0 < rotary <= dk:
        raise ValueError(f"cos: expected an even width of 2 to {dk}, got {rotary}")
    if query.dtype != keys.dtype or cos.dtype != sin.dtype or cos.dtype not in (query.dtype, FLOAT):
        raise TypeError(
            f"keys, cos, sin: expected {query.dtype}, cos and sin that or {FLOAT}, "
            f"got {keys.dtype}, {cos.dtype}, {sin.dtype}"
        )
    out = query.new_empty(rows, heads, dk)
    block = _head_block(max(heads, kv_heads), max(dk, dv))
    _rotate_kernel[(rows, triton.cdiv(heads, block) + triton.cdiv(kv_heads, block))](
        out, key_pages, value_pages, slots, query, keys, values, cos, sin,
        *query.stride(), *keys.stride(), *values.stride(),
        HQ=heads, HKV=kv_heads, DK=dk, DV=dv, ROTARY=rotary,
        HALF_P=triton.next_power_of_2(rotary // 2),
        REST_P=triton.next_power_of_2(max(1, dk - rotary)),
        DVP=triton.next_power_of_2(dv), BLOCK_H=block,
        **UNFUSED, **dependent(query),
    )  # fmt: skip
    return out


def move_rows(key_pages: Tensor, value_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copies K and V rows of all layers of a group from slot to slot along paths, in place.

    The outcome is as if all sources were read before the first target is written, provided that
    within a path no target is the source of a later row, and that no path touches slots of
    another. A row whose source is its target is left alone, wherever it lies.

    Args:
        key_pages, value_pages: [L, P, S, Hkv, Dk] and [L, P, S, Hkv, Dv], each layer contiguous, of
            any dtype.
        sources, targets: [B, N] int64 slots.
    """
    sources, targets = sources.contiguous(), targets.contiguous()
    paths, count = sources.shape
    widths = key_pages.shape[3:].numel(), value_pages.shape[3:].numel()
    # Paths are short; a longer one is moved in blocks.
    rows = min(16, triton.next_power_of_2(max(1, count)))
    columns = min(TILE // rows, triton.next_power_of_2(max(widths)))
    parts = sum(triton.cdiv(width, columns) for width in widths)
    _move_kernel[(paths, len(key_pages), parts)](
        key_pages, value_pages, sources, targets, count,
        key_pages.stride(0), value_pages.stride(0),
        KEY_WIDTH=widths[0], VALUE_WIDTH=widths[1], ROWS=rows, COLUMNS=columns, **UNFUSED,
    )  # fmt: skip


def _head_block(heads: int, dim: int) -> int:
    """How many heads of a row one program takes."""
    most = max(1, TILE // triton.next_power_of_2(dim))
    return min(int(triton.next_power_of_2(heads)), int(most))
