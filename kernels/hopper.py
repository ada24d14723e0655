"""Flash tree attention for Hopper, in Gluon: the work of `flash._attend_kernel`, shared by role.

Groups of four warps compute 64 packed rows each (`hopper_compute.py`). Four more bring keys and
values into a ring of stages, by the copy engine where they are neighbours in a page, else one by
one (`hopper_fetch.py`). A program is one group, and two of them fit on a multiprocessor; or it is
two groups, which share the same tiles. The work list, the partial results and the merge are those
of `flash.py`.

Letters: as in `flash.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from specdec.kernels.hopper_compute import GROUP_M, compute
from specdec.kernels.hopper_fetch import PART_N, fetch
from specdec.kernels.worklist import Schedule

COMPUTE_REGISTERS, COPY_REGISTERS = gl.constexpr(232), gl.constexpr(40)
"""Of a thread. Launches give all threads the same, see `REGISTERS`; groups then trade them."""

REGISTERS = {1: 128, 2: 168}
"""Of a thread of a program of one or two groups, so that two programs fit, or one."""


@gluon.jit(do_not_specialize=["table_width", "fresh"])
def attend_kernel(
    Q, K, V, K_TILES, V_TILES, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE, TABLE,
    KEY_SLOTS, ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS,
    scale, softcap, table_width, fresh, q_row, q_head, k_token, k_head, v_token, v_head,
    HQ: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    PAGE: gl.constexpr, W: gl.constexpr, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, LOOSE_STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    if fresh > 0:  # see `flash.tree_attention`
        tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    GROUPS: gl.constexpr = BLOCK_M // GROUP_M
    dtype: gl.constexpr = Q.dtype.element_ty
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_M, DK], dtype)
    q_held = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_M, DK], Q_TILE)
    PARTS: gl.constexpr = BLOCK_N // PART_N
    k_ring = gl.allocate_shared_memory(dtype, [STAGES * PARTS, PART_N, DK], K_TILES.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES * PARTS, PART_N, DV], V_TILES.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(free.index(stage), GROUPS)
    fence_async_shared()
    # Triton takes these only as they stand here, once for each group of warps.
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (compute, (
                    0, q_held.index(0), k_ring, v_ring, full, free,
                    Q, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE,
                    ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS, scale, softcap, q_row, q_head,
                    HQ, G, DK, DV, W, CAUSAL, SOFTCAP, HAS_SINKS, HAS_LSE,
                    BLOCK_M, BLOCK_N, LOOSE_STEPS, STAGES,
                )),
                (fetch, (
                    K, V, K_TILES, V_TILES, k_ring, v_ring, full, free,
                    Q, HEADER, WORKER_TABLE, TABLE, KEY_SLOTS, table_width,
                    q_row, q_head, k_token, k_head, v_token, v_head,
                    HQ, G, DK, DV, PAGE, BLOCK_M, BLOCK_N, LOOSE_STEPS, STAGES,
                )),
            ],
            [4],
            [COPY_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute, (
                    0, q_held.index(0), k_ring, v_ring, full, free,
                    Q, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE,
                    ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS, scale, softcap, q_row, q_head,
                    HQ, G, DK, DV, W, CAUSAL, SOFTCAP, HAS_SINKS, HAS_LSE,
                    BLOCK_M, BLOCK_N, LOOSE_STEPS, STAGES,
                )),
                (compute, (
                    1, q_held.index(1), k_ring, v_ring, full, free,
                    Q, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE,
                    ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS, scale, softcap, q_row, q_head,
                    HQ, G, DK, DV, W, CAUSAL, SOFTCAP, HAS_SINKS, HAS_LSE,
                    BLOCK_M, BLOCK_N, LOOSE_STEPS, STAGES,
                )),
                (fetch, (
                    K, V, K_TILES, V_TILES, k_ring, v_ring, full, free,
                    Q, HEADER, WORKER_TABLE, TABLE, KEY_SLOTS, table_width,
                    q_row, q_head, k_token, k_head, v_token, v_head,
                    HQ, G, DK, DV, PAGE, BLOCK_M, BLOCK_N, LOOSE_STEPS, STAGES,
                )),
            ],
            [4, 4],
            [COMPUTE_REGISTERS, COPY_REGISTERS],
        )  # fmt: skip


def attend(
    query: Tensor,  # [R, Hq, Dk], the last dimension contiguous
    keys: Tensor,  # [P, page_size, Hkv, Dk], pages contiguous
    values: Tensor,  # [P, page_size, Hkv, Dv]
    out: Tensor,  # [R, Hq, Dv]
    lse: Tensor | None,  # [R, Hq] float32
    part: Tensor,  # [slots, M, Dv]
    states: Tensor,  # [slots, M, 2] float32
    schedule: Schedule,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # [Hq]
    fresh: int,  # 1 for the first user of the work list, which must not look at it early
) -> None:
    """Launches the kernel, which fills `out` and `lse` or leaves partial results.

    `tiles.choose` takes it for what it was checked with. Beyond that it has float16, soft caps,
    sinks and log-sum-exps, and no sliding window. Keys and values have the same number of
    dimensions, 64 or 128; pages have 16 or 32 tokens or multiples of 64.
    """
    tiling = schedule.tiling
    heads, kv_heads = query.shape[1], keys.shape[2]
    attend_kernel[(schedule.programs,)](
        query, keys, values, _tiles(keys), _tiles(values),
        out, states if lse is None else lse, part, states,
        schedule.header, schedule.workers, schedule.page_table,
        schedule.key_slots, schedule.row_roots, schedule.row_tails, schedule.row_depths,
        states if schedule.words is None else schedule.words, states if sinks is None else sinks,
        scale, softcap or 1.0, schedule.page_table.shape[1], fresh,
        query.stride(0), query.stride(1),
        keys.stride(1), keys.stride(2), values.stride(1), values.stride(2),
        HQ=heads, G=heads // kv_heads, DK=query.shape[2], DV=values.shape[3],
        PAGE=schedule.page_size, W=1 if schedule.words is None else schedule.words.shape[1],
        CAUSAL=schedule.causal, SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        LOOSE_STEPS=tiling.loose_steps, STAGES=tiling.stages,
        num_warps=4, maxnreg=REGISTERS[tiling.block_m // GROUP_M.value],
        enable_fp_fusion=True, launch_pdl=True,
    )  # fmt: skip


def _tiles(pages: Tensor) -> TensorDescriptor:
    """What the copy engine needs to know, see `flash._tiles`."""
    count, page_size, heads, dim = pages.shape
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[pages.dtype]
    block = [min(page_size, PART_N.value), dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    shape, strides = [count * page_size, heads * dim], [pages.stride(1), 1]
    return TensorDescriptor(pages, shape, strides, block, layout)
