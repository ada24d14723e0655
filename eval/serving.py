"""Batches, shared prefixes, packed prompts and searches, timed end to end on this machine.

    python -m specdec.eval.serving --model smollm2-135m --dtype bfloat16 --json serving.json

Five measurements, each against its honest opposite on the same model in the same dtype:

* `batch`: tokens per second against batch size, with private prompts and with a shared one, beside
  transformers' `generate` (which shares nothing, so its private prompts stand for both).
* `loop`: what a step of the largest batch costs besides the model, with and without drafts.
* `prefill`: prompts of lognormal lengths, packed, against the same prompts padded, here and in
  transformers.
* `few-shot`: DeFT's questions below one long prompt, with sharing on and off.
* `thought`: a tree of thought that branches at every level, with sharing on and off.

Every arm computes its prompts anew. Text is random tokens; only greedy decoding is timed. Each arm
runs once to warm up, in which some steps are profiled, and once to be timed. Rows are written as
they come, and what there is no time left for is left out and named.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import specdec
from specdec import models
from specdec.console import err, out
from specdec.drafters import NGram
from specdec.drafting import Drafter, NoDraft
from specdec.engine import Engine
from specdec.eval.generate import shapes
from specdec.eval.kernel_times import kernel_times
from specdec.eval.provenance import provenance
from specdec.stats import GenerationStats

MEASUREMENTS = {"batch": 0.45, "loop": 0.55, "prefill": 0.65, "few-shot": 0.85, "thought": 1.0}
"""When each has to be over, as a share of the time there is."""
PLAIN = NoDraft()
PASS = 8192
"""Rows of one pass, here and there: prompts are a load to get through, nobody waits for a token."""
PROFILED = 5
"""Decoding steps that are profiled, behind as many that are not."""
ATTENTION = ("attend_kernel", "_merge_kernel")
LOOP = (
    *("_draft_kernel", "_place_kernel", "_requests", "_items", "_tables"),
    *("reduce_kernel", "argmax", "_accept_kernel", "_move_kernel"),
)
"""Words in the names of kernels: draft, place and plan, choose and accept, commit."""


@dataclass(frozen=True)
class Row:
    """One arm of one case."""

    measurement: str
    case: str
    arm: str
    seconds: float
    tokens: int
    """New ones, or for `prefill` those of the prompts, without padding."""
    prefilled: int = 0
    first: float | None = None
    """Seconds until all requests decode; those that were computed have their first token then."""
    step_ms: float | None = None
    """Of one decoding step of all requests together."""
    attention_ms: float | None = None
    """Of it, in the kernels of attention."""
    loop_share: float | None = None
    """Time besides the model as a share of it: idle, and for draft, plan, acceptance, commit."""
    path: str = ""
    """How the passes ran: `captured`, or why not."""
    peak_mb: float = 0.0
    """Committed K and V when requests ended."""

    @property
    def rate(self) -> float:
        """Tokens per second, the prompts' time included."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Way:
    """How ours is driven."""

    shared: bool
    drafter: Drafter = PLAIN
    nodes: int = 1
    capture: bool = True


@dataclass
class Decoded:
    """What some requests took that were served together, and the steps in which all decoded."""

    seconds: float
    first: float
    steady: float
    """Seconds from then until the first one ended."""
    steps: int
    gap: float
    """Of those, in which the device waited for the host, if the steps were captured."""
    stats: GenerationStats
    texts: list[list[int]]
    kernels: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by kernel, where it was profiled."""


@dataclass
class Bench:
    """A model and how it is driven."""

    model: Any

    def __post_init__(self) -> None:
        # One for all arms, so that graphs and pages are made once.
        self.wrapped: Any = specdec.wrap(self.model, PLAIN, adaptive=False)

    def text(self, *size: int) -> Tensor:
        """Random token ids, never 0."""
        top = self.model.config.get_text_config(decoder=True).vocab_size
        return torch.randint(1, top, size, device=self.model.device)

    def wait(self) -> float:
        """The time when the device has done all it was told."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def row(self, measurement: str, case: str, arm: str, way: Way, ids: Tensor, new: int) -> Row:
        """Serves prompts of one length together, once to warm up and once to be timed."""
        prompts = ids.tolist()
        warm = self.serve(way, prompts, new, profiled=True)
        return self.row_of(measurement, case, arm, [self.serve(way, prompts, new)], warm)

    def row_of(
        self, measurement: str, case: str, arm: str, runs: Sequence[Decoded], warm: Decoded
    ) -> Row:
        """Sums up runs that follow one another; the steps are those of the last one."""
        last = runs[-1]
        stats = sum((run.stats for run in runs), GenerationStats(rule=last.stats.rule))
        step = last.steady / last.steps
        path = last.stats.paths.most_common(1)[0][0]
        attention = 1000 * _named(warm.kernels, ATTENTION) if warm.kernels else None
        if path == "captured":
            loop = (last.gap / last.steps + _named(warm.kernels, LOOP)) / step
        else:
            decoding = stats.seconds["total"] - stats.seconds.get("prefill", 0.0)
            loop = 1 - stats.seconds["forward"] / decoding
        return Row(
            measurement,
            case,
            arm,
            seconds=sum(run.seconds for run in runs),
            tokens=stats.tokens,
            prefilled=stats.prefilled_tokens,
            first=sum(run.first for run in runs),
            step_ms=1000 * step,
            attention_ms=attention,
            loop_share=loop,
            path=path,
            peak_mb=stats.bytes["committed"] / 2**20,
        )

    def serve(
        self,
        way: Way,
        prompts: Sequence[Sequence[int]],
        new: int,
        *,
        keep: bool = False,
        profiled: bool = False,
    ) -> Decoded:
        """Serves prompts together.

        Args:
            keep: use what is cached already.
            profiled: look into the kernels of some steps; what it takes means nothing then.
        """
        wrapped = self.wrapped
        wrapped.prefix_cache, wrapped.drafter, wrapped.nodes = way.shared, way.drafter, way.nodes
        wrapped._driven().capture = way.capture
        if not keep:
            wrapped.cache.prefixes.clear()
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
        begin = self.wait()
        with wrapped.engine(step_tokens=PASS) as engine:
            handles = [engine.submit(text, **options) for text in prompts]
            while engine.scheduler.waiting or engine.scheduler.prefilling:
                engine.step()
            first = self.wait()
            kernels: dict[str, float] = {}
            if profiled and self.model.device.type == "cuda":
                kernels = _profile(engine)
            steps, gap = 0, engine.stats.seconds.get("gap", 0.0)
            while not any(handle.done for handle in handles):
                engine.step()
                steps += 1
            steady, gap = self.wait(), engine.stats.seconds.get("gap", 0.0) - gap
            engine.run_all()
            end = self.wait()
        texts = [list(handle.tokens) for handle in handles]
        return Decoded(
            end - begin, first - begin, steady - first, steps, gap, engine.stats, texts, kernels
        )


def _profile(engine: Engine) -> dict[str, float]:
    """Seconds of each kernel in a decoding step, once steps are captured."""
    for _ in range(PROFILED):
        engine.step()

    def run() -> None:
        for _ in range(PROFILED):
            engine.step()

    return {name: seconds / PROFILED for name, (_, seconds) in kernel_times(run).items()}


def _named(kernels: dict[str, float], words: Sequence[str]) -> float:
    return sum(seconds for name, seconds in kernels.items() if any(w in name for w in words))


def batches(bench: Bench, sizes: Sequence[int], prompt: int, new: int) -> Iterator[Row]:
    """Tokens per second by batch size, private prompts and shared ones."""
    for size in sizes:
        private = bench.text(size, prompt + 16)
        shared = torch.cat([bench.text(1, prompt).expand(size, -1), bench.text(size, 16)], 1)
        on, off = Way(shared=True), Way(shared=False)
        yield bench.row("batch", f"{size} x {prompt} private", "specdec", on, private, new)
        case = f"{size} x {prompt} shared"
        yield bench.row("batch", case, "specdec", on, shared, new)
        yield bench.row("batch", case, "specdec, no sharing", off, shared, new)
        yield _theirs(bench, f"{size} x {prompt} private", private, new)


def _theirs(bench: Bench, case: str, ids: Tensor, new: int) -> Row:
    def run(count: int) -> float:
        begin = bench.wait()
        bench.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        return bench.wait() - begin

    run(2)
    first, seconds = run(1), run(new)
    step = 1000 * (seconds - first) / (new - 1)
    count = ids.numel()
    return Row("batch", case, "transformers", seconds, len(ids) * new, count, first, step)


def loops(bench: Bench, size: int, prompt: int, new: int) -> Iterator[Row]:
    """What a step costs besides the model, by who drafts and where."""
    text = bench.text(1, prompt // 4)
    ids = torch.cat([text.repeat(1, 4).expand(size, -1), bench.text(size, 16)], 1)
    lookup = NGram()
    for arm, way in (
        ("no drafts", Way(shared=True)),
        ("n-gram trees of 8", Way(True, lookup, 8)),
        ("n-gram trees of 8, on the host", Way(True, lookup, 8, capture=False)),
    ):
        yield bench.row("loop", f"{size} x {prompt} shared", arm, way, ids, new)


def prefills(bench: Bench, batches: Sequence[int], mean: int, longest: int) -> Iterator[Row]:
    """Prompts of lognormal lengths (Prepacking, arXiv 2404.09529): packed against padded."""
    target = bench.wrapped._driven()

    def ours(texts: Sequence[Tensor]) -> None:
        sequences = [target.cache.admit() for _ in texts]
        target.prefill(sequences, texts, chunk=PASS)
        for sequence in sequences:
            target.cache.release(sequence)

    def theirs(padded: Tensor, mask: Tensor) -> None:
        with torch.no_grad():
            bench.model(padded, attention_mask=mask, logits_to_keep=1)

    for batch in batches:
        sizes = torch.empty(batch).log_normal_(mean=torch.tensor(mean).log().item(), std=1.0)
        lengths = sizes.clamp(2, longest).long().tolist()
        prompts = [bench.text(length) for length in lengths]
        case, real = f"{batch} prompts, longest {max(lengths)}", sum(lengths)
        padded = torch.zeros(batch, max(lengths), dtype=torch.int64, device=bench.model.device)
        mask = torch.zeros_like(padded)
        for row, prompt in enumerate(prompts):
            padded[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1

        arms: dict[str, tuple[Callable[[], None], int]] = {
            "packed": (partial(ours, prompts), real),
            "padded": (partial(ours, list(padded)), padded.numel()),
            "transformers, padded": (partial(theirs, padded, mask), padded.numel()),
        }
        for arm, (run, computed) in arms.items():
            run()
            begin = bench.wait()
            run()
            yield Row("prefill", case, arm, bench.wait() - begin, real, computed)


def few_shot(bench: Bench, widths: Sequence[int], prompt: int, new: int) -> Iterator[Row]:
    """DeFT's few-shot workload (arXiv 2404.00242, section 4): b continuations of one prompt."""
    for width in widths:
        ids = torch.cat([bench.text(1, prompt).expand(width, -1), bench.text(width, 8)], 1)
        for arm, shared in (("sharing", True), ("no sharing", False)):
            case = f"b = {width}, {prompt} tokens"
            yield bench.row("few-shot", case, arm, Way(shared), ids, new)


def thoughts(bench: Bench, depth: int, width: int, prompt: int, new: int) -> Iterator[Row]:
    """A tree of thought: `width` thoughts of `new` tokens below each of the first few lines.

    The step that is told is one of the last level.
    """
    ids = bench.text(prompt).tolist()
    case = f"depth {depth}, {width} x {width} thoughts of {new}, prompt {prompt}"

    def search(shared: bool, profiled: bool) -> list[Decoded]:
        lines, runs = [ids], []
        for level in range(depth):
            prompts = [[*line, 1 + level, 2 + place] for line in lines for place in range(width)]
            last = profiled and level == depth - 1
            runs.append(bench.serve(Way(shared), prompts, new, keep=level > 0, profiled=last))
            lines = [p + t for p, t in zip(prompts, runs[-1].texts, strict=True)][:width]
        return runs

    for arm, shared in (("sharing", True), ("no sharing", False)):
        warm = search(shared, profiled=True)[-1]
        yield bench.row_of("thought", case, arm, search(shared, profiled=False), warm)


def table(rows: Sequence[Row]) -> Table:
    """All rows, for a terminal."""
    shown = Table(
        *("measurement", "case", "arm", "s", "tokens/s", "computed", "until all decode, s"),
        *("step, ms", "attention, ms", "loop", "KV MiB"),
    )
    for row in rows:
        shown.add_row(
            row.measurement,
            row.case,
            row.arm,
            f"{row.seconds:.3f}",
            f"{row.rate:.0f}",
            str(row.prefilled),
            _figure(row.first),
            _figure(row.step_ms),
            _figure(row.attention_ms),
            "" if row.loop_share is None else f"{row.loop_share:.0%}",
            f"{row.peak_mb:.1f}" if row.peak_mb else "",
        )
    return shown


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main(
    model: Annotated[
        str, typer.Option(help=f"A name, a folder, a hub id, or {', '.join(shapes.SHAPES)}.")
    ] = models.DEFAULT,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, cpu, ...")] = "cuda",
    only: Annotated[str, typer.Option(help="Measurements, comma between.")] = ",".join(
        MEASUREMENTS
    ),
    sizes: Annotated[str, typer.Option(help="Batch sizes, the most wanted first.")] = "64,1,16,4",
    prompt: Annotated[int, typer.Option(help="Tokens of the shared prompt.")] = 1024,
    few_shot_prompt: Annotated[int, typer.Option(help="Tokens of the few-shot prompt.")] = 4000,
    few_shot_widths: Annotated[str, typer.Option(help="Questions below it.")] = "20,50,30",
    new: Annotated[int, typer.Option(min=32, help="New tokens of each request.")] = 64,
    limit: Annotated[float, typer.Option(help="Seconds; later cases are left out.")] = 130.0,
    file: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
) -> None:
    """Times batches, shared prefixes, packed prompts and searches."""
    begin = time.perf_counter()
    if device.startswith("cuda") and not torch.cuda.is_available():
        err.print("device: expected one that torch can use, got cuda; try --device cpu")
        raise typer.Exit(1)
    wanted = only.split(",")
    if unknown := set(wanted) - set(MEASUREMENTS):
        err.print(f"only: expected some of {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}")
        raise typer.Exit(1)
    torch.manual_seed(0)
    bench = Bench(_load(model, torch.device(device), getattr(torch, dtype)))
    widths, counts = [list(map(int, text.split(","))) for text in (few_shot_widths, sizes)]
    measurements = {
        "batch": batches(bench, counts, prompt, new),
        "loop": loops(bench, max(counts), prompt, 2 * new),
        "prefill": prefills(bench, [16, 32, 64], mean=prompt // 4, longest=2 * prompt),
        "few-shot": few_shot(bench, widths, few_shot_prompt, new),
        "thought": thoughts(bench, depth=5, width=4, prompt=prompt, new=new // 2),
    }
    about = {
        "provenance": provenance(torch.device(device), getattr(torch, dtype)),
        "model": model,
        "transformers' attention": bench.model.config._attn_implementation,
    }
    rows: list[Row] = []
    cut: list[str] = []
    for name in wanted:
        for row in measurements[name]:
            rows.append(row)
            spent = time.perf_counter() - begin
            err.print(
                f"{spent:6.1f} s  {name}, {row.case}, {row.arm}: {row.rate:.0f} tokens/s",
                markup=False,
                highlight=False,
            )
            late = spent > limit * MEASUREMENTS[name]
            if late:
                cut.append(name)
            if file is not None:
                found = {**about, "cut short": cut, "rows": [asdict(row) for row in rows]}
                file.write_text(json.dumps(found, indent=1))
            if late:
                break
    out.print(table(rows))
    if cut:
        err.print(f"cut short, for lack of time: {', '.join(cut)}; see --only and --limit")


def _load(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    if name in shapes.SHAPES:  # with random weights
        return shapes.load(name, device, dtype).model
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        models.resolve(name), dtype=dtype, attn_implementation="sdpa"
    )
    return loaded.to(device).eval()


if __name__ == "__main__":
    typer.run(main)
