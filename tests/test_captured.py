"""Captured steps: two in flight, read one late, and the tokens of transformers all the same.

On a CPU there are no graphs; the steps run as they are, and what the host knows late is the same.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.drafters import NGram
from specdec.kernels import ngram, steps
from specdec.testing import TINY, OracleDrafter, RandomDrafter, tiny_model
from tests import plain_steps
from tests.checks import nothing_left

VOCAB = TINY["vocab_size"]
NEW = 20


@pytest.fixture(scope="module")
def hf_model() -> Any:
    """One layer, and answers that repeat themselves, so that drafts are accepted."""
    return tiny_model("Llama", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_kernels" not in request.fixturenames:
        plain_steps.stand_in(monkeypatch)


@pytest.fixture
def real_kernels() -> None:
    """Marks tests of the kernels themselves."""


def wrap(hf_model: Any, drafter: Any = "ngram", **options: Any) -> Any:
    return specdec.wrap(hf_model, drafter, **{"layers": "fused", "nodes": 8, **options})


def texts(count: int = 1, length: int = 9) -> Tensor:
    """[count, length + 5] prompts that repeat their beginning."""
    ids = torch.randint(1, VOCAB, (count, length))
    return torch.cat([ids, ids[:, :5]], 1)


def greedy(hf_model: Any, ids: Tensor, new: int = NEW, **options: Any) -> Tensor:
    options = {"max_new_tokens": new, "do_sample": False, **options}
    return hf_model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[no-any-return]


def alone(hf_model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    return greedy(hf_model, torch.tensor([prompt]), new)[0, len(prompt) :].tolist()


def oracle(hf_model: Any, ids: Tensor, corrupt: float = 0.2) -> plain_steps.OnDevice:
    """Mostly right, also behind the ends of the texts."""
    known = greedy(hf_model, ids, NEW + 20).tolist()
    return plain_steps.OnDevice(OracleDrafter(known, corrupt=corrupt, vocab_size=VOCAB))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("drafter", "nodes"), [("none", 1), ("ngram", 1), ("ngram", 8), ("ngram", 33)]
)
def test_tokens_are_those_of_transformers(
    hf_model: Any, count: int, drafter: str, nodes: int
) -> None:
    ids = texts(count)
    model = wrap(hf_model, drafter, nodes=nodes)
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy(hf_model, ids))
    assert out.stats.paths["captured"] == sum(out.stats.paths.values()) - 1, "one for the prompts"
    assert nodes == 1 or out.stats.accepted > 0
    nothing_left(model)


@pytest.mark.parametrize("do_sample", [False, True])
def test_stats_and_tokens_are_those_of_steps_that_are_not_captured(
    hf_model: Any, do_sample: bool
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "return_dict_in_generate": True, "seed": 3}
    options["do_sample"] = do_sample
    ids = texts(2)
    here, there = wrap(hf_model), wrap(hf_model, capture=False)
    out, expected = here.generate(ids, **options), there.generate(ids, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.stats.paths["captured"] > 0
    assert "captured" not in expected.stats.paths
    assert (out.stats.steps, out.stats.tokens) == (expected.stats.steps, expected.stats.tokens)
    # The last token of a text may come from a node here; there it has no room for one.
    assert 0 <= out.stats.accepted - expected.stats.accepted <= len(ids)


@pytest.mark.parametrize("drafter", ["ngram", "random", "oracle"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_drafts_good_and_bad_change_nothing(
    hf_model: Any, drafter: str, prefix_cache: bool
) -> None:
    ids = texts(3)
    drafters = {
        "oracle": oracle(hf_model, ids),
        "random": plain_steps.OnDevice(RandomDrafter(VOCAB)),
    }
    model = wrap(hf_model, drafters.get(drafter, drafter), nodes=13, prefix_cache=prefix_cache)
    for new in (NEW, NEW + 13):
        out = model.generate(ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(out.sequences, greedy(hf_model, ids, new))
        assert drafter != "oracle" or out.stats.tokens_per_step > 2.5
        nothing_left(model)


@pytest.mark.parametrize("place", [*range(1, 9), NEW - 2, NEW - 1])
def test_text_ends_with_the_end_of_sequence_wherever_it_is_in_a_path(
    hf_model: Any, place: int
) -> None:
    ids = texts(3)
    end = int(greedy(hf_model, ids)[0, ids.shape[1] + place])
    options = {"eos_token_id": end, "pad_token_id": 0}
    model = wrap(hf_model, oracle(hf_model, ids, 0.0), nodes=11)
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
    assert torch.equal(out, greedy(hf_model, ids, **options))
    nothing_left(model)


@pytest.mark.parametrize("new", [1, 2, 3, 15, 16, 17])
def test_text_ends_at_the_length_limit(hf_model: Any, new: int) -> None:
    ids = texts(3)
    model = wrap(hf_model, oracle(hf_model, ids, 0.0), nodes=11)
    assert torch.equal(
        model.generate(ids, max_new_tokens=new, do_sample=False), greedy(hf_model, ids, new)
    )
    nothing_left(model)


class After(StoppingCriteria):
    """Ends a text once it has so many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_criteria_on_the_host_end_a_text_where_they_say(hf_model: Any) -> None:
    ids = texts()
    model = wrap(hf_model, oracle(hf_model, ids, 0.0), nodes=11)
    for length in range(ids.shape[1] + 1, ids.shape[1] + 12):
        criteria = StoppingCriteriaList([After(length)])
        out = model.generate(ids, stopping_criteria=criteria, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, greedy(hf_model, ids)[:, :length])
    out = model.generate(ids, max_time=0.0, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, greedy(hf_model, ids)[:, : ids.shape[1] + 1])
    nothing_left(model)


def test_closing_a_stream_early_leaves_nothing_and_what_follows_is_right(hf_model: Any) -> None:
    ids = texts(2)
    model = wrap(hf_model, oracle(hf_model, ids))
    for count in range(1, 5):
        stream = model.stream(ids, max_new_tokens=NEW, do_sample=False)
        for _ in range(count):
            next(stream)
        stream.close()
        nothing_left(model)
    assert torch.equal(
        model.generate(ids, max_new_tokens=NEW, do_sample=False), greedy(hf_model, ids)
    )


@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (1, 3)])
def test_streams_take_turns_on_one_model(hf_model: Any, counts: tuple[int, int]) -> None:
    """Texts on the device change owner, or lie side by side."""
    model = wrap(hf_model)
    prompts = [texts(count, 7 + count) for count in counts]
    streams = [model.stream(ids, max_new_tokens=NEW, do_sample=False) for ids in prompts]
    got: list[list[list[int]]] = [[[] for _ in range(count)] for count in counts]
    going = {0, 1}
    while going:
        for index in sorted(going):
            step = next(streams[index], None)
            if step is None:
                going.discard(index)
                continue
            for row, tokens in step.tokens.items():
                got[index][row] += tokens
            model.cache.check_integrity()
    for ids, rows in zip(prompts, got, strict=True):
        assert rows == greedy(hf_model, ids)[:, ids.shape[1] :].tolist()
    nothing_left(model)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_come_and_go(hf_model: Any, prefix_cache: bool) -> None:
    model = wrap(hf_model, prefix_cache=prefix_cache)
    prompts = [texts(1, 3 + 5 * i)[0].tolist() for i in range(5)]
    with model.engine() as engine:
        handles = []
        for index, prompt in enumerate(prompts):
            handles.append(engine.submit(prompt, max_new_tokens=8 + 3 * index, do_sample=False))
            for _ in range(3):
                engine.step()
                model.cache.check_integrity()
        engine.run_all()
    for index, (prompt, handle) in enumerate(zip(prompts, handles, strict=True)):
        assert handle.tokens == alone(hf_model, prompt, 8 + 3 * index)
    assert engine.stats.paths["captured"] > 5
    nothing_left(model)


def test_a_request_begins_like_one_whose_steps_are_in_flight(hf_model: Any) -> None:
    """What they have in common is shared below what the step in flight may write."""
    model = wrap(hf_model)
    prompt = texts(1, 15)[0].tolist()
    with model.engine() as engine:
        first = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        for _ in range(4):
            engine.step()
        assert len(first.tokens) > 1
        again = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        further = engine.submit([*prompt, *first.tokens], max_new_tokens=NEW, do_sample=False)
        while not engine.idle:
            engine.step()
            model.cache.check_integrity()
    text = alone(hf_model, prompt, 2 * NEW)
    assert first.tokens == again.tokens == text[:NEW]
    known = (len(further._request.emitted), further._request.prompt_length - len(prompt))
    assert further.tokens == text[known[1] : known[1] + NEW]
    assert engine.stats.reused_tokens >= 2 * (len(prompt) - 1)
    nothing_left(model)


def test_cancelling_while_a_step_is_in_flight(hf_model: Any) -> None:
    model = wrap(hf_model)
    prompts = texts(3).tolist()
    with model.engine() as engine:
        handles = [engine.submit(p, max_new_tokens=NEW, do_sample=False) for p in prompts]
        while len(handles[1].tokens) < 4:
            engine.step()
        handles[1].cancel()
        model.cache.check_integrity()
        late = engine.submit(prompts[1], max_new_tokens=NEW, do_sample=False)  # in its pages
        engine.run_all()
    for prompt, handle in zip(prompts, handles, strict=True):
        expected = alone(hf_model, prompt)
        assert handle.tokens == (expected[: len(handle.tokens)] if handle.cancelled else expected)
    assert late.tokens == alone(hf_model, prompts[1])
    nothing_left(model)


def test_pages_for_half_of_the_requests_are_enough(hf_model: Any) -> None:
    ids = texts(4, 20)
    need = 4 * -(-(ids.shape[1] + NEW + 8) // 16)
    model = wrap(hf_model, oracle(hf_model, ids, 0.5), max_pages=need // 2)
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy(hf_model, ids))
    assert out.stats.preemptions > 0
    assert out.stats.paths["captured"] > 0
    nothing_left(model)


def test_pages_for_all_but_not_for_what_is_in_flight(hf_model: Any) -> None:
    """Steps go on, one by one, where there is no room for two."""
    ids = texts(1, 20)
    for pages in range(-(-(ids.shape[1] + NEW + 8) // 16), 8):
        model = wrap(hf_model, max_pages=pages)
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, greedy(hf_model, ids))
        nothing_left(model)


def test_what_is_launched_was_looked_up_after_room_was_made(
    hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making room may move the cache's tensors, and a graph writes where they were."""
    ids = texts(2)
    model = wrap(hf_model, page_size=16)
    monkeypatch.setattr(model.cache, "expect", lambda *_: None)  # so that it grows on the way
    graphs, seen = model._driven().graphs, set()
    launch = type(graphs).launch

    def watched(self: Any, graph: Any) -> bool:
        seen.add(self._places)
        assert self._places == self.target.places
        assert graph in self._graphs.values()
        return bool(launch(self, graph))

    monkeypatch.setattr(type(graphs), "launch", watched)
    out = model.generate(ids, max_new_tokens=60, do_sample=False)
    assert torch.equal(out, greedy(hf_model, ids, 60))
    assert len(seen) > 1, "nothing was moved"


def test_the_pool_and_the_tables_grow_under_steps_in_flight(hf_model: Any) -> None:
    model = wrap(hf_model)
    ids, other = texts(1), texts(3, 60)
    stream = model.stream(ids, max_new_tokens=40, do_sample=False)
    got = [token for _ in range(3) for token in next(stream).tokens[0]]
    pages, width = model.cache.pool.num_pages, model.cache.page_table.shape
    out = model.generate(other, max_new_tokens=NEW, do_sample=False)
    assert model.cache.pool.num_pages > pages
    assert model.cache.page_table.shape > width
    got += [token for step in stream for token in step.tokens[0]]
    assert torch.equal(out, greedy(hf_model, other))
    assert got == alone(hf_model, ids[0].tolist(), 40)
    nothing_left(model)


def test_branches_inherit_what_captured_steps_wrote(hf_model: Any) -> None:
    model = wrap(hf_model)
    prompt = texts(1)[0].tolist()
    text = prompt + alone(hf_model, prompt, 60)
    end = text[len(prompt) + 17]
    model.drafter = plain_steps.OnDevice(OracleDrafter([text], corrupt=0.1, vocab_size=VOCAB))
    with model.branch(prompt) as root:
        twin, other = root.fork(2)
        other.append([5, 6, 7])
        for _ in range(3):
            model.extend([root, twin, other], max_new_tokens=5, do_sample=False)
            model.cache.check_integrity()
        assert root.tokens == twin.tokens == text[: len(prompt) + 15]
        assert other.tokens == [*prompt, 5, 6, 7, *alone(hf_model, [*prompt, 5, 6, 7], 15)]
        model.extend([twin], max_new_tokens=30, do_sample=False, eos_token_id=end)
        assert twin.tokens == text[: len(twin.tokens)]
        assert twin.tokens[-1] == end
        twin.fork()[0].prune()
        assert float(specdec.score([twin], [[text[len(twin.tokens)]]])) > float("-inf")
    nothing_left(model)


def test_what_captured_steps_wrote_is_used_by_later_calls(hf_model: Any) -> None:
    model, ids = wrap(hf_model), texts(1, 30)
    first = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    longer = torch.cat([first, texts(1)], 1)
    out = model.generate(longer, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert out.stats.reused_tokens >= (first.shape[1] - 1) // 16 * 16
    assert torch.equal(out.sequences, greedy(hf_model, longer))
    nothing_left(model)


def test_a_row_without_a_next_token_fails_and_the_others_go_on(
    hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = texts(3)
    expected = greedy(hf_model, ids)
    bad = int(expected[1, ids.shape[1] + 6])  # NaN behind this token
    healthy = [bad not in row[ids.shape[1] :].tolist()[:-1] for row in expected]
    whole = plain_steps.forward

    def broken(model: Any, tokens: Tensor, *rest: Any) -> Tensor:
        logits = whole(model, tokens, *rest)
        if len(logits) == len(tokens):
            logits[tokens == bad] = torch.nan
        return logits

    monkeypatch.setattr(specdec.fused.FusedModel, "forward", broken)
    model = wrap(hf_model)
    with pytest.raises(specdec.RequestError, match="no token could be drawn") as error:
        model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert not all(healthy)
    assert error.value.sequences is not None
    for row, good in enumerate(healthy):
        if good:
            assert torch.equal(error.value.sequences[row], expected[row])
    nothing_left(model)


def test_an_exception_in_a_step_stops_all_and_the_engine_goes_on(
    hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(hf_model)
    prompt = texts(1)[0].tolist()
    with model.engine() as engine:
        handle = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        while len(handle.tokens) < 3:
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(steps, "accept", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        assert handle.done
        nothing_left(model)
        again = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        assert again.result() == alone(hf_model, prompt)
    nothing_left(model)


def test_a_criterion_may_generate_with_the_model_whose_steps_are_in_flight(hf_model: Any) -> None:
    model, ids, other = wrap(hf_model), texts(1), texts(1, 12)
    expected = greedy(hf_model, other)
    seen = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            seen.append(
                torch.equal(model.generate(other, max_new_tokens=NEW, do_sample=False), expected)
            )
            return torch.zeros(1, dtype=torch.bool)

    criteria = StoppingCriteriaList([Asks()])
    out = model.generate(ids, stopping_criteria=criteria, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, greedy(hf_model, ids, 6))
    assert seen == [True] * 5, "not asked at the length limit"
    nothing_left(model)


def test_unwrapping_frees_the_cache_at_once(hf_model: Any) -> None:
    model = wrap(hf_model)
    cache = weakref.ref(model.cache)
    gc.disable()
    try:
        stream = model.stream(texts(1), max_new_tokens=NEW, do_sample=False)
        for _ in range(2):  # the token that comes with the prompt, and a step
            next(stream)
        stream.close()  # with a step in flight
        del stream
        model.unwrap()
        assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("options", "call", "why"),
    [
        ({"capture": False}, {}, "capture is off"),
        ({"layers": "transformers"}, {}, "layers by transformers: transformers was asked for"),
        ({}, {"repetition_penalty": 1.2}, "the rule 'greedy' with these options is not captured"),
        ({}, {"output_scores": True}, "scores or logits are kept"),
        ({"drafter": RandomDrafter(VOCAB)}, {}, "RandomDrafter drafts on the host"),
    ],
)
def test_steps_that_are_not_captured_say_why(
    hf_model: Any, options: Any, call: Any, why: str
) -> None:
    model, ids = wrap(hf_model, **options), texts(1)
    call = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, **call}
    assert set(model.generate(ids, **call).stats.paths) == {"prompts are computed", why}


# The kernels, against plain Python.


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """Parents of trees with fillers, and how many nodes are none, for some requests."""
    nodes = draw(st.sampled_from([1, 5, 33]))
    out = []
    for _ in range(draw(st.integers(1, 2))):
        count = draw(st.integers(1, nodes))
        parents = [-1, *(draw(st.integers(max(0, i - 3), i - 1)) for i in range(1, count))]
        out.append((parents + [0] * (nodes - count), count))
    return out


@pytest.mark.usefixtures("real_kernels")
@settings(max_examples=25, deadline=None)
@given(trees=trees(), seed=st.integers(0, 2**16), over=st.booleans())
def test_kernels_do_what_plain_python_does(
    trees: list[tuple[list[int], int]], seed: int, over: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    count, nodes, size = len(trees), len(trees[0][0]), 4
    words, rows = 1 if nodes <= 32 else 2, count * nodes
    path = nodes
    parents = torch.tensor([p for tree, _ in trees for p in tree], dtype=torch.int32)
    sequences = torch.arange(1, count + 1)
    lengths = integers(0, 9, count + 1)
    lengths[0] = 0
    known = lengths[1:] + 1
    limits = known + integers(1, 6, count)
    if over:
        sequences[0], limits[0] = 0, known[0]
    table = 1 + torch.randperm((count + 1) * 12, generator=generator).view(count + 1, 12)
    table[0] = 0
    tokens, choices = integers(0, 2, rows), integers(0, 2, rows)
    best = integers(0, 30, rows).float()
    best[best == 0], best[best == 1] = float("-inf"), torch.nan
    results = []
    for module in (steps, plain_steps):
        state = [x.clone() for x in (sequences, lengths, limits)]
        texts = [torch.zeros(count, 24, dtype=torch.int32), known.clone()]
        placed = {
            "row_sequences": torch.zeros(rows, dtype=torch.int64),
            "depths": torch.zeros(rows, dtype=torch.int64),
            "ancestors": torch.zeros(rows, words, dtype=torch.int32),
            "slots": torch.zeros(rows, dtype=torch.int64),
            "positions": torch.zeros(rows, dtype=torch.int64),
        }
        module.place(*state, parents, table, size, **placed)
        moves = [torch.zeros(count, path, dtype=torch.int64) for _ in range(2)]
        report = torch.full((count, 5 + 2 * path), -1, dtype=torch.int32)
        module.accept(
            *state, *texts, table, size,
            tokens=tokens, parents=parents, depths=placed["depths"], ancestors=placed["ancestors"],
            counts=torch.tensor([n for _, n in trees], dtype=torch.int32),
            choices=choices, best=best, sources=moves[0], targets=moves[1], report=report,
        )  # fmt: skip
        results.append([*state, *texts, *placed.values(), *moves, report])
    for kernel, plain in zip(*results, strict=True):
        assert torch.equal(kernel, plain)


def worth(drafter: NGram, text: list[int], tokens: list[int], parents: list[int]) -> float:
    """The sum of the chances of all paths of a tree; every node must be one of the candidates."""
    matches = {0: drafter._matches(torch.tensor(text).numpy())}
    chance, depth, total = {0: 1.0}, {0: 0}, 0.0
    assert len({*zip(parents, tokens, strict=True)}) == len(tokens), "siblings differ"
    for node in range(1, len(tokens)):
        up = parents[node]
        place = depth[up]
        group = [m for m in matches[up] if text[m[0] + place : m[0] + place + 1] == [tokens[node]]]
        share = sum(w for _, w in group) / sum(w for _, w in matches[up])
        assert share > 0
        matches[node], depth[node] = group, place + 1
        chance[node] = chance[up] * share * drafter.DECAY
        total += chance[node]
    assert max(depth.values()) <= drafter.depth
    return total


@pytest.mark.usefixtures("real_kernels")
@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=2),
    nodes=st.sampled_from([1, 5, 16]),
    drafter=st.builds(NGram, st.integers(1, 6), st.integers(1, 24), st.just(64)),
)
def test_trees_of_the_device_are_worth_those_of_the_host(
    texts: list[list[int]], nodes: int, drafter: NGram
) -> None:
    text = torch.full((len(texts), 64), -7, dtype=torch.int32)
    for line, one in zip(text, texts, strict=True):
        line[: len(one)] = torch.tensor(one)
    rows = len(texts) * nodes
    tokens, parents = torch.full((rows,), -9), torch.full((rows,), -9, dtype=torch.int32)
    counts = torch.zeros(len(texts), dtype=torch.int32)
    ngram.draft(
        text,
        torch.tensor([len(one) for one in texts]),
        torch.zeros(len(texts), drafter.max_matches, dtype=torch.int32),
        tokens=tokens,
        parents=parents,
        counts=counts,
        max_ngram=drafter.max_ngram,
        max_depth=drafter.depth,
        decay=drafter.DECAY,
    )
    for row, one in enumerate(texts):
        own = slice(row * nodes, (row + 1) * nodes)
        count, tree = int(counts[row]), drafter.draft(one, nodes)
        got, up = tokens[own].tolist(), parents[own].tolist()
        assert count == len(tree)
        assert got[0] == one[-1]
        assert up[0] == -1
        assert got[count:] == [one[-1]] * (nodes - count)
        assert up[count:] == [0] * (nodes - count)
        expected = worth(drafter, one, tree.tokens.tolist(), tree.parents.tolist())
        assert worth(drafter, one, got[:count], up[:count]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("real_kernels")
def test_a_whole_run_of_the_kernels(hf_model: Any) -> None:
    ids = texts(1, 4)
    model = wrap(hf_model, nodes=3)
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, greedy(hf_model, ids, 4))
    nothing_left(model)
