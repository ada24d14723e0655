"""Where a GPU's time goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def kernel_times(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Launches and seconds of every kernel, by name, while something runs; see `shares`."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return shares(
        (event.time_range.start / 1e6, event.time_range.end / 1e6, event.name)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA"
    )


def shares(kernels: Iterable[tuple[float, float, str]]) -> dict[str, tuple[int, float]]:
    """Launches by name, and the seconds by which they moved the end of all work.

    Kernels that are launched early wait beside those before them, so how long they last says
    little. What is counted is the time from the latest end before, or from the own beginning where
    the GPU had nothing to do; the sum is the time in which it had.

    Args:
        kernels: begin and end in seconds, and name.
    """
    times: dict[str, tuple[int, float]] = {}
    latest = 0.0
    for begin, end, name in sorted(kernels):
        count, seconds = times.get(name, (0, 0.0))
        times[name] = count + 1, seconds + max(0.0, end - max(begin, latest))
        latest = max(latest, end)
    return times
