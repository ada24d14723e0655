"""A drafter with K and V of its own, under the target's page ids, in real use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec import TokenTree
from specdec.batch import TreeBatch
from specdec.drafting import DraftContext, Drafter, TargetRows
from specdec.hooks import Taps
from specdec.kernels import cache as kernels
from specdec.pages import LayerShape
from specdec.target import Target
from specdec.testing import TINY, tiny_model

VOCAB, NEW, HEADS, KEY, VALUE = TINY["vocab_size"], 20, 3, 4, 6
CPU = torch.device("cpu")


class Head(Drafter):
    """One attention layer over the target's last hidden states, as EAGLE's, with random weights.

    A second layer of one head keeps the hidden states themselves, since a prefix that is reused
    yields none. Beside the head's own guesses it proposes the right text, so that paths are kept.
    """

    hidden_layers = frozenset({-1})

    def __init__(self, model: Any, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.model, self.answers = model, answers
        width = model.config.hidden_size
        self.query, self.key = torch.randn(2, width, HEADS * KEY)
        self.value = torch.randn(width, HEADS * VALUE)
        self.out = torch.randn(HEADS * VALUE, width)
        self.checked = 0

    def layer_shapes(self, target: Target) -> list[LayerShape]:
        width = self.model.config.hidden_size
        return [
            LayerShape(HEADS, KEY, VALUE, torch.float32, CPU),
            LayerShape(1, width, 1, torch.float32, CPU),
        ]

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = hidden @ self.key, hidden @ self.value
        return keys.unflatten(1, (HEADS, KEY)), values.unflatten(1, (HEADS, VALUE))

    def fill(self, rows: TargetRows) -> None:
        hidden, slots = rows.hidden[-1], rows.plan.slots
        attention, states = rows.layers.layer(0), rows.layers.layer(1)
        keys, values = self.keys_and_values(hidden)
        kernels.write_rows(attention.keys, slots, keys)
        kernels.write_rows(attention.values, slots, values)
        kernels.write_rows(states.keys, slots, hidden[:, None])

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        own = context.own
        assert own is not None
        trees: list[TokenTree] = []
        for tokens, sequence in zip(context.tokens, own.sequences, strict=True):
            assert own.cache.filled(sequence, own.layers) is None
            length = own.cache.length_bound(sequence)
            assert length == len(tokens) - 1
            slots = own.cache.slots(torch.full((length,), sequence), torch.arange(length))
            keys, values = (
                pages.flatten(0, 1)[slots]
                for pages in (own.layers.layer(0).keys, own.layers.layer(0).values)
            )
            self.check(tokens[:-1], keys, values)
            guesses: list[int] = []
            if length:
                state = own.layers.layer(1).keys.flatten(0, 1)[slots[-1], 0]
                guesses = self.guess(state, keys, values)
            right = self.answer(tokens)[:2]
            paths = [[guess] for guess in guesses if guess not in right] + [right]
            tree = TokenTree.from_paths(tokens[-1], paths, nodes)
            trees.append(tree.cut(depth=max(0, context.max_depths[len(trees)])))
        return TreeBatch.pack(trees, vocab_size=context.vocab_size)

    def guess(self, state: Tensor, keys: Tensor, values: Tensor) -> list[int]:
        query = (state @ self.query).unflatten(0, (HEADS, 1, KEY))
        seen = torch.nn.functional.scaled_dot_product_attention(
            query, keys.transpose(0, 1), values.transpose(0, 1)
        )
        logits = self.model.lm_head(state + seen.flatten() @ self.out)
        return logits.topk(3).indices.tolist()  # type: ignore[no-any-return]

    def answer(self, tokens: Sequence[int]) -> list[int]:
        for prompt, answer in self.answers.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                return answer[len(tokens) - len(prompt) :]
        return []

    def check(self, text: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """What is in the cache is what the text gives when it is computed anew."""
        if text:
            output = self.model(torch.tensor([text]), output_hidden_states=True)
            for found, computed in zip(
                (keys, values), self.keys_and_values(output.hidden_states[-1][0]), strict=True
            ):
                torch.testing.assert_close(found, computed, rtol=1e-4, atol=1e-4)
            self.checked += 1


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return tiny_model("Llama")


def random_text(length: int) -> list[int]:
    return torch.randint(1, VOCAB, (length,)).tolist()


def head(hf_model: Any, prompts: Sequence[list[int]]) -> Head:
    answers = {}
    for prompt in sorted(prompts, key=len, reverse=True):
        ids = torch.tensor([prompt])
        out = hf_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        answers[tuple(prompt)] = out[0, len(prompt) :].tolist()
    return Head(hf_model, answers)


def serve(model: Any, prompts: Sequence[list[int]], **options: Any) -> list[list[int]]:
    with model.engine(**options) as engine:
        handles = [engine.submit(prompt, max_new_tokens=NEW, do_sample=False) for prompt in prompts]
        engine.run_all()
        model.served = engine.stats
    return [handle.result() for handle in handles]


def nothing_left(model: Any) -> None:
    model.cache.check_integrity()
    assert not model.cache.sequences
    model.cache.prefixes.clear()
    assert model.cache.pool.num_free == model.cache.pool.num_pages


@pytest.mark.parametrize("pages", [None, 7])
def test_its_cache_is_right_after_commits_forks_reuse_and_preemption(
    hf_model: Any, pages: int | None
) -> None:
    """Prompts come in pieces beside trees of others; some begin alike, some are equal."""
    trunk = random_text(40)
    prompts = [random_text(3), trunk + random_text(9), trunk, list(trunk), random_text(1)]
    prompts.append(trunk[:20] + random_text(25))
    drafter = head(hf_model, prompts)
    model: Any = specdec.wrap(hf_model, drafter, nodes=7, max_pages=pages)
    for _ in range(2):
        texts = serve(model, prompts, step_tokens=24)
        assert texts == [drafter.answers[tuple(prompt)] for prompt in prompts]
        assert model.served.accepted > NEW
        assert model.served.reused_tokens > 0
        assert bool(model.served.preemptions) == bool(pages)
    assert drafter.checked > 2 * len(prompts)
    nothing_left(model)


def test_a_prefix_that_it_has_not_filled_is_computed_for_it_once(hf_model: Any) -> None:
    prompt = random_text(50)
    drafter = head(hf_model, [prompt])
    model: Any = specdec.wrap(tiny_model("Llama"), "none", nodes=7)  # without a hook in it yet
    serve(model, [prompt])
    reused = []
    for way in (drafter, drafter, "none", head(hf_model, [prompt]), drafter):
        model.drafter = way
        (answer,) = serve(model, [prompt])
        assert answer == drafter.answers[tuple(prompt)]
        reused.append(model.served.reused_tokens)
    assert reused == [0, 48, 48, 0, 48]
    assert len(model.cache.pool.registered) == 2
    before = model.cache.pool.page_bytes
    model._driven().forget(drafter)
    assert model.cache.pool.page_bytes < before
    nothing_left(model)


def test_requests_with_and_without_it_run_together_and_branches_go_on(hf_model: Any) -> None:
    prompt = random_text(40)
    other = prompt + random_text(4)
    drafter = head(hf_model, [prompt, other])
    model: Any = specdec.wrap(hf_model, drafter, nodes=7)
    options = {"max_new_tokens": NEW, "do_sample": False}
    with model.engine() as engine:
        plain = engine.submit(prompt, drafter="none", **options)
        engine.step()  # its prompt is computed without the drafter, but for what others begin with
        drafted = engine.submit(other, **options)
        engine.run_all()
    assert plain.result() == drafter.answers[tuple(prompt)]
    assert drafted.result() == drafter.answers[tuple(other)]
    with model.branch(prompt) as root:
        twin, third = root.fork(2)
        model.extend([root, twin], **options)
        assert root.tokens == twin.tokens == prompt + drafter.answers[tuple(prompt)]
        assert third.tokens == prompt
    assert drafter.checked
    nothing_left(model)


@pytest.mark.parametrize("layers", ["transformers", "fused"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_taps_see_the_hidden_states_of_transformers(name: str, layers: Any) -> None:
    model = tiny_model(name)
    text = torch.tensor(random_text(9))
    expected = model(text[None], output_hidden_states=True).hidden_states
    target = Target(tiny_model(name), layers=layers)  # transformers left hooks in the other one
    assert (target.fused is not None) == (layers == "fused")
    sequence, last = target.cache.admit(), len(expected) - 1
    taps = Taps(frozenset({0, 1, last, -1, -2}))
    with target.cache.speculate([sequence], [9]) as lease:
        target.forward(text, lease.plan_chains(), keep=1, taps=taps)
    for layer, state in taps.states.items():
        torch.testing.assert_close(state, expected[layer][0], rtol=1e-4, atol=1e-4)

    class Lost(Head):
        hidden_layers = frozenset({last + 1})

    with pytest.raises(ValueError, match=f"hidden_layers: expected -{last + 1} to {last}"):
        target.layers_of(Lost(model, {}))
    assert not target.cache.pool.registered
    assert taps.states.keys() == {0, 1, last, -1, -2}
