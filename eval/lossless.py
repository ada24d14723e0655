"""Greedy decoding with trees against transformers' own generate, prompt by prompt.

    python -m specdec.eval.lossless --prompts question.jsonl --json out.json

Every configuration runs the same prompts. Its tokens must equal those of transformers; a first
difference is excused only where the model's two best logits lie within 1e-4 of each other. Tokens
per step stand beside those of transformers' prompt lookup. Both count every pass that gave tokens,
that over the prompt, too.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import models
from specdec.drafters import DraftModel
from specdec.eval import judging
from specdec.eval.provenance import provenance
from specdec.testing import degraded

CONFIGURATIONS = ("prompt-lookup", "ngram-1", "ngram-4", "draft-1", "draft-4")

err = Console(stderr=True)


@dataclass(frozen=True)
class Question:
    """A prompt of a suite in Spec-Bench's form; only the first turn is asked."""

    id: int
    category: str
    text: str


@dataclass
class Tally:
    """What one configuration did on the prompts of one category."""

    tokens: int = 0
    steps: int = 0
    """Passes that gave tokens, those over prompts included."""
    prompts: int = 0
    equal: int = 0
    near_ties: int = 0
    different: list[int] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Ratio of sums."""
        return self.tokens / self.steps if self.steps else 0.0


def load_questions(path: Path, *, small: int, large: int) -> list[Question]:
    """The first questions of each category: `small` of those with 10, `large` of the others."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    sizes = Counter(line["category"] for line in lines)
    taken: Counter[str] = Counter()
    chosen = []
    for line in lines:
        category = line["category"]
        if taken[category] < (small if sizes[category] <= 10 else large):
            taken[category] += 1
            chosen.append(Question(line["question_id"], category, line["turns"][0]))
    return chosen


@contextmanager
def count_forwards(model: Any) -> Iterator[list[int]]:
    """Counts the passes of a model: one entry a pass."""
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        hook.remove()


def judge(model: Any, got: Tensor, reference: Tensor) -> str:
    """`equal`, `near-tie` or `different`, for [L] token ids that start with the same prompt."""
    first = reference[None, :1]
    return judging.judge(model, first, got[1:].tolist(), reference[1:].tolist()).verdict


class Suite:
    """Questions as token ids, with transformers' greedy answers."""

    def __init__(self, model: Any, tokenizer: Any, questions: Sequence[Question], new: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.questions = questions
        self.new = new
        self.prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"].to(model.device)
            for question in questions
        ]
        self.references = [
            self._transformers(prompt) for prompt in self._track(self.prompts, "transformers")
        ]

    def _track(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        yield from track(items, description=what, console=err)

    def _transformers(self, prompt: Tensor, **options: Any) -> Tensor:
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.new,
            do_sample=False,
            **options,
        )
        row: Tensor = out[0]
        return row

    def prompt_lookup(self) -> dict[str, Tally]:
        """transformers' prompt lookup with 10 tokens."""
        tallies: dict[str, Tally] = defaultdict(Tally)
        for index, prompt in enumerate(self._track(self.prompts, "prompt lookup")):
            with count_forwards(self.model) as passes:
                out = self._transformers(prompt, prompt_lookup_num_tokens=10)
            self._add(tallies, index, out, len(passes))
        return dict(tallies)

    def speculative(
        self, wrapped: specdec.SpeculativeModel, *, batch: int, name: str
    ) -> dict[str, Tally]:
        """Our own generate, `batch` prompts at a time, padded on the left."""
        tallies: dict[str, Tally] = defaultdict(Tally)
        starts = list(range(0, len(self.prompts), batch))
        for start in self._track(starts, name):
            prompts = self.prompts[start : start + batch]
            width = max(prompt.shape[1] for prompt in prompts)
            padding = [width - prompt.shape[1] for prompt in prompts]
            ids = torch.cat(
                [torch.nn.functional.pad(p, (n, 0)) for p, n in zip(prompts, padding, strict=True)]
            )
            mask = torch.stack([(torch.arange(width) >= n).long() for n in padding]).to(ids.device)
            passes: Counter[int] = Counter()
            rows: dict[int, list[int]] = defaultdict(list)
            for step in wrapped.stream(
                ids, attention_mask=mask, max_new_tokens=self.new, do_sample=False
            ):
                for row, tokens in step.tokens.items():
                    rows[row] += tokens
                    passes[row] += 1
            for row, prompt in enumerate(prompts):
                answer = torch.tensor(rows[row], device=ids.device)
                self._add(tallies, start + row, torch.cat([prompt[0], answer]), passes[row])
        return dict(tallies)

    def _add(self, tallies: dict[str, Tally], index: int, out: Tensor, steps: int) -> None:
        question = self.questions[index]
        verdict = judge(self.model, out, self.references[index])
        for name in (question.category, "overall"):
            tally = tallies[name]
            tally.prompts += 1
            tally.steps += steps
            tally.tokens += len(out) - self.prompts[index].shape[1]
            tally.equal += verdict == "equal"
            tally.near_ties += verdict == "near-tie"
            if verdict == "different":
                tally.different.append(question.id)


def show(results: dict[str, dict[str, Tally]]) -> Table:
    """Tokens per step by category, one column a configuration."""
    table = Table("tokens per step", *results)
    categories = sorted({name for tallies in results.values() for name in tallies} - {"overall"})
    for category in (*categories, "overall"):
        cells = [f"{t[category].tokens_per_step:.2f}" for t in results.values() if category in t]
        table.add_row(category, *cells)
    overall = [tallies["overall"] for tallies in results.values()]
    table.add_row(
        "equal / near-ties / different",
        *(f"{t.equal} / {t.near_ties} / {len(t.different)}" for t in overall),
    )
    return table


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL in Spec-Bench's form.")],
    model: Annotated[
        str, typer.Option(help="A known name, a folder or a hub id.")
    ] = models.DEFAULT,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Configurations, all by default: {', '.join(CONFIGURATIONS)}."),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes of n-gram trees.")] = 32,
    draft_nodes: Annotated[int, typer.Option(help="Nodes of a draft model's trees.")] = 16,
    bits: Annotated[int, typer.Option(help="Bits of the degraded draft model's weights.")] = 4,
    new: Annotated[int, typer.Option(help="New tokens.")] = 128,
    small: Annotated[int, typer.Option(help="Prompts of each category of 10.")] = 2,
    large: Annotated[int, typer.Option(help="Prompts of each larger category.")] = 5,
    device: Annotated[str, typer.Option()] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write results.")
    ] = None,
) -> None:
    """Runs the configurations `prompt-lookup`, `ngram-B` and `draft-B` for batch sizes B."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = models.resolve(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, use_safetensors=True
    )
    loaded = loaded.to(device).eval()
    questions = load_questions(prompts, small=small, large=large)
    suite = Suite(loaded, AutoTokenizer.from_pretrained(where), questions, new)
    results: dict[str, dict[str, Tally]] = {}
    for name in only or CONFIGURATIONS:
        kind, _, batch = name.partition("-")
        if name == "prompt-lookup":
            results[name] = suite.prompt_lookup()
            continue
        if kind == "ngram":
            wrapped = specdec.wrap(loaded, "ngram", nodes=nodes)
        else:
            wrapped = specdec.wrap(
                loaded, DraftModel(degraded(loaded, bits=bits)), nodes=draft_nodes
            )
        results[name] = suite.speculative(wrapped, batch=int(batch), name=name)
    Console().print(show(results))
    if json_file is not None:
        record = {
            "provenance": provenance(loaded.device, loaded.dtype),
            "question_ids": [question.id for question in questions],
            "nodes": nodes,
            "draft": {"bits": bits, "nodes": draft_nodes},
            "results": {
                name: {
                    category: asdict(t) | {"tokens_per_step": t.tokens_per_step}
                    for category, t in tallies.items()
                }
                for name, tallies in results.items()
            },
        }
        json_file.write_text(json.dumps(record, indent=1))
    if any(tallies["overall"].different for tallies in results.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
