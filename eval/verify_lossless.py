"""Does a drafter with a rule give the model's own distribution? A test for any vocabulary.

If a token was drawn from the distribution `p`, then the share of `p` that comes before it, plus a
random part of its own share, is uniform between 0 and 1, whatever `p` was (the probability integral
transform of Rosenblatt 1952); so the shares of several tokens in a row fill a cube evenly. Tokens
are ordered from the likeliest to the least, by the model's own forward, plainly. The cube is cut
into equal cells and the counts go through a chi-square test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import specdec
from specdec.generation import SpeculativeOutput
from specdec.noise import split_seeds, uniform
from specdec.sampling import Text

REJECT = 1e-3
"""A p-value below this says that the output is not the model's."""


@dataclass(frozen=True)
class Verdict:
    """What the test found."""

    rule: str
    samples: int
    tokens: int
    cells: int
    statistic: float
    p_value: float
    tokens_per_step: float
    detectable: float
    """Total variation between cell laws that is noticed with a probability of 0.9."""

    @property
    def passed(self) -> bool:
        return self.p_value >= REJECT

    def to_dict(self) -> dict[str, object]:
        """Plain numbers for JSON."""
        return {**self.__dict__, "passed": self.passed}

    def __rich__(self) -> Table:
        table = Table(show_header=False, box=None)
        table.add_row("rule", self.rule)
        table.add_row("samples", f"{self.samples} of {self.tokens} tokens, {self.cells} cells")
        table.add_row("tokens per step", f"{self.tokens_per_step:.2f}")
        table.add_row("chi-square", f"{self.statistic:.1f}, p = {self.p_value:.3g}")
        table.add_row("noticed", f"a total variation of {self.detectable:.3f}, with power 0.9")
        table.add_row("verdict", "the model's own law" if self.passed else "NOT the model's law")
        return table


def verify_lossless(
    wrapped: specdec.SpeculativeModel,
    prompt: Tensor,
    *,
    samples: int = 2000,
    tokens: int = 3,
    bins: int = 4,
    batch: int = 100,
    seed: int = 0,
    **options: Any,
) -> Verdict:
    """Samples many short continuations of a prompt and tests their joint law.

    Args:
        wrapped: the model with the drafter and the rule in question.
        prompt: [1, L] token ids.
        samples: continuations to draw.
        tokens: of each continuation.
        bins: cells along each axis; there are `bins ** tokens`, and each should expect 5 samples.
        batch: continuations drawn at once.
        seed: of the run and of the random parts.
        options: sampling options of `generate`.

    Raises:
        ValueError: too few samples for that many cells.
    """
    cells = bins**tokens
    if samples < 5 * cells:
        raise ValueError(f"samples: expected at least {5 * cells} for {cells} cells, got {samples}")
    counts = torch.zeros(cells, dtype=torch.float64)
    stats = specdec.GenerationStats(rule="")
    drawn = 0
    while drawn < samples:
        count = min(batch, samples - drawn)
        out = wrapped.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            num_return_sequences=count,
            seed=seed + drawn,
            return_dict_in_generate=True,
            **options,
        )
        assert isinstance(out, SpeculativeOutput)
        assert out.stats is not None
        stats = out.stats if not drawn else stats + out.stats
        shares = _shares(wrapped, out.sequences, tokens, seed + drawn, count, options)
        place = (shares * bins).long().clamp_max(bins - 1)
        weights = bins ** torch.arange(tokens)
        counts += torch.bincount((place * weights).sum(1), minlength=cells).double()
        drawn += count
    expected = samples / cells
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return Verdict(
        rule=stats.rule,
        samples=samples,
        tokens=tokens,
        cells=cells,
        statistic=statistic,
        p_value=_tail(statistic, cells - 1),
        tokens_per_step=stats.tokens_per_step,
        detectable=_detectable(samples, cells - 1),
    )


@torch.no_grad()
def _shares(
    wrapped: specdec.SpeculativeModel,
    texts: Tensor,
    tokens: int,
    seed: int,
    count: int,
    options: dict[str, Any],
) -> Tensor:
    """[B, tokens] float64, where each token lies in the model's own distribution at its place."""
    call = wrapped._prepare(
        texts[:, :-tokens],
        None,
        None,
        None,
        None,
        {**options, "do_sample": True, "max_new_tokens": tokens, "min_new_tokens": tokens},
    )
    sampler = call.sampler
    width = texts.shape[1] - tokens
    logits = wrapped(texts).logits[:, width - 1 : -1]
    chains = [specdec.TokenTree.chain(line[width - 1], line[width:-1]) for line in texts.tolist()]
    trees = specdec.TreeBatch.pack(chains, vocab_size=logits.shape[-1], device=logits.device)
    begun = [Text(line[:width], row) for row, line in enumerate(texts.tolist())]
    probs = sampler.probs(sampler.scores(logits.flatten(0, 1), trees, begun)).double()
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    place = (order == texts[:, width:].reshape(-1, 1)).int().argmax(1, keepdim=True)
    upto = ordered.cumsum(-1).gather(1, place)[:, 0]
    own = ordered.gather(1, place)[:, 0]
    part = uniform(split_seeds(~seed, count)[:, None], torch.arange(tokens)[None], 0)
    return ((upto - own).cpu() + part.flatten() * own.cpu()).view(-1, tokens).clamp(0, 1)


def _tail(statistic: float, degrees: int) -> float:
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _detectable(samples: int, degrees: int) -> float:
    """The total variation whose chi-square exceeds the bound with a probability of 0.9.

    A variation of d adds at least 4 d^2 to the statistic for each sample (Cauchy-Schwarz).
    """
    low, high = 0.0, 10.0 * degrees + 1000
    bound = _root(lambda x: _tail(x, degrees) - REJECT, 0.0, 10.0 * degrees + 1000)
    shift = _root(lambda x: 0.9 - _power(x, bound, degrees), low, high)
    return math.sqrt(shift / (4 * samples))


def _power(shift: float, bound: float, degrees: int) -> float:
    """A non-central chi-square is a Poisson mixture of central ones."""
    count = torch.arange(2000, dtype=torch.float64)
    mean = torch.tensor(shift / 2, dtype=torch.float64).clamp_min(1e-12)
    weight = (count * mean.log() - mean - torch.lgamma(count + 1)).exp()
    tail = torch.special.gammaincc(degrees / 2 + count, torch.full_like(count, bound / 2))
    return float((weight * tail).sum())


def _root(falling: Any, low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
