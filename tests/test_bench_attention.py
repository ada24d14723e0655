"""The attention benchmark: what its cases hold, what it counts, and what it reports."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from specdec.attention import tree_attention
from specdec.cli import app
from specdec.eval.attention import report
from specdec.eval.attention.cases import Case, all_cases, private, select, shared
from specdec.eval.attention.data import Data, lay_out
from specdec.kernels.partition import Mode

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "dim": 16, "page_size": 16}
THREE_LEVELS = Case("small", "three levels", ((1, 40), (2, 37), (6, 21)), 5, **SMALL)
CASES = [
    private(1, 33, 3, **SMALL),
    private(7, 32, 2, tree="chain", **SMALL),
    private(5, 40, 4, ragged=True, **SMALL),
    shared(6, 50, 9, 3, **SMALL),
    shared(1, 48, 0, 4, tree="star", **SMALL),
    THREE_LEVELS,
]


def run(*args: str) -> Any:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", "attention", *args])


def test_labels_are_unique() -> None:
    labels = [case.label for case in all_cases()]
    assert len(labels) == len(set(labels)) > 100


def test_cases_are_selected_by_label() -> None:
    assert [case.label for case in select("DeFT: .*64 leaves")] == [
        "DeFT: Table 14: 64 leaves over 4096"
    ]
    with pytest.raises(ValueError, match="only: expected a match of a case's label, got 'nope'"):
        select("nope")
    with pytest.raises(ValueError, match="only: expected a regular expression"):
        select("(")


def token_names(case: Case, request: int, prefix: int) -> list[object]:
    """Which node of the prefix tree every committed token of a request belongs to, and where."""
    names: list[object] = []
    last = len(case.levels) - 1
    for level, (nodes, tokens) in enumerate(case.levels):
        node = request if level == last else request * nodes // case.requests
        count = prefix - len(names) if level == last else tokens
        names += [(level, node, token) for token in range(count)]
    return names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_requests_share_exactly_the_pages_that_hold_the_same_tokens(case: Case) -> None:
    layout = lay_out(case)
    size = case.page_size
    held: list[list[list[object]]] = []  # tokens of each full page, by request
    for request, prefix in enumerate(layout.prefixes):
        names = token_names(case, request, prefix)
        assert len(names) == prefix
        held.append([names[i : i + size] for i in range(0, prefix // size * size, size)])
        assert len(layout.tables[request]) == -(-(prefix + case.rows) // size)
    for one, other in itertools.combinations(range(case.requests), 2):
        same = [
            number
            for number, (a, b) in enumerate(zip(held[one], held[other], strict=False))
            if a == b
        ]
        tables = layout.tables[one], layout.tables[other]
        assert sorted(set(tables[0]) & set(tables[1])) == sorted(tables[0][n] for n in same)
        assert all(tables[0][number] == tables[1][number] for number in same)
    slots = {
        (table[place // size], place % size)
        for table, prefix in zip(layout.tables, layout.prefixes, strict=True)
        for place in range(prefix + case.rows)
    }
    assert layout.unique == len(slots)
    assert layout.pages == len({page for page, _ in slots})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_exact_answer_is_that_of_the_reference(case: Case) -> None:
    data = Data(case, CPU, torch.float32, sets=1)
    out = tree_attention(data.queries[0], data.pools[0], data.plan, backend="reference")
    assert data.error(out, data.exact(0)) < 1e-6
    out[0, 0, 0] = torch.nan
    assert data.error(out, data.exact(0)) != data.error(out, data.exact(0))


@pytest.mark.parametrize("name", ["sdpa", "sdpa_dense", "flex"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_answer_the_same_question(name: str, case: Case) -> None:
    peers = pytest.importorskip("specdec.eval.attention.peers", reason="needs Triton")
    case = replace(case, page_size=64)  # what FlexAttention takes
    why = peers.PEERS[name].applies(case)
    if why is not None:
        pytest.skip(why)
    data = Data(case, CPU, torch.float32, sets=1)
    with torch.compiler.set_stance("force_eager"):
        out = peers.PEERS[name].prepare(data).run(0)
    assert out.shape == data.queries[0].shape
    assert data.error(out, data.exact(0)) < 1e-6


class Wrapper:
    """FlashInfer's paged wrappers in plain words: what `plan` is told decides what `run` sees."""

    rows: Tensor
    starts: Tensor
    pages: Tensor
    last: Tensor
    page_size: int
    causal: bool = False
    mask: Tensor | None = None

    def __init__(self, workspace: Tensor, layout: str, **options: Any) -> None:
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        outs, first = [], 0
        for request in range(len(self.starts) - 1):
            listed = self.pages[self.starts[request] : self.starts[request + 1]].long()
            length = (len(listed) - 1) * self.page_size + int(self.last[request])
            keys, values = (x[listed].flatten(0, 1)[:length].transpose(0, 1) for x in pages)
            rows = query[self.rows[request] : self.rows[request + 1]].transpose(0, 1)
            mask = torch.ones(rows.shape[1], length, dtype=torch.bool)
            if self.mask is not None:
                mask = self.mask[first : first + mask.numel()].view_as(mask)
                first += mask.numel()
            elif self.causal:
                mask = mask.tril(length - rows.shape[1])
            out = torch.nn.functional.scaled_dot_product_attention(
                rows[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)


class Prefill(Wrapper):
    def plan(
        self, rows: Tensor, starts: Tensor, pages: Tensor, last: Tensor, *heads: int,
        causal: bool, custom_mask: Tensor | None, q_data_type: Any, kv_data_type: Any,
    ) -> None:  # fmt: skip
        self.rows, self.starts, self.pages, self.last = rows, starts, pages, last
        self.causal, self.mask, self.page_size = causal, custom_mask, heads[-1]


class Decode(Wrapper):
    def plan(
        self, starts: Tensor, pages: Tensor, last: Tensor, *heads: int,
        q_data_type: Any, kv_data_type: Any,
    ) -> None:  # fmt: skip
        self.starts, self.pages, self.last, self.page_size = starts, pages, last, heads[-1]
        self.rows = torch.arange(len(starts))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_flashinfer_is_told_the_same_question(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = pytest.importorskip("specdec.eval.attention.peers", reason="needs Triton")
    module: Any = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(peers, "FLASHINFER_WORKSPACE", 1)
    data = Data(case, CPU, torch.float32, sets=1)
    out = peers.PEERS["flashinfer"].prepare(data).run(0)
    assert data.error(out, data.exact(0)) < 1e-6


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = pytest.importorskip("specdec.eval.attention.peers", reason="needs Triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.PEERS["flashinfer"].applies(CASES[0]) == "not installed"


def test_peers_are_chosen_by_name() -> None:
    peers = pytest.importorskip("specdec.eval.attention.peers", reason="needs Triton")
    names = [peer.name for peer in peers.named(["sdpa", "ours", "sdpa"])]
    assert names[:2] == ["sdpa", "ours:auto"]
    assert len(names) == 7
    with pytest.raises(ValueError, match=r"peers: expected ours, .*, got 'fa9'"):
        peers.named(["fa9"])


@pytest.fixture
def partials(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The states of every launch's partial results, NaN where nothing is written."""
    made: list[Tensor] = []
    plain = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        out = plain(self, *size, **options)
        if out.is_floating_point() and out.ndim == 3 and out.shape[-1] == 2:
            made.append(out.fill_(torch.nan))
        return out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    return made


@pytest.mark.parametrize("mode", ["sequence", "node_chunk", "auto"])
def test_bytes_are_counted_as_the_programs_move_them(mode: Mode, partials: list[Tensor]) -> None:
    bench = pytest.importorskip("specdec.eval.attention.bench", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("runs in Triton's interpreter")
    case = shared(1, 48, 9, 3, **SMALL)
    data = Data(case, CPU, torch.float32, sets=1)
    asked = bench.requested_bytes(data, mode)
    key = 2 * case.dim * 4 * case.kv_heads  # bytes of a key and its value, in all heads
    if mode == "sequence":  # every request reads all of its own
        assert asked == key * case.requests * (case.prefix + case.rows)
    else:
        assert asked == data.kv_bytes == key * (48 + case.requests * (9 + case.rows))
    schedule = bench.peers.schedule_of(data.plan, mode)
    written = int((~partials[-1].isnan()).any(2).any(1).sum())
    assert int(schedule.header[bench.work.PARTIALS.value]) == written
    block_m = schedule.tiling.block_m
    assert bench.partial_bytes(data, mode) == written * block_m * (case.dim * 4 + 8)


CEILINGS = report.Ceilings(4.0, 4.0, 800.0, 1.0, [report.Read(4.2, 132, 2.0, 2.1)])


def test_the_limit_is_the_slower_of_reading_and_multiplying() -> None:
    assert CEILINGS.limit_us(8_000_000, 0) == pytest.approx(1 + 2)
    assert CEILINGS.limit_us(8_000_000, 800_000_000) == pytest.approx(1 + 2)
    assert CEILINGS.limit_us(8_000_000, 8_000_000_000) == pytest.approx(1 + 10)


def counted(saved: float) -> report.Counters:
    return report.Counters(1000, 20, saved)


class Clock:
    """Gives every call 5 microseconds, and remembers who was timed."""

    def __init__(self) -> None:
        self.order: list[Tensor] = []

    def capture(self, run: Any, sets: int) -> Any:
        last = run(0)

        def measure() -> list[float]:
            self.order.append(last)
            return [4.0, 5.0, 6.0]

        return SimpleNamespace(calls=sets, last=last, measure=measure)


def test_only_what_is_right_is_timed_and_nothing_fails_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = pytest.importorskip("specdec.eval.attention.bench", reason="needs Triton")
    clock = Clock()
    monkeypatch.setattr(bench.clock, "capture", clock.capture)
    monkeypatch.setattr(bench.ceilings, "measure", lambda device: CEILINGS)
    monkeypatch.setattr(bench, "Data", partial(Data, sets=1))
    monkeypatch.setattr(bench, "provenance", lambda *_: {})
    monkeypatch.setattr(bench, "clocks", lambda _: {})
    monkeypatch.setattr(bench, "_broken", lambda _: None)

    def wrong(data: Data) -> Any:
        return bench.peers.Prepared(lambda index: torch.zeros_like(data.queries[index]))

    def broken(data: Data) -> Any:
        raise RuntimeError("no such kernel")

    chosen = bench.peers.named(["sdpa", "sdpa_dense", "flex"])
    for prepare in (wrong, broken):
        chosen.append(bench.peers.Peer(prepare.__name__, lambda case: None, prepare))
    seen: list[int] = []
    measured = bench.run(
        [shared(3, 20, 9, 2, **SMALL)],
        chosen,
        device=CPU,
        dtype=torch.float32,
        after_case=lambda so_far: seen.append(len(so_far.cases)),
    )
    assert seen == [1]
    [case] = measured.cases
    assert case.error is None
    assert case.limit_us == CEILINGS.limit_us(case.moved, case.flops)
    rows = {row.peer: row for row in case.rows}
    assert [row.peer for row in case.timed] == ["sdpa", "sdpa_dense"]
    assert (rows["sdpa"].us, rows["sdpa"].rounds) == (5.0, [5.0, 5.0])
    assert 4 <= rows["sdpa"].p10 <= 5 <= rows["sdpa"].p90 <= 6
    assert rows["flex"].skipped is not None
    assert rows["wrong"].error == "ValueError: gate: expected a deviation of at most 0.01, got 1"
    assert rows["broken"].error == "RuntimeError: no such kernel"
    first, second, third, fourth = clock.order  # there and back again
    assert first is fourth
    assert second is third
    late = bench.run(CASES, chosen, device=CPU, seconds=-1.0)
    assert (late.cases, late.stopped) == ([], f"time was up before {CASES[0].label}")


@pytest.fixture
def result() -> report.Result:
    """Two cases; one peer fails, one does not apply, one is not paged."""
    first = report.CaseResult("small: a | b", {}, 8_000_000, 7_000_000, 10**9, 4, 3.0)
    first.rows = [
        report.Row("ours:auto", us=6.0, rounds=[6.0, 6.0], counters=counted(50.0)),
        report.Row("ours:sequence", us=8.0, rounds=[8.0, 8.0], counters=counted(0.0)),
        report.Row("sdpa", us=24.0, rounds=[24.0, 24.0]),
        report.Row("sdpa_dense", paged=False, us=1.0, rounds=[1.0, 1.0]),
        report.Row("flex", skipped="pages of 64 or 128 tokens only"),
    ]
    second = report.CaseResult("small: c", {}, 8_000_000, 7_000_000, 10**10, 4, 4.0)
    second.sdpa = report.Row("sdpa", error="OutOfMemoryError: [no room]")
    second.rows = [
        report.Row("ours:auto", us=2.0, rounds=[2.0, 2.0]),
        report.Row("sdpa", error="OutOfMemoryError: [no room]"),
    ]
    origin = {
        "device": "Some GPU", "torch": "1", "triton": "2", "python": "3", "date": "2026-01-01",
        "command": "specdec bench attention",
    }  # fmt: skip
    return report.Result(origin, CEILINGS, [first, second])


def test_a_result_survives_its_file(result: report.Result, tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    result.save(file)
    assert report.Result.load(file) == result
    assert list(tmp_path.iterdir()) == [file]
    file.write_text(json.dumps({"ceilings": {}}))
    with pytest.raises(ValueError, match="expected a saved attention benchmark"):
        report.Result.load(file)


def test_means_leave_out_what_is_not_paged(result: report.Result) -> None:
    assert report.ratios(result) == ([2.0, 0.5], [4.0])
    assert report.summary(result) == [
        "ours:auto / limit: 1.00 (geometric mean of 2 cases)",
        "best peer / ours:auto: 4.00 (geometric mean of 1 cases)",
    ]
    assert result.own_failures == []
    result.cases[1].rows[0].error = "gate"
    assert result.own_failures == ["small: c: ours:auto: gate"]


def test_markdown_names_the_origin_and_every_failure(result: report.Result) -> None:
    lines = report.markdown(result).splitlines()
    assert lines[0].startswith("Some GPU, torch 1, triton 2, Python 3, 2026-01-01.")
    assert lines[2].startswith("| case | limit | ours:auto | ours:sequence | sdpa | sdpa_dense |")
    assert lines[4] == "| small: a \\| b | 3.0 | 6.0 | 8.0 | 24.0 | 1.0 | - | 2.00 |  |"
    failure = "sdpa: OutOfMemoryError: [no room]"
    assert lines[5] == f"| small: c | 4.0 | 2.0 | - | failed | - | - | 0.50 | {failure} |"
    assert "specdec bench attention" in lines


def test_the_terminal_shows_the_same_cells(result: report.Result) -> None:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(report.table(result))
    assert "sdpa: OutOfMemoryError: [no room]" in capture.get()
    assert "small: a | b" in capture.get()


def test_plots_are_drawn_again_from_a_file(result: report.Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result.save(tmp_path / "attention.json")
    shown = run("--plots-from", str(tmp_path / "attention.json"), "--out", str(tmp_path / "new"))
    assert shown.exit_code == 0
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "attention.md",
        "requested_bytes.png",
        "roofline.png",
        "time_against_limit.png",
    }


def test_plots_without_matplotlib_say_what_to_install(
    result: report.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result.save(tmp_path / "attention.json")
    shown = run("--plots-from", str(tmp_path / "attention.json"))
    assert shown.exit_code == 1
    assert "plots need matplotlib: pip install 'specdec-toolkit[eval]'" in shown.stderr
    assert (tmp_path / "attention.md").exists()


def test_the_command_lists_cases_without_a_gpu() -> None:
    shown = run("--list", "--only", "^SmolLM2")
    assert shown.exit_code == 0
    assert "SmolLM2: T64 L4096 B1" in shown.stdout
    assert "private" not in shown.stdout


def test_the_command_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = run()
    assert shown.exit_code == 1
    assert "bench attention: expected a CUDA device that torch can use" in shown.stderr


@pytest.mark.gpu
def test_a_small_case_end_to_end(tmp_path: Path) -> None:
    only = "^SmolLM2: T16 L1024 B1$"
    shown = run("--only", only, "--peers", "ours,sdpa,sdpa_dense", "--out", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    measured = report.Result.load(tmp_path / "attention.json")
    [case] = measured.cases
    assert [row.peer for row in case.rows if row.us is None] == []
    assert case.sdpa is not None
    assert case.sdpa.deviation is not None
    for row in case.rows:
        assert row.error is None
        assert row.us is not None
        assert row.deviation is not None
        assert row.us > 0.8 * case.limit_us
        assert row.deviation < 1e-2
        if row.peer.startswith(report.OURS):
            assert row.counters is not None
            assert row.counters.kv_bytes >= case.kv_bytes
            assert row.plan_us is not None
            assert row.deviation_over_sdpa is not None
            assert row.deviation_over_sdpa < 2
    assert measured.provenance["device"] == torch.cuda.get_device_name()
