"""The serving measurements count what they claim to, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.eval import serving
from specdec.testing import tiny_model


def test_every_measurement_runs_and_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serving, "PROFILED", 1)
    bench = serving.Bench(tiny_model("Llama"))
    private, shared, alone, theirs = serving.batches(bench, [3], prompt=64, new=6)
    rows = [private, shared, alone, theirs]
    assert [row.arm for row in rows[1:]] == ["specdec", "specdec, no sharing", "transformers"]
    assert {row.tokens for row in rows} == {18}
    assert private.prefilled == alone.prefilled == 3 * 79
    assert shared.prefilled == 64 + 3 * 15
    assert shared.peak_mb < 0.6 * alone.peak_mb
    assert all(0 < (row.loop_share or 0) < 1 for row in rows[:3])
    assert all(0 < (row.first or 0) < row.seconds and row.step_ms for row in rows)
    rows += serving.loops(bench, 3, prompt=64, new=12)
    assert [row.tokens for row in rows[4:]] == [36] * 3

    packed, padded, theirs = serving.prefills(bench, [6], mean=20, longest=60)
    assert packed.tokens == packed.prefilled == padded.tokens < padded.prefilled
    assert theirs.prefilled == padded.prefilled

    shared, alone = serving.few_shot(bench, [5], prompt=48, new=6)
    assert shared.prefilled < alone.prefilled == 5 * 55

    rows = list(serving.thoughts(bench, depth=2, width=2, prompt=40, new=5))
    assert [row.tokens for row in rows] == [30, 30]
    assert rows[0].prefilled < rows[1].prefilled
    assert serving.table(rows).row_count == 2


def test_what_there_is_no_time_for_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "_load", lambda *_: tiny_model("Llama"))
    file = tmp_path / "rows.json"
    arguments: dict[str, Any] = {
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "sizes": "1,2",
    }
    prompts: dict[str, Any] = {
        "prompt": 32,
        "few_shot_prompt": 32,
        "few_shot_widths": "2",
        "new": 3,
    }
    serving.main(**arguments, **prompts, only="batch,few-shot", limit=0.0, file=file)
    found = json.loads(file.read_text())
    assert [row["measurement"] for row in found["rows"]] == ["batch", "few-shot"]
    assert found["cut short"] == ["batch", "few-shot"]
    assert found["provenance"]["dtype"] == "float32"
    assert "cut short, for lack of time: batch, few-shot" in capsys.readouterr().err
