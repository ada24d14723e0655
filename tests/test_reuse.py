"""What was computed once is not computed again, and nothing else changes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.drafters import DraftModel
from specdec.picture import as_svg, as_text
from specdec.testing import TINY, degraded, tiny_model

VOCAB, PAGE = TINY["vocab_size"], 16


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama", max_position_embeddings=4096)


def random_text(length: int, batch: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length))


def greedy(model: Any, prompt: Tensor, new: int = 12) -> Any:
    mask = torch.ones_like(prompt)
    return model.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=new, do_sample=False
    )


def run(wrapped: Any, prompts: Tensor, new: int = 12, **options: Any) -> Any:
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompts)} | options
    out = wrapped.generate(prompts, max_new_tokens=new, return_dict_in_generate=True, **options)
    wrapped.cache.check_integrity()
    assert not wrapped.cache.sequences
    return out


def test_a_prompt_that_begins_like_an_earlier_one_computes_the_rest(model: Any) -> None:
    wrapped = specdec.wrap(model)
    first = random_text(70)
    second = torch.cat([first[:, :50], random_text(9)], 1)
    assert run(wrapped, first).stats.prefilled_tokens == 69
    out = run(wrapped, second)
    assert (out.stats.reused_tokens, out.stats.prefilled_tokens) == (48, 10)
    assert out.stats.hit_rate == 48 / 58
    assert torch.equal(out.sequences, greedy(model, second))
    assert run(wrapped, second).stats.prefilled_tokens == 58 - 48


def test_reuse_can_be_switched_off_and_is_kept_apart_by_key(model: Any) -> None:
    wrapped, prompt = specdec.wrap(model), random_text(70)
    run(wrapped, prompt, cache_key="ann")
    assert run(wrapped, prompt, cache_key="bob").stats.reused_tokens == 0
    assert run(wrapped, prompt, cache_key="ann").stats.reused_tokens == 64
    assert run(wrapped, prompt).stats.reused_tokens == 0
    wrapped.prefix_cache = False
    assert run(wrapped, prompt, cache_key="ann").stats.reused_tokens == 0
    off = specdec.wrap(model, prefix_cache=False)
    run(off, prompt)
    assert run(off, prompt).stats.reused_tokens == 0
    assert off.cache.prefixes.num_pages == 0


def test_draft_models_reuse_what_the_run_allows_them_to(model: Any) -> None:
    drafter = DraftModel(degraded(model, bits=5))
    cache, prompt = drafter._target.cache, random_text(70)
    off = specdec.wrap(model, drafter, prefix_cache=False)
    run(off, prompt)
    assert cache.prefixes.num_pages == 0
    on = specdec.wrap(model, drafter)
    expected = run(on, prompt, cache_key="ann").sequences
    pages = cache.prefixes.num_pages
    assert pages >= 70 // PAGE
    assert torch.equal(run(on, prompt, cache_key="ann").sequences, expected)
    assert cache.prefixes.num_pages == pages
    run(on, prompt, cache_key="bob")
    assert cache.prefixes.num_pages == 2 * pages
    cache.check_integrity()
    assert not cache.sequences


@pytest.mark.parametrize("length", [8, 40])
def test_equal_prompts_are_prefilled_once(model: Any, length: int) -> None:
    prompt, options = random_text(length), {"do_sample": True, "seed": 3, "num_return_sequences": 6}
    out = run(specdec.wrap(model), prompt, **options)
    assert out.stats.prefilled_tokens == length - 1
    assert out.stats.reused_tokens == 5 * (length - 1)
    alone = run(specdec.wrap(model, prefix_cache=False), prompt, **options)
    assert torch.equal(out.sequences, alone.sequences)
    assert alone.stats.prefilled_tokens == 6 * (length - 1)


def test_a_common_prefix_is_computed_and_stored_once(model: Any) -> None:
    """32 requests, 2,048 tokens in common and 256 of their own, of which 16 are generated."""
    common = random_text(2048).expand(32, -1)
    prompts = torch.cat([common, random_text(240, 32)], 1)
    prompts[:, 2048] = torch.arange(1, 33)
    wrapped = specdec.wrap(model, "none")
    out = run(wrapped, prompts, new=16)
    assert out.stats.prefilled_tokens == 2048 + 32 * 239
    token_bytes = wrapped.cache.pool.page_bytes // PAGE
    unique = 2048 + 32 * 256
    assert out.stats.bytes["committed"] <= 1.05 * unique * token_bytes
    alone = run(specdec.wrap(model, "none", prefix_cache=False), prompts[5:6], new=16)
    assert torch.equal(out.sequences[5:6], alone.sequences)


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_a_chat_pays_for_new_turns(model: Any, drafter: str) -> None:
    draft_model = DraftModel(degraded(model, bits=5))
    wrapped = specdec.wrap(model, draft_model if drafter == "model" else drafter)
    talk = random_text(20)
    known = 0
    for _ in range(10):
        talk = torch.cat([talk, random_text(11)], 1)
        out = run(wrapped, talk, new=14)
        new_tokens = talk.shape[1] - known
        assert out.stats.prefilled_tokens <= new_tokens + PAGE
        assert torch.equal(out.sequences, greedy(model, talk, 14))
        talk = out.sequences
        known = talk.shape[1]
    if drafter == "model":
        cache = draft_model._target.cache
        cache.check_integrity()
        assert cache.prefixes.num_pages >= known // PAGE - 1


def test_changed_weights_never_hit() -> None:
    model: Any = tiny_model("Llama")
    wrapped, prompt = specdec.wrap(model), random_text(70)
    run(wrapped, prompt)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.0)
    assert run(wrapped, prompt).stats.reused_tokens == 0
    assert run(wrapped, prompt).stats.reused_tokens == 64
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.normal_()
    out = run(wrapped, prompt)
    assert out.stats.reused_tokens == 0
    assert torch.equal(out.sequences, greedy(model, prompt))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert run(wrapped, prompt).stats.reused_tokens == 0
    assert len(wrapped.cache.prefixes.roots) == 1, "what cannot match again is forgotten"


def test_switching_an_adapter_gives_its_own_tokens() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "k_proj"], init_lora_weights=False)
    peft_model: Any = get_peft_model(tiny_model("Llama"), config, adapter_name="a").eval()
    torch.manual_seed(5)
    peft_model.add_adapter("b", config)
    wrapped: Any = specdec.wrap(peft_model)
    prompt, texts = random_text(70), {}
    for name in "abab":
        peft_model.set_adapter(name)
        out = run(wrapped, prompt)
        expected = peft_model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
        assert torch.equal(out.sequences, expected)
        assert out.stats.reused_tokens == (64 if name in texts else 0)
        texts[name] = tuple(expected[0].tolist())
    assert len(set(texts.values())) == 2
    with peft_model.disable_adapter():
        assert run(wrapped, prompt).stats.reused_tokens == 0


def test_what_two_adapters_have_computed_is_not_used_again() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "k_proj"], init_lora_weights=False)
    peft_model: Any = get_peft_model(tiny_model("Llama"), config, adapter_name="a").eval()
    peft_model.add_adapter("b", config)
    peft_model.set_adapter("a")
    wrapped: Any = specdec.wrap(peft_model, page_size=2)
    with wrapped.engine() as engine:
        prompt = random_text(15)
        handle = engine.submit(prompt, max_new_tokens=24, do_sample=False)
        for _ in range(4):
            engine.step()
        peft_model.set_adapter("b")  # while the request runs
        engine.run_all()
    peft_model.set_adapter("a")
    prompt = torch.cat([prompt, torch.tensor([handle.tokens])], 1)
    assert torch.equal(run(wrapped, prompt).sequences, greedy(peft_model, prompt))


def test_a_hook_is_part_of_the_weights() -> None:
    model: Any = tiny_model("Llama")
    wrapped, prompt = specdec.wrap(model), random_text(40)
    run(wrapped, prompt)
    hook = model.model.layers[0].register_forward_hook(lambda _, __, out: out.flip(-1))
    assert torch.equal(run(wrapped, prompt).sequences, greedy(model, prompt))
    hook.remove()
    assert run(wrapped, prompt).stats.reused_tokens == 32


def test_earlier_texts_make_room_when_pages_run_out(model: Any) -> None:
    wrapped = specdec.wrap(model, max_pages=8)
    for _ in range(4):
        out = run(wrapped, random_text(70))
    assert out.stats.evicted_pages > 0
    assert out.stats.preemptions == 0
    small = specdec.wrap(model, max_cached_bytes=2 * wrapped.cache.pool.page_bytes)
    run(small, random_text(70))
    assert small.cache.prefixes.num_pages == 2


def test_pictures_show_every_node(model: Any) -> None:
    from rich.console import Console

    wrapped, trunk = specdec.wrap(model), random_text(40)
    for _ in range(2):
        run(wrapped, torch.cat([trunk, random_text(20)], 1))
    tree = wrapped.cache.prefixes
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_text(tree, lambda tokens: f"<{len(tokens)}>"))
    text = console.export_text()
    nodes = list(tree.nodes())
    assert [len(node.tokens) for node in nodes] == [32, 32, 32]
    assert text.count("32 tokens, 2 pages: <32>") == 3
    svg = as_svg(tree, lambda tokens: "<&>")
    assert svg.count("<rect") == 3
    assert "&lt;&amp;&gt;" in svg
