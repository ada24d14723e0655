"""How many nodes pay, by made-up step times and acceptance."""

from __future__ import annotations

from specdec.budget import NodeBudget

SECONDS = {1: 1.00, 8: 1.02, 16: 1.05, 32: 1.10}


def run(budget: NodeBudget, accepted: int, steps: int) -> list[int]:
    """The sizes chosen while the first `accepted` nodes below the root are kept."""
    sizes = []
    for _ in range(steps):
        nodes = budget.choose(SECONDS.get)
        budget.learn(nodes, [range(min(nodes, accepted + 1))])
        sizes.append(nodes)
    return sizes


def test_what_was_not_measured_is_tried_the_largest_first() -> None:
    assert NodeBudget(32).choose({16: 1.0}.get) == 32
    assert NodeBudget(32).choose({16: 1.0, 32: 1.0, 8: 1.0}.get) == 1


def test_drafts_that_are_never_accepted_cost_next_to_nothing() -> None:
    budget = NodeBudget(32)
    run(budget, accepted=0, steps=100)
    sizes = run(budget, accepted=0, steps=1000)
    assert sum(SECONDS[size] for size in sizes) < 1.01 * len(sizes) * SECONDS[1]
    assert set(sizes) != {1}, "larger trees are tried again"


def test_a_drafter_that_must_catch_up_first_is_tried_less_often() -> None:
    budget, spent = NodeBudget(32), 0.0
    run(budget, accepted=0, steps=100)
    for _ in range(4000):
        nodes = budget.choose(SECONDS.get, before=1.5)
        budget.learn(nodes, [range(1)])
        spent += SECONDS[nodes] + (1.5 if nodes > 1 else 0.0)
    assert SECONDS[1] < spent / 4000 < 1.012 * SECONDS[1]


def test_the_size_follows_what_is_accepted() -> None:
    budget = NodeBudget(32)
    run(budget, accepted=0, steps=200)
    run(budget, accepted=20, steps=400)
    assert run(budget, accepted=20, steps=1) == [32]
    run(budget, accepted=5, steps=200)
    assert run(budget, accepted=5, steps=1)[0] <= 16


def test_a_fixed_size_is_kept_to() -> None:
    assert run(NodeBudget(32, fixed=True), accepted=0, steps=50) == [32] * 50
