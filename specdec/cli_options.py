"""The options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ModelOption = Annotated[
    str, typer.Option(help="A name from `specdec models list`, a folder or a hub id.")
]
DrafterOption = Annotated[
    str,
    typer.Option(help="ngram, none, file.py:Name, or a smaller model (name, folder, hub id)."),
]
TreeOption = Annotated[
    str | None, typer.Option(help="Nodes (16) or, for a model, a shape: chain:5, 4,2,1, beam:8x6.")
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


def sampling(temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
    """The options of `generate` behind `--temperature`, `--top-k` and `--top-p`."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
