"""A drafter of your own, a rule for it, and the proof that it samples the model's distribution.

python examples/own_drafter.py
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec.eval.verify_lossless import Verdict, verify_lossless


class Habits(specdec.SequenceDrafter):
    """Draws what followed the last token before, in this text or in `texts`, by how often."""

    law = specdec.ProposalLaw.IID  # children are drawn independently, so multi-round is legal

    def __init__(self, texts: Sequence[Sequence[int]] = (), seed: int = 0) -> None:
        self._texts = texts
        self._generator = torch.Generator().manual_seed(seed)

    def draft(self, tokens: Sequence[int], nodes: int) -> specdec.TokenTree:
        texts = [*self._texts, list(tokens)]
        followers = [b for t in texts for a, b in pairwise(t) if a == tokens[-1]]
        if not followers or nodes < 3:
            return specdec.TokenTree.root(tokens[-1])
        names, counts = torch.tensor(followers).unique(return_counts=True)
        probs = counts / counts.sum()
        drawn = torch.multinomial(probs, 2, replacement=True, generator=self._generator)
        return specdec.TokenTree(
            torch.tensor([tokens[-1], *names[drawn].tolist()]),
            torch.tensor([-1, 0, 0]),
            self.law,
            probs.expand(3, -1),  # row n: what the children of node n were drawn from
            names.expand(3, -1),
        )


def prove(model: Any, drafter: specdec.Drafter, prompt: torch.Tensor, **options: Any) -> Verdict:
    """The joint law of three sampled tokens against the model's own, by chi-square."""
    wrapped = specdec.wrap(model, drafter, rule="multi-round", nodes=3)
    return verify_lossless(wrapped, prompt, **options)


def main() -> None:
    folder = specdec.models.fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("A, B, A, B, A,", return_tensors="pt")["input_ids"]
    Console().print(prove(model, Habits(), prompt, samples=400, tokens=2))


if __name__ == "__main__":
    main()
