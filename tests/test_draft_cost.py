"""The measurement of draft models runs where nothing can be captured, too."""

from __future__ import annotations

from typing import Any

import torch

from specdec.eval.draft_cost import ADAPTIVE, CALLS, TREES, measure, show
from specdec.testing import tiny_model


def test_every_tree_is_run_both_ways() -> None:
    target: Any = tiny_model("Llama", num_hidden_layers=1)
    draft: Any = tiny_model("Llama", num_hidden_layers=1)
    rows = list(measure(target, draft, torch.randint(1, 90, (1, 12)), 4))
    ways = [(row.tree, row.way) for row in rows[::CALLS]]
    assert ways == [
        ("none", "plain"),
        *((tree, way) for tree in TREES for way in ("captured", "uncaptured")),
        ("none", "adaptive"),
        *((tree, "adaptive") for tree in ADAPTIVE),
        ("n-grams, 32 nodes", "adaptive"),
    ]
    plain = [row for row in rows if row.tree == "none"]
    assert all(row.tokens_per_step == 1 for row in plain)
    assert all(row.tokens_per_step > 1 for row in rows if row.tree in TREES), "it drafts for itself"
    assert show(rows).row_count == len(ways)
