"""What a kernel does before it may read what the kernel before it writes.

With programmatic dependent launch (Hopper and later) a kernel is there while the one before it
ends. Until it may go on, it can have what is older than that brought into the L2 cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = tl.constexpr(128)
"""Bytes that the cache takes in at once."""


@triton.jit
def bring(BASE, rows, wanted, COUNT: tl.constexpr):
    """Asks for `COUNT` neighbouring elements behind each of `rows` [N], offsets from `BASE`.

    Lines are asked for one by one: the copy engine's own prefetch would keep it from copying. That
    something is still to be written does no harm, since writes go through the same cache.
    """
    SIZE: tl.constexpr = LINE // (BASE.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2((COUNT + SIZE - 1) // SIZE)
    element = tl.arange(0, LINES) * SIZE
    at = BASE + rows[:, None] + element[None, :]
    ask = wanted[:, None] & (element[None, :] < COUNT)
    tl.inline_asm_elementwise(
        "{ .reg .pred ask; setp.ne.s32 ask, $2, 0; @ask prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [at.to(tl.int64), ask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def dependent(tensor: Tensor) -> dict[str, Any]:
    """Launch options with which a kernel gets ready while the one before it ends.

    It waits for that one before it reads what it writes, so this asks nothing of its surroundings.
    """
    early = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if early else {"PDL": False}
