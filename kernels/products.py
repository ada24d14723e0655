"""Products of few rows with weights, which take as long as reading the weights does.

cuBLAS begins to read when the kernel before it has ended. Here a program asks for the first of its
weights at once (programmatic dependent launch), so that memory is busy while the small kernels
between two products run. Gate, what it scales, and the activation are one launch. Where a product
has few outputs, its sum is divided among programs, and `layers.add_norm` adds the parts.

Letters: R rows, N outputs, K inputs, F features, S parts of a sum.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec.kernels.ahead import bring, dependent
from specdec.kernels.layers import ACTIVATIONS, UNFUSED, Activation, activated

MOST_ROWS = 64
"""From there on arithmetic counts, and cuBLAS has the better kernels."""
BLOCK_K = 128
SHARED_MEMORY = 200 * 1024
"""Bytes that a program may hold weights and inputs in: so many that each has a multiprocessor."""
AHEAD = 256
"""Inputs whose weights a program has brought into the cache before it may read anything else."""


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    WEIGHT, INPUT_TILES, WEIGHT_TILES, BIAS, OUT, rows,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows, over one part of the inputs; gated, N more scale the first N."""
    dtype: tl.constexpr = WEIGHT.dtype.element_ty
    SPAN: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    n0 = tl.program_id(0) * BLOCK_N
    k0 = tl.program_id(1) * SPAN
    output = n0 + tl.arange(0, BLOCK_N)
    inside = output < N
    if PDL:  # weights are older than the launch before; inputs are not
        bring(WEIGHT + k0, output.to(tl.int64) * K, inside, AHEAD)
        if GATED:
            bring(WEIGHT + k0, (N + output).to(tl.int64) * K, inside, AHEAD)
        tl.extra.cuda.gdc_wait()
        # Not before: kernels that come early take room from those that are at work.
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, M], tl.float32)
    scaled = tl.zeros([BLOCK_N, M], tl.float32)
    for k in tl.range(k0, tl.minimum(k0 + SPAN, K), BLOCK_K, num_stages=STAGES):
        x = tl.trans(INPUT_TILES.load([0, k]))
        acc = tl.dot(WEIGHT_TILES.load([n0, k]), x, acc)
        if GATED:
            scaled = tl.dot(WEIGHT_TILES.load([N + n0, k]), x, scaled)
    if HAS_BIAS:
        acc += tl.load(BIAS + output, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            scaled += tl.load(BIAS + N + output, mask=inside, other=0.0).to(tl.float32)[:, None]
        gate = activated(acc.to(dtype).to(tl.float32), KIND).to(dtype).to(tl.float32)
        acc = gate * scaled.to(dtype).to(tl.float32)
    row = tl.arange(0, M)
    at = OUT + (tl.program_id(1) * rows + row[None, :]).to(tl.int64) * N + output[:, None]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=(row[None, :] < rows) & inside[:, None])


def fits(given: Tensor, weight: Tensor) -> bool:
    """Whether the products here take such operands, and are worth it.

    Args:
        given: [R, K].
        weight: [N, K].
    """
    return (
        given.is_cuda
        and torch.cuda.get_device_capability(given.device)[0] == 9  # Hopper; measured nowhere else
        and given.dtype == weight.dtype
        and given.dtype in (torch.float16, torch.bfloat16)
        and 0 < len(given) <= MOST_ROWS
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (given, weight))
        and weight.shape[1] % 8 == 0  # the copy engine wants rows of 16 bytes
    )


def product(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` for few rows.

    Args:
        given: [R, K].
        weight: [N, K].
        bias: [N].

    Returns:
        [R, N].
    """
    out = given.new_empty(len(given), len(weight))
    _launch(given, weight, bias, out)
    return out


def product_parts(given: Tensor, weight: Tensor) -> Tensor:
    """A product whose sum is left in parts.

    Args:
        given: [R, K].
        weight: [N, K].

    Returns:
        [S, R, N] float32; their sum over S is the product.
    """
    outputs, inputs = weight.shape
    processors = 6
    if given.is_cuda:
        processors = torch.cuda.get_device_properties(given.device).multi_processor_count
    parts = _parts(outputs, inputs, processors)
    out = given.new_empty(parts, len(given), outputs, dtype=torch.float32)
    _launch(given, weight, None, out)
    return out


def gated(given: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """The activated first half of a product times its second half, each rounded as modules do.

    Args:
        given: [R, K].
        weight: [2 * F, K], the gate's outputs first.
        bias: [2 * F].

    Returns:
        [R, F].
    """
    out = given.new_empty(len(given), len(weight) // 2)
    _launch(given, weight, bias, out, activation)
    return out


def _block(outputs: int) -> int:
    """Outputs of a program: 64 suit the matrix unit, fewer make more programs."""
    return 64 if outputs >= 12 * 64 else 16


def _parts(outputs: int, inputs: int, processors: int) -> int:
    """Parts of a sum, none of them empty, so that its programs are nearly as many as processors."""
    blocks, turns = triton.cdiv(outputs, _block(outputs)), triton.cdiv(inputs, BLOCK_K)
    parts = 1
    while 2 * parts * blocks <= processors and inputs >= 4 * parts * BLOCK_K:
        parts *= 2
    return int(triton.cdiv(turns, triton.cdiv(turns, parts)))


def _launch(
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    activation: Activation | None = None,
) -> None:
    rows, inputs = given.shape
    outputs, parts = out.shape[-1], len(out) if out.ndim == 3 else 1
    block_m, block_n = 16 if rows <= 16 else MOST_ROWS, _block(outputs)
    held = (block_m + block_n * (1 if activation is None else 2)) * BLOCK_K * given.element_size()
    span = triton.cdiv(inputs, parts * BLOCK_K) * BLOCK_K
    options: dict[str, Any] = {**UNFUSED, **dependent(given)}
    _product_kernel[(triton.cdiv(outputs, block_n), parts)](
        weight,
        TensorDescriptor(given, [rows, inputs], [inputs, 1], [block_m, BLOCK_K]),
        TensorDescriptor(weight, list(weight.shape), [inputs, 1], [block_n, BLOCK_K]),
        weight if bias is None else bias, out, rows,
        N=outputs, K=inputs, M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK_K, PARTS=parts,
        STAGES=min(9 if block_n == 64 else 3, SHARED_MEMORY // held),
        AHEAD=min(AHEAD, inputs - (parts - 1) * span),
        HAS_BIAS=bias is not None, GATED=activation is not None,
        KIND=0 if activation is None else ACTIVATIONS.index(activation),
        num_warps=4, **options,
    )  # fmt: skip
