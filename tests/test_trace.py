"""A trace says what the run did: its tokens, its probabilities, and where each token came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec import ProposalLaw, Topology, Verified
from specdec.drafters import DraftModel, NGram
from specdec.eval.trace import Trace, record
from specdec.testing import TINY, degraded, tiny_model

PROMPT = torch.tensor([[5, 9, 2, 5, 9, 2, 7, 5, 9]])


class Numbers:
    """Shows tokens as numbers."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f" {token}" for token in tokens)


def recorded(drafter: Any, rule: str = "auto", **options: Any) -> Trace:
    wrapped = specdec.wrap(tiny_model("Llama"), drafter, rule=rule, nodes=10)
    about = {"model": "tiny", "drafter": "a test's"}
    return record(wrapped, Numbers(), about=about, inputs=PROMPT, max_new_tokens=24, **options)


def drawing() -> DraftModel:
    small = degraded(tiny_model("Llama"), bits=5)
    shape = Topology.branching([3, 2])
    return DraftModel(small, shape, law=ProposalLaw.WITHOUT_REPLACEMENT)


@pytest.mark.parametrize("drafter", [NGram(), drawing(), "none"], ids=["ngram", "model", "none"])
@pytest.mark.parametrize("temperature", [0.0, 0.7], ids=["greedy", "sampled"])
def test_a_trace_has_the_runs_own_tokens_and_the_targets_own_probabilities(
    drafter: Any, temperature: float
) -> None:
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": 3}
    trace = recorded(drafter, **(sampled if temperature else {"do_sample": False}))
    model: Any = tiny_model("Llama")
    prompt, answer = PROMPT[0].tolist(), [token.token for token in trace.tokens]
    if not temperature:
        plain = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
        assert prompt + answer == plain[0].tolist()
    assert trace.text == Numbers().decode(answer)
    assert sum(step.emitted for step in trace.steps) == len(answer) == 24

    known = list(prompt)
    for step in trace.steps:
        assert step.tokens[0] == known[-1]
        given = dict(zip(range(len(step.tokens)), step.target, strict=True))
        given[len(step.tokens)] = step.next_probability
        nodes = [*zip(step.tokens, step.parents, strict=True), (step.next_token, step.path[-1])]
        texts: list[list[int]] = []
        for node, (token, parent) in enumerate(nodes):
            texts.append([*texts[parent], token] if node else known)
            if node:
                with torch.no_grad():
                    logits = model(torch.tensor([texts[parent]])).logits[0, -1]
                probs = (logits / (temperature or 1.0)).softmax(-1)
                assert given[node] == pytest.approx(float(probs[token]), rel=2e-3, abs=1e-6)
        known = [*texts[step.path[-1]], step.next_token][: len(known) + step.emitted]
    assert known == prompt + answer


def test_every_token_says_how_it_came_about() -> None:
    trace = recorded(NGram(), do_sample=False)
    accepted = [token for token in trace.tokens if token.origin == "accepted"]
    assert len(accepted) == trace.stats["accepted"] > 0
    assert {token.origin for token in recorded("none").tokens} == {"plain"}
    for number, step in enumerate(trace.steps):
        mine = [token for token in trace.tokens if token.step == number]
        assert [token.depth for token in mine] == list(range(1, step.emitted + 1))
        ended = step.path[-1] in step.parents  # the path could have gone on
        expected = "corrected" if ended else "bonus" if len(step.tokens) > 1 else "plain"
        assert step.next_origin == expected


def test_draft_probabilities_are_there_where_children_were_drawn() -> None:
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "seed": 1}
    drawn = recorded(drawing(), rule="traversal", **options)
    for step in drawn.steps:
        assert step.draft[0] is None
        assert all(p is not None and 0 < p <= 1 for p in step.draft[1:])
    chosen = recorded(NGram(), **options)
    assert {p for step in chosen.steps for p in step.draft} == {None}


def test_a_trace_survives_its_file_and_others_are_refused(tmp_path: Path) -> None:
    trace = recorded(NGram(), do_sample=False)
    file = tmp_path / "traces" / "one.json"
    trace.save(file)
    assert Trace.load(file) == trace
    for text, message in [
        ("[]", "expected a JSON object"),
        ('{"format": "specdec-trace", "version": 0}', "of version 0"),
        (file.read_text().replace('"steps": [{', '"steps": [{"more": 1, '), "more"),
        (file.read_text()[:100], "one.json: "),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Trace.load(file)


def test_an_observer_that_raises_ends_the_call_and_leaves_no_page() -> None:
    wrapped = specdec.wrap(tiny_model("Llama"), "ngram", prefix_cache=False)
    with pytest.raises(ValueError, match="trace: expected one text, got 2"):
        record(
            wrapped, Numbers(), about={}, inputs=PROMPT.repeat(2, 1), max_new_tokens=8,
            do_sample=False,
        )  # fmt: skip
    assert wrapped.cache.pool.num_free == wrapped.cache.pool.num_pages
    seen: list[Verified] = []
    wrapped.generate(PROMPT, max_new_tokens=8, do_sample=False, observer=seen.append)
    assert sum(len(each.emissions[0].tokens) for each in seen) == 8
    assert all(each.scores.shape[1] == TINY["vocab_size"] for each in seen)
