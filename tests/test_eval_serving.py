"""The serving measurements count what they claim to, on a tiny model."""

from __future__ import annotations

from specdec.eval import serving
from specdec.testing import tiny_model


def test_every_measurement_runs_and_counts() -> None:
    bench = serving.Bench(tiny_model("Llama"), repeats=1)
    rows = serving.batches(bench, [3], prompt=64, new=4)
    private, shared = rows[:3], rows[3:]
    assert [row.arm for row in private] == ["specdec", "specdec, no sharing", "transformers"]
    assert {row.tokens for row in rows} == {12}
    assert {row.prefilled for row in private[:2]} == {3 * 79}
    assert shared[0].prefilled == 64 + 3 * 15
    assert shared[1].prefilled == 3 * 79
    assert shared[0].peak_mb < 0.6 * shared[1].peak_mb
    assert all(0 < row.loop_share < 1 for row in (*private[:2], *shared[:2]))

    rows = serving.prefills(bench, batch=6, mean=20, longest=60)
    assert rows[0].tokens == rows[1].tokens

    rows = serving.few_shot(bench, [5], prompt=48, new=3)
    assert rows[0].prefilled < rows[1].prefilled == 5 * 55

    rows = serving.thoughts(bench, depth=2, width=2, prompt=40, new=5)
    assert [row.tokens for row in rows] == [30, 30]
    assert serving.table(rows).row_count == 2
