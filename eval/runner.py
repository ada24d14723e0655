"""Runs a grid over suites of prompts, row by row, and goes on where it was stopped.

The order is chosen for honest ratios: every prompt runs under all configurations before the next
prompt does, forwards and backwards in turn, so that a drift of the machine meets the baseline as
much as what is compared with it. Prompts are never reused, and every configuration warms up on the
longest one first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from specdec.eval.grid import Grid, Settings
from specdec.eval.loading import encode, parse_dtype, parse_topology
from specdec.eval.lossless import NEAR_TIE
from specdec.eval.processes import Processes
from specdec.eval.prompts import Prompt
from specdec.eval.provenance import provenance
from specdec.eval.records import Configuration, Key, Lossless, Row, Run, RunFolder
from specdec.eval.suites import Suite, load_suites
from specdec.eval.ways import Generated, Subject, Way

Progress = Callable[[str, int, int], None]
"""Is told what runs, how many rows are done and how many there will be."""


@dataclass(frozen=True)
class Group:
    """A prompt and a repetition: what all configurations of a target run back to back."""

    suite: Suite
    prompt: Prompt
    repetition: int
    backwards: bool

    def key(self, configuration: Configuration) -> Key:
        return (configuration.name, self.suite.name, self.prompt.id, self.repetition)

    def seed(self, seed: int) -> int:
        """The same for all configurations."""
        text = f"{seed} {self.suite.name} {self.prompt.id} {self.repetition}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def evaluate(grid: Grid, folder: RunFolder, progress: Progress = lambda *_: None) -> None:
    """Runs what of a grid the folder does not have yet.

    Under `accelerate launch` every process takes its share of the prompts, and the first one puts
    the rows together at the end.

    Args:
        grid: what to run.
        folder: where to; made if it is not there.
        progress: is told how far this process is.

    Raises:
        ValueError: the folder holds a run of another grid or other prompts, a process is writing
            to it, or something in the grid cannot be made.
    """
    processes = Processes.current(grid.settings.device)
    suites = load_suites(grid.suites, grid.settings.limit)
    device = processes.device
    kind = grid.settings.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    run = Run(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=grid.to_dict()["settings"],
        grid={name: value for name, value in grid.to_dict().items() if name != "settings"},
        configurations=tuple(_sized(c, device) for c in grid.configurations()),
        suites=tuple(suite.to_dict() for suite in suites),
        provenance={
            **provenance(device, parse_dtype(kind)),
            "processes": processes.count,
        },
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / f".lock-{processes.index}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder.path}: another process is writing to this folder") from None
    try:
        if processes.first:
            _begin(folder, run)
        processes.wait()
        groups = list(_groups(suites, grid.settings.repetitions, processes))
        _fill(run, grid.settings, folder, groups, processes, progress)
        processes.wait()
        if processes.first and len(folder.row_files()) > 1:
            folder.merge(folder.rows())
        processes.wait()
    finally:
        lock.release()


def _sized(configuration: Configuration, device: torch.device) -> Configuration:
    """With the node budget that follows from its tree."""
    tree = configuration.tree
    if configuration.is_transformers:
        return configuration
    if configuration.is_plain:
        return replace(configuration, nodes=1)
    if tree is None:
        return replace(configuration, nodes=8 if device.type == "cpu" else 32)
    return replace(
        configuration, nodes=int(tree) if tree.isdecimal() else len(parse_topology(tree))
    )


def _begin(folder: RunFolder, run: Run) -> None:
    """Writes what is to run, or notes that the run there goes on."""
    if not folder.exists:
        if folder.row_files():
            raise ValueError(f"{folder.path}: has rows but no run.json; choose another --out")
        folder.write_run(run)
        return
    old = folder.run()
    for name in ("settings", "grid", "configurations", "suites"):
        before, now = _plain(getattr(old, name)), _plain(getattr(run, name))
        if before != now:
            raise ValueError(
                f"{folder.path}: holds a run with other {name}; choose another --out or the same "
                f"{name} to go on with it. There: {before}; here: {now}"
            )
    done = {row.key for row in folder.rows()}
    if len(done) < total_rows(old):
        folder.write_run(replace(old, resumed=(*old.resumed, run.provenance)))


def _plain(value: Any) -> Any:
    """As it is once it has been to JSON and back."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def total_rows(run: Run) -> int:
    """How many rows a run has when it is done."""
    prompts = sum(int(suite["prompts"]) for suite in run.suites)
    return prompts * int(run.settings["repetitions"]) * len(run.configurations)


def _groups(suites: Sequence[Suite], repetitions: int, processes: Processes) -> Iterator[Group]:
    prompts = [(suite, prompt) for suite in suites for prompt in suite.prompts]
    for repetition in range(repetitions):
        for number, (suite, prompt) in enumerate(processes.share(prompts)):
            yield Group(suite, prompt, repetition, backwards=(repetition + number) % 2 == 1)


def _fill(
    run: Run,
    settings: Settings,
    folder: RunFolder,
    groups: Sequence[Group],
    processes: Processes,
    progress: Progress,
) -> None:
    """Runs every configuration of every group that there is no row of."""
    rows = {row.key: row for row in folder.rows()}
    wanted = len(groups) * len(run.configurations)
    done = sum(group.key(c) in rows for group in groups for c in run.configurations)
    with folder.open_rows(processes.index if processes.count > 1 else None) as writer:
        for target in dict.fromkeys(c.target for c in run.configurations):
            own = [c for c in run.configurations if c.target == target]
            missing = [g for g in groups if any(g.key(c) not in rows for c in own)]
            if not missing:
                continue
            progress(f"loading {target}", done, wanted)
            bench = _Bench.of(target, own, settings, str(processes.device))
            for c in own:
                progress(f"warming up {c.name}", done, wanted)
                bench.warm_up(c, [group.prompt for group in missing])
            for group in missing:
                progress(f"{group.suite.name} {group.prompt.id}", done, wanted)
                for row in bench.rows(run, group, rows):
                    writer.append(row)
                    rows[row.key] = row
                    done += 1
        progress("done", done, wanted)


@dataclass(frozen=True)
class _Bench:
    """A target with all that runs on it."""

    subject: Subject
    ways: Mapping[str, Way]
    settings: Settings

    @classmethod
    def of(
        cls, target: str, own: Sequence[Configuration], settings: Settings, device: str
    ) -> _Bench:
        subject = Subject.load(
            target,
            dtype=settings.dtype,
            device=device,
            capture=settings.capture,
            max_new=settings.max_new_tokens,
        )
        return cls(subject, {c.name: subject.way(c) for c in own}, settings)

    def warm_up(self, configuration: Configuration, prompts: Sequence[Prompt]) -> None:
        """Once on the longest prompt there is room for, so that nothing grows in a timed run."""
        inputs = [self._encode(prompt) for prompt in prompts]
        room = getattr(self.subject.model.config, "max_position_embeddings", None)
        fits = [
            each
            for each in inputs
            if room is None or each["input_ids"].shape[1] + self.settings.max_new_tokens <= room
        ]
        if fits:
            longest = max(fits, key=lambda each: each["input_ids"].shape[1])
            self.ways[configuration.name](longest, 0, watch=False)

    def rows(self, run: Run, group: Group, known: Mapping[Key, Row]) -> list[Row]:
        """The rows of a group that are not known, compared with the plain loop's."""
        own = [c for c in run.configurations if c.name in self.ways]
        order = own[::-1] if group.backwards else own
        inputs = self._encode(group.prompt)
        made: dict[str, tuple[Row, bool]] = {}
        for c in order:
            if group.key(c) not in known:
                made[c.name] = self._row(c, group, inputs)
        rows = []
        for c in own:
            if c.name in made:
                row, follows = made[c.name]
                plain = run.plain_of(c)
                reference = made[plain.name][0] if plain.name in made else known[group.key(plain)]
                if follows and not c.is_plain and row.error is None and reference.error is None:
                    row = replace(row, lossless=self._compare(row, reference, inputs, c))
                rows.append(row)
        return rows

    def _encode(self, prompt: Prompt) -> dict[str, Tensor]:
        encoded = encode(self.subject.tokenizer, prompt.messages).to(self.subject.device)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _row(
        self, configuration: Configuration, group: Group, inputs: dict[str, Tensor]
    ) -> tuple[Row, bool]:
        seed = group.seed(self.settings.seed)
        error = None
        try:
            got = self.ways[configuration.name](inputs, seed, watch=group.repetition == 0)
        except (ValueError, RuntimeError, NotImplementedError) as raised:
            got = Generated([], 0, 0, {"total": 0.0}, follows=False)
            error = f"{type(raised).__name__}: {raised}"
        row = Row(
            configuration=configuration.name,
            suite=group.suite.name,
            prompt=group.prompt.id,
            category=group.prompt.category,
            repetition=group.repetition,
            seed=seed,
            prompt_tokens=inputs["input_ids"].shape[1],
            new_tokens=len(got.tokens),
            decode_tokens=got.decode_tokens,
            steps=got.steps,
            seconds=got.seconds,
            decode_seconds=got.seconds["total"] - got.seconds.get("prefill", 0.0),
            tokens=got.tokens,
            error=error,
            **got.counts,
        )
        if configuration.temperature > 0 and error is None:
            row = replace(row, log_likelihood=self._log_likelihood(row, inputs, configuration))
        return row, got.follows

    @torch.no_grad()
    def _log_likelihood(
        self, row: Row, inputs: dict[str, Tensor], configuration: Configuration
    ) -> float:
        prompt = inputs["input_ids"]
        new = torch.tensor(row.tokens, device=prompt.device)
        text = torch.cat([prompt[0], new])[None]
        keep = torch.arange(prompt.shape[1] - 1, text.shape[1] - 1, device=prompt.device)
        logits = self.subject.model(text, logits_to_keep=keep).logits[0].float()
        chances = (logits / configuration.temperature).log_softmax(-1)
        return float(chances.gather(1, new[:, None]).sum())

    @torch.no_grad()
    def _compare(
        self, row: Row, plain: Row, inputs: dict[str, Tensor], configuration: Configuration
    ) -> Lossless:
        """Whether a row has the plain loop's tokens; if not, whether rounding may have decided."""
        if row.tokens == plain.tokens:
            return Lossless(equal=True)
        pairs = enumerate(zip(row.tokens, plain.tokens, strict=False))
        shorter = min(len(row.tokens), len(plain.tokens))
        first = next((place for place, (a, b) in pairs if a != b), shorter)
        if configuration.temperature > 0:
            return Lossless(equal=False, first_difference=first)
        prompt = inputs["input_ids"]
        new = torch.tensor(plain.tokens[:first], dtype=prompt.dtype, device=prompt.device)
        text = torch.cat([prompt[0], new])[None]
        logits = self.subject.model(text, logits_to_keep=1).logits[0, -1]
        best, second = (float(value) for value in logits.float().topk(2).values)
        return Lossless(
            equal=False,
            first_difference=first,
            gap=best - second,
            near_tie=best - second <= near_tie(logits.dtype, best),
        )


def near_tie(dtype: torch.dtype, best: float) -> float:
    """How close two logits may be for rounding to decide between them."""
    return max(NEAR_TIE, 4 * torch.finfo(dtype).eps * abs(best))
