"""Runs on disk: what is written comes back, torn lines do not."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from specdec.eval.example import CONFIGURATIONS, example_run
from specdec.eval.metrics import METRICS, categories, measure, summarize
from specdec.eval.provenance import command
from specdec.eval.records import RunFolder


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = example_run(tmp_path)
    again = RunFolder(tmp_path)
    run, rows = again.run(), again.rows()
    assert run.configurations == CONFIGURATIONS
    assert len(rows) == len({row.key for row in rows}) == 5 * 12 * 2
    again.write_run(run)
    assert folder.run() == run
    first = (tmp_path / "rows.jsonl").read_bytes()
    folder.merge(rows)
    assert (tmp_path / "rows.jsonl").read_bytes() == first


def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    folder = example_run(tmp_path, prompts=1)
    file = tmp_path / "rows.jsonl"
    rows, whole = folder.rows(), file.read_bytes()
    for cut in (1, 100, len(rows[-1].to_json())):
        file.write_bytes(whole[:-cut])
        assert folder.rows() == rows[:-1]
        with folder.open_rows() as writer:
            writer.append(rows[-1])
        assert file.read_bytes() == whole


def test_a_damaged_line_inside_is_named(tmp_path: Path) -> None:
    folder = example_run(tmp_path, prompts=1)
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"tokens": [', '"tokens": [7, ')
    file.write_text("".join(lines))
    with pytest.raises(ValueError, match=r"line 4: the tokens of row .* do not have its digest"):
        folder.rows()


def test_files_of_several_processes_are_one_run(tmp_path: Path) -> None:
    folder = example_run(tmp_path, prompts=2)
    rows = folder.rows()
    folder.merge([])
    for process in range(2):
        with folder.open_rows(process) as writer:
            for row in rows[process::2] + rows[:1]:
                writer.append(row)
    assert {row.key for row in folder.rows()} == {row.key for row in rows}
    assert len(folder.rows()) == len(rows)


def test_metrics_are_ratios_of_sums_with_intervals_around_them(tmp_path: Path) -> None:
    folder = example_run(tmp_path)
    run, rows = folder.run(), folder.rows()
    tree = run.configuration("ngram 16")
    summary = summarize(run, rows, tree)
    own = [row for row in rows if row.configuration == tree.name]
    found = summary.measures["tokens_per_step"]
    assert found.value == sum(r.decode_tokens for r in own) / sum(r.steps for r in own)
    assert found.low < found.value < found.high
    assert set(summary.speedups) == {"plain", "hf-eager"}
    assert summary.measures["speedup"] == summary.speedups["plain"]
    parts = [summarize(run, rows, tree, category) for category in categories(rows)]
    speeds = [part.measures["tokens_per_step"].value for part in parts]
    assert speeds == sorted(speeds), "the example accepts more from one category to the next"
    assert all(speed > 1 for speed in speeds)


def test_the_plain_loop_is_as_fast_as_itself(tmp_path: Path) -> None:
    folder = example_run(tmp_path)
    own = [row for row in folder.rows() if row.configuration == "plain"]
    found = measure(METRICS["speedup"], own, own)
    assert found is not None
    assert found.value == found.low == found.high == 1


@pytest.mark.parametrize(
    ("module", "begun"),
    [
        (None, "specdec"),
        ("specdec.__main__", "python -m specdec"),
        ("specdec.eval.serving", "python -m specdec.eval.serving"),
    ],
)
def test_the_command_that_is_noted_can_be_typed_again(
    module: str | None, begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = ModuleType("__main__")
    main.__spec__ = None if module is None else ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/specdec", "--out", "a folder"])
    assert command() == f"{begun} --out 'a folder'"
