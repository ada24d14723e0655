"""A draft model inside captured steps: the trees of its host path, and nobody's text changes.

On a CPU there are no graphs; the steps run as they are, see `test_captured.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec import ProposalLaw, Topology
from specdec.budget import NodeBudget
from specdec.captured import CapturedLane
from specdec.drafters import Beam, DraftModel
from specdec.drafters.device_draft import DeviceDraftModel
from specdec.drafting import DraftBuffers, DraftContext
from specdec.pages import OutOfPages
from specdec.sampling import Sampler
from specdec.target import Target
from specdec.testing import TINY, tiny_model
from tests import plain_steps
from tests.test_judge import no_waiting

VOCAB = TINY["vocab_size"]
NEW = 24
SHAPES = [
    None,
    Topology.chain(5),
    Topology.branching([3, 2, 1]),
    Beam(1, 4),
    Beam(3, 3),
    Beam(12, 4),
]


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return tiny_model("Llama", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_kernels" not in request.fixturenames:
        plain_steps.stand_in(monkeypatch)


@pytest.fixture
def real_kernels() -> None:
    """Marks tests of the kernels themselves."""


def small(noise: float = 0.1, **changes: Any) -> Any:
    """A model that often says what `hf_model` says."""
    model = tiny_model("Llama", num_hidden_layers=1, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


def drafter_of(shape: Any = None, noise: float = 0.1, **options: Any) -> DraftModel:
    changes = {"vocab_size": options.pop("vocab_size", VOCAB)}
    drafter = DraftModel(small(noise, **changes), shape, **options)
    fuse(drafter)
    return drafter


def fuse(drafter: DraftModel) -> None:
    """Gives it on a CPU what it has on a GPU."""
    drafter._cache.target = Target(
        drafter.model,
        max_pages=drafter.max_pages,
        layers="fused",
        last_position=drafter._target.last_position,
    )


def wrap(hf_model: Any, drafter: Any, **options: Any) -> Any:
    options = {"layers": "fused", "nodes": 8, "adaptive": False, **options}
    return specdec.wrap(hf_model, drafter, **options)


def prompts() -> dict[str, Any]:
    """Three of different lengths."""
    ids = torch.randint(1, VOCAB, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :13] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(hf_model: Any, inputs: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return hf_model.generate(**inputs, **options)  # type: ignore[no-any-return]


def nothing_left(model: Any) -> None:
    for cache in (model.cache, model.drafter._target.cache):
        cache.check_integrity()
        assert not cache.sequences
        cache.prefixes.clear()
        assert cache.pool.num_free == cache.pool.num_pages


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_those_of_transformers(hf_model: Any, shape: Any) -> None:
    inputs = prompts()
    model = wrap(hf_model, drafter_of(shape), nodes=13)
    for _ in range(2):  # the second run begins with pages of the first
        out = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        assert torch.equal(out.sequences, greedy(hf_model, inputs))
        assert out.stats.paths["captured"] == sum(out.stats.paths.values()) - 1, out.stats.paths
        assert out.stats.accepted > 0
    nothing_left(model)


@pytest.mark.parametrize("shape", [Topology.branching([3, 2, 1]), Beam(3, 3)], ids=str)
@pytest.mark.parametrize("vocab_size", [VOCAB - 7, VOCAB + 7])
def test_padded_vocabularies_are_tolerated(hf_model: Any, shape: Any, vocab_size: int) -> None:
    inputs = prompts()
    model = wrap(hf_model, drafter_of(shape, vocab_size=vocab_size))
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW), greedy(hf_model, inputs))
    nothing_left(model)


@pytest.mark.parametrize("shape", [None, Beam(3, 3)], ids=str)
def test_sampled_text_is_that_of_the_plain_loop(hf_model: Any, shape: Any) -> None:
    inputs = prompts()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "seed": 5, "top_k": 20}
    model = wrap(hf_model, drafter_of(shape))
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    plain: Any = specdec.wrap(hf_model, "none")
    assert torch.equal(out.sequences, plain.generate(**inputs, **options))
    assert out.stats.rule == "sample-and-match"
    assert out.stats.paths["captured"] > 0
    nothing_left(model)


def test_the_draft_cache_holds_the_text_and_nothing_else(hf_model: Any) -> None:
    """With itself as the draft, chains are always accepted: one wrong key would show."""
    inputs = prompts()
    drafter = DraftModel(tiny_model("Llama", num_hidden_layers=1), Topology.chain(5))
    fuse(drafter)
    model = wrap(hf_model, drafter, nodes=5)
    out = model.generate(**inputs, max_new_tokens=26, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy(hf_model, inputs, max_new_tokens=26))
    assert out.stats.accepted >= out.stats.drafted - 4 * len(inputs["input_ids"])
    nothing_left(model)


@contextmanager
def noted_trees(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[int, ...], Any]]:
    """Tokens and parents of the trees that are drafted, by the text above them.

    But for the last ones of the host, which go no deeper than the texts may become.
    """
    trees: dict[tuple[int, ...], Any] = {}
    draft, propose = DeviceDraftModel.draft, DraftModel.propose

    def noting_host(self: DraftModel, context: DraftContext, nodes: int) -> Any:
        batch = propose(self, context, nodes)
        parts = zip(batch.tokens.split(batch.sizes), batch.parents.split(batch.sizes), strict=True)
        for text, (tokens, parents) in zip(context.tokens, parts, strict=True):
            if max(context.max_depths) >= nodes:
                trees[tuple(text)] = tokens.tolist(), parents.tolist()
        return batch

    def noting(self: DeviceDraftModel, buffers: DraftBuffers) -> None:
        draft(self, buffers)
        nodes = buffers.nodes
        for row, length in enumerate(buffers.lengths.tolist()):
            if buffers.sequences[row] > 0:
                own = slice(row * nodes, row * nodes + int(buffers.counts[row]))
                text = tuple(buffers.text[row, :length].tolist())
                trees[text] = buffers.tokens[own].tolist(), buffers.parents[own].tolist()

    with monkeypatch.context() as patch:
        patch.setattr(DeviceDraftModel, "draft", noting)
        patch.setattr(DraftModel, "propose", noting_host)
        yield trees


def proposed(drafter: DraftModel, text: tuple[int, ...], nodes: int) -> Any:
    """The tree of the host path for a text that it has not seen."""
    context = DraftContext(
        sequences=(-1,), tokens=(text,), max_depths=(99,), seeds=torch.zeros(1).long(),
        sampler=Sampler(), vocab_size=VOCAB, device=torch.device("cpu"),
        law=ProposalLaw.DETERMINISTIC, chains=False,
    )  # fmt: skip
    drafter.begin([-1])
    tree = drafter.propose(context, nodes)
    drafter.end([-1])
    return tree.tokens.tolist(), tree.parents.tolist()


class Alternating(NodeBudget):
    """Steps with and without drafts in turn, of all sizes and as many plain ones as it takes."""

    def choose(self, seconds: Any, before: float = 0.0) -> int:
        self.turns = getattr(self, "turns", -1) + 1
        pattern = [self.sizes[-1]] * 2 + [1] * 9 + [self.sizes[-1], 1, 1, 8, 8]
        return pattern[self.turns % len(pattern)]


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("shape", [None, Topology.branching([3, 2, 1]), Beam(4, 3)], ids=str)
def test_trees_are_those_of_the_host_path(
    hf_model: Any, shape: Any, alternating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after plain steps, which the draft model has to catch up with."""
    inputs = prompts()
    model = wrap(hf_model, drafter_of(shape), nodes=12)
    caught_up: Counter[str] = Counter()
    if alternating:
        monkeypatch.setattr(specdec.captured, "NodeBudget", Alternating)
        catch_up = DeviceDraftModel.catch_up

        def counting(self: DeviceDraftModel, text: Tensor) -> None:
            caught_up["times"] += 1
            catch_up(self, text)

        monkeypatch.setattr(DeviceDraftModel, "catch_up", counting)
    with noted_trees(monkeypatch) as trees:
        out = model.generate(**inputs, max_new_tokens=40)
    assert torch.equal(out, greedy(hf_model, inputs, max_new_tokens=40))
    assert len(trees) > 20
    assert not alternating or caught_up["times"] > 1
    fresh = drafter_of(shape)
    for text, (tokens, parents) in trees.items():
        expected = {nodes: proposed(fresh, text, nodes) for nodes in (8, 12)}
        assert (tokens, parents) in expected.values(), text
    nothing_left(model)


def test_texts_that_end_early_leave_the_others_alone(hf_model: Any) -> None:
    inputs = prompts()
    expected = greedy(hf_model, inputs)
    for place in (3, 8):
        end = int(expected[0, inputs["input_ids"].shape[1] + place])
        options = {"eos_token_id": end, "pad_token_id": 0}
        model = wrap(hf_model, drafter_of(Beam(3, 3), noise=0.02))
        out = model.generate(**inputs, max_new_tokens=NEW, **options)
        assert torch.equal(out, greedy(hf_model, inputs, **options))
        nothing_left(model)


def test_requests_come_go_and_are_cancelled(hf_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes with prompts are not captured: the draft's cache goes from one way to the other."""
    model = wrap(hf_model, drafter_of(Beam(3, 3)))
    texts = [torch.randint(1, VOCAB, (3 + 5 * i,)).tolist() for i in range(5)]
    with model.engine() as engine, noted_trees(monkeypatch) as trees:
        handles = []
        for index, text in enumerate(texts):
            new = 8 + 4 * index
            handles.append(engine.submit(text, max_new_tokens=new, do_sample=False))
            for _ in range(3):
                engine.step()
                model.drafter._target.cache.check_integrity()
        handles[3].cancel()
        engine.run_all()
        assert len(engine.stats.paths) > 1
        assert engine.stats.paths["captured"] > 5
    for index, (text, handle) in enumerate(zip(texts, handles, strict=True)):
        ids = torch.tensor([text])
        expected = greedy(
            hf_model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            max_new_tokens=8 + 4 * index,
        )[0, len(text) :].tolist()
        assert handle.tokens == (expected[: len(handle.tokens)] if index == 3 else expected)
    fresh = drafter_of(Beam(3, 3))
    for known, tree in trees.items():
        assert tree == proposed(fresh, known, 8)
    nothing_left(model)


def test_streams_take_turns_on_one_draft_model(hf_model: Any) -> None:
    """Two models with one draft model; texts on the device change owner, or lie side by side."""
    drafter = drafter_of(Beam(3, 3))
    models = [wrap(hf_model, drafter), wrap(hf_model, drafter)]
    inputs = [torch.randint(1, VOCAB, (count, 9 + count)) for count in (1, 1, 2)]
    streams = [
        models[index % 2].stream(ids, max_new_tokens=NEW, do_sample=False)
        for index, ids in enumerate(inputs)
    ]
    got: list[list[list[int]]] = [[[] for _ in ids] for ids in inputs]
    going = {0, 1, 2}
    while going:
        for index in sorted(going):
            step = next(streams[index], None)
            if step is None:
                going.discard(index)
                continue
            for row, tokens in step.tokens.items():
                got[index][row] += tokens
    for ids, rows in zip(inputs, got, strict=True):
        expected = greedy(hf_model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert rows == expected[:, ids.shape[1] :].tolist()
    for model in models:
        nothing_left(model)


def test_pages_of_the_draft_model_run_out(hf_model: Any) -> None:
    """Then steps are not captured, and requests give way to one another."""
    inputs = prompts()
    ways: Counter[str] = Counter()
    for pages in (4, 6, 8, 10):
        drafter = drafter_of(Beam(8, 4), max_pages=pages)
        model = wrap(hf_model, drafter)
        out = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        assert torch.equal(out.sequences, greedy(hf_model, inputs))
        ways.update(out.stats.paths)
        nothing_left(model)
    assert ways["captured"] > 0
    assert ways["pages run out"] > 0
    model = wrap(hf_model, drafter_of(Beam(8, 4), max_pages=1))
    with pytest.raises(OutOfPages):
        model.generate(**inputs, max_new_tokens=NEW)
    nothing_left(model)


def test_an_exception_in_a_step_leaves_nothing(
    hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = wrap(hf_model, drafter_of(Beam(3, 3))), prompts()
    text = inputs["input_ids"][0].tolist()
    with model.engine() as engine:
        handle = engine.submit(text, max_new_tokens=NEW, do_sample=False)
        while len(handle.tokens) < 3:
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(DeviceDraftModel, "draft", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        nothing_left(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW), greedy(hf_model, inputs))
    nothing_left(model)


def test_why_it_is_not_captured(hf_model: Any) -> None:
    inputs = prompts()
    drawing = drafter_of(law=ProposalLaw.IID)
    sampled = {"do_sample": True, "seed": 1}
    for drafter, rule, options, why in (
        (DraftModel(small()), "auto", {}, "the model is on cpu"),
        (drawing, "sample-and-match", sampled, "DraftModel draws its drafts"),
    ):
        model = wrap(hf_model, drafter, rule=rule)
        out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, **options)
        (path,) = set(out.stats.paths) - {"prompts are computed"}
        assert path.endswith(why)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drafting_never_waits_for_the_device(
    hf_model: Any, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the forward, whose kernels are launched on a GPU."""
    model = wrap(hf_model, drafter_of(shape), nodes=12)
    lanes = []
    launch = CapturedLane._launch

    def noting(self: CapturedLane) -> None:
        lanes.append(self)
        launch(self)

    monkeypatch.setattr(CapturedLane, "_launch", noting)
    stream = model.stream(**prompts(), max_new_tokens=NEW, do_sample=False)
    next(stream)  # the token that comes with the prompts
    next(stream)
    (graph,) = lanes[-1].graphs._graphs.values()
    buffers = graph.step.trees
    there = graph.step.drafter

    def forward(_: Any, tokens: Tensor, plan: Any, *rest: Any) -> Tensor:
        keep = rest[2]
        rows = len(keep) if isinstance(keep, Tensor) else len(tokens)
        return torch.zeros(rows, VOCAB)

    monkeypatch.setattr(specdec.fused.FusedModel, "forward", forward)
    with no_waiting():
        there.draft(buffers)
    stream.close()
    nothing_left(model)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for the CPU")
@pytest.mark.usefixtures("real_kernels")
def test_the_kernels_draft_the_same_trees() -> None:
    """Fused layers and Triton's attention, on a row that fills up the batch, too."""
    texts = [list(range(1, 40)), [3, 4]]
    drafter = drafter_of(Beam(3, 3))
    expected = [proposed(drafter_of(Beam(3, 3)), tuple(text), 8) for text in texts]
    drafter._cache.target = Target(drafter.model, layers="fused", backend="triton")
    context = DraftContext(
        sequences=(1, 2), tokens=tuple(texts), max_depths=(99, 99), seeds=torch.zeros(2).long(),
        sampler=Sampler(), vocab_size=VOCAB, device=torch.device("cpu"),
        law=ProposalLaw.DETERMINISTIC, chains=False,
    )  # fmt: skip
    drafter.begin([1, 2])
    there = drafter.on_device(3, 8, torch.device("cpu"))
    assert there is not None
    there.load(context)
    buffers = DraftBuffers(
        sequences=torch.tensor([1, 2, 0]), text=torch.zeros(3, 64, dtype=torch.int32),
        lengths=torch.tensor([39, 2, 1]), tokens=torch.zeros(24).long(),
        parents=torch.zeros(24, dtype=torch.int32), counts=torch.zeros(3, dtype=torch.int32),
        longest=64, shared=False,
    )  # fmt: skip
    for row, text in zip(buffers.text, texts, strict=False):
        row[: len(text)] = torch.tensor(text)
    assert there.lagging
    there.catch_up(buffers.text)
    assert not there.lagging
    with there.launching(8, 4), torch.no_grad():
        there.draft(buffers)
    there.settle([1, 1])
    for row, tree in enumerate(expected):
        own = slice(8 * row, 8 * row + 8)
        assert (buffers.tokens[own].tolist(), buffers.parents[own].tolist()) == tree
    drafter.end([1, 2])
    cache = drafter._target.cache
    cache.check_integrity()
    assert not cache.sequences
