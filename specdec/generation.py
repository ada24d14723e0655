"""Hugging Face's `generate()` around the engine: its options in, its outputs back.

transformers itself prepares a call - defaults, padding, validation, expansion, stopping criteria -
and hands everything to a function given as `custom_generate`. That function is all we replace, so
every option means what it means there, and one that is not supported is refused by name.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import (
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.engine import Engine
from specdec.guidance import Guidance
from specdec.noise import split_seeds
from specdec.prompt_logprobs import PromptLogprobs, gathered
from specdec.request import Emission, Request, RequestError
from specdec.sampling import Sampler
from specdec.stats import GenerationStats
from specdec.stopping import Stopping

SUPPORTED_OPTIONS = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "do_sample",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "max_length",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_return_sequences",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    "watermarking_config",
}
IRRELEVANT_OPTIONS = {
    # Options of features that are off, or refused by another name.
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "diversity_penalty",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
}
NEUTRAL_VALUES: dict[str, object] = {"num_beams": 1}
ALTERNATIVES = {
    "assistant_early_exit": "use drafter=specdec.drafters.DraftModel(model)",
    "assistant_model": "pass it as drafter= to specdec.wrap",
    "cache_implementation": "the paged tree cache takes the place of every other",
    "custom_generate": "call the unwrapped model with custom_generate",
    "inputs_embeds": "pass input_ids: trees are made of token ids",
    "num_beams": "beams leave nothing to verify; search with branches, examples/beam_search.py",
    "output_attentions": "call the model itself on the generated sequences",
    "output_hidden_states": "call the model itself on the generated sequences",
    "past_key_values": "pass the whole text as input_ids; the cache is specdec's own",
    "position_ids": "positions follow from attention_mask",
    "prompt_lookup_num_tokens": "use drafter='ngram'",
    "streamer": "what stream() yields is the stream",
    "synced_gpus": "run one process per model replica",
    "token_healing": "heal the prompt before the call",
}


def refuse(name: str, value: object) -> NotImplementedError:
    """The error for an option that is not supported."""
    shown = repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
    alternative = ALTERNATIVES.get(name)
    if alternative is None and name in NEUTRAL_VALUES:
        alternative = f"pass {name}={NEUTRAL_VALUES[name]} to do without"
        return NotImplementedError(f"{name}={shown} is not supported yet: {alternative}")
    return NotImplementedError(
        f"{name}={shown} is not supported" + (f": {alternative}" if alternative else " yet")
    )


@dataclass(frozen=True)
class Call:
    """A call to `generate()` as transformers has prepared it."""

    input_ids: Tensor  # [B, L] int64, num_return_sequences already expanded
    attention_mask: Tensor | None  # [B, L]; None where nothing is padded
    sampler: Sampler
    criteria: Sequence[StoppingCriteria]
    config: GenerationConfig

    @classmethod
    def from_transformers(
        cls,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Sequence[StoppingCriteria],
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> Call:
        """Checks what transformers hands to a `custom_generate` function.

        Raises:
            NotImplementedError: an option is not supported; the message names it.
            ValueError: the attention mask is not left-padded.
        """
        _check_options(generation_config)
        mask = model_kwargs.get("attention_mask")
        _check_model_inputs(input_ids, mask, model_kwargs)
        processors = tuple(
            Guidance.from_transformers(processor, input_ids)
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
            else processor
            for processor in logits_processor
        )
        return cls(
            input_ids,
            mask,
            Sampler(generation_config.do_sample, processors, len(input_ids)),
            tuple(stopping_criteria),
            generation_config,
        )

    @property
    def max_length(self) -> int:
        """Prompt, padding included, and new tokens."""
        limits = [c.max_length for c in self.criteria if isinstance(c, MaxLengthCriteria)]
        return int(min([self.config.max_length, *limits]))

    @property
    def keeps_scores(self) -> bool:
        """Whether scores or logits are to be returned."""
        config = self.config
        asked = config.output_scores or config.output_logits
        return bool(config.return_dict_in_generate and asked)

    @property
    def pad_token(self) -> int:
        """What fills the rows that end early."""
        if self.config.pad_token_id is not None:
            return int(self.config.pad_token_id)
        eos = self.config.eos_token_id
        first = eos[0] if isinstance(eos, list) else eos
        return 0 if first is None else int(first)

    def requests(self, seed: int, cache_key: Hashable = None) -> list[Request]:
        """One request for each row, without its padding."""
        stopping = Stopping(self.input_ids, self.criteria)
        width = self.input_ids.shape[1]
        # transformers asks its criteria after a token: there is always one.
        new = max(1, self.max_length - width)
        requests = []
        seeds = split_seeds(seed, len(self.input_ids)).tolist()
        texts = self.input_ids.tolist()  # one copy to the host for all rows
        masks = None if self.attention_mask is None else self.attention_mask.tolist()
        for row, (text, row_seed) in enumerate(zip(texts, seeds, strict=True)):
            padding = 0 if masks is None else masks[row].count(0)
            request = Request(
                text[padding:],
                new,
                row_seed,
                stopping.of_row(row),
                cache_key=cache_key,
                row=row,
                padding=text[:padding],
            )
            requests.append(request)
        stopping.watch(requests)
        return requests

    def sequences(self, requests: Sequence[Request]) -> Tensor:
        """[B, L + longest answer], padded as transformers pads."""
        longest = max(len(request.emitted) for request in requests)
        fill = torch.full((len(requests), longest), self.pad_token)
        for row, request in enumerate(requests):
            fill[row, : len(request.emitted)] = torch.tensor(request.emitted)
        return torch.cat([self.input_ids, fill.to(self.input_ids.device)], dim=1)


def prepare(
    model: PreTrainedModel,
    inputs: Tensor | None,
    *,
    stop_strings: str | list[str] | None,
    tokenizer: Any,
    options: dict[str, Any],
) -> Call:
    """Lets transformers prepare a call without running it.

    Args:
        model: the model, for its defaults.
        inputs: [B, L] token ids, or None if `options` has `input_ids`.
        stop_strings, tokenizer: kept apart, since transformers drops the tokenizer on its way to a
            `custom_generate` function.
        options: everything else that `generate()` takes.

    Raises:
        NotImplementedError, ValueError: see `Call.from_transformers`, and what transformers raises.
    """
    for name in ALTERNATIVES:
        if not _is_neutral(name, options.get(name)):
            raise refuse(name, options[name])
    input_ids = options.get("input_ids") if inputs is None else inputs
    if input_ids is not None:  # what transformers says of these is hard to read
        _check_shapes(input_ids, options.get("attention_mask"))
    for config in (options.get("generation_config"), model.generation_config):
        if stop_strings is None and config is not None:
            stop_strings = config.stop_strings
    criteria = stop_string_criteria(stop_strings, tokenizer)
    if criteria:
        given = options.get("stopping_criteria") or ()
        criteria = StoppingCriteriaList([*given, *criteria])
        options = {**options, "stopping_criteria": criteria, "stop_strings": None}
    captured: list[Call] = []

    def capture(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Sequence[StoppingCriteria],
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        captured.append(
            Call.from_transformers(
                input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
            )
        )
        return input_ids

    # transformers would make a cache, which nobody uses, in a third of all the time spent here.
    options = {**options, "use_cache": False}
    model.generate(inputs, custom_generate=capture, **options)  # type: ignore[operator]
    return captured[0]


def stop_string_criteria(
    stop_strings: str | list[str] | None, tokenizer: Any
) -> list[StoppingCriteria]:
    """transformers' criterion for stop strings, if there are any.

    Raises:
        ValueError: there are, but no tokenizer to find them with.
    """
    if stop_strings is None:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings: pass tokenizer= as well, to find them in the tokens")
    return [StopStringCriteria(tokenizer, stop_strings)]


def _is_neutral(name: str, value: object) -> bool:
    if value is None or value is False:
        return True
    return name in NEUTRAL_VALUES and value == NEUTRAL_VALUES[name]


def _check_options(config: GenerationConfig) -> None:
    for name, value in vars(config).items():
        if name.startswith("_"):  # transformers' own notes on a prepared call
            continue
        if name not in SUPPORTED_OPTIONS | IRRELEVANT_OPTIONS and not _is_neutral(name, value):
            raise refuse(name, value)


def _check_model_inputs(input_ids: Tensor, mask: Tensor | None, given: dict[str, Any]) -> None:
    caches = {"past_key_values", "cache"}  # the name until transformers 5.23, and since
    known = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *caches}
    for name, value in given.items():
        if name not in known and value is not None:
            raise refuse(name, value)
    for name in caches & given.keys():
        if given[name] is not None and given[name].get_seq_length() > 0:
            raise refuse("past_key_values", given[name])
    _check_shapes(input_ids, mask)
    if mask is not None:
        seen = mask.cpu() != 0  # one copy to the host, where small operations cost nothing
        if not bool(seen[:, -1].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
            raise ValueError(
                "attention_mask: expected padding on the left only, got padding on the right or "
                "inside; set tokenizer.padding_side = 'left'. Without an attention_mask it is "
                "inferred from pad_token_id: pass one if the prompt itself has that token"
            )
    positions = given.get("position_ids")
    if positions is not None:
        seen = torch.ones(input_ids.shape) if mask is None else mask.cpu() != 0
        expected = seen.long().cumsum(1) - 1
        if not bool(((positions.cpu() == expected) | (seen == 0)).all()):
            raise refuse("position_ids", positions)


def _check_shapes(input_ids: Tensor, mask: Tensor | None) -> None:
    """Refuses what is no batch of token ids, or a mask that is not one of it."""
    if not isinstance(input_ids, Tensor):
        hint = "; pass **inputs" if isinstance(input_ids, Mapping) else ""
        raise TypeError(
            f"input_ids: expected a tensor [B, L], got {type(input_ids).__name__}{hint}"
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids: expected integer token ids, got {input_ids.dtype}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids: expected [B, L] with at least one token, got {list(input_ids.shape)}"
        )
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected {list(input_ids.shape)}, got {list(mask.shape)}"
        )


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`: transformers' output and more.

    `scores` and `logits` are transformers': for each new token [B, V] float32. A row that ended
    has zeros there; transformers has what the model says to its padding.

    Args:
        stats: the counts of the run.
        prompt_logprobs: those of the prompts, if they were asked for.
    """

    stats: GenerationStats | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True)
class Step:
    """One step of `stream`: what each row of the batch received.

    The pass that ends prompts is one, too: their rows get their first token, with nothing drafted.
    """

    tokens: dict[int, list[int]]
    """New tokens by row; rows that are finished are absent."""
    drafted: dict[int, int]
    """Nodes proposed by row, the root not counted."""
    accepted: dict[int, int]
    """Nodes accepted by row, the root not counted."""
    scores: dict[int, Tensor]
    """With `output_scores` or `output_logits`, [tokens, V] processed logits by row."""
    logits: dict[int, Tensor]
    """With either, [tokens, V] logits by row."""


_STREAMS: weakref.WeakSet[Generator[Step, None, None]] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Ends streams that were left before their end while everything is still there to end them.

    Where that is left to the interpreter's shutdown, torch aborts the process.
    """
    for steps in list(_STREAMS):
        with suppress(ValueError):  # another thread is in it
            steps.close()


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[Step]:
    """Runs the engine and yields every step by row."""
    steps = _steps(engine, requests)
    _STREAMS.add(steps)
    return steps


def _steps(engine: Engine, requests: Sequence[Request]) -> Generator[Step, None, None]:
    rows = {id(request): row for row, request in enumerate(requests)}
    for emissions in engine.run(requests):
        by_row: dict[int, Emission] = {rows[id(e.request)]: e for e in emissions}
        yield Step(
            {row: emission.tokens for row, emission in by_row.items()},
            {row: emission.drafted for row, emission in by_row.items()},
            {row: emission.accepted for row, emission in by_row.items()},
            {row: e.scores for row, e in by_row.items() if e.scores is not None},
            {row: e.logits for row, e in by_row.items() if e.logits is not None},
        )


def run(
    call: Call, engine: Engine, requests: Sequence[Request], streamer: BaseStreamer | None
) -> Tensor | SpeculativeOutput:
    """Runs a prepared call to its end, with transformers' return types.

    A streamer gets the prompt and then the tokens of each step; it is ended also when an exception
    passes through, so that whoever reads from it does not wait for ever.

    Raises:
        ValueError: a streamer was given for more than one row.
        RequestError: a row had no next token; the others ran on, see its `sequences`.
    """
    scores: list[list[Tensor]] = [[] for _ in requests]
    logits: list[list[Tensor]] = [[] for _ in requests]
    try:
        if streamer is not None and len(requests) > 1:
            raise ValueError(
                f"streamer: expected a batch of one, got {len(requests)} rows; "
                "use .stream() instead"
            )
        if streamer is not None:
            streamer.put(call.input_ids.cpu())
        for step in stream(engine, requests):
            if streamer is not None:
                streamer.put(torch.tensor(step.tokens[0]))
            for row in step.scores:
                scores[row] += step.scores[row].unbind(0)
                logits[row] += step.logits[row].unbind(0)
    except RequestError as error:
        error.sequences = call.sequences(requests)
        raise
    finally:
        if streamer is not None:
            streamer.end()
    sequences = call.sequences(requests)
    if call.config.return_dict_in_generate:
        new = sequences.shape[1] - call.input_ids.shape[1]
        asked = [r.prompt_scores for r in requests if r.prompt_scores is not None]
        return SpeculativeOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=_by_token(scores, new) if call.config.output_scores else None,  # type: ignore[arg-type]
            logits=_by_token(logits, new) if call.config.output_logits else None,  # type: ignore[arg-type]
            stats=engine.stats,
            prompt_logprobs=gathered(asked, call.input_ids.shape[1], call.input_ids.device)
            if asked
            else None,
        )
    return sequences


def _by_token(rows: Sequence[Sequence[Tensor]], new: int) -> tuple[Tensor, ...]:
    """[V] of every token of every row to [B, V] of every token, zeros behind a row's end."""
    blank = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(
        torch.stack([row[token] if token < len(row) else blank for row in rows])
        for token in range(new)
    )
