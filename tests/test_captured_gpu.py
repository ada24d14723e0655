"""Captured steps as CUDA graphs. Skipped where there is no CUDA device."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import specdec
from specdec import DraftContext, ProposalLaw, Topology
from specdec.captured import CapturedLane
from specdec.drafters import Beam, DraftModel
from specdec.drafters.device_draft import DeviceDraftModel
from specdec.fused import FAMILIES
from specdec.sampling import Sampler
from specdec.testing import TINY, tiny_model

pytestmark = pytest.mark.gpu

VOCAB = TINY["vocab_size"]
NEW = 48
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def model_of(name: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model: Any = tiny_model(name, **{"max_position_embeddings": 4096, **changes})
    return model.to("cuda", dtype)


SHAPES = [None, Topology.branching([3, 2, 1]), Beam(4, 4), Beam(16, 3)]


def draft_of(shape: Any, dtype: torch.dtype = torch.float32) -> DraftModel:
    """A model that often says what `model_of()` says."""
    model = model_of(dtype=dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, device="cuda", dtype=dtype)
            weight.add_(0.1 * weight.std() * noise)
    return DraftModel(model, shape)


def texts(count: int = 1, length: int = 24) -> Tensor:
    ids = torch.randint(1, VOCAB, (count, length))
    return torch.cat([ids, ids[:, :9]], 1).cuda()


def steps_of(model: Any, ids: Tensor, nodes: int, **options: Any) -> tuple[CapturedLane, Any]:
    """A lane of captured steps in the middle of its texts, warm, and the stream that it is of."""
    engine = model.engine()
    handles = [
        engine.submit(line, max_new_tokens=1000, do_sample=False, nodes=nodes, **options)
        for line in ids.tolist()
    ]
    while engine._captured is None or len(handles[0].tokens) < 8:
        engine.step()
    return engine._captured, engine


@pytest.mark.parametrize("name", [family.removesuffix("ForCausalLM") for family in FAMILIES])
def test_tokens_are_those_of_transformers(name: str) -> None:
    model, ids = model_of(name), texts(3)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for adaptive in (True, False):
        wrapped: Any = specdec.wrap(model, nodes=33, adaptive=adaptive)
        out = wrapped.generate(ids, return_dict_in_generate=True, **options)
        assert out.stats.paths["captured"] > 0, out.stats.paths
        assert torch.equal(out.sequences, expected)
        wrapped.cache.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", ["ngram", "beam"])
def test_a_replay_gives_what_its_steps_give_one_by_one(
    dtype: torch.dtype, do_sample: bool, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same launches, replayed or not: to the same bits, in every dtype."""
    model, ids = model_of(dtype=dtype), texts(3)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": do_sample, "seed": 3}

    def chosen() -> Any:
        return draft_of(Beam(4, 4), dtype) if drafter == "beam" else drafter

    wrapped: Any = specdec.wrap(model, chosen(), nodes=17, adaptive=False)
    replayed = wrapped.generate(ids, **options)
    assert wrapped._driven().graphs.captured
    monkeypatch.setattr(specdec.captured.StepGraphs, "launch", lambda _, graph: graph.step.run())
    single: Any = specdec.wrap(model, chosen(), nodes=17, adaptive=False)
    assert torch.equal(single.generate(ids, **options), replayed)
    assert not single._driven().graphs.captured


def parts_at_near_ties_only(model: Any, here: Any, there: Any) -> None:
    """Where two texts part, the two tokens have nearly the same score."""
    for one, other in zip(here, there, strict=True):
        if torch.equal(one, other):
            continue
        place = int((one != other).int().argmax())
        with torch.no_grad():
            scores = model(one[None, :place]).logits[0, -1].float()
        gap = float((scores[one[place]] - scores[other[place]]).abs())
        assert gap < (1e-4 if model.dtype is torch.float32 else 2**-5 * float(scores.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_differ_from_uncaptured_ones_at_near_ties_only(dtype: torch.dtype) -> None:
    model, ids = model_of(dtype=dtype), texts(4)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    here = specdec.wrap(model, nodes=17).generate(ids, **options)
    there = specdec.wrap(model, nodes=17, capture=False).generate(ids, **options)
    parts_at_near_ties_only(model, here, there)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("capture", [True, False])
def test_hoppers_own_kernel_generates_the_same_but_for_near_ties(
    capture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdec.kernels import hopper

    spy = Mock(wraps=hopper.attend)
    monkeypatch.setattr(hopper, "attend", spy)
    model, ids = model_of(dtype=torch.bfloat16, head_dim=64), texts(4, 150)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    found = [
        specdec.wrap(model, nodes=17, capture=capture, backend=backend).generate(ids, **options)
        for backend in ("gluon", "triton")
    ]
    assert spy.called
    parts_at_near_ties_only(model, *found)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_draft_model_drafts_inside_the_graph(shape: Any, adaptive: bool) -> None:
    model, drafter = model_of(), draft_of(shape)
    wrapped: Any = specdec.wrap(model, drafter, nodes=17, adaptive=adaptive)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    for count, length in ((1, 24), (3, 40), (1, 700)):  # all its tensors move
        ids = texts(count, length)
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for _ in range(2):
            out = wrapped.generate(ids, return_dict_in_generate=True, **options)
            assert set(out.stats.paths) <= {"captured", "prompts are computed"}, out.stats.paths
            assert torch.equal(out.sequences, expected)
            assert adaptive or out.stats.accepted > 0
        drafting = [
            graph
            for graph in wrapped._driven().graphs.captured
            if isinstance(graph.step.drafter, DeviceDraftModel)
        ]
        assert adaptive or drafting, "small models may do better without"
        for cache in (wrapped.cache, drafter._target.cache):
            cache.check_integrity()
    sampling: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "seed": 3}
    plain: Any = specdec.wrap(model, "none")
    assert torch.equal(wrapped.generate(ids, **sampling), plain.generate(ids, **sampling))


def test_trees_of_a_replay_are_those_of_the_host_path() -> None:
    drafter = draft_of(Beam(4, 4))
    wrapped: Any = specdec.wrap(model_of(), drafter, nodes=17, adaptive=False)
    lane, engine = steps_of(wrapped, texts(3), 17)
    lane.land()
    (graph,) = wrapped._driven().graphs.captured
    buffers = graph.step.trees
    got = buffers.tokens.view(-1, 17), buffers.parents.view(-1, 17)
    # The step that was replayed last began before what it gave.
    given = [len(report.tokens) for report in lane._landed[-1]]
    known = buffers.lengths.tolist()
    for row in range(3):
        text = buffers.text[row, : known[row] - given[row]].tolist()
        context = DraftContext(
            sequences=(-1,), tokens=(text,), max_depths=(99,), seeds=torch.zeros(1).long(),
            sampler=Sampler(), vocab_size=VOCAB, device=got[0].device,
            law=ProposalLaw.DETERMINISTIC, chains=False,
        )  # fmt: skip
        with torch.no_grad():
            drafter.begin([-1])
            tree = drafter.propose(context, 17)
            drafter.end([-1])
        assert int(got[0][row, 0]) == text[-1]
        assert torch.equal(tree.tokens, got[0][row])
        assert torch.equal(tree.parents, got[1][row].long())
    engine.close()


@pytest.mark.parametrize(
    ("drafter", "nodes"), [("ngram", 1), ("ngram", 17), ("model", 17), ("beam", 17)]
)
def test_a_step_is_launched_without_waiting_for_the_device(drafter: str, nodes: int) -> None:
    drafters = {"model": None, "beam": Beam(4, 4)}
    chosen: Any = draft_of(drafters[drafter]) if drafter in drafters else drafter
    wrapped: Any = specdec.wrap(model_of(), chosen, nodes=nodes, adaptive=False)
    lane, engine = steps_of(wrapped, texts(2), nodes)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):  # over the ends of pages
            lane._launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lane.land()
    engine.close()
    wrapped.cache.check_integrity()


def test_all_graphs_share_their_memory() -> None:
    """Graphs of many sizes take hardly more than the largest one."""
    wrapped: Any = specdec.wrap(model_of(hidden_size=256, intermediate_size=1024), adaptive=False)
    ids = texts(1)

    def taken(nodes: int) -> int:
        before = torch.cuda.memory_reserved()
        wrapped.nodes = nodes
        wrapped.generate(ids, max_new_tokens=12, do_sample=False)
        return torch.cuda.memory_reserved() - before

    for _ in range(2):  # passes over prompts are captured when they come again
        taken(64)
    assert len(wrapped._driven().graphs.captured) == 1
    assert sum(taken(nodes) for nodes in range(33, 64, 5)) <= 2 * 2**20 * 7
    assert len(wrapped._driven().graphs.captured) == 8


def test_steps_are_captured_again_when_their_tensors_move() -> None:
    model = model_of()
    wrapped: Any = specdec.wrap(model, nodes=9, adaptive=False)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    ids, many, long = texts(1), texts(5, 40), texts(1, 1500)

    def check(ids: Tensor) -> None:
        out = wrapped.generate(ids, **options)
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(out, expected)
        assert wrapped._driven().graphs.captured

    check(ids)
    (first,) = wrapped._driven().graphs.captured
    stream = wrapped.stream(ids, **options)  # in flight while all moves
    got = [token for _ in range(4) for token in next(stream).tokens[0]]
    check(many)  # more sequences and pages
    check(long)  # a longer text, a wider table
    got += [token for step in stream for token in step.tokens[0]]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert got == expected[0, ids.shape[1] :].tolist()
    check(ids)
    assert first not in wrapped._driven().graphs.captured
    with torch.no_grad():  # in place: the graphs stay, and read the new weights
        for parameter in model.parameters():
            parameter.mul_(1.1)
    check(ids)
    model.model.norm.weight.data = model.model.norm.weight.detach().flip(0) + 0.5  # it moves
    check(ids)
    wrapped.unwrap()
    again: Any = specdec.wrap(model, nodes=9)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(again.generate(ids, **options), expected)


def test_adapters_and_hooks_added_later_are_heard() -> None:
    model, ids = model_of(), texts(2)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    wrapped: Any = specdec.wrap(model, nodes=9)
    wrapped.generate(ids, **options)
    hook = model.lm_head.register_forward_hook(lambda _module, _given, out: -out)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    out = wrapped.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, expected)
    assert set(out.stats.paths) == {
        "prompts are computed", "layers by transformers: lm_head has a forward hook"
    }  # fmt: skip
    hook.remove()
    out = wrapped.generate(ids, return_dict_in_generate=True, **options)
    assert out.stats.paths["captured"] > 0
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(out.sequences, expected)


def test_unwrapping_gives_the_memory_back_at_once() -> None:
    model, ids = model_of(hidden_size=256, intermediate_size=1024), texts(2)
    torch.cuda.synchronize()
    wrapped: Any = specdec.wrap(model)
    wrapped.generate(ids, max_new_tokens=NEW, do_sample=False)
    wrapped.unwrap()
    before = torch.cuda.memory_allocated()
    wrapped = specdec.wrap(model)
    wrapped.generate(ids, max_new_tokens=NEW, do_sample=False)
    wrapped.unwrap()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_norms_round_bfloat16_where_those_of_transformers_do() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    from specdec.kernels import layers

    kinds: dict[Any, Any] = {
        "cast, scale": LlamaRMSNorm, "scale, cast": Olmo2RMSNorm, "one plus": GemmaRMSNorm
    }  # fmt: skip
    hidden = torch.randn(64, 576, device="cuda", dtype=torch.bfloat16)
    for kind, norm in kinds.items():
        module = norm(576, eps=1e-5).to("cuda", torch.bfloat16)
        module.weight.data = torch.randn_like(module.weight)
        with torch.no_grad():
            got = layers.add_norm(hidden.clone(), None, module.weight, 1e-5, kind)
            equal = (got == module(hidden)).float().mean()
        assert equal > 0.999, kind  # sums in another order differ at the edge of a rounding
