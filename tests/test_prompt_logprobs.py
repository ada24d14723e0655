"""What the model thinks of the prompts, against one forward of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec.engine import Engine
from specdec.testing import TINY, tiny_model

VOCAB = TINY["vocab_size"]
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "repetition_penalty": 1.5,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("step_tokens", [512, 16])
def test_they_are_those_of_a_forward_whole_or_in_pieces(
    monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    shipped = Engine.__init__

    def small(self: Engine, *args: Any, **kwargs: Any) -> None:
        shipped(self, *args, **{**kwargs, "step_tokens": step_tokens})

    monkeypatch.setattr(Engine, "__init__", small)
    model: Any = tiny_model("Llama")
    wrapped: Any = specdec.wrap(model, "ngram")
    ids = torch.randint(1, VOCAB, (2, 40))
    ids[1, 20:] = ids[1, :20]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = wrapped.generate(ids, attention_mask=mask, **OPTIONS)
    for _ in range(2):  # what is cached of the prompts does not change what is reported
        out = wrapped.generate(ids, attention_mask=mask, prompt_logprobs=3, **OPTIONS)
        assert torch.equal(out.sequences, plain.sequences)
        found = out.prompt_logprobs
        for row, start in enumerate((3, 0)):
            text = ids[row, start:]
            with torch.no_grad():
                expected = model(text[None]).logits[0, :-1].log_softmax(-1)
            own = expected.gather(1, text[1:, None])
            torch.testing.assert_close(
                found.logprobs[row, start + 1 :], own[:, 0], rtol=1e-4, atol=1e-4
            )
            assert found.logprobs[row, : start + 1].isnan().all()
            assert (found.ranks[row, : start + 1] == -1).all()
            top = expected.topk(3, 1)
            assert torch.equal(found.top_tokens[row, start + 1 :], top.indices)
            assert torch.equal(found.ranks[row, start + 1 :], (expected > own).sum(1) + 1)
    again = wrapped.generate(ids, attention_mask=mask, **OPTIONS)
    assert again.prompt_logprobs is None
    assert again.stats.reused_tokens > 0, "what was computed is there for others"


def test_they_must_have_somewhere_to_go() -> None:
    wrapped: Any = specdec.wrap(tiny_model("Llama"), "ngram")
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="prompt_logprobs: pass return_dict_in_generate=True"):
        wrapped.generate(prompt, prompt_logprobs=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt_logprobs: expected 0 to 97, got -1"):
        wrapped.generate(prompt, prompt_logprobs=-1, max_new_tokens=2, return_dict_in_generate=True)
