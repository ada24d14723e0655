"""Runs a grid: prompt by prompt, all configurations next to each other, row by row to disk.

Order: for each target, suite, prompt and repetition all configurations run one after the other, in
opposite order every other time (A B, B A), so that a drift of the machine hits all alike. Rows of
one prompt and repetition are written together, when the plain loop has said what is right. What a
killed run has written is not run again.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from specdec.console import err
from specdec.eval.arms import Arm, Generation, Lab, seed_of
from specdec.eval.grid import Grid
from specdec.eval.judging import judge, log_likelihood
from specdec.eval.loading import encode, load_model, node_budget
from specdec.eval.observe import token_classes
from specdec.eval.prompts import Prompt
from specdec.eval.provenance import provenance
from specdec.eval.records import Configuration, Key, Lossless, Row, RowWriter, Run, RunFolder
from specdec.eval.suites import Suite, load_suites

SAME_TO_RESUME = ("device", "torch", "transformers", "specdec", "commit", "dtype")
"""Parts of the provenance that must not change within a run."""

FOLLOWS_PLAIN = ("sample-and-match",)
"""Rules under which a sampled text with the same seed is that of the plain loop."""


def run_grid(grid: Grid, folder: RunFolder) -> list[Row]:
    """Runs what is missing of a grid and returns all rows.

    Under `accelerate launch` every process takes its share of the prompts; only the first one
    returns rows, the others an empty list.

    Raises:
        ValueError: something in the grid cannot be run, or the folder has another run.
    """
    state = _processes(grid)
    suites = load_suites(grid.suites, grid.settings.limit)
    configurations = grid.configurations()
    targets = list(dict.fromkeys(c.target for c in configurations))
    device = grid.settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = str(state.device)  # a GPU for each process
    configurations = [_sized(c, device) for c in configurations]
    session: Session | None = None
    for target in targets:
        lab, texts = _lab(target, grid, suites, device)
        chosen = [c for c in configurations if c.target == target]
        arms = {c.name: lab.arm(c) for c in chosen}
        if session is None:
            session = Session.begin(grid, folder, suites, configurations, lab.model, state)
        session.run_target(chosen, arms, lab, texts)
        del lab, texts, arms  # before the next target takes their memory
    assert session is not None
    return session.finish(configurations)


def _processes(grid: Grid) -> PartialState:
    """This process among those launched with it; they wait for the slowest, however long."""
    on_cpu = grid.settings.device == "cpu" or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=7))


def _sized(configuration: Configuration, device: str) -> Configuration:
    """With its node budget: that of its tree, or the default of `specdec.wrap`."""
    if configuration.is_transformers:
        return configuration
    if configuration.is_plain:
        return replace(configuration, nodes=1)
    default = 8 if device == "cpu" else 32
    nodes = default if configuration.tree is None else node_budget(configuration.tree)
    return replace(configuration, nodes=nodes)


def _lab(
    target: str, grid: Grid, suites: Sequence[Suite], device: str
) -> tuple[Lab, dict[tuple[str, str], Tensor]]:
    """A target, and its [1, L] token ids of every prompt, by suite and id."""
    model, tokenizer = load_model(target, grid.settings.dtype, device)
    texts: dict[tuple[str, str], Tensor] = {
        (suite.name, prompt.id): encode(tokenizer, prompt.messages)["input_ids"].to(device)
        for suite in suites
        for prompt in suite.prompts
    }
    return Lab(model, tokenizer, grid.settings), texts


@dataclass
class Session:
    """A run that goes on: what is there already, and where new rows go."""

    grid: Grid
    folder: RunFolder
    suites: Sequence[Suite]
    state: PartialState
    done: dict[Key, Row]
    writer: RowWriter

    @classmethod
    def begin(
        cls,
        grid: Grid,
        folder: RunFolder,
        suites: Sequence[Suite],
        configurations: Sequence[Configuration],
        model: Any,
        state: PartialState,
    ) -> Session:
        """Writes `run.json`, or checks that what is there is the same run."""
        problem: list[str | None] = [None]
        if state.is_main_process:
            try:
                _announce(grid, folder, suites, configurations, model)
            except ValueError as error:
                problem = [str(error)]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise ValueError(problem[0])
        shared: list[list[Row]] = [folder.rows() if state.is_main_process else []]
        broadcast_object_list(shared)
        # A machine with a disk of its own has rows that the first process does not see.
        rows = {row.key: row for row in [*folder.rows(), *shared[0]]}
        process = state.process_index if state.num_processes > 1 else None
        return cls(grid, folder, suites, state, rows, folder.open_rows(process))

    def run_target(
        self,
        configurations: Sequence[Configuration],
        arms: dict[str, Arm],
        lab: Lab,
        texts: dict[tuple[str, str], Tensor],
    ) -> None:
        """Runs everything of one target that is missing, this process's share of the prompts."""
        places = [(suite, prompt) for suite in self.suites for prompt in suite.prompts]
        share = list(enumerate(places))[self.state.process_index :: self.state.num_processes]
        missing = [
            (number, suite, prompt, repetition)
            for number, (suite, prompt) in share
            for repetition in range(self.grid.settings.repetitions)
            if any(
                (c.name, suite.name, prompt.id, repetition) not in self.done for c in configurations
            )
        ]
        if not missing:
            return
        longest = max(texts.values(), key=lambda ids: ids.shape[1])
        for arm in arms.values():
            with suppress(Exception):  # whatever it is, the rows will say
                arm.warm_up(longest)
        with self._progress(len(missing), configurations[0].target) as advance:
            for number, suite, prompt, repetition in missing:
                ids = texts[suite.name, prompt.id]
                group = Group(lab, suite, prompt, repetition, self.grid.settings.seed, ids)
                order = list(configurations)
                if (number + repetition) % 2:
                    order.reverse()
                for row in group.rows(order, arms, self.done, self.grid.settings.max_new_tokens):
                    self.writer.append(row)
                    self.done[row.key] = row
                advance()

    @contextmanager
    def _progress(self, count: int, target: str) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            TimeRemainingColumn(),
            console=err,
            disable=not self.state.is_main_process,
        ) as progress:
            task = progress.add_task(target, total=count)
            yield lambda: progress.advance(task)

    def finish(self, configurations: Sequence[Configuration]) -> list[Row]:
        """Gathers the rows of all processes in `rows.jsonl`, in the order of the grid."""
        self.writer.__exit__()
        rows = gather_object(list(self.done.values()))
        self.state.wait_for_everyone()
        if not self.state.is_main_process:
            return []
        place = {c.name: number for number, c in enumerate(configurations)}
        prompts = {
            (suite.name, prompt.id): number
            for number, (suite, prompt) in enumerate(
                (suite, prompt) for suite in self.suites for prompt in suite.prompts
            )
        }
        unique = {row.key: row for row in rows}
        ordered = sorted(
            unique.values(),
            key=lambda row: (
                prompts[row.suite, row.prompt],
                row.repetition,
                place[row.configuration],
            ),
        )
        self.folder.merge(ordered)
        return ordered


def _announce(
    grid: Grid,
    folder: RunFolder,
    suites: Sequence[Suite],
    configurations: Sequence[Configuration],
    model: Any,
) -> None:
    here = provenance(model.device, model.dtype)
    found = tuple(suite.to_dict() for suite in suites)
    if not folder.exists:
        if folder.row_files():
            raise ValueError(f"{folder.path}: there are rows here, but no run.json")
        settings = grid.to_dict()["settings"]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        folder.write_run(
            Run(now, settings, grid.to_dict(), tuple(configurations), found, provenance=here)
        )
        return
    before = folder.run()
    if Grid.from_dict(before.grid) != grid:
        raise ValueError(
            f"{folder.path}: another grid was begun here; resume it with --out alone, or choose "
            "another folder"
        )
    if [dict(suite) for suite in before.suites] != list(found):
        raise ValueError(f"{folder.path}: the prompts of its suites have changed since it began")
    changed = [
        f"{name} was {before.provenance.get(name)} and is {here[name]}"
        for name in SAME_TO_RESUME
        if before.provenance.get(name) != here[name]
    ]
    if changed:
        raise ValueError(
            f"{folder.path}: rows of one run must be made alike, but {'; '.join(changed)}"
        )
    folder.write_run(replace(before, resumed=(*before.resumed, here)))


@dataclass(frozen=True)
class Group:
    """All configurations on one prompt, once."""

    lab: Lab
    suite: Suite
    prompt: Prompt
    repetition: int
    base_seed: int
    ids: Tensor

    def rows(
        self,
        order: Sequence[Configuration],
        arms: dict[str, Arm],
        done: dict[Key, Row],
        new: int,
    ) -> list[Row]:
        """Those that are missing, judged against the plain loop."""
        missing = [c for c in order if self._key(c) not in done]
        made = [(c, self._run(c, arms[c.name], new)) for c in missing]
        known = [done[self._key(c)] for c in order if self._key(c) in done]
        plain = {
            c.temperature: row
            for c, row in [*made, *((c, r) for c in order for r in known if r.key == self._key(c))]
            if c.is_plain
        }
        return [replace(row, **self._judged(c, row, plain[c.temperature])) for c, row in made]

    def _key(self, configuration: Configuration) -> Key:
        return (configuration.name, self.suite.name, self.prompt.id, self.repetition)

    def _run(self, configuration: Configuration, arm: Arm, new: int) -> Row:
        seed = seed_of(self.base_seed, self.suite.name, self.prompt.id, self.repetition)
        about: dict[str, Any] = {
            "configuration": configuration.name,
            "suite": self.suite.name,
            "prompt": self.prompt.id,
            "category": self.prompt.category,
            "repetition": self.repetition,
            "seed": seed,
            "prompt_tokens": self.ids.shape[1],
        }
        try:
            made = arm.generate(self.ids, new, seed)
        except Exception as error:  # a drafter of a user's, or no memory: the others go on
            empty: dict[str, Any] = {"new_tokens": 0, "decode_tokens": 0, "steps": 0, "seconds": {}}
            return Row(
                **about, **empty, decode_seconds=0.0, error=f"{type(error).__name__}: {error}"
            )
        return Row(**about, **self._counts(made))

    def _counts(self, made: Generation) -> dict[str, Any]:
        classes = token_classes(self.lab.tokenizer, made.tokens)
        counts: dict[str, Any] = {
            "new_tokens": len(made.tokens),
            "decode_tokens": len(made.tokens) - made.first,
            "steps": made.steps,
            "seconds": made.seconds,
            "decode_seconds": made.seconds["total"] - made.prefill,
            "tokens": made.tokens,
            "emitted_by_class": _count(classes),
        }
        if made.stats is None or made.counts is None:
            return counts
        stats, seen = made.stats, made.counts
        accepted = [classes[place] for place in sorted(seen.drafted_places)]
        return counts | {
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "reached_by_depth": dict(sorted(stats.reached.items())),
            "accepted_by_depth": dict(sorted(stats.accepted_at.items())),
            "offered_by_rank": dict(sorted(seen.offered.items())),
            "accepted_by_rank": dict(sorted(seen.accepted.items())),
            "accepted_by_class": _count(accepted),
            "tree_sizes": dict(sorted(seen.tree_sizes.items())),
            "paths": dict(stats.paths),
            "observed": made.observed,
        }

    def _judged(self, configuration: Configuration, row: Row, plain: Row) -> dict[str, Any]:
        """The fields that need the plain loop's answer, or the model."""
        if row.error is not None:
            return {}
        model, verdict, likely = self.lab.model, None, None
        comparable = plain.error is None and not configuration.is_plain
        if configuration.temperature > 0:
            likely = log_likelihood(model, self.ids, row.tokens, configuration.temperature)
            comparable &= configuration.rule in FOLLOWS_PLAIN and not configuration.is_transformers
        if comparable and configuration.temperature > 0:
            verdict = Lossless(equal=row.tokens == plain.tokens)
        elif comparable:
            verdict = judge(model, self.ids, row.tokens, plain.tokens)
        return {"lossless": verdict, "log_likelihood": likely}


def _count(classes: Sequence[str]) -> dict[str, int]:
    return {name: classes.count(name) for name in dict.fromkeys(classes)}
