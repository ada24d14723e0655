"""The clock: CUDA graphs that rotate over many pools, so that the L2 cache is cold.

Letters: n calls in a graph.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[int], Tensor]  # one call on set i


@dataclass
class Timed:
    """A captured graph and the times of its replays."""

    graph: torch.cuda.CUDAGraph
    calls: int
    last: Tensor  # the output of the last call
    samples: list[float]  # microseconds a call

    @property
    def us(self) -> float:
        return statistics.median(self.samples)

    def replay(self, times: int) -> list[float]:
        """Microseconds of a call, for each replay."""
        samples = []
        for _ in range(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1e3 / self.calls)
        return samples

    def measure(self, warm_up: float = 40e3, span: float = 40e3) -> list[float]:
        """Adds samples after `warm_up` microseconds of the same work, for about `span`.

        Returns:
            The samples that were added, in microseconds a call.
        """
        once = self.us * self.calls
        self.replay(int(min(20, max(1, warm_up / once))))
        added = self.replay(int(min(25, max(3, span / once))))
        self.samples += added
        return added


def capture(run: Run, sets: int) -> Timed:
    """A graph of whole rotations: at least 2 ms and 20 calls, unless one call is slow."""
    calls = sets * math.ceil(8 / sets)
    timed = _record(run, sets, calls)
    us = min(timed.replay(3))
    wanted = min(400, max(20, 2000 / us)) if us < 200 else max(4, 4000 / us)
    if wanted > calls:
        timed = _record(run, sets, sets * math.ceil(wanted / sets))
    timed.samples = timed.replay(4)
    return timed


def _record(run: Run, sets: int, calls: int) -> Timed:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            last = run(call % sets)
    return Timed(graph, calls, last, [])
