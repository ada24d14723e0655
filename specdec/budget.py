"""How large a tree pays now: measured step times against what trees of each size would have given.

A pass over more rows costs more, little while the weights are what takes the time and a lot once
the arithmetic does; what it brings depends on the text. Both are measured while the run goes on.
The nodes of a tree are in the order in which they were chosen, so a smaller tree is the beginning
of a larger one, and one step tells what all smaller trees would have given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

SMALLEST = 8
"""Of the trees that are tried, but for the bare root."""
MEMORY = 0.1
"""Weight of the newest step among those before."""
PROBING = 0.01
"""Share of the time that may be spent on finding out whether larger trees would pay again."""
MARGIN = 1.01
"""A larger tree has to be better by this factor: measured times are not exact."""


class NodeBudget:
    """Chooses the nodes of the next trees.

    Args:
        most: the largest tree.
        fixed: take that one always.
    """

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        sizes = [most] if fixed else [1, most]
        size = SMALLEST
        while not fixed and size < most:
            sizes.append(size)
            size *= 2
        self.sizes = sorted(set(sizes))
        self.tokens = [1.0 + 0.5 * math.log2(size) for size in self.sizes]
        """What a tree of each size gives, in tokens of a request and step: hopeful at first."""
        self._since = 0  # steps since a larger tree than the chosen one was tried

    def choose(self, seconds: Callable[[int], float | None], before: float = 0.0) -> int:
        """The size for the next step.

        Args:
            seconds: of a step with trees of a size; None if it was not measured yet.
            before: seconds that drafting takes now before such a step, since the drafter has
                fallen behind the texts.
        """
        times = [seconds(size) for size in self.sizes]
        for size, time in zip(self.sizes[::-1], times[::-1], strict=True):
            if time is None:
                return size
        known = [time for time in times if time is not None]
        best = 0
        for index in range(1, len(known)):
            ahead = self.tokens[index] / known[index] * known[best] / self.tokens[best]
            if ahead > MARGIN:
                best = index
        if best + 1 < len(known):
            tried = known[best + 1] + before
            dearer = tried / known[best] - self.tokens[best + 1] / self.tokens[best]
            self._since += 1
            if self._since * PROBING >= max(dearer, PROBING):
                best, self._since = best + 1, 0
        return self.sizes[best]

    def learn(self, nodes: int, paths: Sequence[Sequence[int]]) -> None:
        """Takes in what a step with trees of a size gave.

        Args:
            nodes: of the trees.
            paths: the nodes of each accepted path, the root first.
        """
        for index, size in enumerate(self.sizes):
            if size <= nodes and paths:
                given = sum(sum(node < size for node in path) for path in paths) / len(paths)
                self.tokens[index] += MEMORY * (given - self.tokens[index])
        for index in range(1, len(self.sizes)):  # a larger tree gives what a smaller one gives
            self.tokens[index] = max(self.tokens[index], self.tokens[index - 1])
