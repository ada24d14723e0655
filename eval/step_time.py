"""How long a step takes, fitted to the rows of a run.

A step over `rows` tree nodes behind `context` committed tokens is modelled as

    target(rows, context) = f(rows) + c * context        f rises, piecewise linear
    draft(rows)           = d + e * rows

and a text takes some time besides its steps, mostly for the options of the call.

Every row of a run says how long all of its steps took together and how many nodes each tree had, so
the sums are linear in the unknowns, which non-negative least squares finds (scipy). Nothing is
timed anew. `specdec.eval.cost` times single passes instead, before there is any run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from specdec.eval.records import Row

Array = NDArray[np.float64]

KNOTS = (1, 2, 16, 128, 1024)
"""One row is a product of a matrix with a vector, several are a product of matrices, which fill a
small tile at 16 rows and a large one at 128. With more knots the fit would follow the noise."""


@dataclass(frozen=True)
class Gpu:
    """What bounds a pass: reading weights, or arithmetic. Data-sheet figures, dense."""

    bandwidth: float  # TB/s
    compute: float  # TFLOP/s, bfloat16


GPUS = {
    "A100": Gpu(2.04, 312),
    "H100": Gpu(3.35, 989),
    "H200": Gpu(4.8, 989),
    "L40S": Gpu(0.864, 362),
    "RTX 4090": Gpu(1.008, 165),
}
"""SXM where there are several, 80 GB for the A100."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    knots: tuple[int, ...]
    seconds: tuple[float, ...]
    """At the knots, without context."""
    per_context: float
    """For each committed token of each sequence."""
    draft: tuple[float, float]
    """Drafting: of a step and sequence, and for each node."""
    prefill: float
    """For each token of a prompt."""
    text: float
    """For each text, besides its steps and its prompt."""

    def target(self, rows: float, context: float) -> float:
        """Of the target's part: verification and all that is not drafting.

        Args:
            rows: nodes of all trees together.
            context: committed tokens of all sequences together. Behind the last knot the line goes
                on.
        """
        if rows <= self.knots[-1] or len(self.knots) == 1:
            base = float(np.interp(rows, self.knots, self.seconds))
        else:
            (x, y), (u, v) = zip(self.knots[-2:], self.seconds[-2:], strict=True)
            base = v + (v - u) / (y - x) * (rows - y)
        return base + self.per_context * context

    def step(self, nodes: float, context: float, batch: int = 1) -> float:
        """Of one step of a batch of sequences, whose trees are drafted one after the other.

        Args:
            nodes: of each tree, the root included.
            context: committed tokens of each sequence.
        """
        drafting = self.draft[0] + self.draft[1] * nodes if nodes > 1 else 0.0
        return self.target(batch * nodes, batch * context) + batch * drafting

    def on(self, here: str, there: str) -> StepTime:
        """The same on another GPU: an upper bound of what data sheets promise, not a measurement.

        The time of one row goes with the memory's bandwidth, what further rows add and the prefill
        with the arithmetic; what the host does stays.

        Raises:
            ValueError: one of them is not in `GPUS`.
        """
        for name in (here, there):
            if name not in GPUS:
                raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}")
        bytes_ = GPUS[here].bandwidth / GPUS[there].bandwidth
        flops = GPUS[here].compute / GPUS[there].compute
        first = self.seconds[0]
        return replace(
            self,
            seconds=tuple(first * bytes_ + (s - first) * flops for s in self.seconds),
            per_context=self.per_context * bytes_,
            prefill=self.prefill * flops,
        )


def fit(rows: Sequence[Row]) -> StepTime:
    """The model that fits rows of our own loop best.

    Args:
        rows: with `tree_sizes`; those with errors and those of transformers are left out.

    Raises:
        ValueError: there are no such rows, or all of them have trees of one size.
    """
    good = [row for row in rows if row.error is None and row.tree_sizes]
    largest = max((size for row in good for size in row.tree_sizes), default=0)
    if largest < 2:
        raise ValueError("a fit needs rows with trees of several sizes, such as 4 and 32 nodes")
    knots = [*(knot for knot in KNOTS if knot < largest), largest]
    design = np.array([_features(row, knots) for row in good])
    spent = np.array([row.decode_seconds - row.seconds.get("draft", 0.0) for row in good])
    found = _least_squares(design, spent)
    base, steps, (per_context, text) = found[0], found[1:-2], found[-2:]
    drafted = [row for row in good if row.drafted]
    draft = _least_squares(
        np.array([[row.steps, row.steps + (row.drafted or 0)] for row in drafted], dtype=float),
        np.array([row.seconds.get("draft", 0.0) for row in drafted]),
    )
    prompts = sum(row.prompt_tokens for row in good)
    return StepTime(
        tuple(knots),
        tuple(float(s) for s in base + np.concatenate([[0.0], np.cumsum(steps)])),
        float(per_context),
        (float(draft[0]), float(draft[1])),
        sum(row.seconds.get("prefill", 0.0) for row in good) / prompts,
        float(text),
    )


def _features(row: Row, knots: Sequence[int]) -> list[float]:
    """Steps, how far their trees reach into each interval between knots, context; and one text."""
    sizes: Mapping[int, int] = row.tree_sizes
    steps = sum(sizes.values())
    reach = [
        sum(
            count * min(1.0, max(0.0, (size - low) / (high - low))) for size, count in sizes.items()
        )
        for low, high in pairwise(knots)
    ]
    return [steps, *reach, steps * (row.prompt_tokens + row.new_tokens / 2), 1.0]


def _least_squares(design: Array, spent: Array) -> Array:
    """Non-negative; relative errors count, so that slow prompts do not decide alone."""
    from scipy import optimize

    weight = 1 / np.maximum(spent, 1e-9)
    scale = np.maximum((design * weight[:, None]).max(axis=0), 1e-12)
    found, _ = optimize.nnls(design * weight[:, None] / scale, spent * weight)
    return np.asarray(found / scale, dtype=np.float64)
