"""How fast would other trees be, other batches, another GPU? Answered from a run, without a model.

What is accepted comes from one of two places:

* *Replay*, for drafters that look at tokens only: the text of a run is what the target says,
  however it was cut into steps, so drafting along it again, with any budget, shows exactly which
  drafts would have been accepted. This holds for greedy runs, and for those under
  `sample-and-match`.
* *Rates*, for draft models on a fixed shape: how often the child of each rank was accepted at each
  depth. The expected number of accepted nodes is the sum over the shape's nodes of the chance that
  all of their path is (Sequoia, arXiv 2402.12374, section 3.1), ranks and depths taken as
  independent.

How long it takes comes from `specdec.eval.step_time`, fitted to the same run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import AutoTokenizer

from specdec import models
from specdec.drafters import DRAFTERS
from specdec.drafting import SequenceDrafter
from specdec.eval.loading import encode, make_drafter, parse_topology
from specdec.eval.metrics import METRICS, measure
from specdec.eval.records import Configuration, Row, Run, RunFolder, total
from specdec.eval.step_time import StepTime, fit
from specdec.eval.suites import load_suites
from specdec.topology import Topology


@dataclass(frozen=True)
class Acceptance:
    """What steps would do, as sums over some texts."""

    tokens: float
    """That steps give: without the first ones, which come with prompts."""
    steps: float
    tree_sizes: Mapping[int, float]
    """By number of nodes: steps."""
    context: float
    """Committed tokens, summed over steps."""
    texts: int

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps

    @property
    def nodes(self) -> float:
        """Of a tree, on average."""
        return sum(size * count for size, count in self.tree_sizes.items()) / self.steps


def replay(
    drafter: SequenceDrafter,
    nodes: int,
    texts: Sequence[tuple[Sequence[int], Sequence[int], int]],
) -> Acceptance:
    """Drafts along known texts.

    Args:
        drafter: looks at one sequence at a time.
        nodes: its budget, the root included.
        texts: of each what is known when steps begin, what they give, and how long it may become:
            drafts behind that are not made.
    """
    sizes: Counter[int] = Counter()
    tokens, context = 0, 0
    for begin, answer, limit in texts:
        text, known = [*begin, *answer], len(begin)
        while known < len(text):
            tree = drafter.draft(text[:known], nodes).cut(depth=max(0, limit - known - 1))
            taken = min(_matched(tree.tokens.tolist(), tree.parents.tolist(), text, known) + 1,
                        len(text) - known)  # fmt: skip
            sizes[len(tree)] += 1
            context += known - 1
            tokens += taken
            known += taken
    return Acceptance(tokens, sizes.total(), dict(sorted(sizes.items())), context, len(texts))


def _matched(tokens: Sequence[int], parents: Sequence[int], text: Sequence[int], known: int) -> int:
    """Drafts on the path that goes on like the text, whose first `known` tokens end at the root."""
    at, depth = 0, 0
    for node in range(1, len(tokens)):  # parents come before their children
        place = known + depth
        if parents[node] == at and place < len(text) and tokens[node] == text[place]:
            at, depth = node, depth + 1
    return depth


def expected(topology: Topology, rows: Sequence[Row]) -> Acceptance:
    """What a fixed shape would do where acceptance is as in some rows.

    Args:
        topology: the shape of every tree.
        rows: of a run of the same drafter; ranks that it never proposed count as never accepted.

    Raises:
        ValueError: the rows do not tell acceptance by rank and depth.
    """
    offered = total([row.offered_by_rank for row in rows])
    taken = total([row.accepted_by_rank for row in rows])
    reached = total([row.reached_by_depth for row in rows])
    kept = total([row.accepted_by_depth for row in rows])
    if not offered or not reached:
        raise ValueError("the rows tell nothing of acceptance by rank and depth")
    ranks = {rank: taken.get(rank, 0) / count for rank, count in offered.items()}
    mean = sum(kept.values()) / sum(reached.values())
    depths = {d: kept.get(d, 0) / count / mean if mean else 0.0 for d, count in reached.items()}
    deepest = depths[max(depths)]
    chance, children = [1.0], Counter[int]()
    for node, parent in enumerate(topology.parents[1:], start=1):
        rate = ranks.get(children[parent], 0.0) * depths.get(topology.depths[node], deepest)
        children[parent] += 1
        chance.append(chance[parent] * min(1.0, rate))
    new = sum(row.decode_tokens for row in rows)
    steps = new / sum(chance)
    around = sum(row.decode_tokens * (row.prompt_tokens + row.new_tokens / 2) for row in rows)
    context = around / new
    return Acceptance(new, steps, {len(topology): steps}, steps * context, len(rows))


@dataclass(frozen=True)
class Prediction:
    """One tree, simulated."""

    tree: str
    batch: int
    tokens_per_step: float
    step_ms: float
    tokens_per_second: float
    """Of all sequences together, decoding only."""
    speedup: float
    """Over plain decoding of the same batch, simulated too."""
    extrapolated: bool
    """Whether a pass has more rows than any that the times were fitted to."""
    requests_per_second: float
    """Of a GPU that always has `batch` requests, prompts included."""
    latency: float
    """Seconds of a request there, from its admission to its last token."""
    measured: float | None = None
    """Speed-up measured in the run, where it has that tree."""

    @property
    def error(self) -> float | None:
        """Relative, of the speed-up."""
        return None if self.measured is None else self.speedup / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "error": self.error}


def predict(
    tree: str,
    acceptance: Acceptance,
    time: StepTime,
    rows: Sequence[Row],
    *,
    batch: int = 1,
    measured: float | None = None,
) -> Prediction:
    """Puts acceptance and times together.

    Args:
        tree: how it is called.
        acceptance: of single sequences; batches are many of them in step.
        time: of steps.
        rows: of the plain loop, for what a request is: its prompt and its answer.
        batch: sequences in a pass, and requests that a GPU serves at once.
        measured: speed-up to compare with.
    """
    context = acceptance.context / acceptance.steps
    seconds = sum(
        count * time.step(size, context, batch) for size, count in acceptance.tree_sizes.items()
    )
    # What the host does for a text, it does for one after the other.
    speed = batch * acceptance.tokens / (seconds + batch * acceptance.texts * time.text)
    new = sum(r.decode_tokens for r in rows)
    around = sum((r.prompt_tokens + r.new_tokens / 2) * r.decode_tokens for r in rows) / new
    alone = new * time.step(1, around, batch) + batch * len(rows) * time.text
    plain = batch * new / alone
    answers = new / len(rows)
    prompts = sum(r.prompt_tokens for r in rows) / len(rows)
    # All prompts that are computed while a request runs make it wait: one for each that ends.
    latency = batch * answers / speed + batch * prompts * time.prefill
    return Prediction(
        tree=tree,
        batch=batch,
        tokens_per_step=acceptance.tokens_per_step,
        step_ms=1000 * seconds / acceptance.steps,
        tokens_per_second=speed,
        speedup=speed / plain,
        extrapolated=batch * max(acceptance.tree_sizes) > time.knots[-1],
        requests_per_second=batch / latency,
        latency=latency,
        measured=measured,
    )


def simulate_run(
    folder: RunFolder,
    drafter: str,
    trees: Sequence[str],
    *,
    target: str | None = None,
    temperature: float | None = None,
    fit_to: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    gpu: str | None = None,
) -> list[Prediction]:
    """Predicts trees of a drafter from a run; see the module.

    Args:
        folder: of the run.
        drafter, trees: as on a command line.
        target, temperature: which of the run's, if it has several.
        fit_to: names of configurations that times are fitted to; all of our own by default.
        batches: sizes.
        gpu: `FROM:TO`, names in `step_time.GPUS`.

    Raises:
        ValueError: the run has no such target or configuration, or does not tell what is needed.
    """
    run, rows = folder.run(), [row for row in folder.rows() if row.error is None]
    plain = _plain(run, target, temperature)
    here = [c for c in run.configurations if run.plain_of(c) == plain and not c.is_transformers]
    names = [c.name for c in here]
    if unknown := sorted(set(fit_to or ()) - set(names)):
        raise ValueError(f"--fit: expected names among {', '.join(names)}, got {unknown}")
    time = fit([row for row in rows if row.configuration in (fit_to or names)])
    if gpu is not None:
        time = time.on(*_pair(gpu))
    base = [row for row in rows if row.configuration == plain.name]
    acceptances = _acceptances(run, rows, plain, drafter, trees)
    found = []
    for tree, acceptance in acceptances.items():
        same = [c for c in here if (c.drafter, c.tree) == (drafter, tree)]
        own = [row for row in rows if same and row.configuration == same[0].name]
        speedup = measure(METRICS["speedup"], own, base) if gpu is None else None
        for batch in batches:
            measured = speedup.value if speedup is not None and batch == 1 else None
            found.append(predict(tree, acceptance, time, base, batch=batch, measured=measured))
    return found


def _plain(run: Run, target: str | None, temperature: float | None) -> Configuration:
    found = [
        c
        for c in run.configurations
        if c.is_plain and target in (None, c.target) and temperature in (None, c.temperature)
    ]
    if len(found) != 1:
        shown = ", ".join(
            f"{c.target} at {c.temperature:g}" for c in run.configurations if c.is_plain
        )
        raise ValueError(f"expected --target and --temperature to choose one of {shown}")
    return found[0]


def _pair(gpu: str) -> tuple[str, str]:
    here, colon, there = gpu.partition(":")
    if not colon:
        raise ValueError(f"--gpu: expected FROM:TO, such as H100:H200, got {gpu!r}")
    return here, there


def _acceptances(
    run: Run, rows: Sequence[Row], plain: Configuration, drafter: str, trees: Sequence[str]
) -> dict[str, Acceptance]:
    """By tree: replayed where the drafter needs tokens only, else from rates."""
    if drafter not in DRAFTERS and not drafter.rpartition(":")[0].endswith(".py"):
        own = {c.name for c in run.configurations if c.drafter == drafter}
        same = [row for row in rows if row.configuration in own]
        shapes = {
            tree: Topology.fading(int(tree)) if tree.isdecimal() else parse_topology(tree)
            for tree in trees
        }
        return {tree: expected(shape, same) for tree, shape in shapes.items()}
    texts = _texts(run, [row for row in rows if row.configuration == plain.name], plain.target)
    found = {}
    for tree in trees:
        made, nodes = make_drafter(drafter, tree, torch.device("cpu"), torch.float32)
        if not isinstance(made, SequenceDrafter) or nodes is None:
            raise ValueError(
                f"--drafter: {drafter} looks at more than the tokens of one sequence, so its "
                "drafts cannot be replayed without the model"
            )
        found[tree] = replay(made, nodes, texts)
    return found


def _texts(
    run: Run, rows: Sequence[Row], target: str
) -> list[tuple[Sequence[int], Sequence[int], int]]:
    """Every plain row as `replay` takes it."""
    suites = load_suites(run.grid["suites"], run.settings["limit"])
    if [suite.to_dict() for suite in suites] != [dict(suite) for suite in run.suites]:
        raise ValueError("the prompts of the run's suites have changed since it began")
    tokenizer = AutoTokenizer.from_pretrained(models.resolve(target))
    prompts = {
        (suite.name, prompt.id): encode(tokenizer, prompt.messages)["input_ids"][0].tolist()
        for suite in suites
        for prompt in suite.prompts
    }
    texts: list[tuple[Sequence[int], Sequence[int], int]] = []
    for row in rows:
        prompt, first = prompts[row.suite, row.prompt], row.new_tokens - row.decode_tokens
        limit = len(prompt) + run.settings["max_new_tokens"]
        texts.append(([*prompt, *row.tokens[:first]], row.tokens[first:], limit))
    return texts


def prediction_table(found: Sequence[Prediction]) -> Table:
    """One line for each tree and batch size; columns that would be empty are left out."""
    fleet = any(p.batch > 1 for p in found)
    compared = any(p.measured is not None for p in found)
    table = Table("tree", *(["batch"] if fleet else []), "tokens/step", "ms/step", "tokens/s")
    table.add_column("speed-up")
    if compared:
        table.add_column("measured (error)")
    if fleet:
        table.add_column("requests/s")
        table.add_column("latency")
    for p in found:
        cells = [p.tree, *([str(p.batch)] if fleet else []), f"{p.tokens_per_step:.2f}"]
        cells += [f"{p.step_ms:.1f}{' *' if p.extrapolated else ''}"]
        cells += [f"{p.tokens_per_second:.1f}", f"{p.speedup:.2f}"]
        if compared:
            cells.append("" if p.error is None else f"{p.measured:.2f} ({p.error:+.1%})")
        if fleet:
            cells += [f"{p.requests_per_second:.2f}", f"{p.latency:.2f} s"]
        table.add_row(*cells)
    if any(p.extrapolated for p in found):
        table.caption = "* more rows than were ever timed"
    return table
