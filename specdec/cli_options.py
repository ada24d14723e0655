"""What several commands share: their options, and how models and drafters are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from specdec import models
from specdec.drafters import DRAFTERS, DraftModel
from specdec.drafting import Drafter
from specdec.pages import OutOfPages
from specdec.topology import Topology

out, err = Console(), Console(stderr=True)

EXPECTED_ERRORS = (
    ValueError, NotImplementedError, ImportError, OSError, OutOfPages, models.FetchError
)  # fmt: skip

ModelOption = Annotated[
    str, typer.Option(help="A name from `specdec models list`, a folder or a hub id.")
]
DrafterOption = Annotated[
    str, typer.Option(help="ngram, none, or a smaller model (name, folder or hub id).")
]
TreeOption = Annotated[
    str | None, typer.Option(help="Nodes (16) or, for a model, a shape: chain:5, 4,2,1.")
]
RuleOption = Annotated[
    str, typer.Option(help="auto, traversal, block, ...; see docs/verification.md.")
]
TokensOption = Annotated[int, typer.Option(min=1)]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")]
TopKOption = Annotated[int, typer.Option(min=0, help="0 for no limit.")]
TopPOption = Annotated[float, typer.Option(min=0.0, max=1.0)]
SeedOption = Annotated[int | None, typer.Option(help="Of a sampled run.")]
RawOption = Annotated[bool, typer.Option("--raw", help="No chat template.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32 on a CPU, bfloat16 elsewhere by default.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]


@contextmanager
def readable_errors() -> Iterator[None]:
    """Says what is wrong with the input without a traceback."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        err.print(str(error), markup=False)
        raise typer.Exit(1) from error


def load(name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """The model and tokenizer behind a name, folder or hub id; safetensors only."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    where = models.resolve(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = named_dtype(dtype or ("float32" if device == "cpu" else "bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(where, dtype=kind, use_safetensors=True)
    placed: Any = model
    return placed.to(device).eval(), AutoTokenizer.from_pretrained(where)


def named_dtype(name: str) -> torch.dtype:
    """`float32` and its like.

    Raises:
        ValueError: there is no such dtype.
    """
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype: expected a torch dtype such as float32, got {name!r}")
    return kind


def make_drafter(
    drafter: str, tree: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Drafter, int | None]:
    """A drafter and a node budget from `--drafter` and `--tree`."""
    topology, nodes = None, None
    if tree is not None and tree.isdecimal():
        nodes = int(tree)
    elif tree is not None:
        topology = _parse_topology(tree)
        nodes = len(topology)
    if drafter in DRAFTERS:
        if topology is not None:
            raise ValueError(f"--tree: {drafter} takes a number of nodes, got {tree!r}")
        return DRAFTERS[drafter](), nodes
    small, _ = load(drafter, str(dtype).removeprefix("torch."), str(device))
    return DraftModel(small, topology), nodes


def _parse_topology(text: str) -> Topology:
    """`chain:5` or the number of children at each depth, `4,2,1`."""
    kind, _, count = text.partition(":")
    if kind == "chain" and count.isdecimal():
        return Topology.chain(int(count))
    widths = text.split(",")
    if all(width.isdecimal() for width in widths):
        return Topology.branching([int(width) for width in widths])
    raise ValueError(f"--tree: expected a number of nodes, chain:5 or 4,2,1, got {text!r}")


def encode(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """A prompt as `generate` takes it, in the model's chat template if it has one."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def sampling(temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
    """The options of `generate` behind `--temperature`, `--top-k` and `--top-p`."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
