"""The same promises on a CUDA device. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec import ProposalLaw
from specdec.drafters import DraftModel
from specdec.target import Target
from specdec.testing import ARCHITECTURES, TINY, OracleDrafter, RandomDrafter, degraded, tiny_model
from specdec.topology import Topology

pytestmark = pytest.mark.gpu

VOCAB = TINY["vocab_size"]
GREEDY: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_equal_those_of_transformers(name: str) -> None:
    model: Any = tiny_model(name)
    model.cuda()
    prompts = torch.randint(1, VOCAB, (3, 9)).cuda()
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **GREEDY)
    drafters = [
        RandomDrafter(VOCAB),
        OracleDrafter(expected.tolist(), corrupt=0.3, vocab_size=VOCAB),
    ]
    for drafter in drafters:
        wrapped: Any = specdec.wrap(model, drafter, nodes=24)
        assert torch.equal(wrapped.generate(prompts, **GREEDY), expected)
        wrapped.cache.check_integrity()


@pytest.mark.parametrize("law", list(ProposalLaw))
def test_a_draft_model_on_the_device(law: ProposalLaw) -> None:
    model: Any = tiny_model("Llama")
    model.cuda()
    prompts = torch.randint(1, VOCAB, (4, 9)).cuda()
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **GREEDY)
    drafter = DraftModel(degraded(model, bits=6), Topology.branching([3, 2, 1]), law=law)
    wrapped: Any = specdec.wrap(model, drafter, nodes=24)
    out = wrapped.generate(prompts, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert out.stats.tokens_per_step > 1.5
    # Trees of several sizes round differently; no draw of this seed is within 0.001 of another one.
    sampling: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "seed": 24}
    again = wrapped.generate(prompts, **sampling)
    assert torch.equal(again, wrapped.generate(prompts, **sampling))
    drafter._target.cache.check_integrity()


@pytest.mark.parametrize("law", list(ProposalLaw))
def test_last_steps_without_room_for_drafts_say_what_a_plain_run_says(law: ProposalLaw) -> None:
    """Their trees have one node, and a batch of them may be views of one."""
    model: Any = tiny_model("Llama")
    model.cuda()
    prompts = torch.randint(1, VOCAB, (4, 9)).cuda()
    plain: Any = specdec.wrap(model, "none", capture=False)
    drafter = DraftModel(degraded(model, bits=6), Topology.branching([3, 2, 1]), law=law)
    for rule in ("sample-and-match", "auto"):
        wrapped: Any = specdec.wrap(model, drafter, nodes=24, capture=False, rule=rule)
        for count in (2, 20):  # behind the first of two tokens, no tree has room
            sampling: dict[str, Any] = {"max_new_tokens": count, "do_sample": True, "seed": 24}
            outs = [wrapped.generate(prompts, **sampling) for _ in range(2)]
            assert torch.equal(*outs)
            if rule == "sample-and-match" or count == 2:
                assert torch.equal(outs[0], plain.generate(prompts, **sampling))
        wrapped.cache.check_integrity()


def test_a_step_commits_without_waiting_for_the_device() -> None:
    """Reserving, planning and committing never ask the device for a number."""
    model: Any = tiny_model("Llama")
    target = Target(model.cuda())
    cache = target.cache
    sequences = [cache.admit(), cache.admit()]
    paths = torch.tensor([[0, 2, -1], [0, -1, -1]]).cuda()
    nodes = torch.tensor([0, 1, 2, 0, 1, 2]).cuda()
    with cache.speculate(sequences, [40, 40]) as lease:  # allocates the pages
        lease.rollback()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with cache.speculate(sequences, [3, 3]) as lease:
                lease.plan([3, 3], nodes, nodes, None)
                lease.commit(paths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths[sequences].tolist() == [6, 3]
    cache.check_integrity()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_layers_on_two_devices_keep_their_keys_there(name: str) -> None:
    from accelerate import dispatch_model

    model: Any = tiny_model(name, num_hidden_layers=4)
    prompts = torch.randint(1, VOCAB, (3, 9)).cuda()
    device_map = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    device_map |= {f"model.layers.{layer}": layer // 2 for layer in range(4)}
    model = dispatch_model(model, device_map)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **GREEDY)
    oracle = OracleDrafter(expected.tolist(), corrupt=0.3, vocab_size=VOCAB)
    for drafter in (RandomDrafter(VOCAB), oracle):
        wrapped: Any = specdec.wrap(model, drafter, nodes=24)
        assert len(wrapped.cache.pool.groups) == 2
        assert torch.equal(wrapped.generate(prompts, **GREEDY), expected)
        wrapped.cache.check_integrity()
