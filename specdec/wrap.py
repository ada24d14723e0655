"""The front door: wrap a Hugging Face model, and its `generate` is speculative."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
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

from specdec.attention import Backend
from specdec.branching import Branch, check_branches, check_weights, grow
from specdec.cache import TreeKVCache
from specdec.drafting import Drafter
from specdec.engine import Engine
from specdec.generation import (
    Call,
    SpeculativeOutput,
    Step,
    prepare,
    refuse,
    run,
    stream,
)
from specdec.guidance import bind
from specdec.pages import check_count, check_flag
from specdec.prompt_logprobs import PromptScores
from specdec.request import Policy, Request, Verified, token_ids
from specdec.rules import check_rule, select_rule
from specdec.sampling import Sampler
from specdec.serving import ServingEngine
from specdec.support import causal_model, check_length
from specdec.target import Layers, Target
from specdec.tree import MAX_NODES
from specdec.verify import AcceptanceRule
from specdec.warmup import warm_up

FLUENT = {"apply", "eval", "requires_grad_", "to", "train", "type", "cpu", "cuda"} | {
    "bfloat16",
    "double",
    "float",
    "half",
}
"""Methods of a module that return the module: on a wrapped model they return the wrapper."""

OWN = frozenset({"adaptive", "drafter", "nodes", "rule", "prefix_cache"}) | {
    "_model",
    "_target",
    "_target_key",
    "_target_options",
}


def wrap(
    model: Any,
    drafter: str | Drafter | PreTrainedModel = "ngram",
    *,
    rule: str | AcceptanceRule = "auto",
    nodes: int | None = None,
    page_size: int | None = None,
    max_pages: int | None = None,
    prefix_cache: bool = True,
    max_cached_bytes: int | None = None,
    backend: Backend = "auto",
    layers: Layers = "auto",
    capture: bool = True,
    adaptive: bool = True,
) -> SpeculativeModel:
    """Makes a model's `generate()` speculative without changing what it generates.

    Args:
        model: a decoder-only transformers model, or a PEFT model of layers around one. It is not
            changed and keeps working on its own.
        drafter: `"ngram"`, `"none"`, a smaller Hugging Face model with the same tokenizer, or any
            `Drafter`.
        rule: how sampled tokens are verified: `auto`, `sample-and-match`, `token-level`,
            `multi-round`, `without-replacement`, `block`, `traversal`, or a rule of
            `specdec.rules` with settings of its own. `typical` and `threshold` are lossy. Greedy
            decoding is always verified greedily.
        nodes: largest token tree, its root included; 8 on a CPU and 32 elsewhere by default. A
            pass over more rows costs more; `specdec demo` shows how to choose.
        page_size: tokens in a page of the KV cache, a power of two; 64 on a CUDA device and 16
            elsewhere by default. Texts share whole pages, and attention reads large ones faster.
        max_pages: upper bound for the cache's pages; None to grow as needed.
        prefix_cache: keep the K and V of texts that are over, so that a later one that begins alike
            computes only the rest.
        max_cached_bytes: for how much of that there is room, at most; by default a tenth of the
            device's memory.
        backend: the backend of tree attention, see `specdec.attention.tree_attention`.
        layers: who computes the model's layers: `fused`, in few kernels, for the standard decoder
            families; `transformers`, for all. `auto` takes the first on a GPU where it fits. Then
            the model's weights are packed where they lie, see `unwrap`.
        capture: run decoding steps as CUDA graphs where they can be; `stats.paths` tells which were
            not, and why.
        adaptive: let captured steps take smaller trees than `nodes`, or none, where these pay
            better by measured times. What is generated does not depend on it.

    Raises:
        UnsupportedModel: the model cannot be driven with trees; the message says why.
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    flags = {"prefix_cache": prefix_cache, "capture": capture, "adaptive": adaptive}
    for name, flag in flags.items():
        check_flag(name, flag)
    return SpeculativeModel(
        model,
        drafter,
        rule=rule,
        nodes=nodes,
        page_size=page_size,
        max_pages=max_pages,
        prefix_cache=prefix_cache,
        max_cached_bytes=max_cached_bytes,
        backend=backend,
        layers=layers,
        capture=capture,
        adaptive=adaptive,
    )


class SpeculativeModel:
    """A wrapped model: `generate` and `stream` are speculative, all else is the model's own.

    `drafter`, `rule`, `nodes`, `adaptive` and `prefix_cache` may be changed between calls.
    """

    drafter: Drafter
    rule: str | AcceptanceRule
    nodes: int
    prefix_cache: bool
    adaptive: bool
    _model: Any
    _target: Target | None
    _target_options: dict[str, Any]
    _target_key: tuple[torch.device, torch.dtype, int] | None

    def __init__(
        self,
        model: Any,
        drafter: str | Drafter | PreTrainedModel,
        *,
        rule: str | AcceptanceRule,
        nodes: int | None,
        prefix_cache: bool,
        adaptive: bool,
        **target_options: Any,
    ) -> None:
        causal_model(model)
        self._model = model
        self.adaptive = adaptive
        self.prefix_cache = prefix_cache
        self._target_options = target_options
        self._target, self._target_key = None, None
        device = self._driven().device
        self.rule = rule
        self.nodes = (8 if device.type == "cpu" else 32) if nodes is None else nodes
        self.drafter = drafter  # type: ignore[assignment]

    def _wrapped(self) -> Any:
        model = object.__getattribute__(self, "_model")
        if model is None:
            raise RuntimeError("this wrapper was unwrapped; call specdec.wrap again")
        return model

    def _driven(self) -> Target:
        """The target, made anew when the model has been moved, cast or resized since."""
        embeddings: Any = causal_model(self._wrapped()).get_input_embeddings()
        key = (embeddings.weight.device, embeddings.weight.dtype, len(embeddings.weight))
        if self._target is None or key != self._target_key:
            self._target = Target(self._wrapped(), **self._target_options)
            self._target_key = key
        return self._target

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: BaseStreamer | None = None,
        observer: Callable[[Verified], object] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        cache_key: Hashable = None,
        prompt_logprobs: int | None = None,
        **options: Any,
    ) -> Tensor | SpeculativeOutput:
        """transformers' `generate()`, with its options, shapes, padding and return types.

        Args:
            inputs: [B, L] prompts, padded on the left; also as `input_ids=`.
            generation_config, logits_processor, stopping_criteria: as in transformers.
            streamer: gets the prompt and then the tokens of each step; for one row.
            observer: is called after every step with the trees, what the target made of them and
                the accepted paths; what it raises ends the call.
            seed: of a sampled run. By default drawn from `generator`, or from torch's global
                generator, so that `transformers.set_seed` works.
            generator: to draw the seed from.
            tokenizer: needed with `stop_strings`.
            cache_key: only calls with equal keys reuse each other's prompts; give every tenant its
                own, since how long a prompt takes tells whether somebody has sent it before
                (InputSnatch, arXiv 2411.18191).
            prompt_logprobs: also report the log-probability of every token of the prompts, and so
                many of the likeliest tokens beside it; 0 for none beside. In the output as
                `prompt_logprobs`, with `return_dict_in_generate=True`. Such a call computes its
                prompts whole, also what is cached of them; others may reuse what it computed.
            options: everything else `generate()` takes: `attention_mask`, `max_new_tokens`,
                `do_sample`, `temperature`, `top_k`, `top_p`, `eos_token_id`, `stop_strings`,
                `num_return_sequences`, `return_dict_in_generate`, ...

        Returns:
            [B, L + longest answer] token ids, or with `return_dict_in_generate=True` a
            `SpeculativeOutput`, transformers' output with `.stats`.

        Raises:
            NotImplementedError: an option is not supported; none is ignored.
            OutOfPages: the cache is limited by `max_pages` and too small.
            RequestError: rows had no next token; the others ran on, see its `sequences`.
        """
        call = self._prepare(
            inputs, generation_config, logits_processor, stopping_criteria, tokenizer, options
        )
        top = _check_logprobs(prompt_logprobs, call, self._driven().vocab_size)
        return self._run(call, streamer, seed, generator, cache_key, observer, top)

    def stream(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        cache_key: Hashable = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Like `generate`, but yields every step: new tokens, drafted and accepted nodes by row.

        Options are checked at the call, not at the first step. Closing the iterator early frees
        everything. In a batch without an end-of-sequence token, a row may have yielded tokens
        behind the place where a stopping criterion ends all rows; `generate` cuts them off.
        """
        call = self._prepare(
            inputs, generation_config, logits_processor, stopping_criteria, tokenizer, options
        )
        engine = self._engine(call)
        return stream(engine, call.requests(_seed(call, seed, generator), cache_key))

    def branch(self, tokens: Sequence[int] | Tensor, *, cache_key: Hashable = None) -> Branch:
        """A text that can be forked, extended, scored and pruned; see `extend` and `Branch`.

        Args:
            tokens: the ids of the prompt, [L] or [1, L].
            cache_key: as in `generate`.
        """
        target = self._driven()
        return Branch.plant(target, _one_prompt(tokens, target.vocab_size).tolist(), cache_key)

    def extend(
        self,
        branches: Sequence[Branch],
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        """Lets branches go on, all together and speculatively; they hold the longer texts then.

        Args:
            branches: each at most once, of this model.
            seed, generator, tokenizer, options: as in `generate`; every branch draws its own
                tokens. Without `attention_mask` and `num_return_sequences`.
        """
        target = check_branches(branches, self._driven())
        check_weights(branches)
        _check_single(options)
        width = max(len(branch.tokens) for branch in branches)
        ids = torch.zeros(len(branches), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, branch in enumerate(branches):
            ids[row, width - len(branch.tokens) :] = torch.tensor(branch.tokens)
            mask[row, width - len(branch.tokens) :] = 1
        options["attention_mask"] = mask.to(target.device)
        call = self._prepare(ids.to(target.device), None, None, None, tokenizer, options)
        _check_rows(call, len(branches))
        grow(branches, call, self._engine(call), _seed(call, seed, generator))

    def _prepare(
        self,
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: Any,
        options: dict[str, Any],
    ) -> Call:
        given = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            **options,  # None among them means something: it overrides the model's default
        }
        stop_strings = given.pop("stop_strings", None)
        return prepare(
            causal_model(self._wrapped()),
            inputs,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            options=given,
        )

    @property
    def cache(self) -> TreeKVCache:
        """The model's paged cache."""
        return self._driven().cache

    def warm_up(self, requests: int = 1, *, longest: int = 1024, progress: bool = True) -> None:
        """Does now what the first calls would take longer for: compiles kernels, captures steps.

        That is for greedy decoding with the drafter, rule and node budget that are set now; other
        sampling options, more requests and longer texts are captured when they come.

        Args:
            requests: that will decode at once.
            longest: tokens of a text, the new ones included. Steps are captured anew where a text
                and its tree pass 1,024 tokens and every power of two from there on; up to this
                many, now. At most 64 steps are kept; the first ones make way.
            progress: show a bar on standard error.

        Raises:
            ValueError: `requests` or `longest` is below 1.
            UnsupportedModel: the model does not allow texts of that length, or of the 1,026 tokens
                that passes over prompts are captured with.
            OutOfPages: the cache may not grow to one such text. Where it may not grow to as many
                as `requests`, steps are captured for fewer.
        """
        check_count("requests", requests)
        check_count("longest", longest)
        warm_up(self, requests=requests, longest=longest, progress=progress)

    def without_drafts(self) -> SpeculativeModel:
        """The same model in the same loop with an empty tree: the baseline to compare with."""
        return SpeculativeModel(
            self._wrapped(),
            "none",
            rule="auto",
            nodes=1,
            prefix_cache=self.prefix_cache,
            adaptive=self.adaptive,
            **self._target_options,
        )

    def engine(
        self, *, step_tokens: int | None = None, max_running: int | None = None
    ) -> ServingEngine:
        """Continuous batching: requests are submitted one by one and share every pass.

        Args:
            step_tokens: rows of one pass, at most, if the trees alone are not more; by default 512,
                and 2,048 for passes that hold nothing but prompts.
            max_running: requests that run at once; None for as many as there is room for.
        """
        return ServingEngine(
            self, step_tokens=step_tokens, max_running=max_running, prefix_cache=self.prefix_cache
        )

    def _request(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        drafter: object,
        rule: str | AcceptanceRule | None,
        nodes: int | None,
        seed: int | None,
        generator: torch.Generator | None,
        tokenizer: Any,
        cache_key: Hashable,
        options: dict[str, Any],
    ) -> tuple[Request, Policy]:
        """One request from the options of `generate`, and how it is decoded."""
        target = self._driven()
        ids = _one_prompt(tokens, target.vocab_size).to(target.device)[None]
        _check_single(options)
        options = {**options, "attention_mask": torch.ones_like(ids)}
        call = self._prepare(ids, None, None, None, tokenizer, options)
        _check_rows(call, 1)
        policy = self._policy(call, drafter, rule, nodes)
        (request,) = call.requests(_seed(call, seed, generator), cache_key)
        return request, policy

    def _policy(
        self,
        call: Call,
        drafter: object = None,
        rule: str | AcceptanceRule | None = None,
        nodes: int | None = None,
    ) -> Policy:
        """How a call is decoded; what is not given is the model's."""
        target = self._driven()
        if target.model.training:
            raise RuntimeError(
                "the model is in training mode, where dropout makes outputs random; "
                "call model.eval() first"
            )
        check_length(target.model, call.max_length)
        chosen = self.drafter if drafter is None else _resolve_drafter(drafter)
        if nodes is not None:
            check_count("nodes", nodes, MAX_NODES)
        accepts, law = select_rule(
            self.rule if rule is None else rule,
            chosen.law,
            do_sample=call.sampler.do_sample,
            can_draft=chosen.can_draft,
        )
        size = self.nodes if nodes is None else nodes
        sampler = bind(call.sampler, target)
        return Policy(chosen, accepts, sampler, size, law, call.keeps_scores, self.adaptive)

    def _greedy_policy(self) -> Policy:
        drafter = self.drafter
        rule, law = select_rule(
            self.rule, drafter.law, do_sample=False, can_draft=drafter.can_draft
        )
        return Policy(drafter, rule, Sampler(), self.nodes, law, adaptive=self.adaptive)

    def _engine(self, call: Call, observer: Callable[[Verified], object] | None = None) -> Engine:
        policy = replace(self._policy(call), observer=observer)
        return Engine(self._driven(), policy, prefix_cache=self.prefix_cache)

    def _run(
        self,
        call: Call,
        streamer: BaseStreamer | None,
        seed: int | None,
        generator: torch.Generator | None,
        cache_key: Hashable,
        observer: Callable[[Verified], object] | None = None,
        prompt_logprobs: int | None = None,
    ) -> Tensor | SpeculativeOutput:
        engine = self._engine(call, observer)
        requests = call.requests(_seed(call, seed, generator), cache_key)
        if prompt_logprobs is not None:
            for request in requests:
                request.prompt_scores = PromptScores(request.prompt_length, prompt_logprobs)
        return run(call, engine, requests, streamer)

    def unwrap(self) -> Any:
        """Frees the cache, gives the model's weights their own storages again, and returns it.

        Other wrappers of the model go on; they pack its weights again when they need them.
        """
        model = self._wrapped()
        if self._target is not None:
            self._target.unpack()
        self._model, self._target = None, None
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped(), name)
        if name not in FLUENT:
            return value

        def fluent(*args: Any, **kwargs: Any) -> SpeculativeModel:
            value(*args, **kwargs)
            return self

        return fluent

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "drafter":
            value = _resolve_drafter(value)
        elif name == "rule":
            check_rule(value)
        elif name == "nodes":
            check_count("nodes", value, MAX_NODES)
        if name in OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._wrapped(), name, value)

    def __repr__(self) -> str:
        return (
            f"SpeculativeModel({type(self._model).__name__}, {self.drafter!r}, "
            f"rule={self.rule!r}, nodes={self.nodes})"
        )


def _one_prompt(tokens: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """[L] int64 from one prompt, [L] or [1, L]."""
    ids = token_ids("tokens", tokens, vocab_size)
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != 1) or not ids.numel():
        raise ValueError(
            "tokens: expected one prompt of at least one token, [L] or [1, L], "
            f"got {list(ids.shape)}"
        )
    return ids.flatten()


def _check_single(options: dict[str, Any]) -> None:
    """Refuses options for batches where each text is a request of its own."""
    if options.get("attention_mask") is not None:
        raise NotImplementedError(
            "attention_mask is not supported here: pass tokens without padding, all are attended to"
        )
    if options.get("num_return_sequences") not in (None, 1):
        raise refuse("num_return_sequences", options["num_return_sequences"])


def _check_logprobs(top: int | None, call: Call, vocab_size: int) -> int | None:
    if top is None:
        return None
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= vocab_size:
        raise ValueError(f"prompt_logprobs: expected 0 to {vocab_size}, got {top!r}")
    if not call.config.return_dict_in_generate:
        raise ValueError("prompt_logprobs: pass return_dict_in_generate=True, to get them")
    return top


def _check_rows(call: Call, count: int) -> None:
    """Refuses what a generation config made of some texts when it made more of them."""
    if len(call.input_ids) != count:
        raise refuse("num_return_sequences", call.config.num_return_sequences)


def _seed(call: Call, seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None and generator is not None:
        raise ValueError("seed and generator: expected at most one of them, got both")
    if seed is not None:
        if not isinstance(seed, int):
            raise TypeError(f"seed: expected an integer, got {seed!r}")
        return seed
    if not call.sampler.do_sample:
        return 0  # nothing is drawn; the global generator is left alone, as transformers does
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _resolve_drafter(drafter: object) -> Drafter:
    from specdec.drafters import DRAFTERS, DraftModel

    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, str) and drafter in DRAFTERS:
        return DRAFTERS[drafter]()
    if isinstance(drafter, torch.nn.Module):
        return DraftModel(drafter)
    shown = repr(drafter) if isinstance(drafter, str) else f"{drafter!r:.60}"
    raise ValueError(
        f"drafter: expected one of {', '.join(DRAFTERS)}, a model or a Drafter, got {shown}"
    )
