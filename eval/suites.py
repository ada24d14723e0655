"""Suites of prompts: the built-in one, public ones by hub id or file, any JSONL.

A suite is asked for as `name`, `name=path` or a path. Public data sets are read through Hugging
Face's `datasets`, or from a file of their public format: one JSON object a line. Of a conversation
with several turns only the first is asked, since what comes next depends on the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from specdec.eval.prompts import Prompt, builtin_prompts

BUILTIN = "builtin"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A public data set: where it is, and what of a record is asked."""

    hub: str | None
    """Id on the hub; None for one that comes as a file."""
    config: str | None
    split: str
    text: Callable[[Record], str]


def _first_turn(record: Record) -> str:
    turns = record["turns"] if "turns" in record else record["prompt"]
    return str(turns if isinstance(turns, str) else turns[0])


def _code(record: Record) -> str:
    return (
        "Complete this Python function. Answer with the whole function in one code block.\n\n"
        f"```python\n{record['prompt'].strip()}\n```"
    )


def _instruction(record: Record) -> str:
    return "\n\n".join(record[key] for key in ("instruction", "input") if record.get(key))


SOURCES: dict[str, Source] = {
    "spec-bench": Source(None, None, "", _first_turn),
    "humaneval": Source("openai/openai_humaneval", None, "test", _code),
    "gsm8k": Source("openai/gsm8k", "main", "test", lambda record: record["question"]),
    "mt-bench": Source("HuggingFaceH4/mt_bench_prompts", None, "train", _first_turn),
    "alpaca": Source("tatsu-lab/alpaca", None, "train", _instruction),
    "cnn-dm": Source(
        "abisee/cnn_dailymail",
        "3.0.0",
        "test",
        lambda record: f"Summarize this article.\n\n{record['article']}",
    ),
}
"""Spec-Bench (arXiv 2401.07851) is the file `data/spec_bench/question.jsonl` of its repository."""

IDS = ("id", "question_id", "task_id", "prompt_id")


@dataclass(frozen=True)
class Suite:
    """Prompts with a name."""

    name: str
    prompts: tuple[Prompt, ...]
    path: str | None = None
    """Of the file they come from, if any."""

    def limited(self, count: int | None) -> Suite:
        """At most so many prompts, taken from the categories in turn, in the suite's order."""
        if count is None or count >= len(self.prompts):
            return self
        groups: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in self.prompts:
            groups[prompt.category].append(prompt)
        turns = [prompt for turn in zip_longest(*groups.values()) for prompt in turn if prompt]
        chosen = {prompt.id for prompt in turns[:count]}
        return Suite(self.name, tuple(p for p in self.prompts if p.id in chosen), self.path)

    def to_dict(self) -> dict[str, Any]:
        """What `run.json` keeps: the digest is of ids, categories and texts."""
        content = json.dumps([[p.id, p.category, p.messages] for p in self.prompts])
        digest = hashlib.sha256(content.encode()).hexdigest()
        return {"name": self.name, "prompts": len(self.prompts), "digest": digest} | (
            {"path": self.path} if self.path else {}
        )


def load_suite(spec: str) -> Suite:
    """The suite behind `name`, `name=path` or a path.

    Raises:
        ValueError: there is none, its file cannot be read, or a record is not of its format.
        ImportError: it comes from the hub, and `datasets` is missing.
    """
    if spec == BUILTIN:
        return Suite(BUILTIN, tuple(builtin_prompts()))
    name, _, path = spec.rpartition("=") if "=" in spec else (spec, "", "")
    if not name or (name not in SOURCES and path):
        raise ValueError(f"--suite: expected one of {_names()} before '=', got {spec!r}")
    if name in SOURCES:
        source = SOURCES[name]
        records = _lines(Path(path)) if path else _from_hub(name, source)
        return Suite(name, _prompts(spec, records, name, source.text), path or None)
    file = Path(spec).expanduser()
    if not file.is_file():
        raise ValueError(f"--suite: expected {_names()} or a JSONL file, got {spec!r}")
    return Suite(file.stem, _prompts(spec, _lines(file), file.stem, None), spec)


def _names() -> str:
    return ", ".join([BUILTIN, *SOURCES])


def _lines(file: Path) -> list[Record]:
    if not file.is_file():
        raise ValueError(f"--suite: there is no file {str(file)!r}")
    records: list[Record] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: expected JSON, {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}, line {number}: expected an object, got {line:.40}")
            records.append(record)
    return records


def _from_hub(name: str, source: Source) -> Iterable[Record]:
    if source.hub is None:
        raise ValueError(f"--suite: {name} comes as a file: give {name}=PATH")
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"--suite: {name} is read from the hub through `datasets`, which is not installed; "
            f"install it (pip install 'specdec-toolkit[hub]'), or give {name}=PATH of a JSONL file"
        ) from None
    loaded: Iterable[Record] = datasets.load_dataset(source.hub, source.config, split=source.split)
    return loaded


def _prompts(
    spec: str, records: Iterable[Record], name: str, text: Callable[[Record], str] | None
) -> tuple[Prompt, ...]:
    prompts = []
    for index, record in enumerate(records):
        given = next((record[key] for key in IDS if record.get(key) is not None), index)
        try:
            messages = (
                _messages(record)
                if text is None
                else [{"role": "user", "content": str(text(record))}]
            )
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"--suite: record {given} of {spec} is not of the format of {name}: "
                f"it has {', '.join(record)}"
            ) from None
        prompts.append(Prompt(str(given), str(record.get("category", name)), messages))
    if not prompts:
        raise ValueError(f"--suite: {spec} has no prompts")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"--suite: the id {twice!r} occurs more than once in {spec}")
    return tuple(prompts)


def _messages(record: Record) -> list[dict[str, str]]:
    """Of a file of the user's own: `messages`, `turns` or `prompt`."""
    if "messages" in record:
        return [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
    return [{"role": "user", "content": _first_turn(record)}]


def load_suites(specs: Sequence[str], limit: int | None) -> list[Suite]:
    """All of them, cut to the limit; raises ValueError if two have one name."""
    suites = [load_suite(spec).limited(limit) for spec in specs]
    names = [suite.name for suite in suites]
    if len(set(names)) < len(names):
        raise ValueError(f"--suite: expected different names, got {', '.join(names)}")
    return suites
