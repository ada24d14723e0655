"""Which tile sizes the Triton tree attention runs with."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from specdec.kernels.schedule import Tiling


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose(
    query: Tensor,  # [R, Hq, Dk]
    keys: Tensor,  # [P, page_size, Hkv, Dk]
    values: Tensor,  # [P, page_size, Hkv, Dv]
    max_rows: int,
    requests: int,
    shared: bool,
) -> tuple[Tiling, int]:
    """The tiling, and the number of programs of a launch."""
    groups = query.shape[1] // keys.shape[2]
    packed = max_rows * groups
    if query.device.type != "cuda":
        return Tiling(16, 16, 4, 1, 1, loose_n=16), 6
    width = max(triton.next_power_of_2(keys.shape[3]), triton.next_power_of_2(values.shape[3]))
    if query.dtype == torch.float32:
        tiling = Tiling(16, 32 if width <= 128 else 16, 4, 2, 2)
    elif width > 128:
        tiling = Tiling(16 if packed <= 16 else 64, 32, 4, 2, 1)
    elif packed <= 16:
        tiling = Tiling(16, 64, 4, 3, 2)
    elif packed <= 64:
        tiling = Tiling(64, 64, 4, 3, 2)
    else:
        tiling = Tiling(128, 64, 8, 3, 1)
    return tiling, multiprocessors(query.device) * tiling.ctas
