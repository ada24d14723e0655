"""How large a tree should be: measured forward times against expected acceptance.

The model is deliberately small. A pass over n rows is timed for three n and interpolated; a tree
of n nodes is expected to give `(1 - accept**n) / (1 - accept)` tokens, as a chain of n nodes does
when every token is accepted with the same chance. The best n gives most tokens a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specdec.batch import TreeBatch
from specdec.target import Target
from specdec.tree import TokenTree


@dataclass(frozen=True)
class StepCost:
    """Measured seconds of a forward by number of rows."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Seconds of a forward over `rows` rows, interpolated."""
        return float(np.interp(rows, self.rows, self.seconds))

    def best_nodes(self, *, accept: float = 0.7) -> int:
        """The node budget that promises most tokens a second.

        Args:
            accept: chance that a drafted token is accepted, given that its parent was.
        """

        def speed(nodes: int) -> float:
            return (1 - accept**nodes) / (1 - accept) / self.at(nodes)

        return max(range(1, self.rows[-1] + 1), key=speed)


def measure_step(
    target: Target, *, context: int = 128, rows: Sequence[int] = (1, 8, 32), repeats: int = 5
) -> StepCost:
    """Times verification forwards of three sizes behind a prefix of `context` tokens.

    The median of `repeats` runs after one to warm up; leaves nothing in the cache.
    """
    prompt = torch.zeros(context, dtype=torch.int64, device=target.device)
    sequence = target.cache.admit()
    try:
        target.prefill([sequence], [prompt])
        seconds = []
        for count in rows:
            tree = TreeBatch.pack(
                [TokenTree.chain(0, [0] * (count - 1))],
                vocab_size=target.vocab_size,
                device=target.device,
            )
            runs = [_time_once(target, sequence, tree) for _ in range(repeats + 1)]
            seconds.append(statistics.median(runs[1:]))
    finally:
        target.cache.release(sequence)
    return StepCost(tuple(rows), tuple(seconds))


def _time_once(target: Target, sequence: int, tree: TreeBatch) -> float:
    start = time.perf_counter()
    with target.speculate([sequence], tree) as scored:
        float(scored.logits[0, 0])  # waits for the device
    return time.perf_counter() - start
