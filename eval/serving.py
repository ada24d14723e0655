"""Batches, shared prefixes, packed prompts and searches, timed end to end on this machine.

    python -m specdec.eval.serving --model smollm2-135m --dtype bfloat16 --json serving.json

Four measurements, each against its honest opposite on the same model:

* `batch`: tokens per second against batch size, with private prompts and with a shared one, beside
  transformers' `generate`; and the loop's own time as a share of the step.
* `prefill`: prompts of lognormal lengths, packed, against transformers' pass over the padded batch.
* `few-shot`: DeFT's questions below one long prompt, with sharing on and off.
* `thought`: a tree of thought that branches at every level, with sharing on and off.

Every arm computes its prompts anew. Text is random tokens; only greedy decoding is timed.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import specdec
from specdec import models
from specdec.generation import SpeculativeOutput

out, err = Console(), Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """One arm of one case; the best of some runs."""

    measurement: str
    case: str
    arm: str
    seconds: float
    tokens: int
    """New ones, or for `prefill` those of the prompts, without padding."""
    prefilled: int = 0
    loop_share: float = 0.0
    """Time around the forwards as a share of the decoding steps."""
    peak_mb: float = 0.0
    """Committed K and V when requests ended."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass
class Bench:
    """A model and how to time it."""

    model: Any
    repeats: int = 3

    def text(self, *size: int) -> Tensor:
        """Random token ids, never 0."""
        top = self.model.config.get_text_config(decoder=True).vocab_size
        return torch.randint(1, top, size, device=self.model.device)

    def best(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """The shortest of some runs behind one that warms up, and what it returned."""
        times = []
        for turn in range(1 + self.repeats):
            self._wait()
            start = time.perf_counter()
            result = run()
            self._wait()
            if turn:
                times.append((time.perf_counter() - start, result))
        return min(times, key=lambda pair: pair[0])

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def wrapped(self, *, shared: bool) -> Any:
        """Plain decoding, so that only batching and sharing differ."""
        return specdec.wrap(self.model, "none", nodes=1, prefix_cache=shared)

    def row(self, measurement: str, case: str, arm: str, run: Callable[[], Any]) -> Row:
        """Times a `generate` of ours or of transformers that returns a dictionary."""
        seconds, output = self.best(run)
        if not isinstance(output, SpeculativeOutput):
            return Row(measurement, case, arm, seconds, output)
        stats = output.stats
        assert stats is not None
        decoding = stats.seconds["total"] - stats.seconds.get("prefill", 0.0)
        share = 1 - stats.seconds["forward"] / decoding
        peak = stats.bytes["committed"] / 2**20
        return Row(
            measurement, case, arm, seconds, stats.tokens, stats.prefilled_tokens, share, peak
        )


def batches(bench: Bench, sizes: Sequence[int], prompt: int, new: int) -> list[Row]:
    """Tokens per second by batch size, private prompts and shared ones."""
    rows = []
    for size in sizes:
        trunk, tails = bench.text(1, prompt).expand(size, -1), bench.text(size, 16)
        for kind, ids in (
            ("private", bench.text(size, prompt + 16)),
            ("shared", torch.cat([trunk, tails], 1)),
        ):
            case = f"{size} x {prompt} {kind}"
            for arm, shared in (("specdec", True), ("specdec, no sharing", False)):
                wrapped = bench.wrapped(shared=shared)
                run = _generate(wrapped, ids, new)
                rows.append(bench.row("batch", case, arm, run))
            rows.append(bench.row("batch", case, "transformers", _theirs(bench.model, ids, new)))
    return rows


def _generate(wrapped: Any, ids: Tensor, new: int) -> Callable[[], Any]:
    def run() -> Any:
        wrapped.cache.prefixes.clear()
        return wrapped.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )

    return run


def _theirs(model: Any, ids: Tensor, new: int) -> Callable[[], int]:
    def run() -> int:
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
        model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        return len(ids) * new

    return run


def prefills(bench: Bench, batch: int, mean: int, longest: int) -> list[Row]:
    """Prompts of lognormal lengths (Prepacking, arXiv 2404.09529): packed against padded."""
    sizes = torch.empty(batch).log_normal_(mean=torch.tensor(mean).log().item(), std=1.0)
    lengths = sizes.clamp(2, longest).long().tolist()
    prompts = [bench.text(length) for length in lengths]
    case, real = f"{batch} prompts, {sum(lengths)} tokens, longest {max(lengths)}", sum(lengths)
    target = bench.wrapped(shared=False)._driven()
    padded = torch.zeros(batch, max(lengths), dtype=torch.int64, device=bench.model.device)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1

    def packed() -> None:
        sequences = [target.cache.admit() for _ in prompts]
        target.prefill(sequences, prompts, chunk=8192)
        for sequence in sequences:
            target.cache.release(sequence)

    def together() -> None:
        with torch.no_grad():
            bench.model(padded, attention_mask=mask, logits_to_keep=1)

    return [
        Row("prefill", case, "packed", bench.best(packed)[0], real),
        Row("prefill", case, "padded", bench.best(together)[0], real),
    ]


def few_shot(bench: Bench, widths: Sequence[int], prompt: int, new: int) -> list[Row]:
    """DeFT's few-shot workload (arXiv 2404.00242, section 4): b continuations of one prompt."""
    rows = []
    for width in widths:
        ids = torch.cat([bench.text(1, prompt).expand(width, -1), bench.text(width, 8)], 1)
        for arm, shared in (("sharing", True), ("no sharing", False)):
            run = _generate(bench.wrapped(shared=shared), ids, new)
            rows.append(bench.row("few-shot", f"b = {width}, {prompt} tokens", arm, run))
    return rows


def thoughts(bench: Bench, depth: int, width: int, prompt: int, new: int) -> list[Row]:
    """A tree of thought: `width` thoughts of `new` tokens below each of the first few lines."""
    ids = bench.text(prompt).tolist()

    def search(shared: bool) -> Callable[[], int]:
        wrapped = bench.wrapped(shared=shared)

        def run() -> int:
            wrapped.cache.prefixes.clear()
            lines, tokens = [ids], 0
            for level in range(depth):
                prompts = [
                    [*line, 1 + level, 2 + place] for line in lines for place in range(width)
                ]
                with wrapped.engine() as engine:
                    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
                    handles = [engine.submit(text, **options) for text in prompts]
                    engine.run_all()
                tokens += sum(len(handle.tokens) for handle in handles)
                grown = [p + h.tokens for p, h in zip(prompts, handles, strict=True)]
                lines = grown[:width]
            return tokens

        return run

    case = f"depth {depth}, {width} x {width} thoughts of {new}, prompt {prompt}"
    rows = []
    for arm, shared in (("sharing", True), ("no sharing", False)):
        seconds, tokens = bench.best(search(shared))
        rows.append(Row("thought", case, arm, seconds, tokens))
    return rows


def table(rows: Sequence[Row]) -> Table:
    """All rows, for a terminal."""
    shown = Table("measurement", "case", "arm", "s", "tokens/s", "prefilled", "loop", "KV MiB")
    for row in rows:
        shown.add_row(
            row.measurement,
            row.case,
            row.arm,
            f"{row.seconds:.3f}",
            f"{row.rate:.0f}",
            str(row.prefilled or ""),
            f"{row.loop_share:.0%}" if row.loop_share else "",
            f"{row.peak_mb:.1f}" if row.peak_mb else "",
        )
    return shown


def main(
    model: Annotated[str, typer.Option(help="A name, a folder or a hub id.")] = models.DEFAULT,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, cpu, ...")] = "cuda",
    only: Annotated[str, typer.Option(help="Measurements, comma between.")] = (
        "batch,prefill,few-shot,thought"
    ),
    sizes: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8,16,32,64",
    prompt: Annotated[int, typer.Option(help="Tokens of the shared prompt.")] = 1024,
    few_shot_prompt: Annotated[int, typer.Option(help="Tokens of the few-shot prompt.")] = 4000,
    few_shot_widths: Annotated[str, typer.Option(help="Questions below it.")] = "20,30,50",
    new: Annotated[int, typer.Option(help="New tokens of each request.")] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    file: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
) -> None:
    """Times batches, shared prefixes, packed prompts and searches."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        err.print("device: expected one that torch can use, got cuda; try --device cpu")
        raise typer.Exit(1)
    torch.manual_seed(0)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        models.resolve(model), dtype=getattr(torch, dtype)
    )
    bench = Bench(loaded.to(device).eval(), repeats)
    wanted = only.split(",")
    rows: list[Row] = []
    if "batch" in wanted:
        rows += batches(bench, [int(size) for size in sizes.split(",")], prompt, new)
    if "prefill" in wanted:
        rows += prefills(bench, batch=32, mean=prompt // 4, longest=2 * prompt)
    if "few-shot" in wanted:
        widths = [int(width) for width in few_shot_widths.split(",")]
        rows += few_shot(bench, widths, few_shot_prompt, new)
    if "thought" in wanted:
        rows += thoughts(bench, depth=3, width=4, prompt=prompt, new=new // 2)
    out.print(table(rows))
    if file is not None:
        machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
        about = {"device": machine, "torch": torch.__version__, "arguments": sys.argv[1:]}
        file.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    typer.run(main)
