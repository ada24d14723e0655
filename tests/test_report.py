"""The report: the same numbers in HTML, Markdown and CSV, and a page that works in a browser."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.eval.example import example_run
from specdec.eval.records import Lossless
from specdec.eval.report import write_report
from specdec.eval.report.page import markdown, render
from specdec.eval.report.results import OVERALL, Arm, Estimate, Notice, Results
from specdec.eval.report.rows import results
from specdec.eval.report.tables import tables
from specdec.eval.trace import Trace, record
from specdec.testing import tiny_model

SPEEDUPS = {"plain": None, "chain": 1.21, "tree 16": 1.28, "tree 8": 10.5}


class Hostile:
    """Shows tokens as text that must not become part of the page."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(f" <b>{token}</b></script>" for token in tokens)


def arm(name: str, speedup: float | None) -> Arm:
    estimates = (
        {} if speedup is None else {OVERALL: Estimate(speedup, 0.9 * speedup, 1.1 * speedup)}
    )
    per_step = {"code": Estimate(2.0), "chat": Estimate(1.5), OVERALL: Estimate(1.7, 1.6, 1.8)}
    drafts = 0 if speedup is None else 70
    return Arm(
        name=name,
        family=name.split()[0],
        nodes=8,
        prompts=4,
        steps=20,
        tokens=40,
        speedup={**estimates, **({"code": Estimate(2.0)} if estimates else {})},
        tokens_per_second={OVERALL: Estimate(20.0)},
        tokens_per_step=per_step,
        drafted=drafts,
        accepted=drafts // 2,
        by_depth={1: (20, 15), 2: (10, 4), 3: (1, 1)} if drafts else {},
        by_rank={1: (20, 12), 2: (20, 3)} if drafts else {},
        over={"transformers": Estimate(3.0, 2.5, 3.5)},
        by_class={"words": (30, 12), "code": (10, 0)} if drafts else {},
        seconds={"draft": 0.1, "forward": 0.8, "host": 0.1},
    )


RESULTS = Results(
    lead="Four configurations of a tiny model.",
    baseline="plain decoding",
    arms=[arm(name, speedup) for name, speedup in SPEEDUPS.items()],
    notices=[Notice("warn", "Synthetic numbers | not measured.", ["Missing: transformers."])],
    provenance=[("Target", "tiny <Llama>"), ("Seed", "0")],
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    wrapped = specdec.wrap(tiny_model("Llama"), "ngram", nodes=10)
    prompt = torch.tensor([[5, 9, 2, 5, 9, 2, 7, 5, 9]])
    about = {"model": "tiny", "drafter": "ngram"}
    return record(
        wrapped, Hostile(), about=about, inputs=prompt, max_new_tokens=24, do_sample=False
    )


def test_csv_has_full_precision_and_markdown_the_same_rows() -> None:
    found = {table.id: table for table in tables(RESULTS)}
    assert list(found) == ["configurations", "categories", "depths", "ranks", "classes", "time"]
    rows = list(csv.DictReader(io.StringIO(found["configurations"].csv())))
    assert [row["Configuration"] for row in rows] == list(SPEEDUPS)
    assert [row["Speed-up"] for row in rows] == ["", "1.21", "1.28", "10.5"]
    assert rows[3]["Speed-up low"] == str(0.9 * 10.5)
    depths = list(csv.DictReader(io.StringIO(found["depths"].csv())))
    assert (depths[0]["Accepted"], depths[0]["Tried"]) == ("0.75", "20")
    text = markdown("A title", RESULTS)
    assert "| tree 8 | 10.5 (9.45 to 11.6) | 3.00 (2.50 to 3.50) | 20.0 | 1.70 (1.60" in text
    assert "> **Note:** Synthetic numbers | not measured.\n> * Missing: transformers." in text
    assert "* Seed: 0" in text


def test_a_page_is_whole_and_its_data_cannot_break_out(trace: Trace) -> None:
    page = render("A <title>", RESULTS, {"a <trace>": trace})
    assert "Synthetic numbers" in page
    assert "tiny &lt;Llama&gt;" in page
    assert "<b>5</b>" not in page
    assert page.count("</script>") == page.count("<script") == 6 - 1
    for fetches in ('src="', "@import", 'rel="stylesheet"', "fetch("):
        assert fetches not in page.replace(_plotly(), "")
    only = render("Trace", None, {"one": trace})
    assert _plotly() not in only
    with pytest.raises(ValueError, match="expected results or traces"):
        render("Nothing", None, {})


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def test_a_run_becomes_its_metrics_and_says_what_it_is(tmp_path: Path) -> None:
    folder = example_run(tmp_path, prompts=6, repetitions=1)
    run, rows = folder.run(), folder.rows()
    found = results(run, rows)
    arms = {arm.name: arm for arm in found.arms}
    tree = arms["ngram 16"]
    own = [row for row in rows if row.configuration == "ngram 16"]
    plain = [row for row in rows if row.configuration == "plain"]
    speeds = [
        sum(r.decode_tokens for r in of) / sum(r.decode_seconds for r in of) for of in (own, plain)
    ]
    speedup = tree.speedup[OVERALL]
    assert speedup.value == pytest.approx(speeds[0] / speeds[1])
    assert speedup.low is not None
    assert speedup.high is not None
    assert speedup.low < speedup.value < speedup.high
    assert arms["plain"].speedup == {}
    assert set(tree.over) == {"hf-eager"}
    assert list(tree.speedup) == [OVERALL, "writing", "code", "extraction"]
    assert tree.by_rank[1][0] == sum(row.offered_by_rank[0] for row in own)
    assert (tree.family, arms["ngram chain:8"].family) == ("ngram", "ngram, chain")
    assert found.notices[0].text.startswith("Synthetic")
    assert found.notices[-2].text.startswith("Lossless: all 54 outputs")

    few = results(run, [row for row in rows if row.prompt.endswith(("-0", "-1"))])
    assert few.arms[-1].speedup["code"].low is None, "too few prompts for an interval"
    assert any(point.startswith("Unfinished: 30 of 90 rows") for point in few.notices[-1].points)
    odd = replace(own[0], lossless=Lossless(equal=False))
    broken = results(run, [odd, *(row for row in rows if row.key != odd.key)])
    assert broken.notices[-2].text.endswith("differ from plain decoding (1 of ngram 16).")
    failed = replace(own[0], error="OutOfPages: too small")
    text = " ".join(results(run, [failed, *rows[1:]]).notices[-1].points)
    assert "Failed: 1 generations, of ngram 16; the first said 'OutOfPages: too small'" in text


def test_a_report_is_written_beside_its_run(tmp_path: Path, trace: Trace) -> None:
    with pytest.raises(ValueError, match=r"expected run.json with rows.jsonl, or traces"):
        write_report(tmp_path)
    example_run(tmp_path)
    trace.save(tmp_path / "traces" / "one.json")
    names = ("categories", "classes", "configurations", "depths", "ranks", "time")
    written = sorted(file.name for file in write_report(tmp_path))
    assert written == [*(f"report-{name}.csv" for name in names), "report.html", "report.md"]
    assert "hf-eager" in (tmp_path / "report.md").read_text()


# ---- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> Path:
    written = tmp_path_factory.mktemp("report") / "report.html"
    written.write_text(render("Report", RESULTS, {"one": trace, "two": trace}), encoding="utf-8")
    return written


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Any]:
    """The page; afterwards it must have asked for nothing and complained about nothing."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda asked: troubles.append(asked.url) if "file:" not in asked.url else 0)
    page.goto(file.as_uri())
    yield page
    page.close()
    assert [each for each in troubles if not each.startswith(("data:", "blob:"))] == []


def test_tables_sort_by_number_and_say_so(opened: Any) -> None:
    table = opened.locator("#table-configurations")
    head = table.locator("th", has_text="Speed-up")
    firsts = table.locator("tbody th")
    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert firsts.all_inner_texts() == ["chain", "tree 16", "tree 8", "plain"]
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert firsts.all_inner_texts() == ["tree 8", "tree 16", "chain", "plain"], "absent is last"
    assert opened.locator("#said").inner_text() == "Sorted by Speed-up, descending."
    table.locator("th", has_text="Configuration").get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    assert firsts.all_inner_texts() == ["chain", "plain", "tree 8", "tree 16"]


def test_trees_are_stepped_through_by_buttons_keys_and_tokens(opened: Any, trace: Trace) -> None:
    viewer = opened.locator("#trace-viewer")
    told, tree = viewer.locator("[data-part=told]"), viewer.locator("[data-part=canvas] svg")

    def check(number: int) -> None:
        step = trace.steps[number]
        assert told.inner_text().startswith(f"Step {number + 1} of {len(trace.steps)}: ")
        assert tree.locator(".node").count() == len(step.tokens) + 1
        assert tree.locator(".node.accepted").count() == len(step.path) - 1
        assert tree.locator(f".node.{step.next_origin}").count() == 1
        assert viewer.locator("tbody tr").count() == len(step.tokens) + 1
        assert viewer.locator(".answer .here").count() == step.emitted

    viewer.locator("select").select_option("1")
    check(0)
    assert viewer.get_by_role("button", name="Previous").is_disabled()
    viewer.get_by_role("button", name="Next").click()
    check(1)
    opened.keyboard.press("ArrowRight")
    check(2)
    opened.keyboard.press("ArrowLeft")
    check(1)
    viewer.get_by_role("slider").press("ArrowRight")
    check(2)
    opened.keyboard.press("End")
    check(len(trace.steps) - 1)
    busiest = max(range(len(trace.steps)), key=lambda number: len(trace.steps[number].path))
    viewer.locator(f".answer [data-step='{busiest}']").first.click()
    check(busiest)
    shown = viewer.locator(".answer .token")
    assert shown.count() == len(trace.tokens)
    origins = [each.get_attribute("class").split()[1] for each in shown.all()]
    assert origins == [token.origin for token in trace.tokens]


def test_plots_are_drawn_the_theme_follows_and_nothing_hangs_over_the_edge(opened: Any) -> None:
    assert opened.locator(".plot .main-svg").count() > 0
    assert opened.locator("[data-figure=speedup] .bars .point").count() == 3
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = opened.evaluate(ground)
    opened.locator("#theme").click()
    assert opened.evaluate(ground) == "rgb(255, 255, 255)" != dark
    for width in (390, 1440):
        opened.set_viewport_size({"width": width, "height": 900})
        assert opened.evaluate("document.documentElement.scrollWidth") == width
