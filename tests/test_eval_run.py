"""A grid on a tiny model: what is run, what is kept when it is killed, what readers make of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec.cli import app
from specdec.drafters import Chains, NGram
from specdec.eval import arms, runner
from specdec.eval.check import Threshold, failures
from specdec.eval.differences import differences
from specdec.eval.grid import Grid, Settings
from specdec.eval.metrics import verdict
from specdec.eval.records import Row, RunFolder
from specdec.eval.runner import run_grid
from specdec.eval.simulate import expected, replay, simulate_run
from specdec.eval.step_time import StepTime, fit
from specdec.testing import tiny_model
from specdec.topology import Topology

DRAFTER = '''
from specdec import SequenceDrafter, TokenTree


class Same(SequenceDrafter):
    """Expects every token to come again."""

    def draft(self, tokens, nodes):
        return TokenTree.chain(tokens[-1], [tokens[-1]] * (nodes - 1))


class Broken(SequenceDrafter):
    def draft(self, tokens, nodes):
        raise RuntimeError("no idea")


ready = Same()
'''


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that says one character at a time."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("Llama").save_pretrained(folder)
    characters = ["<pad>", "<end>", *map(chr, range(32, 127))]
    raw = tokenizers.Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>")
    )
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    (folder / "mine.py").write_text(DRAFTER)
    lines = [
        {"id": i, "category": "ab"[i % 2], "prompt": text}
        for i, text in enumerate(
            ["one, two, one, two,", "aaaa", "so it goes, so it", "x = 1; x = "]
        )
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def grid_of(tiny: Path, **changes: Any) -> Grid:
    settings = Settings(max_new_tokens=12, device="cpu", **changes.pop("settings", {}))
    options = {"trees": ("4", "chain:4"), "suites": (str(tiny / "prompts.jsonl"),), **changes}
    return Grid(settings=settings, targets=(str(tiny),), **options)


def timeless(rows: list[Row]) -> list[Row]:
    """What must be the same in every run."""
    return [replace(row, seconds={}, decode_seconds=0.0) for row in rows]


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run: plain, trees, chains; every prompt twice."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    run_grid(grid_of(tiny, settings={"repetitions": 2}), folder)
    return folder


def test_every_configuration_says_what_the_plain_loop_says(done: RunFolder) -> None:
    run, rows = done.run(), done.rows()
    names = [c.name for c in run.configurations]
    assert names == ["plain", "ngram 4", "ngram chain:4"]
    assert [row.key for row in rows] == [
        (name, "prompts", str(prompt), repetition)
        for prompt in range(4)
        for repetition in range(2)
        for name in names
    ]
    assert Counter(verdict(row) for row in rows) == {"equal": 2 * 8, "not compared": 8}
    assert {row.new_tokens for row in rows} == {12}
    assert all(0 < row.decode_seconds < row.seconds["total"] for row in rows)


def test_transformers_is_timed_from_its_first_token_on(tiny: Path, tmp_path: Path) -> None:
    baselines = ("hf-eager", "hf-prompt-lookup", f"hf-assisted:{tiny}")
    grid = grid_of(tiny, baselines=baselines, trees=("4",), settings={"limit": 2})
    rows = [row for row in run_grid(grid, RunFolder(tmp_path)) if row.observed is None]
    assert Counter(verdict(row) for row in rows) == {"equal": 6}
    for row in rows:
        assert row.drafted is None
        assert row.decode_seconds == row.seconds["total"] - row.seconds["prefill"] > 0
        if row.configuration == "hf-eager":
            assert (row.new_tokens, row.decode_tokens, row.steps) == (12, 11, 11)
        elif row.configuration != "hf-prompt-lookup":
            assert row.steps < row.new_tokens, "it is its own assistant"
            assert row.decode_tokens < row.new_tokens - 1


def test_counts_of_a_row_agree_with_each_other(done: RunFolder) -> None:
    ours = [row for row in done.rows() if row.observed is not None]
    assert any(row.accepted for row in ours)
    for row in ours:
        assert row.drafted is not None
        assert row.decode_tokens == row.new_tokens - 1 == row.steps + (row.accepted or 0)
        assert sum(row.tree_sizes.values()) == row.steps
        assert sum((n - 1) * count for n, count in row.tree_sizes.items()) == row.drafted
        assert sum(row.accepted_by_depth.values()) == row.accepted
        assert sum(row.accepted_by_rank.values()) == row.accepted
        assert sum(row.accepted_by_class.values()) == row.accepted
        assert sum(row.emitted_by_class.values()) == row.new_tokens
        assert row.offered_by_rank.get(0, 0) == sum(row.reached_by_depth.values())
        if row.configuration == "ngram chain:4":
            assert set(row.offered_by_rank) <= {0}


def test_repetitions_go_forwards_and_backwards(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    ran = runner.Group._run

    def noted(group: Any, configuration: Any, *rest: Any) -> Row:
        order.append(configuration.name)
        return ran(group, configuration, *rest)

    monkeypatch.setattr(runner.Group, "_run", noted)
    run_grid(grid_of(tiny, settings={"repetitions": 2, "limit": 1}), RunFolder(tmp_path))
    there = ["plain", "ngram 4", "ngram chain:4"]
    assert order == there + there[::-1]


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_anywhere_goes_on_to_the_same_rows(
    done: RunFolder, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Killed in the middle of a generation, and with the last line torn at a random byte."""
    draw, folder = random.Random(seed), RunFolder(tmp_path)
    grid = Grid.from_dict(done.run().grid)
    left, generate = draw.randrange(5, 27), arms.OwnArm.generate

    def dying(arm: arms.OwnArm, *args: Any) -> arms.Generation:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return generate(arm, *args)

    monkeypatch.setattr(arms.OwnArm, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, folder)
    file = tmp_path / "rows.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: draw.randint(0, len(content))])
    before = folder.rows()
    rows = run_grid(grid, folder)
    assert timeless(rows) == timeless(done.rows())
    kept = {row.key: row for row in rows}
    assert all(kept[row.key] == row for row in before), "what was there was not run again"


def test_a_run_whose_process_was_killed_goes_on_to_the_same_rows(
    done: RunFolder, tmp_path: Path
) -> None:
    grid, folder, draw = Grid.from_dict(done.run().grid), RunFolder(tmp_path), random.Random(0)
    kills, written = 0, 0
    for _ in range(3):
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # a forked process has none of its parent's threads
            run_grid(grid, folder)
            os._exit(0)
        ended, before = 0, written
        while written == before and not ended:
            time.sleep(0.001)
            ended, _ = os.waitpid(child, os.WNOHANG)
            written = sum(file.stat().st_size for file in folder.row_files())
        if ended:
            break
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        written = sum(file.stat().st_size for file in folder.row_files())
    assert kills, "the first process was killed when its first row was there"
    assert timeless(run_grid(grid, folder)) == timeless(done.rows())
    assert len(folder.run().resumed) == kills


@pytest.mark.slow
def test_processes_that_were_launched_together_share_the_prompts(
    done: RunFolder, tmp_path: Path
) -> None:
    config, grid = tmp_path / "grid.toml", Grid.from_dict(done.run().grid)
    config.write_text(
        "max_new_tokens = 12\nrepetitions = 2\ndevice = 'cpu'\n"
        f"suites = {list(grid.suites)}\n[grid]\ntargets = {list(grid.targets)}\n"
        f"trees = {list(grid.trees)}\n"
    )
    folder = RunFolder(tmp_path / "run")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "specdec", "eval", "--config", str(config), "--out", str(folder.path)]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [*launch, *command], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Rows are in") == 1, "only the first process speaks"
    assert timeless(folder.rows()) == timeless(done.rows())
    assert [file.name for file in folder.row_files()] == ["rows.jsonl"]


def test_another_grid_or_other_prompts_do_not_mix_with_a_run(
    done: RunFolder, tiny: Path, tmp_path: Path
) -> None:
    grid = Grid.from_dict(done.run().grid)
    with pytest.raises(ValueError, match="another grid was begun here"):
        run_grid(replace(grid, trees=("5",)), done)
    file = tmp_path / "prompts.jsonl"
    file.write_text((tiny / "prompts.jsonl").read_text())
    folder, grid = RunFolder(tmp_path / "run"), grid_of(tiny, suites=(str(file),), trees=("2",))
    run_grid(grid, folder)
    file.write_text(file.read_text().replace("aaaa", "bbbb"))
    with pytest.raises(ValueError, match="prompts of its suites have changed"):
        run_grid(grid, folder)


def test_a_drafter_from_a_file_is_evaluated_and_one_that_fails_is_told(
    tiny: Path, tmp_path: Path
) -> None:
    options = ["eval", "--model", str(tiny), "--suite", str(tiny / "prompts.jsonl")]
    options += ["--max-new-tokens", "6", "--tree", "3", "--limit", "2", "--out", str(tmp_path)]
    file = tiny / "mine.py"
    result = CliRunner().invoke(
        app, [*options, "--drafter", f"{file}:Same", "--drafter", f"{file}:ready", "--json"]
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)["summary"]
    ready, same = (summary[f"{file}:{name} 3"]["measures"] for name in ("ready", "Same"))
    assert ready["tokens_per_step"] == same["tokens_per_step"]
    again = CliRunner().invoke(app, ["eval", "--out", str(tmp_path)])
    assert again.exit_code == 0, "the folder alone goes on with its own grid"
    broken = [*options[:-1], str(tmp_path / "b"), "--drafter", f"{file}:Broken"]
    result = CliRunner().invoke(app, broken)
    assert result.exit_code == 1
    assert "RuntimeError: no idea" in " ".join(result.stderr.split())
    assert Counter(row.error for row in RunFolder(tmp_path / "b").rows()) == {
        None: 2,
        "RuntimeError: no idea": 2,
    }
    for name, message in (("Absent", "to be a Drafter"), ("DRAFT.py:X", "there is no file")):
        wrong = name if ":" in name else f"{file}:{name}"
        result = CliRunner().invoke(app, [*options[:-1], str(tmp_path / "c"), "--drafter", wrong])
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())


def test_without_scipy_a_run_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    result = CliRunner().invoke(app, ["eval", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "need scipy: pip install 'specdec-toolkit[eval]'" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_options_of_a_subcommand_stand_behind_its_name() -> None:
    result = CliRunner().invoke(app, ["eval", "--out", "somewhere", "report", "somewhere"])
    assert result.exit_code == 2
    assert "got --out before it" in " ".join(result.stderr.replace("│", " ").split())


def test_a_run_does_not_differ_from_itself(
    done: RunFolder,
) -> None:
    assert {d.verdict for d in differences(done, done)} == {"no difference", ""}
    assert all(d.before > 0 for d in differences(done, done)), "the plain loop wastes no drafts"
    result = CliRunner().invoke(app, ["eval", "compare", str(done.path), str(done.path)])
    assert "no difference" in result.stdout.splitlines()[-1]


def test_thresholds_fail_a_run(done: RunFolder) -> None:
    run, rows = done.run(), done.rows()
    reached = Threshold("tokens_per_step", min=1.0)
    assert failures(run, rows, [reached]) == []
    missed = failures(run, rows, [Threshold("tokens_per_step", min=12.5, configuration="ngram 4")])
    assert len(missed) == 1
    assert missed[0].startswith("ngram 4, all prompts: tokens_per_step is")
    with pytest.raises(ValueError, match="not 'ngram 5'"):
        failures(run, rows, [Threshold("speedup", min=1, configuration="ngram 5")])
    with pytest.raises(ValueError, match="expected min or max"):
        Threshold("speedup")


def test_sampled_runs_have_log_likelihoods(tiny: Path, tmp_path: Path) -> None:
    grid = grid_of(tiny, temperatures=(1.0,), rules=("sample-and-match",), trees=("4",))
    rows = run_grid(grid, RunFolder(tmp_path))
    assert all(row.log_likelihood is not None and row.log_likelihood < 0 for row in rows)
    assert Counter(verdict(row) for row in rows) == {"equal": 4, "not compared": 4}


def test_replay_drafts_what_the_engine_drafted(done: RunFolder, tiny: Path) -> None:
    rows = done.rows()
    for name, drafter in (("ngram 4", NGram()), ("ngram chain:4", Chains(NGram()))):
        own = [row for row in rows if row.configuration == name and row.repetition == 0]
        (prediction,) = simulate_run(done, "ngram", [name.removeprefix("ngram ")])
        assert prediction.tokens_per_step == sum(r.decode_tokens for r in own) / sum(
            r.steps for r in own
        )
        text = [3, 4, 5, 3, 4]
        seen = replay(drafter, 4, [(text, [5, 3, 4, 5, 3], 10)])
        assert seen.tokens == 5
        assert seen.steps == 2


def test_expected_acceptance_of_a_chain_is_a_sum_of_powers(done: RunFolder) -> None:
    row = replace(
        done.rows()[0],
        offered_by_rank={0: 100},
        accepted_by_rank={0: 50},
        reached_by_depth={1: 60, 2: 40},
        accepted_by_depth={1: 30, 2: 20},
    )
    chain = expected(Topology.chain(4), [row])
    assert chain.tokens_per_step == pytest.approx(1 + 0.5 + 0.25 + 0.125)


def test_step_times_are_found_again_in_rows_made_of_them(done: RunFolder) -> None:
    true = StepTime((1, 2, 16), (0.05, 0.07, 0.1), 1e-5, (2e-4, 3e-5), 1e-3, 0.04)
    draw, rows = random.Random(0), []
    for row in done.rows()[:40]:
        sizes = {draw.choice([1, 2, 4, 8, 16]): draw.randint(1, 9) for _ in range(4)}
        nodes = sum(size * count for size, count in sizes.items())
        steps = sum(sizes.values())
        prompt = draw.randint(10, 500)
        context = prompt + row.new_tokens / 2
        drafting = 2e-4 * steps + 3e-5 * nodes
        spent = true.text + drafting + sum(n * true.target(s, context) for s, n in sizes.items())
        rows.append(
            replace(
                row,
                prompt_tokens=prompt,
                steps=steps,
                tree_sizes=sizes,
                drafted=nodes - steps,
                seconds={"draft": drafting, "prefill": 1e-3 * prompt},
                decode_seconds=spent,
            )
        )
    found = fit(rows)
    assert found.knots == true.knots
    assert found.seconds == pytest.approx(true.seconds, rel=1e-3)
    assert found.text == pytest.approx(true.text, rel=1e-3)
    assert found.step(8, 100, batch=2) == pytest.approx(true.step(8, 100, batch=2), rel=1e-3)
    assert found.on("H100", "H100") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit = 'all'", "limit: expected"),
        ("speed = 3", "expected keys among"),
        ("[grid]\ntrees = 8", "expected a list"),
        ("[[configuration]]\nname = 'x'", "expected `drafter`"),
        ("[grid]\nbaselines = ['hf']", "--baseline: expected hf-eager"),
    ],
)
def test_a_wrong_grid_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Grid.from_file(file).configurations()


def test_a_grid_from_a_file_has_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        "max_new_tokens = 7\nsuites = ['gsm8k=x.jsonl']\n[grid]\ntrees = [4, 'chain:5']\n"
        "temperatures = [0.0, 1.0]\n"
        "[[configuration]]\nname = 'mine'\ndrafter = 'f.py:D'\ntree = 3\n"
    )
    grid = Grid.from_file(file)
    assert grid.settings.max_new_tokens == 7
    assert [c.name for c in grid.configurations()] == ["plain T=0", "mine T=0", "plain T=1"]
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_compiled_transformers_needs_a_gpu(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="hf-compile needs a CUDA device"):
        run_grid(grid_of(tiny, baselines=("hf-compile",)), RunFolder(tmp_path))
