"""How work is captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

SHORTEST = 1024
"""Of the prefixes that a graph is made for; later ones are for twice as many tokens."""


def reach(tokens: int) -> int:
    """Of the graphs for a text of so many tokens, what comes behind them included: their prefix."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def capture(run: Callable[[], Result], memory: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """What `run` launches, as a graph, and what it returned, which a replay fills again.

    Args:
        run: launches work on the current stream; it must have run before, since what it compiles
            or looks up cannot be captured.
        memory: what the graph allocates from, see `shared_memory`.
    """
    graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = _stream(now.device)
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        # Other threads may use the device for something else meanwhile.
        graph.capture_begin(memory, capture_error_mode="thread_local")
        try:
            result = run()
        finally:
            graph.capture_end()
    now.wait_stream(stream)
    return graph, result


def shared_memory(graphs: Iterable[torch.cuda.CUDAGraph | None]) -> Any:
    """What these graphs allocate from, so that another one may use it, too; None if there are none.

    They must never run at the same time, nor leave results there that are read later.
    """
    return next((graph.pool() for graph in graphs if graph is not None), None)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for every stream that it was ever used on."""
    return torch.cuda.Stream(device)
