"""A small run without a model, for tests and pictures: plausible, and the same each time."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from specdec.eval.records import (
    PLAIN,
    TOKEN_CLASSES,
    Configuration,
    Lossless,
    Row,
    Run,
    RunFolder,
)

CONFIGURATIONS = (
    Configuration(PLAIN, "smollm2-135m", "none", None, 1),
    Configuration("hf-eager", "smollm2-135m", "hf-eager"),
    Configuration("ngram chain:8", "smollm2-135m", "ngram", "chain:8", 8),
    Configuration("ngram 4", "smollm2-135m", "ngram", "4", 4),
    Configuration("ngram 16", "smollm2-135m", "ngram", "16", 16),
)
CATEGORIES = {"writing": 0.2, "code": 0.6, "extraction": 0.8}
"""By name: how often the first child is accepted."""


def example_run(
    path: Path,
    *,
    prompts: int = 4,
    repetitions: int = 2,
    seed: int = 0,
    acceptance: Mapping[str, float] = CATEGORIES,
) -> RunFolder:
    """Writes a whole run to a folder.

    Args:
        path: of the folder.
        prompts: of each category.
        repetitions: of each prompt.
        seed: of what is made up; the text of a prompt does not depend on it.
        acceptance: by category.
    """
    folder = RunFolder(path)
    folder.write_run(
        Run(
            created="2026-01-01T00:00:00+00:00",
            settings={"max_new_tokens": 32, "repetitions": repetitions, "seed": seed},
            grid={},
            configurations=CONFIGURATIONS,
            suites=({"name": "example", "prompts": prompts * len(acceptance), "digest": "0" * 64},),
            provenance={
                "synthetic": True,
                "device": "none",
                "commit": None,
                "dirty": None,
                "torch": "0",
            },
        )
    )
    with folder.open_rows() as writer:
        for category, chance in acceptance.items():
            for number in range(prompts):
                for repetition in range(repetitions):
                    for configuration in CONFIGURATIONS:
                        prompt = f"{category}-{number}"
                        draw = random.Random(f"{seed} {configuration.name} {prompt} {repetition}")
                        writer.append(
                            _row(configuration, category, prompt, repetition, chance, draw)
                        )
    return folder


def _row(
    configuration: Configuration,
    category: str,
    prompt: str,
    repetition: int,
    chance: float,
    draw: random.Random,
) -> Row:
    new, nodes = 32, configuration.nodes or 1
    text = [random.Random(f"{prompt} {place}").randrange(49152) for place in range(new)]
    reached: dict[int, int] = {}
    accepted: dict[int, int] = {}
    offered: dict[int, int] = {}
    taken: dict[int, int] = {}
    known, steps = 1, 0  # the first token comes with the prefill
    while known < new:
        steps, depth = steps + 1, 0
        while nodes > 1 + depth and known + depth + 1 < new:
            reached[depth + 1] = reached.get(depth + 1, 0) + 1
            ranks = 1 if configuration.tree and ":" in configuration.tree else 2
            for rank in range(ranks):
                offered[rank] = offered.get(rank, 0) + 1
            rank = 0 if draw.random() < chance else 1 if draw.random() < chance / 4 else 2
            if rank >= ranks:
                break
            depth += 1
            accepted[depth] = accepted.get(depth, 0) + 1
            taken[rank] = taken.get(rank, 0) + 1
        known += depth + 1
    forward = steps * (0.05 + 0.004 * nodes) * draw.uniform(0.95, 1.05)
    draft = steps * 0.0004 * (nodes > 1)
    ours = not configuration.is_transformers
    seconds = {"prefill": 0.2, "total": 0.2 + 1.03 * forward + draft}
    if ours:
        seconds |= {"draft": draft, "forward": forward, "accept": 0.01 * forward, "commit": 0.0}
    classes = [TOKEN_CLASSES[token % len(TOKEN_CLASSES)] for token in text]
    drafted = [place for place in range(1, new) if draw.random() < 1 - steps / new]
    return Row(
        configuration=configuration.name,
        suite="example",
        prompt=prompt,
        category=category,
        repetition=repetition,
        seed=0,
        prompt_tokens=100,
        new_tokens=new,
        decode_tokens=new - 1,
        steps=steps,
        seconds=seconds,
        decode_seconds=seconds["total"] - seconds["prefill"],
        drafted=steps * (nodes - 1) if ours else None,
        accepted=new - 1 - steps if ours else None,
        reached_by_depth=reached if ours else {},
        accepted_by_depth=accepted if ours else {},
        offered_by_rank=offered if ours else {},
        accepted_by_rank=taken if ours else {},
        emitted_by_class={c: classes.count(c) for c in TOKEN_CLASSES if c in classes},
        accepted_by_class={
            c: sum(classes[p] == c for p in drafted) for c in TOKEN_CLASSES if c in classes
        },
        tree_sizes={nodes: steps} if ours else {},
        paths={"the device is a CPU": steps} if ours else {},
        observed="timed" if ours else None,
        tokens=text,
        lossless=None if configuration.is_plain else Lossless(equal=True),
    )
