"""Times every arm on every prompt, and takes one captured step apart."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from specdec.captured import Graph
from specdec.eval.generate.arms import Arm
from specdec.eval.generate.shapes import Subject
from specdec.eval.kernel_times import kernel_times
from specdec.eval.provenance import provenance
from specdec.graphs import reach

PARTS = {
    "draft": ("_draft_kernel",),
    "plan": ("_place_kernel", "_requests", "_items", "_tables"),
    "attention": ("attend_kernel", "_merge_kernel", "_rotate_kernel"),
    "norms and gates": ("_add_norm_kernel", "_norm_heads_kernel", "_gate_kernel"),
    "accept": ("reduce_kernel", "_accept_kernel", "argmax"),
    "commit": ("_move_kernel",),
    "products": ("_product_kernel", "nvjet", "gemm", "gemv", "cutlass", "splitK", "cublas"),
}
"""Parts of a step by words in the names of their kernels; the first that fits counts."""


CONTEXT = 1024
"""Tokens before the steps that are taken apart."""
STREAMED = 256
"""New tokens of the text that they are in, at most."""
TRACED = 8
"""Steps of a trace."""


@dataclass
class Timed:
    """One prompt with one arm."""

    prompt: str
    tokens: int
    seconds: float  # of the whole call
    first: float  # of a call for one token: the prompt's pass
    steps: int | None  # behind it
    same: bool | None = None
    """Whether the text is that of the first arm; None where it is synthetic, or the first."""
    agreed: int | None = None
    """New tokens before the first difference."""


@dataclass
class ArmResult:
    """One arm on all prompts."""

    name: str
    what: str
    synthetic: bool = False
    start_seconds: float = math.nan
    """Until the first call is over: compilation, capture and all."""
    runs: list[Timed] = field(default_factory=list)
    gap_us: float | None = None
    """Time between two captured steps in which the GPU had nothing to do."""
    peak_bytes: int | None = None
    """Above the weights, the pages of the cache included."""
    pool_bytes: int | None = None
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Ratio of sums over the prompts, prompts included in the time."""
        return sum(run.tokens for run in self.runs) / sum(run.seconds for run in self.runs)

    @property
    def tokens_per_step(self) -> float | None:
        """Ratio of sums, without the first tokens, which come with the prompts."""
        if not self.runs or any(run.steps is None for run in self.runs):
            return None
        return sum(run.tokens - 1 for run in self.runs) / sum(run.steps or 1 for run in self.runs)


@dataclass
class StepResult:
    """A captured step with trees of one size."""

    nodes: int
    ms: float
    parts: dict[str, float] = field(default_factory=dict)
    """Milliseconds by part: how much later the step ends because of it, see `kernel_times`."""
    kernels: list[tuple[str, int, float]] = field(default_factory=list)
    """Name, launches, microseconds in all, counted likewise, the dearest first."""


@dataclass
class Result:
    """All of a run."""

    provenance: dict[str, object]
    model: str
    weight_bytes: int
    floor_ms: float
    """To read the weights once at the bandwidth that was measured."""
    new_tokens: int
    arms: list[ArmResult] = field(default_factory=list)
    steps: list[StepResult] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self), indent=1))

    def of(self, name: str) -> ArmResult | None:
        return next((arm for arm in self.arms if arm.name == name and arm.runs), None)


def run(
    subject: Subject,
    chosen: Sequence[Callable[[], Arm]],
    prompts: Sequence[tuple[str, Tensor]],
    *,
    new_tokens: int,
    copy_tbps: float,
    after_arm: Callable[[Result], None] = lambda _: None,
    traces: Path | None = None,
) -> Result:
    """Runs the arms one after another, each on all prompts after two calls of warm-up.

    Args:
        prompts: names and ids [1, L] on the device.
        copy_tbps: bandwidth that the weights can be read with.
        after_arm: called with what there is so far.
        traces: folder for a trace of some steps of each of our arms, as Perfetto shows it.
    """
    device = prompts[0][1].device
    bytes_ = subject.weight_bytes
    dtype = next(subject.model.parameters()).dtype
    result = Result(
        provenance(device, dtype), subject.name, bytes_, bytes_ / copy_tbps / 1e9, new_tokens
    )
    texts: dict[str, list[int]] = {}
    for make in chosen:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        weights = torch.cuda.memory_allocated(device)
        arm = make()
        found = ArmResult(arm.name, arm.what, arm.synthetic)
        result.arms.append(found)
        try:
            _measure(arm, found, prompts, new_tokens, texts)
        except Exception as error:  # the others go on
            found.error = f"{type(error).__name__}: {error}"[:500]
        found.peak_bytes = torch.cuda.max_memory_allocated(device) - weights
        if arm.wrapped is not None and found.error is None:
            pool = arm.wrapped.cache.pool
            found.pool_bytes = pool.page_bytes * (pool.num_pages + 1)
            if traces is not None:
                _trace(arm, _context(prompts), traces / f"{arm.name}_trace.json.gz")
            for step in _steps(arm, _context(prompts)):
                if step.nodes not in {s.nodes for s in result.steps}:
                    result.steps.append(step)
        after_arm(result)
        del arm
    return result


def _measure(
    arm: Arm,
    found: ArmResult,
    prompts: Sequence[tuple[str, Tensor]],
    new_tokens: int,
    texts: dict[str, list[int]],
) -> None:
    begin = time.perf_counter()
    if arm.wrapped is not None:
        longest = max(prompt.shape[1] for _, prompt in prompts) + new_tokens
        longest = max(longest, CONTEXT + STREAMED)
        arm.wrapped.warm_up(longest=longest, progress=False)
    _timed(arm, prompts[0][1], 8)
    found.start_seconds = time.perf_counter() - begin
    _timed(arm, prompts[-1][1], new_tokens)
    gaps: list[float] = []
    for name, prompt in prompts:
        first, _ = _timed(arm, prompt, 1)
        seconds, answer = _timed(arm, prompt, new_tokens)
        text = answer.tokens[0, prompt.shape[1] :].tolist()
        run = Timed(name, len(text), seconds, first, answer.steps)
        base = texts.setdefault(name, text)
        if base is not text and not arm.synthetic:
            run.same = text == base
            pairs = zip(text, base, strict=False)
            run.agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), len(base))
        found.runs.append(run)
        if answer.stats is not None and "gap" in answer.stats.seconds:
            gaps.append(answer.stats.seconds["gap"] / answer.stats.paths["captured"])
    found.gap_us = statistics.mean(gaps) * 1e6 if gaps else None


def _timed(arm: Arm, prompt: Tensor, new: int) -> tuple[float, Any]:
    if arm.wrapped is not None:
        arm.wrapped.cache.prefixes.clear()  # every prompt is computed, as by the others
    torch.cuda.synchronize()
    begin = time.perf_counter()
    answer = arm.run(prompt, new)
    torch.cuda.synchronize()
    return time.perf_counter() - begin, answer


def _context(prompts: Sequence[tuple[str, Tensor]]) -> Tensor:
    """[1, CONTEXT] tokens of the prompts one after another, as often as it takes."""
    joined = torch.cat([ids for _, ids in prompts], 1)
    return joined.repeat(1, -(-CONTEXT // joined.shape[1]))[:, :CONTEXT]


def _steps(arm: Arm, prompt: Tensor) -> list[StepResult]:
    """The captured steps of batch 1 that a wrapper has, in the middle of a text."""
    assert arm.stream is not None
    stream = arm.stream(prompt, STREAMED)
    for _ in range(8):
        next(stream)
    latest: dict[int, Graph] = {}
    running = reach(CONTEXT + 1)  # others are left from warming up
    for graph in arm.wrapped._driven().graphs.captured:
        if len(graph.step.texts.lengths) == 1 and graph.step.longest == running:
            latest[graph.step.trees.nodes] = graph
    # What is replayed behind the leased pages is written to the trash page.
    found = [_take_apart(nodes, graph) for nodes, graph in sorted(latest.items())]
    stream.close()  # type: ignore[attr-defined]
    return found


def _trace(arm: Arm, prompt: Tensor, file: Path) -> None:
    """Some steps in the middle of a text, host and device, for ui.perfetto.dev."""
    assert arm.stream is not None
    stream = arm.stream(prompt, STREAMED)
    for _ in range(2 * TRACED):
        next(stream)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(TRACED):
            next(stream)
        torch.cuda.synchronize()
    stream.close()  # type: ignore[attr-defined]
    profiler.export_chrome_trace(str(file))


def _take_apart(nodes: int, graph: Graph) -> StepResult:
    assert graph.graph is not None
    replays = 20
    for _ in range(3):
        graph.graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.graph.replay()
    end.record()
    torch.cuda.synchronize()
    found = StepResult(nodes, begin.elapsed_time(end) / replays)
    times = kernel_times(graph.graph.replay)
    for name, (count, seconds) in sorted(times.items(), key=lambda item: -item[1][1]):
        us = seconds * 1e6
        found.kernels.append((name[:100], count, us))
        part = next((p for p, words in PARTS.items() if any(w in name for w in words)), "other")
        found.parts[part] = found.parts.get(part, 0.0) + us / 1000
    return found
