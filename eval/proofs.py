"""The promises on a real model: sampled continuations, and ties in half precision.

    python -m specdec.eval.proofs continuations --device cuda --json continuations.json
    python -m specdec.eval.proofs ties --device cuda --json ties.json

`continuations` samples 2,000 answers of up to 64 tokens with and without speculation, from seeds of
their own, and compares their log-likelihoods under the model and their lengths by two-sample
Kolmogorov-Smirnov tests. `ties` decodes prompts greedily in half precision: by transformers, by
transformers' prompt lookup, and by trees. Sums of floating-point numbers depend on their order, so
the two best tokens can change places where they are closer than that; the tests are whether trees
change more answers than prompt lookup does, and whether they do so only at such places.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import specdec
from specdec import models
from specdec.console import readable_errors
from specdec.drafters import DraftModel
from specdec.eval.loading import load_model
from specdec.eval.prompts import builtin_prompts
from specdec.eval.provenance import provenance
from specdec.testing import degraded
from specdec.topology import Topology

app = typer.Typer(add_completion=False, no_args_is_help=True)
REJECT = 1e-3
"""A p-value below this says that two samples are not of one distribution."""
QUANTILE = 1.959964
"""Of the normal distribution, for intervals of 95 %."""


@dataclass(frozen=True)
class Sampled:
    """Continuations by one drafter and rule, against those without drafts."""

    name: str
    count: int
    tokens_per_step: float
    loglik: float
    """Mean log-likelihood of an answer."""
    loglik_p: float
    """p-value of the two-sample test."""
    length: float
    length_p: float


@dataclass(frozen=True)
class Ties:
    """Greedy answers that differ from transformers' plain ones."""

    name: str
    prompts: int
    different: int
    low: float
    high: float
    """Wilson's interval of 95 % for the rate."""
    widest_gap: float
    """The two best logits at the first difference: the largest gap, in roundings of the logit."""


def kolmogorov(first: Tensor, second: Tensor) -> float:
    """The asymptotic p-value that two samples are of one distribution; too large with ties."""
    values = torch.cat([first, second]).sort().values
    a = torch.searchsorted(first.sort().values, values, right=True).double() / len(first)
    b = torch.searchsorted(second.sort().values, values, right=True).double() / len(second)
    size = len(first) * len(second) / (len(first) + len(second))
    root = math.sqrt(size)
    x = (root + 0.12 + 0.11 / root) * float((a - b).abs().max())
    if x < 0.3:
        return 1.0
    terms = [(-1.0) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101)]
    return float(min(1.0, max(0.0, 2 * sum(terms))))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The interval of 95 % for a rate (Wilson 1927)."""
    square = QUANTILE**2
    middle = (hits + square / 2) / (count + square)
    half = QUANTILE / (count + square) * math.sqrt(hits * (count - hits) / count + square / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def sample(
    wrapped: Any, prompt: Tensor, *, count: int, new: int, batch: int, seed: int, **options: Any
) -> tuple[Tensor, Tensor, float]:
    """Log-likelihoods and lengths of sampled answers, [count] each, and tokens per step."""
    likelihoods, lengths = [], []
    stats = None
    for start in range(0, count, batch):
        out = wrapped.generate(
            prompt,
            do_sample=True,
            top_k=0,
            max_new_tokens=new,
            num_return_sequences=min(batch, count - start),
            seed=seed + start,
            return_dict_in_generate=True,
            **options,
        )
        stats = out.stats if stats is None else stats + out.stats
        answer = out.sequences[:, prompt.shape[1] :]
        ends = wrapped.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends or -1], device=answer.device)
        over = torch.isin(answer, ends).int()
        real = over.cumsum(1) - over == 0  # the end itself belongs to the answer
        lengths.append(real.sum(1).cpu())
        for texts, kept in zip(out.sequences.split(50), real.split(50), strict=True):
            with torch.no_grad():
                logits = wrapped(texts).logits[:, prompt.shape[1] - 1 : -1].float()
            own = logits.log_softmax(-1).gather(2, texts[:, prompt.shape[1] :, None])[..., 0]
            likelihoods.append((own * kept).sum(1).double().cpu())
    assert stats is not None
    return torch.cat(likelihoods), torch.cat(lengths), stats.tokens_per_step


def compare_samples(
    runs: dict[str, Any], prompt: Tensor, *, count: int, new: int, batch: int, **options: Any
) -> list[Sampled]:
    """Every run against the first one, which is without drafts; each with seeds of its own."""
    rows: list[Sampled] = []
    plain: tuple[Tensor, Tensor] | None = None
    for index, (name, wrapped) in enumerate(runs.items()):
        loglik, length, pace = sample(
            wrapped, prompt, count=count, new=new, batch=batch, seed=index << 32, **options
        )
        plain = plain or (loglik, length)
        rows.append(
            Sampled(
                name,
                count,
                pace,
                float(loglik.mean()),
                kolmogorov(loglik, plain[0]),
                float(length.double().mean()),
                kolmogorov(length.double(), plain[1].double()),
            )
        )
    return rows


def compare_ties(model: Any, wrapped: Any, prompts: Sequence[Tensor], new: int) -> list[Ties]:
    """Prompt lookup by transformers and trees, each against transformers' plain greedy answers."""
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False}
    runs: dict[str, Callable[[Tensor], Any]] = {
        "transformers, prompt lookup": lambda p: model.generate(
            p, attention_mask=torch.ones_like(p), prompt_lookup_num_tokens=10, **options
        ),
        "specdec, n-gram trees": lambda p: wrapped.generate(p, **options),
    }
    plain = [model.generate(p, attention_mask=torch.ones_like(p), **options)[0] for p in prompts]
    rows = []
    for name, run in runs.items():
        gaps = []
        for prompt, expected in zip(prompts, plain, strict=True):
            got = run(prompt)[0]
            length = min(len(got), len(expected))
            differ = (got[:length] != expected[:length]).nonzero()
            if len(differ) or len(got) != len(expected):
                first = int(differ[0]) if len(differ) else length
                with torch.no_grad():
                    top = model(expected[None, :first]).logits[0, -1].topk(2).values.float()
                rounding = float(top[0].abs()) * torch.finfo(model.dtype).eps
                gaps.append(float(top[0] - top[1]) / rounding)
        rows.append(
            Ties(
                name,
                len(prompts),
                len(gaps),
                *wilson(len(gaps), len(prompts)),
                max(gaps, default=0.0),
            )
        )
    return rows


def load(name: str, device: str, dtype: str) -> tuple[Any, list[Tensor]]:
    """A model, and the built-in prompts as token ids."""
    with readable_errors():
        loaded, tokenizer = load_model(name, dtype, device)
    prompts = [
        tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(device)
        for prompt in builtin_prompts()
    ]
    return loaded, prompts


def write(
    file: Path | None, model: Any, rows: Sequence[Sampled | Ties], **settings: object
) -> None:
    """The record of a run, if one is wanted."""
    if file is not None:
        record = {"provenance": provenance(model.device, model.dtype), **settings}
        file.write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1))


Model = Annotated[str, typer.Option(help="A known name, folder or hub id.")]
Device = Annotated[str, typer.Option()]
Json = Annotated[Path | None, typer.Option("--json", help="Where to write.")]


@app.command()
def continuations(
    model: Model = models.DEFAULT,
    count: Annotated[int, typer.Option(help="Answers of each run.")] = 2000,
    new: Annotated[int, typer.Option(help="Tokens of each, at most.")] = 64,
    batch: Annotated[int, typer.Option(help="Answers sampled at once.")] = 500,
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Sampled answers to one prompt with and without speculation, at temperature 1."""
    loaded, prompts = load(model, device, "float32")
    draft = degraded(loaded, bits=4)
    tree = Topology.branching([2, 2])
    runs = {
        "no drafts": specdec.wrap(loaded, "none"),
        "n-grams, sample-and-match": specdec.wrap(loaded, "ngram", nodes=8),
        "drawn drafts, traversal": specdec.wrap(
            loaded, DraftModel(draft, tree), rule="traversal", nodes=8
        ),
    }
    rows = compare_samples(runs, prompts[0], count=count, new=new, batch=batch)
    table = Table("run", "tokens per step", "log-likelihood", "p", "length", "p")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.tokens_per_step:.2f}",
            f"{row.loglik:.2f}",
            f"{row.loglik_p:.3f}",
            f"{row.length:.2f}",
            f"{row.length_p:.3f}",
        )
    Console().print(table)
    write(json_file, loaded, rows, count=count, new=new)
    if min(min(row.loglik_p, row.length_p) for row in rows) < REJECT:
        raise typer.Exit(1)


@app.command()
def ties(
    model: Model = models.DEFAULT,
    prompts: Annotated[int, typer.Option(help="How many of the built-in prompts.")] = 16,
    new: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Greedy answers in half precision that differ from transformers' plain ones."""
    loaded, texts = load(model, device, dtype)
    wrapped = specdec.wrap(loaded, "ngram")
    rows = compare_ties(loaded, wrapped, texts[:prompts], new)
    table = Table("run", "different answers", "95 % interval", "widest gap, in roundings")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.different} of {row.prompts}",
            f"{row.low:.2f} to {row.high:.2f}",
            f"{row.widest_gap:.2f}",
        )
    Console().print(table)
    write(json_file, loaded, rows, new=new)
    theirs, ours = rows
    if ours.low > theirs.high:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
