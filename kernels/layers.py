"""The small operations between the matrix products of a decoder layer, one launch each, in Triton.

Each rounds where transformers' own modules do, so that a layer made of them gives what the model
gives. Eagerly these would be some twenty launches a layer, and a launch costs more than the work.

Letters: R rows, D hidden size, F features, Hq/Hkv heads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.ahead import dependent

NormKind = Literal["cast, scale", "scale, cast", "one plus"]
"""Where a norm rounds: before its weight acts (Llama), after it (OLMo-2), or after 1 + weight acts
(Gemma)."""
NORM_KINDS: tuple[NormKind, ...] = ("cast, scale", "scale, cast", "one plus")

Activation = Literal["silu", "gelu_pytorch_tanh", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_pytorch_tanh", "gelu")

UNFUSED = {"enable_fp_fusion": False}
"""A fused multiply-add would not round the product. Triton warns of launches that do not choose."""


@triton.jit
def _normed(x, WEIGHT, dims, inside, size: tl.constexpr, eps, KIND: tl.constexpr, dtype):
    """Rows of float32 divided by their root mean square, times the weight, rounded to `dtype`."""
    w = tl.load(WEIGHT + dims, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    if KIND == 0:
        x = x.to(dtype).to(tl.float32) * w
    elif KIND == 1:
        x = x * w
    else:
        x = x * (1.0 + w)
    return x.to(dtype)


@triton.jit
def activated(gate, KIND: tl.constexpr):
    """float32 under the activation of that place in `ACTIVATIONS`."""
    if KIND == 0:
        gate = gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
        gate = 0.5 * gate * (1.0 + tanh)
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return gate


@triton.jit
def _add_norm_kernel(
    HIDDEN, BRANCH, BRANCH_WEIGHT, WEIGHT, OUT, multiplier, branch_eps, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SCALES: tl.constexpr,
    NORMS_BRANCH: tl.constexpr, NORMS: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = HIDDEN.dtype.element_ty
    dims = tl.arange(0, BLOCK)
    inside = dims < D
    x = tl.load(HIDDEN + row * D + dims, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(BRANCH + row * D + dims, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            at = BRANCH + (part * tl.num_programs(0) + row) * D + dims
            added += tl.load(at, mask=inside, other=0.0)
        added = added.to(dtype).to(tl.float32)
        if NORMS_BRANCH:
            added = _normed(added, BRANCH_WEIGHT, dims, inside, D, branch_eps, KIND, dtype)
            added = added.to(tl.float32)
        if SCALES:
            added = (added * multiplier).to(dtype).to(tl.float32)
        sum_ = (x + added).to(dtype)
        tl.store(HIDDEN + row * D + dims, sum_, mask=inside)
        x = sum_.to(tl.float32)
    if NORMS:
        y = _normed(x, WEIGHT, dims, inside, D, eps, KIND, dtype)
        tl.store(OUT + row * D + dims, y, mask=inside)


@triton.jit
def _norm_heads_kernel(
    X, QUERY_WEIGHT, KEY_WEIGHT, row_stride, query_eps, key_eps,
    QUERIES: tl.constexpr, QUERY_SIZE: tl.constexpr, KEY_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first programs of a row take what is normed as queries, the others what is as keys."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    X += row * row_stride
    dtype: tl.constexpr = X.dtype.element_ty
    if unit < QUERIES:
        X += unit * QUERY_SIZE
        inside = dims < QUERY_SIZE
        x = tl.load(X + dims, mask=inside, other=0.0).to(tl.float32)
        y = _normed(x, QUERY_WEIGHT, dims, inside, QUERY_SIZE, query_eps, KIND, dtype)
        tl.store(X + dims, y, mask=inside)
    else:
        X += QUERIES * QUERY_SIZE + (unit - QUERIES) * KEY_SIZE
        inside = dims < KEY_SIZE
        x = tl.load(X + dims, mask=inside, other=0.0).to(tl.float32)
        y = _normed(x, KEY_WEIGHT, dims, inside, KEY_SIZE, key_eps, KIND, dtype)
        tl.store(X + dims, y, mask=inside)


@triton.jit
def _gate_kernel(
    X, OUT, F: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = X.dtype.element_ty
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = features < F
    gate = tl.load(X + row * 2 * F + features, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + row * 2 * F + F + features, mask=inside, other=0.0).to(tl.float32)
    out = activated(gate, KIND).to(dtype).to(tl.float32) * up
    tl.store(OUT + row * F + features, out.to(dtype), mask=inside)


@triton.jit
def _rotary_kernel(
    POSITIONS, FREQUENCIES, COS, SIN, scaling,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < HALF
    position = tl.load(POSITIONS + row).to(tl.float32)
    angle = position * tl.load(FREQUENCIES + dims, mask=inside, other=0.0)
    cos = (tl.cos(angle) * scaling).to(COS.dtype.element_ty)
    sin = (tl.sin(angle) * scaling).to(COS.dtype.element_ty)
    at = row * 2 * HALF + dims
    tl.store(COS + at, cos, mask=inside)
    tl.store(COS + at + HALF, cos, mask=inside)
    tl.store(SIN + at, sin, mask=inside)
    tl.store(SIN + at + HALF, sin, mask=inside)


def rotary(
    positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cosines and sines that rotate queries and keys, for all layers.

    Args:
        positions: [R] int64.
        frequencies: [Drot / 2] float32, angle of each pair of dimensions for one position.
        scaling: factor on both.
        dtype: of the results.

    Returns:
        Two of [R, Drot]; the halves are equal.
    """
    half = len(frequencies)
    cos, sin = (positions.new_empty(len(positions), 2 * half, dtype=dtype) for _ in range(2))
    _rotary_kernel[(len(positions),)](
        positions, frequencies, cos, sin, scaling,
        HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1,
        **UNFUSED, **dependent(positions),
    )  # fmt: skip
    return cos, sin


def add_norm(
    hidden: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    eps: float,
    kind: NormKind,
    *,
    branch_weight: Tensor | None = None,
    branch_eps: float = 0.0,
    multiplier: float = 1.0,
) -> Tensor:
    """Adds what a branch computed to the residual stream, and norms the sum for the next branch.

    Root mean square norms (Zhang and Sennrich 2019).

    Args:
        hidden: [R, D], contiguous; grows by the branch in place.
        branch: [R, D], contiguous, or [S, R, D] float32, parts whose sum it is; None adds nothing.
        weight: [D] of the norm that follows; None for none.
        eps: of that norm.
        kind: of all norms here.
        branch_weight: [D] of a norm of the branch itself before it is added; None for none.
        branch_eps: of that norm.
        multiplier: factor on the branch.

    Returns:
        [R, D] the normed sum; `hidden` itself without a norm.
    """
    rows, size = hidden.shape
    out = hidden if weight is None else torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    _add_norm_kernel[(rows,)](
        hidden, _some(branch, hidden), _some(branch_weight, hidden), _some(weight, hidden), out,
        multiplier, branch_eps, eps,
        D=size, BLOCK=block, PARTS=_parts(branch), SCALES=multiplier != 1.0,
        NORMS_BRANCH=branch_weight is not None, NORMS=weight is not None,
        KIND=NORM_KINDS.index(kind), num_warps=max(1, min(8, block // 512)),
        **UNFUSED, **dependent(hidden),
    )  # fmt: skip
    return out


def norm_heads(
    packed: Tensor,
    query: tuple[Tensor, float],
    key: tuple[Tensor, float],
    widths: tuple[int, int],
    kind: NormKind,
) -> None:
    """Norms the queries and keys of packed projections in place.

    Args:
        packed: [R, Hq * Dk + Hkv * Dk + Hkv * Dv], rows contiguous.
        query, key: weight and epsilon. The size of a weight says what is normed together: a head,
            or all heads.
        widths: Hq * Dk and Hkv * Dk.
    """
    sizes = query[0].numel(), key[0].numel()
    units = widths[0] // sizes[0], widths[1] // sizes[1]
    block = triton.next_power_of_2(max(sizes))
    _norm_heads_kernel[(len(packed), sum(units))](
        packed, query[0], key[0], packed.stride(0), query[1], key[1],
        QUERIES=units[0], QUERY_SIZE=sizes[0], KEY_SIZE=sizes[1], BLOCK=block,
        KIND=NORM_KINDS.index(kind), num_warps=max(1, min(8, block // 512)),
        **UNFUSED, **dependent(packed),
    )  # fmt: skip


def gate(packed: Tensor, activation: Activation) -> Tensor:
    """The activated gate times the other half.

    Args:
        packed: [R, 2 * F], contiguous: the gate, then what it scales.

    Returns:
        [R, F].
    """
    rows, features = packed.shape[0], packed.shape[1] // 2
    out = packed.new_empty(rows, features)
    block = min(1024, triton.next_power_of_2(features))
    _gate_kernel[(rows, triton.cdiv(features, block))](
        packed, out, F=features, BLOCK=block, KIND=ACTIVATIONS.index(activation),
        **UNFUSED, **dependent(packed),
    )  # fmt: skip
    return out


def _parts(branch: Tensor | None) -> int:
    if branch is None:
        return 0
    return len(branch) if branch.ndim == 3 else 1


def _some(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if tensor is None else tensor
