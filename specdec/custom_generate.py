"""The other door: `model.generate(..., custom_generate=specdec.generate)`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from specdec.drafting import Drafter
from specdec.generation import Call, SpeculativeOutput, stop_string_criteria
from specdec.wrap import SpeculativeModel, wrap


class Generate:
    """A function for `model.generate(..., custom_generate=specdec.generate)`.

    `with_` sets what transformers cannot hand over: it drops `streamer`, `tokenizer` and
    `assistant_model` on the way to a custom function, and refuses arguments it does not know.
    `stop_strings`, which need a tokenizer, therefore go to `with_` too.
    """

    def __init__(
        self,
        drafter: str | Drafter | PreTrainedModel = "ngram",
        *,
        streamer: BaseStreamer | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        cache_key: Hashable = None,
        **wrap_options: Any,
    ) -> None:
        self._drafter = drafter
        self._streamer = streamer
        self._criteria = stop_string_criteria(stop_strings, tokenizer)
        self._seed = seed
        self._generator = generator
        self._cache_key = cache_key
        self._wrap_options = wrap_options
        self._wrapped: SpeculativeModel | None = None

    def with_(
        self,
        drafter: str | Drafter | PreTrainedModel = "ngram",
        *,
        streamer: BaseStreamer | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        cache_key: Hashable = None,
        **wrap_options: Any,
    ) -> Generate:
        """The same function with settings; `wrap_options` are those of `specdec.wrap`.

        Keep the result to use it again: it keeps the model's cache for the next call.
        """
        return Generate(
            drafter,
            streamer=streamer,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            seed=seed,
            generator=generator,
            cache_key=cache_key,
            **wrap_options,
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Called by transformers with everything prepared."""
        call = Call.from_transformers(
            input_ids,
            logits_processor,
            [*stopping_criteria, *self._criteria],
            generation_config,
            model_kwargs,
        )
        wrapped = self._wrapped
        if wrapped is None or wrapped._model is not model:
            # A wrapper for a single call is not worth a capture.
            once = {"capture": False} if self is generate else {}
            wrapped = wrap(model, self._drafter, **{**once, **self._wrap_options})
        if self is not generate:
            self._wrapped = wrapped
        return wrapped._run(call, self._streamer, self._seed, self._generator, self._cache_key)


generate = Generate()
"""`model.generate(..., custom_generate=specdec.generate)`: n-gram trees; see `Generate.with_`."""
