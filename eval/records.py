"""What an evaluation leaves on disk: a folder with `run.json` and `rows.jsonl`.

`run.json` says what was asked for and where it ran; `rows.jsonl` has one line for each
configuration, suite, prompt and repetition. Everything that is published is computed from the two:
rows hold counts and seconds, which add up, and ratios are made last (`specdec.eval.metrics`).

    folder = RunFolder(path)
    run, rows = folder.run(), folder.rows()

A line is written by one call, so a process that is killed leaves at most one torn line, the last,
which `rows` leaves out and `open_rows` cuts off. Processes that share a run each write a file of
their own, `rows-3.jsonl`, and readers take them all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = 2

PLAIN = "plain"
"""The name of the baseline: our own loop with an empty tree. Every run has it."""

TOKEN_CLASSES = ("code", "words", "numbers", "punctuation", "whitespace", "special")
"""`code` is whatever lies in a fenced block; the others go by the token's characters."""

PHASES = ("prefill", "draft", "forward", "accept", "commit", "captured")
"""Parts of `seconds`, in the order in which they happen; what they leave of `total` is the host's.

A step that runs as one captured graph is all `captured`.
"""

K = TypeVar("K", int, str)
Key = tuple[str, str, str, int]
"""(configuration, suite, prompt, repetition): what makes a row unique in a run."""


@dataclass(frozen=True)
class Configuration:
    """One way to generate."""

    name: str
    """Unique in a run."""
    target: str
    """As given: a known name, a folder or a hub id."""
    drafter: str
    """`none`, `ngram`, `file.py:Name`, a model; or a baseline of transformers: `hf-eager`,
    `hf-compile`, `hf-prompt-lookup`, `hf-assisted:MODEL`."""
    tree: str | None = None
    """As given: a number of nodes, `chain:5`, `4,2,1` or `beam:8x6`; None for the default."""
    nodes: int | None = None
    """The node budget that follows, the root included; None for baselines of transformers."""
    rule: str = "auto"
    temperature: float = 0.0
    """0 decodes greedily."""

    @property
    def is_plain(self) -> bool:
        """Whether it is our own loop with an empty tree."""
        return self.drafter == "none"

    @property
    def is_transformers(self) -> bool:
        """Whether transformers' own `generate` runs, not ours."""
        return self.drafter.startswith("hf-")


@dataclass(frozen=True)
class Run:
    """What was asked for, and where it ran."""

    created: str
    """ISO 8601, UTC."""
    settings: dict[str, Any]
    """What does not vary: `max_new_tokens`, `repetitions`, `seed`, `limit`, `dtype`, `device`,
    `capture`, ... See `specdec.eval.grid.Settings`."""
    grid: dict[str, Any]
    """The grid as configured; `configurations` is what came of it."""
    configurations: tuple[Configuration, ...]
    """In the order in which they run in even repetitions; odd ones go backwards."""
    suites: tuple[dict[str, Any], ...]
    """`name`, `prompts` (how many), `digest` (of ids and texts), and `path` of a file if any."""
    provenance: dict[str, Any]
    """Versions, device, clocks, commit, whether files were changed; `specdec.eval.provenance`."""
    resumed: tuple[dict[str, Any], ...] = ()
    """The provenance of each time the run was continued."""
    schema: int = SCHEMA

    def configuration(self, name: str) -> Configuration:
        """Raises KeyError if there is none of that name."""
        return {c.name: c for c in self.configurations}[name]

    def plain_of(self, configuration: Configuration) -> Configuration:
        """The baseline of the same target and temperature, which every configuration has."""
        return next(
            other
            for other in self.configurations
            if other.is_plain
            and other.target == configuration.target
            and other.temperature == configuration.temperature
        )


@dataclass(frozen=True)
class Lossless:
    """Whether the tokens are those of the plain loop with the same seed."""

    equal: bool
    first_difference: int | None = None
    """Place of the first token that differs, among the new ones."""
    gap: float | None = None
    """Between the target's two best logits at that place, if decoding was greedy."""
    near_tie: bool = False
    """Whether the gap is so small that rounding decides; see docs/evaluation.md."""

    @property
    def verdict(self) -> str:
        """`equal`, `near-tie` or `different`."""
        return "equal" if self.equal else "near-tie" if self.near_tie else "different"


@dataclass(frozen=True)
class Row:
    """One generation. All counts; ratios are made by whoever reads them.

    Fields that a baseline of transformers cannot tell are None or empty.
    """

    configuration: str
    suite: str
    prompt: str
    """Its id in the suite."""
    category: str
    repetition: int
    seed: int
    prompt_tokens: int
    new_tokens: int
    decode_tokens: int
    """New tokens that `decode_seconds` was spent on: without those that came with the prefill."""
    steps: int
    """Passes of the target behind the prefill; they gave the `decode_tokens`."""
    seconds: dict[str, float]
    """By phase (`PHASES`), and `total`, the wall time of the call."""
    decode_seconds: float
    """`total` without the prefill."""
    drafted: int | None = None
    """Nodes proposed, roots not counted; `drafted - accepted` of them were wasted."""
    accepted: int | None = None
    reached_by_depth: dict[int, int] = field(default_factory=dict)
    """By depth d from 1: steps that came to a node of depth d - 1 which had children."""
    accepted_by_depth: dict[int, int] = field(default_factory=dict)
    """By depth: steps that accepted one of these children."""
    offered_by_rank: dict[int, int] = field(default_factory=dict)
    """By place r from 0 among siblings, in the order proposed: children number r below a node that
    a step came to."""
    accepted_by_rank: dict[int, int] = field(default_factory=dict)
    """By place: those of them that were accepted."""
    emitted_by_class: dict[str, int] = field(default_factory=dict)
    """By token class (`TOKEN_CLASSES`): new tokens."""
    accepted_by_class: dict[str, int] = field(default_factory=dict)
    """By token class: new tokens that had been drafted."""
    tree_sizes: dict[int, int] = field(default_factory=dict)
    """By number of nodes, the root included: steps that verified such a tree."""
    paths: dict[str, int] = field(default_factory=dict)
    """Passes by how they ran: `captured`, or why not."""
    observed: str | None = None
    """Where the counts by rank and class and `tree_sizes` come from: `timed`, the run that was
    timed, or `again`, a second one, since captured steps do not tell."""
    tokens: list[int] = field(default_factory=list)
    """The new ones, an end-of-sequence token included."""
    log_likelihood: float | None = None
    """Of the new tokens under the target at the temperature of the run; None if greedy."""
    lossless: Lossless | None = None
    """None for the plain loop itself, for sampled runs under rules that do not follow its draws,
    and where there was an error."""
    error: str | None = None
    """What was raised instead of a result; then all counts are 0."""

    @property
    def key(self) -> Key:
        return (self.configuration, self.suite, self.prompt, self.repetition)

    @property
    def digest(self) -> str:
        """SHA-256 of the new tokens, as hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()

    def to_json(self) -> str:
        """One line, the digest included; fields that may be empty and are so are left out."""
        required = {f.name for f in fields(self) if f.default is f.default_factory is MISSING}
        data = {
            name: value
            for name, value in asdict(self).items()
            if name in required or value not in (None, {}, [])
        }
        return json.dumps({**data, "digest": self.digest})

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Raises ValueError if the line is no row, or its tokens do not have its digest."""
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError(f"expected a row, got {line:.60}")
        digest = data.pop("digest", None)
        known = {f.name: f.type for f in fields(cls)}
        if unknown := data.keys() - known.keys():
            raise ValueError(f"expected a row of schema {SCHEMA}, got fields {sorted(unknown)}")
        for name, kind in known.items():
            if kind == "dict[int, int]" and name in data:  # JSON has text as keys
                data[name] = {int(key): count for key, count in data[name].items()}
        if data.get("lossless") is not None:
            data["lossless"] = Lossless(**data["lossless"])
        try:
            row = cls(**data)
        except TypeError as error:
            raise ValueError(f"expected a row of schema {SCHEMA}: {error}") from None
        if row.digest != digest:
            raise ValueError(f"the tokens of row {row.key} do not have its digest {digest}")
        return row


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether a run has begun there."""
        return (self.path / "run.json").is_file()

    def run(self) -> Run:
        """Raises ValueError if there is no run, or one of another schema."""
        if not self.exists:
            raise ValueError(f"{self.path}: there is no run here, no file run.json")
        data = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.path}: expected a run of schema {SCHEMA}, got {data.get('schema')}"
            )
        configurations = tuple(Configuration(**item) for item in data.pop("configurations"))
        suites, resumed = tuple(data.pop("suites")), tuple(data.pop("resumed"))
        return Run(**data, configurations=configurations, suites=suites, resumed=resumed)

    def write_run(self, run: Run) -> None:
        """Writes `run.json`, all of it or nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        part = self.path / "run.json.part"
        part.write_text(json.dumps(asdict(run), indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path / "run.json")

    def row_files(self) -> list[Path]:
        """`rows.jsonl`, and those of single processes."""
        return sorted(self.path.glob("rows*.jsonl"))

    def rows(self) -> list[Row]:
        """All rows, in the order written; a row that several files have counts once.

        Raises:
            ValueError: a line other than the last of a file cannot be read.
        """
        rows: dict[Key, Row] = {}
        for file in self.row_files():
            for row in _read(file):
                rows.setdefault(row.key, row)
        return list(rows.values())

    def open_rows(self, process: int | None = None) -> RowWriter:
        """A writer that appends, to the file of one process if its number is given."""
        name = "rows.jsonl" if process is None else f"rows-{process}.jsonl"
        return RowWriter(self.path / name)

    def merge(self, rows: Sequence[Row]) -> None:
        """Makes `rows.jsonl` of all rows, all of it or nothing, and removes other row files."""
        part = self.path / "rows.part"
        part.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
        os.replace(part, self.path / "rows.jsonl")
        for file in self.row_files():
            if file.name != "rows.jsonl":
                file.unlink()


class RowWriter:
    """Appends rows to a file, each by one call; a torn last line is cut off first."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, _whole(file.read_bytes()))

    def append(self, row: Row) -> None:
        """Writes a row and waits until it is on the disk."""
        line = row.to_json().encode() + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"wrote {written} of {len(line)} bytes of a row; is the disk full?")
        os.fsync(self._file)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _whole(content: bytes) -> int:
    """Bytes of the lines that were written to their ends."""
    return content.rfind(b"\n") + 1


def _read(file: Path) -> Iterator[Row]:
    content = file.read_bytes()
    for number, line in enumerate(content[: _whole(content)].decode().splitlines(), start=1):
        try:
            yield Row.from_json(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None


def total(counts: Sequence[Mapping[K, int]]) -> dict[K, int]:
    """Counts added up by key, in the order of keys."""
    keys = sorted({key for count in counts for key in count})
    return {key: sum(count.get(key, 0) for count in counts) for key in keys}
