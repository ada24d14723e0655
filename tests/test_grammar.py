"""Output held to a grammar, on trees. Needs xgrammar, an optional dependency."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

import specdec
from specdec.drafters import DraftModel
from specdec.grammar import Grammar
from specdec.testing import TINY, degraded, tiny_model
from specdec.topology import Topology

xgrammar = pytest.importorskip("xgrammar")
PATTERN = "([a-f][0-9][A-Z]?)+!"


def compiled(pattern: str) -> Any:
    vocab = ["</s>", *(chr(32 + token) for token in range(1, TINY["vocab_size"]))]
    info = xgrammar.TokenizerInfo(vocab, vocab_size=len(vocab), stop_token_ids=[0])
    return xgrammar.GrammarCompiler(info).compile_regex(pattern)


@pytest.mark.parametrize("sample", [False, True])
def test_every_row_follows_the_grammar_as_without_trees(sample: bool) -> None:
    model: Any = tiny_model("Llama")
    drafter = DraftModel(degraded(model, bits=6), Topology.branching([3, 2, 1]))
    prompts = torch.randint(1, TINY["vocab_size"], (3, 5))
    options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": 0, "pad_token_id": 0}
    outs = []
    for drafts in (drafter, "none"):
        wrapped: Any = specdec.wrap(model, drafts, nodes=16)
        grammar = Grammar(compiled(PATTERN), prompt=5)
        options["logits_processor"] = LogitsProcessorList([grammar])
        outs.append(wrapped.generate(prompts, do_sample=sample, temperature=2.0, seed=3, **options))
    assert torch.equal(*outs)
    for line in outs[0][:, 5:].tolist():
        text = "".join(chr(32 + token) for token in line if token)
        assert re.fullmatch(PATTERN, text) or (0 not in line and re.match("[a-f][0-9]", text))
    if not sample:
        options["logits_processor"] = LogitsProcessorList([Grammar(compiled(PATTERN), prompt=5)])
        assert torch.equal(outs[0], model.generate(prompts, do_sample=False, **options))


def test_a_text_that_breaks_the_grammar_is_named() -> None:
    grammar = Grammar([compiled("ab"), compiled("[0-9]+")], prompt=1)
    scores = torch.zeros(2, TINY["vocab_size"])
    letter, digit = ord("a") - 32, ord("7") - 32
    allowed = grammar(torch.tensor([[4, letter], [4, digit]]), scores).isfinite()
    assert allowed[0].nonzero().flatten().tolist() == [ord("b") - 32]
    assert allowed[1].nonzero().flatten().tolist() == [0, *(ord(d) - 32 for d in "0123456789")]
    with pytest.raises(ValueError, match="row 0: token 23 does not follow the grammar after 0"):
        grammar(torch.tensor([[4, digit], [4, digit]]), scores)
