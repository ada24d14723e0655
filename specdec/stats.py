"""What a run did, as sums: they add up over steps, requests and runs; ratios come last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.table import Table

PHASES = ("prefill", "draft", "forward", "accept", "commit", "captured", "gap")


@dataclass
class GenerationStats:
    """Counts of a run. A step of a batch counts once for every sequence in it.

    Steps are verifications of trees. The pass that ends a prompt gives a token, but it is none.

    `reached[d]` is how often a step came to a node of depth d - 1 that had children, and
    `accepted_at[d]` how often one of them was accepted.
    """

    steps: int = 0
    tokens: int = 0
    """Tokens emitted, cut at the end of sequence or the length limit."""
    first_tokens: int = 0
    """Those that came with the pass that computed the end of the text before them, not with a step:
    the first one of a request, and the next one of a request that was preempted."""
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    """Tokens that were computed before a request could decode."""
    reused_tokens: int = 0
    """Tokens whose K and V were there: from earlier texts, or from requests that begin alike."""
    preemptions: int = 0
    """Requests that were stopped for lack of pages and began again."""
    evicted_pages: int = 0
    """Pages of earlier texts that were given up."""
    bytes: dict[str, int] = field(default_factory=dict)
    """The most bytes each owner had when a request ended: see `CacheUsage`."""
    drafted: int = 0
    """Nodes proposed, roots not counted."""
    accepted: int = 0
    """Nodes accepted, roots not counted."""
    reached: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase; `total` is all of it, and what the phases leave is the host's share."""
    rule: str = ""
    paths: Counter[str] = field(default_factory=Counter)
    """Passes by how they ran: `captured`, or why they were not."""

    def __add__(self, other: GenerationStats) -> GenerationStats:
        return GenerationStats(
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            first_tokens=self.first_tokens + other.first_tokens,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            prefilled_tokens=self.prefilled_tokens + other.prefilled_tokens,
            reused_tokens=self.reused_tokens + other.reused_tokens,
            preemptions=self.preemptions + other.preemptions,
            evicted_pages=self.evicted_pages + other.evicted_pages,
            bytes={
                owner: max(self.bytes.get(owner, 0), other.bytes.get(owner, 0))
                for owner in self.bytes | other.bytes
            },
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            reached=self.reached + other.reached,
            accepted_at=self.accepted_at + other.accepted_at,
            seconds={
                phase: self.seconds.get(phase, 0.0) + other.seconds.get(phase, 0.0)
                for phase in (*PHASES, "total")
            },
            rule=mixed(self.rule, other.rule),
            paths=self.paths + other.paths,
        )

    @property
    def hit_rate(self) -> float:
        """Reused tokens as a share of those that requests needed before they could decode."""
        needed = self.reused_tokens + self.prefilled_tokens
        return self.reused_tokens / needed if needed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens a verification emits: accepted drafts plus the next token."""
        return (self.tokens - self.first_tokens) / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted nodes as a share of the nodes drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_depth(self) -> dict[int, float]:
        """How often a child was accepted, given that its parent was and had children."""
        return {d: self.accepted_at[d] / count for d, count in sorted(self.reached.items())}

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over the whole time, the prefill included."""
        total = self.seconds.get("total", 0.0)
        return self.tokens / total if total else 0.0

    @property
    def loop_overhead(self) -> float:
        """Time around the target's forwards - draft, plan, accept, commit, host - over theirs.

        Of captured steps, only what is outside of them counts as around.
        """
        forward = self.seconds.get("forward", 0.0) + self.seconds.get("captured", 0.0)
        around = self.seconds.get("total", 0.0) - self.seconds.get("prefill", 0.0) - forward
        return around / forward if forward else 0.0

    def add_step(self, *, drafted: int, accepted: int, continued: bool, tokens: int) -> None:
        """Counts one sequence's part of a step."""
        self.steps += 1
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += accepted
        for depth in range(1, accepted + 1):
            self.reached[depth] += 1
            self.accepted_at[depth] += 1
        if continued:
            self.reached[accepted + 1] += 1

    def add_first(self, *, tokens: int) -> None:
        """Counts what a request got from the pass that ended its prompt."""
        self.tokens += tokens
        self.first_tokens += tokens

    def to_dict(self) -> dict[str, object]:
        """Plain numbers for JSON, the ratios included."""
        return {
            "rule": self.rule,
            "steps": self.steps,
            "tokens": self.tokens,
            "first_tokens": self.first_tokens,
            "prompt_tokens": self.prompt_tokens,
            "prefilled_tokens": self.prefilled_tokens,
            "reused_tokens": self.reused_tokens,
            "hit_rate": self.hit_rate,
            "preemptions": self.preemptions,
            "evicted_pages": self.evicted_pages,
            "bytes": dict(self.bytes),
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "loop_overhead": self.loop_overhead,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_by_depth": self.acceptance_by_depth,
            "seconds": dict(self.seconds),
            "paths": dict(self.paths),
        }

    def __rich__(self) -> Table:
        table = Table(show_header=False, box=None)
        total = self.seconds.get("total", 0.0)
        by_depth = "  ".join(f"{d}: {a:.2f}" for d, a in self.acceptance_by_depth.items())
        shares = "  ".join(
            f"{phase} {self.seconds[phase] / total:.0%}"
            for phase in PHASES
            if phase in self.seconds
        )
        made = f"{self.first_tokens} with prompts, the others in {self.steps} steps ({self.rule})"
        table.add_row("tokens", f"{self.tokens}, {made}")
        table.add_row("tokens per step", f"{self.tokens_per_step:.2f}")
        table.add_row("drafted, accepted", f"{self.drafted}, {self.accepted}")
        table.add_row("acceptance by depth", by_depth or "nothing drafted")
        table.add_row("prompt", f"{self.prefilled_tokens} computed, {self.reused_tokens} reused")
        table.add_row("speed", f"{self.tokens_per_second:.1f} tokens/s in {total:.2f} s")
        table.add_row("passes", "  ".join(f"{path}: {n}" for path, n in self.paths.items()))
        table.add_row("time", f"{shares}; loop around the forward {self.loop_overhead:.0%} of it")
        return table


def mixed(rule: str, other: str) -> str:
    """The label of what two rules did together: lossy if either is."""
    if rule == other:
        return rule
    return "mixed (lossy)" if "(lossy)" in rule + other else "mixed"


class Stopwatch:
    """Adds up time by phase without making the host wait for the device.

    On an accelerator the phases are bracketed by events, which are read when the run is over.
    """

    def __init__(self, device: torch.device, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time on the host's clock."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time on the device's clock, where it has one of its own."""
        if not self._cuda:
            with self.host(name):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def read(self) -> None:
        """Adds what is outstanding; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self.add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()

    def add(self, name: str, seconds: float) -> None:
        """Time that somebody else has measured."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
