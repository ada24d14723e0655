"""The `specdec` command."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table
from rich.text import Text
from transformers import TextStreamer

import specdec
from specdec import models, picture
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
from specdec.cli_trace import trace
from specdec.console import err, out, print_json, readable_errors
from specdec.drafters import NGram
from specdec.eval.attention import cases, report
from specdec.eval.cli import app as eval_app
from specdec.eval.compare import compare
from specdec.eval.cost import measure_step
from specdec.eval.generate.command import bench_generate
from specdec.eval.loading import encode, load_model, make_drafter, parse_dtype
from specdec.eval.prompts import DEMO_PROMPT, builtin_prompts
from specdec.eval.verify_lossless import verify_lossless
from specdec.generation import SpeculativeOutput
from specdec.target import Target

app = typer.Typer(
    help="Speculative decoding with token trees for Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
models_app = typer.Typer(help="Models that come with a name.", no_args_is_help=True)
app.add_typer(models_app, name="models")
bench_app = typer.Typer(help="Measurements on a GPU.", no_args_is_help=True)
bench_app.command("generate")(bench_generate)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")
app.command()(trace)

debug_app = typer.Typer(help="A look inside.", no_args_is_help=True)
app.add_typer(debug_app, name="debug")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
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
    compare_: Annotated[
        bool, typer.Option("--compare", help="Run without drafts too and show both.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generates text, streaming it as it is verified."""
    with readable_errors():
        text = sys.stdin.read() if prompt == "-" else prompt
        loaded, tokenizer = load_model(model, dtype, device)
        chosen, nodes = make_drafter(drafter, tree, loaded.device, loaded.dtype)
        wrapped = specdec.wrap(loaded, chosen, rule=rule, nodes=nodes)
        inputs = encode(tokenizer, text, raw=raw).to(loaded.device)
        options: dict[str, Any] = {**inputs, "max_new_tokens": max_new_tokens, "seed": seed}
        options |= sampling(temperature, top_k, top_p)
        width = inputs["input_ids"].shape[1]
        if compare_:
            comparison = compare(wrapped, **options)
            answer = tokenizer.decode(comparison.drafted_tokens[0, width:])
            if as_json:
                print_json({"text": answer, **comparison.to_dict()})
            else:
                out.print(answer, markup=False, highlight=False)
                out.print(comparison)
            return
        streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True)
        output = wrapped.generate(**options, streamer=streamer, return_dict_in_generate=True)
        assert isinstance(output, SpeculativeOutput)
        assert output.stats is not None
        if as_json:
            tokens = output.sequences[0, width:].tolist()
            answer = tokenizer.decode(tokens)
            print_json({"text": answer, "tokens": tokens, "stats": output.stats.to_dict()})
        else:
            err.print(output.stats)


@app.command()
def chat(
    model: Annotated[
        str, typer.Option(help="A name from `specdec models list`, a folder or a hub id.")
    ] = models.DEFAULT,
    drafter: Annotated[
        str,
        typer.Option(help="ngram, none, file.py:Name, or a smaller model (name, folder, hub id)."),
    ] = "ngram",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of a sampled run.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 on a CPU, bfloat16 elsewhere by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Talks with a model; each turn computes only what is new. An empty line ends it."""
    with readable_errors():
        loaded, tokenizer = load_model(model, dtype, device)
        if tokenizer.chat_template is None:
            raise ValueError(f"--model: expected a chat model, {model!r} has no chat template")
        chosen, nodes = make_drafter(drafter, None, loaded.device, loaded.dtype)
        wrapped = specdec.wrap(loaded, chosen, nodes=nodes)
        talk = [] if system is None else [{"role": "system", "content": system}]
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
        sampled = temperature > 0
        options |= (
            {"do_sample": True, "temperature": temperature} if sampled else {"do_sample": False}
        )
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        while line := _ask():
            talk.append({"role": "user", "content": line})
            inputs = tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(loaded.device)
            output: Any = wrapped.generate(
                **inputs, **options, streamer=streamer, return_dict_in_generate=True
            )
            answer = output.sequences[0, inputs["input_ids"].shape[1] :]
            answer = tokenizer.decode(answer, skip_special_tokens=True)
            talk.append({"role": "assistant", "content": answer})
            stats = output.stats
            err.print(
                f"{stats.prefilled_tokens} prompt tokens computed, {stats.reused_tokens} reused; "
                f"{stats.tokens} new at {stats.tokens_per_second:.1f} tokens/s",
                style="dim",
            )


def _ask() -> str:
    """A line from the user, empty at the end of input."""
    err.print("> ", end="", style="bold")
    return sys.stdin.readline().strip()


@debug_app.command("cache")
def debug_cache(
    prompts: Annotated[list[str], typer.Argument(help="Texts to generate from, in order.")],
    model: Annotated[
        str, typer.Option(help="A name from `specdec models list`, a folder or a hub id.")
    ] = models.DEFAULT,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    svg: Annotated[Path | None, typer.Option(help="File to draw the tree to as well.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Shows what the prefix tree holds after some prompts, and who owns the cache's bytes."""
    with readable_errors():
        loaded, tokenizer = load_model(model, None, device)
        wrapped = specdec.wrap(loaded)
        total = specdec.GenerationStats()
        for prompt in prompts:
            inputs = encode(tokenizer, prompt, raw=raw).to(loaded.device)
            output: Any = wrapped.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
            total = total + output.stats
        tree = wrapped.cache.prefixes
        out.print(picture.as_text(tree, tokenizer.decode))
        for owner, count in asdict(wrapped.cache.usage()).items():
            out.print(f"{owner:12} {count / 2**20:8.2f} MiB", highlight=False)
        out.print(
            f"{total.prefilled_tokens} prompt tokens computed, {total.reused_tokens} reused "
            f"({total.hit_rate:.0%}), {total.evicted_pages} pages evicted",
            highlight=False,
        )
        if svg is not None:
            svg.write_text(picture.as_svg(tree, tokenizer.decode))


@app.command("verify-lossless")
def verify_lossless_command(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "Once upon a time",
    model: Annotated[str, typer.Option(help="A name, a folder or a hub id.")] = models.DEFAULT,
    drafter: Annotated[
        str,
        typer.Option(help="ngram, none, file.py:Name, or a smaller model (name, folder, hub id)."),
    ] = "ngram",
    tree: Annotated[
        str | None, typer.Option(help="Nodes, or for a model a shape: chain:5, 4,2,1, beam:8x6.")
    ] = None,
    rule: Annotated[str, typer.Option(help="The rule to test.")] = "auto",
    samples: Annotated[int, typer.Option(min=1)] = 1000,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each sample.")] = 3,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 for no limit.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32 on a CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tests whether a drafter with a rule samples from the model's own distribution."""
    with readable_errors():
        loaded, tokenizer = load_model(model, dtype, device)
        chosen, nodes = make_drafter(drafter, tree, loaded.device, loaded.dtype)
        wrapped = specdec.wrap(loaded, chosen, rule=rule, nodes=nodes)
        ids = encode(tokenizer, prompt, raw=True)["input_ids"].to(loaded.device)
        verdict = verify_lossless(
            wrapped,
            ids,
            samples=samples,
            tokens=tokens,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        if as_json:
            print_json(verdict.to_dict())
        else:
            out.print(verdict)
        if not verdict.passed:
            raise typer.Exit(1)


@app.command()
def demo(
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Fetches a small chat model and shows what token trees do for it."""
    with readable_errors():
        loaded, tokenizer = load_model(models.DEFAULT, "float32", device)
        out.print(f"Model: SmolLM2-135M-Instruct, float32, on {loaded.device}.")

        cost = measure_step(Target(loaded))
        nodes = cost.best_nodes()
        times = ", ".join(
            f"{rows} rows {1000 * seconds:.0f} ms"
            for rows, seconds in zip(cost.rows, cost.seconds, strict=True)
        )
        out.print(f"One pass of the model takes: {times}.")
        out.print(
            f"If 7 of 10 drafted tokens are accepted, trees of {nodes} nodes pay best here "
            "(specdec.eval.cost)."
        )

        prompt = next(p for p in builtin_prompts() if p.id == DEMO_PROMPT)
        text = prompt.messages[0]["content"]
        out.rule("prompt")
        out.print(text, markup=False, highlight=False)
        inputs = encode(tokenizer, prompt.messages).to(loaded.device)
        wrapped = specdec.wrap(loaded, NGram(), nodes=nodes)
        comparison = compare(wrapped, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
        out.rule("answer")
        width = inputs["input_ids"].shape[1]
        answer = tokenizer.decode(comparison.drafted_tokens[0, width:], skip_special_tokens=True)
        out.print(answer, markup=False, highlight=False)
        out.rule()
        out.print(comparison)
        reference = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        same = torch.equal(reference, comparison.drafted_tokens)
        out.print(
            f"Equal to transformers' own generate, token for token: {'yes' if same else 'no'}."
        )
        if not same:
            raise typer.Exit(1)


@models_app.command("list")
def list_models() -> None:
    """Shows the models that come with a name."""
    table = Table("name", "what it is", "download", Column("folder", overflow="fold"))
    for model in models.known():
        size = f"{model.size / 1e6:.0f} MB"
        table.add_row(model.name, model.description, size, str(model.folder or "not fetched"))
    out.print(table)


@models_app.command("fetch")
def fetch_model(
    name: Annotated[
        str, typer.Argument(help="A name from `specdec models list`.")
    ] = models.DEFAULT,
) -> None:
    """Downloads a model once; offline afterwards."""
    with readable_errors():
        out.print(str(models.fetch(name)), highlight=False)


@bench_app.command("attention")
def bench_attention(
    only: Annotated[str, typer.Option(help="Cases whose name matches, a regular expression.")] = "",
    peers: Annotated[
        str | None, typer.Option(help="Arms, comma between; `ours` for all our modes.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Start no case after so many.")] = math.inf,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for attention.json, a table and plots.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of queries, keys and values.")] = "bfloat16",
    list_: Annotated[bool, typer.Option("--list", help="Only show the cases.")] = False,
    plots_from: Annotated[
        Path | None, typer.Option(help="Only draw again from a saved attention.json.")
    ] = None,
) -> None:
    """Times tree attention and its peers against the limits of this GPU."""
    with readable_errors():
        if plots_from is not None:
            if not _write_report(report.Result.load(plots_from), folder or plots_from.parent):
                raise typer.Exit(1)
            return
        chosen = cases.select(only)
        if list_:
            _list_cases(chosen)
            return
        if not torch.cuda.is_available():
            raise ValueError(
                "bench attention: expected a CUDA device that torch can use, got none "
                f"(torch {torch.__version__}); --list and --plots-from do without"
            )
        from specdec.eval.attention import bench  # needs Triton
        from specdec.eval.attention import peers as arms

        wanted = arms.named(peers.split(",") if peers else arms.DEFAULT)
        kind = parse_dtype(dtype)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

        def after_case(result: report.Result) -> None:
            if folder is not None:
                result.save(folder / "attention.json")
            case = result.cases[-1]
            times = "  ".join(f"{row.peer} {row.us:.1f}" for row in case.timed)
            err.print(f"{case.label}: limit {case.limit_us:.1f}  {times}", markup=False)

        result = bench.run(
            chosen,
            wanted,
            device=torch.device("cuda"),
            dtype=kind,
            seconds=seconds,
            after_case=after_case,
        )
        out.print(report.table(result))
        for problem in [*result.own_failures, *filter(None, [result.stopped])]:
            err.print(problem, markup=False)
        if folder is not None:
            result.save(folder / "attention.json")
            _write_report(result, folder)
        if result.own_failures:
            raise typer.Exit(1)


def _list_cases(chosen: Sequence[cases.Case]) -> None:
    table = Table("case", "prefix tree", "rows", "tree", "heads", "page")
    for case in chosen:
        levels = " > ".join(f"{nodes} x {tokens}" for nodes, tokens in case.levels)
        heads = f"{case.heads}/{case.kv_heads} x {case.dim}"
        table.add_row(
            Text(case.label), levels, str(case.rows), case.tree, heads, str(case.page_size)
        )
    out.print(table)


def _write_report(result: report.Result, folder: Path) -> bool:
    """The table for the documentation and the plots; False if there is no matplotlib for them."""
    from specdec.eval.attention import plots  # needs matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "attention.md"]
    files[0].write_text(report.markdown(result))
    drawn = True
    try:
        files += plots.draw(result, folder)
    except ImportError as error:
        err.print(str(error), markup=False)
        drawn = False
    for file in files:
        out.print(str(file), markup=False, highlight=False)
    return drawn
