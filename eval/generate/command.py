"""`specdec bench generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from specdec.eval.loading import parse_dtype
from specdec.eval.prompts import builtin_prompts

DEFAULT_ARMS = "hf-eager,hf-compile,hf-lookup,plain,ngram"
DEFAULT_RANDOM_ARMS = "hf-eager,hf-compile,plain,synthetic"
RANDOM_PROMPT = 1024
"""Tokens of the prompt of a model with random weights."""

out, err = Console(), Console(stderr=True)


def bench_generate(
    model: Annotated[
        str,
        typer.Option(
            help="smollm2-135m, or with random weights llama-3.1-8b, llama-3.2-1b, qwen2.5-1.5b."
        ),
    ] = "smollm2-135m",
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines in Spec-Bench's form; built-in prompts by default."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts, at most; spread evenly.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    nodes: Annotated[int, typer.Option(min=2, help="Of the largest trees.")] = 32,
    kept: Annotated[int, typer.Option(min=0, help="Of synthetic drafts, accepted a step.")] = 3,
    arms: Annotated[str | None, typer.Option(help="Comma between; see the docs.")] = None,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for generate.json, tables, a picture, traces."),
    ] = None,
) -> None:
    """Times generation end to end, ours beside transformers', and takes a captured step apart."""
    if not torch.cuda.is_available():
        raise typer.BadParameter(
            "bench generate: expected a CUDA device that torch can use, got none "
            f"(torch {torch.__version__})"
        )
    from specdec.eval.attention import ceilings
    from specdec.eval.generate import arms as ways
    from specdec.eval.generate import bench, report, shapes

    device = torch.device("cuda")
    try:
        subject = shapes.load(model, device, parse_dtype(dtype))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    names = arms or (DEFAULT_RANDOM_ARMS if subject.tokenizer is None else DEFAULT_ARMS)
    known = ways.arms(subject, nodes, kept)
    for name in names.split(","):
        if name not in known:
            raise typer.BadParameter(f"arms: expected some of {', '.join(known)}, got {name!r}")
    given = _prompts(subject.tokenizer, prompts, limit, device)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def after_arm(result: bench.Result) -> None:
        arm = result.arms[-1]
        said = arm.error or f"{arm.tokens_per_second:.1f} tokens/s"
        err.print(f"{arm.name}: {said}", markup=False, highlight=False)
        if folder is not None:
            result.save(folder / "generate.json")

    result = bench.run(
        subject,
        [known[name] for name in names.split(",")],
        given,
        new_tokens=new_tokens,
        copy_tbps=ceilings.measure(device).copy_tbps,
        after_arm=after_arm,
        traces=folder,
    )
    out.print(report.arms_table(result))
    out.print(report.steps_table(result))
    if folder is not None:
        result.save(folder / "generate.json")
        (folder / "generate.md").write_text(report.markdown(result))
        if result.steps:
            try:
                out.print(str(report.draw(result, folder / "step.png")), highlight=False)
            except ImportError as error:
                err.print(str(error), markup=False)
    if any(arm.error for arm in result.arms if not arm.name.startswith("hf-")):
        raise typer.Exit(1)


def _prompts(
    tokenizer: Any, file: Path | None, limit: int, device: torch.device
) -> list[tuple[str, Tensor]]:
    """Names and ids [1, L]: chat prompts, or where there is no tokenizer one of random tokens."""
    if tokenizer is None:
        half = torch.randint(5, 30000, (1, RANDOM_PROMPT // 2), device=device)
        return [("random", torch.cat([half, half], 1))]
    if file is None:
        chats = [(prompt.id, prompt.messages) for prompt in builtin_prompts()]
    else:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        chats = [
            (str(line["question_id"]), [{"role": "user", "content": line["turns"][0]}])
            for line in lines
        ]
    step = max(1, len(chats) // limit)
    found = []
    for name, messages in chats[::step][:limit]:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found.append((name, ids["input_ids"].to(device)))
    return found
