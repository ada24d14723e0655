"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec import models
from specdec.cli import app

PROMPT = "Repeat exactly: the red fox, the red fox, the red fox."


def run(*args: str, input: str | None = None) -> Any:
    return CliRunner().invoke(app, args, input=input)


@pytest.fixture(scope="module", autouse=True)
def _model_is_there() -> None:
    models.fetch()


def test_generate_streams_text_and_shows_statistics() -> None:
    result = run("generate", PROMPT, "--max-new-tokens", "12")
    assert result.exit_code == 0
    assert "red fox" in result.stdout
    assert "tokens per step" in result.stderr


def test_json_is_one_object_and_equal_with_and_without_drafts() -> None:
    options = ["-", "--max-new-tokens", "12", "--json", "--dtype", "float32"]
    answers = []
    for drafter in ("ngram", "none"):
        result = run("generate", *options, "--drafter", drafter, "--tree", "6", input=PROMPT)
        assert result.exit_code == 0
        answers.append(json.loads(result.stdout))
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[1]["stats"]["first_tokens"] == 1
    assert answers[0]["stats"]["steps"] < answers[1]["stats"]["steps"] == 11


def test_compare_runs_the_baseline_too() -> None:
    result = run("generate", PROMPT, "--max-new-tokens", "8", "--compare")
    assert result.exit_code == 0
    assert "same tokens" in result.stdout
    result = run("generate", PROMPT, "--max-new-tokens", "8", "--compare", "--json")
    comparison = json.loads(result.stdout)
    assert comparison["same_tokens"] is True
    assert comparison["plain"]["drafted"] == 0


def test_a_model_drafts_on_a_shape_and_sampling_is_seeded() -> None:
    options = [
        "generate", PROMPT, "--drafter", models.DEFAULT, "--tree", "2,1", "--rule", "multi-round",
        "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "6", "--json",
    ]  # fmt: skip
    first, second = (json.loads(run(*options).stdout) for _ in range(2))
    assert first["tokens"] == second["tokens"]
    assert first["stats"]["rule"] == "multi-round"
    assert first["stats"]["acceptance_by_depth"]["1"] > 0.9


def test_a_trace_has_the_text_that_generate_gives_and_a_page(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "fox.html"
    result = run("trace", PROMPT, "--out", str(file), "--tree", "6", "--max-new-tokens", "12")
    assert result.exit_code == 0, result.stderr
    recorded = json.loads(file.with_suffix(".json").read_text())
    plain = run("generate", PROMPT, "--max-new-tokens", "12", "--json")
    assert [token["token"] for token in recorded["tokens"]] == json.loads(plain.stdout)["tokens"]
    assert recorded["text"].strip() in result.stdout
    assert recorded["about"]["drafter"] == "ngram 6"
    assert "fox" in file.read_text()
    result = run("trace", PROMPT, "--out", "fox.txt")
    assert result.exit_code == 1
    assert "expected a name that ends in .html or .json" in " ".join(result.stderr.split())


def test_a_chat_computes_only_what_is_new() -> None:
    questions = "What is the capital of France?\nAnd of Italy?\n\n"
    result = run("chat", "--max-new-tokens", "12", "--dtype", "float32", input=questions)
    assert result.exit_code == 0
    assert "Paris" in result.stdout
    notes = re.findall(r"(\d+) prompt tokens computed, (\d+) reused", result.stderr)
    (first, none), (_, reused) = ((int(a), int(b)) for a, b in notes)
    assert none == 0
    assert reused >= first // 16 * 16 > 0, "all full pages of the first turn"


def test_debug_cache_draws_the_prefix_tree(tmp_path: Path) -> None:
    file = tmp_path / "tree.svg"
    result = run("debug", "cache", "Name a color.", "Name a bird.", "--svg", str(file))
    assert result.exit_code == 0
    assert "key 1" in result.stdout
    assert result.stdout.count("pages:") == 3, "what both begin with, and the rest of each"
    assert "reused" in result.stdout
    assert file.read_text().count("<rect") == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tree", "many"], "--tree: expected a number of nodes, chain:5 or 4,2,1, got 'many'"),
        (
            ["--tree", "beam:3"],
            "--tree: expected beam:8x6 or, with its nodes, beam:8x6:32, got 'beam:3'",
        ),
        (
            ["--tree", "beam:3x2"],
            "--tree: ngram takes a number of nodes or chain:5, got 'beam:3x2'",
        ),
        (["--tree", "4,2"], "--tree: ngram takes a number of nodes or chain:5, got '4,2'"),
        (["--rule", "hope"], "rule: expected auto"),
        (["--dtype", "float99"], "dtype: expected a torch dtype"),
        (["--device", "toaster"], "--device: expected one that torch has, got 'toaster'"),
        (
            ["--drafter", "./no/such/folder"],
            "--drafter: expected one of none, ngram, file.py:Name or a model, got",
        ),
    ],
)
def test_wrong_input_is_named_without_a_traceback(args: list[str], message: str) -> None:
    result = run("generate", PROMPT, *args)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_models_are_listed_with_their_folder() -> None:
    result = run("models", "list")
    assert "smollm2-135m" in result.stdout
    assert run("models", "fetch").stdout.replace("\n", "").endswith("smollm2-135m")
    assert run("models", "fetch", "nope").exit_code == 1


def test_verify_lossless_gives_a_verdict_and_names_what_is_too_little() -> None:
    options = ["verify-lossless", "--tokens", "2", "--prompt", "One, two,", "--top-p", "0.9"]
    result = run(*options, "--drafter", "ngram", "--tree", "3", "--samples", "80", "--json")
    assert result.exit_code == 0, result.stderr
    verdict = json.loads(result.stdout)
    assert verdict["passed"] is True
    assert verdict["rule"] == "sample-and-match"
    assert verdict["cells"] == 16
    result = run(*options, "--samples", "20")
    assert result.exit_code == 1
    assert "samples: expected at least 80 for 16 cells, got 20" in " ".join(result.stderr.split())
