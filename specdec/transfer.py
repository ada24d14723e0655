"""From the host to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any] | Tensor, device: torch.device | str) -> Tensor:
    """Integers or a tensor on the device, copied from pinned memory where that matters.

    A copy from ordinary memory would make the host wait until the device has come that far.

    Args:
        values: a tensor, or a list of integers, nested or not, which becomes int64.
        device: where to.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
