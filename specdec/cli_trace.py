"""`specdec trace`: one generation, recorded step by step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import specdec
from specdec import models
from specdec.cli_options import (
    DeviceOption,
    DrafterOption,
    DtypeOption,
    ModelOption,
    RawOption,
    RuleOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
    TopKOption,
    TopPOption,
    TreeOption,
    sampling,
)
from specdec.console import err, out, readable_errors
from specdec.eval.loading import encode, load_model, make_drafter
from specdec.eval.report.page import render
from specdec.eval.trace import record


def trace(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    file: Annotated[
        Path,
        typer.Option("--out", help="NAME.html, with NAME.json beside it, or only NAME.json."),
    ] = Path("trace.html"),
    model: ModelOption = models.DEFAULT,
    drafter: DrafterOption = "ngram",
    tree: TreeOption = None,
    rule: RuleOption = "auto",
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    raw: RawOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Records a generation: every tree, its probabilities, how each token came about."""
    with readable_errors():
        if file.suffix not in (".html", ".json"):
            raise ValueError(f"--out: expected a name that ends in .html or .json, got {file}")
        text = sys.stdin.read() if prompt == "-" else prompt
        loaded, tokenizer = load_model(model, dtype, device)
        chosen, nodes = make_drafter(drafter, tree, loaded.device, loaded.dtype)
        wrapped = specdec.wrap(loaded, chosen, rule=rule, nodes=nodes)
        recorded = record(
            wrapped,
            tokenizer,
            about={"model": model, "drafter": drafter if tree is None else f"{drafter} {tree}"},
            **encode(tokenizer, text, raw=raw).to(loaded.device),
            **sampling(temperature, top_k, top_p),
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        out.print(recorded.text, markup=False, highlight=False)
        written = [file.with_suffix(".json")]
        recorded.save(written[0])
        if file.suffix == ".html":
            file.write_text(render("Trace", None, {file.stem: recorded}), encoding="utf-8")
            written.append(file)
        for name in written:
            err.print(str(name), markup=False, highlight=False)
