"""Where a GPU's time goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def kernel_times(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Launches and seconds of every kernel, by name, while something runs.

    Kernels that overlap count in full, so the sum may be more than the time that passes.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    times: dict[str, tuple[int, float]] = {}
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            count, seconds = times.get(event.name, (0, 0.0))
            times[event.name] = (count + 1, seconds + event.device_time / 1e6)
    return times
