"""Suites: every public format is read, and what cannot be read is named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specdec.eval.observe import token_classes
from specdec.eval.suites import load_suite, load_suites

FORMATS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # name: a record of its public format, then what is made of it: id, category, text
    "spec-bench": (
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        "81",
        "writing",
        "Write.",
    ),
    "humaneval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def one():\n    ",
            "canonical_solution": "    return 1",
            "test": "",
            "entry_point": "one",
        },
        "HumanEval/0",
        "humaneval",
        "Complete this Python function. Answer with the whole function in one code block.\n\n"
        "```python\ndef one():\n```",
    ),
    "gsm8k": ({"question": "1 + 1?", "answer": "#### 2"}, "0", "gsm8k", "1 + 1?"),
    "mt-bench": (
        {"prompt_id": 1, "category": "math", "prompt": ["Add.", "Why?"], "reference": []},
        "1",
        "math",
        "Add.",
    ),
    "alpaca": (
        {"instruction": "Sort.", "input": "b, a", "output": "a, b", "text": ""},
        "0",
        "alpaca",
        "Sort.\n\nb, a",
    ),
    "cnn-dm": (
        {"article": "It rained.", "highlights": "Rain.", "id": "f00"},
        "f00",
        "cnn-dm",
        "Summarize this article.\n\nIt rained.",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_public_format_is_read_from_a_file(name: str, tmp_path: Path) -> None:
    record, id, category, text = FORMATS[name]
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    suite = load_suite(f"{name}={file}")
    (prompt,) = suite.prompts
    assert (suite.name, prompt.id, prompt.category) == (name, id, category)
    assert prompt.messages == [{"role": "user", "content": text}]


def test_a_file_of_ones_own_may_hold_conversations(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"messages": messages}) + '\n\n{"prompt": "Hello"}\n')
    suite = load_suite(str(file))
    assert suite.name == "mine"
    assert [prompt.messages for prompt in suite.prompts] == [
        messages,
        [{"role": "user", "content": "Hello"}],
    ]


def test_a_limit_takes_from_all_categories() -> None:
    (suite,) = load_suites(["builtin"], 20)
    counts = Counter(prompt.category for prompt in suite.prompts)
    assert len(suite.prompts) == 20
    assert set(counts.values()) == {2, 3}
    assert suite.to_dict()["digest"] != load_suite("builtin").to_dict()["digest"]


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("nothing", None, "expected builtin, spec-bench"),
        ("what={}", "{}", "before '='"),
        ("gsm8k={}", None, "there is no file"),
        ("gsm8k={}", '{"quest": 1}', "record 0 of .* is not of the format of gsm8k: it has quest"),
        ("{}", "not json", "line 1: expected JSON"),
        ("{}", "", "has no prompts"),
        ("{}", '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "'1' occurs more than once"),
        ("spec-bench", None, "comes as a file"),
    ],
)
def test_what_cannot_be_read_is_named(
    spec: str, content: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_suite(spec.format(file))


class Words:
    """A tokenizer of a few tokens."""

    all_special_ids = (9,)
    pieces = ("Hi", " ", "3", "!", "```", "\n", "x1", "�")

    def decode(self, tokens: list[int]) -> str:
        return self.pieces[tokens[0]]


def test_tokens_have_classes() -> None:
    found = token_classes(Words(), [0, 1, 2, 3, 7, 4, 6, 5, 4, 5, 6, 9])
    assert found == [
        "words", "whitespace", "numbers", "punctuation", "words",
        "punctuation", "code", "code", "code", "whitespace", "words", "special",
    ]  # fmt: skip
