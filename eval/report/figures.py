"""The interactive plots of a report, as plotly's JSON; the page adds what depends on its theme.

Needs plotly, which comes with the `eval` extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from specdec.eval.report.results import OVERALL, Arm, Estimate, Results
from specdec.eval.report.tables import milliseconds_per_token, phases_of

# 3:1 against both pages, 4.5:1 below white words, and never the only thing that tells two apart.
COLORS = (
    "#2876cb", "#ad6117", "#27845c", "#9956c8", "#d33e3e", "#147f91", "#7c761d", "#c3448e",
)  # fmt: skip
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LEAST_TRIES = 10
"""For a point of an acceptance curve; the table has the others too."""
PATTERNS = ("", "/", "x", ".", "\\", "-", "+")


@dataclass(frozen=True)
class Figure:
    """A plot: its place on the page, what it shows in words, and plotly's JSON."""

    id: str
    section: str
    title: str
    caption: str
    height: int
    figure: dict[str, Any]


def figures(results: Results) -> list[Figure]:
    """All plots that there are numbers for."""
    makers = (_speedup, _by_category, _by_depth, _by_rank, _by_size, _pareto, _time)
    return [figure for make in makers if (figure := make(results)) is not None]


def _speedup(results: Results) -> Figure | None:
    arms = [arm for arm in results.arms if OVERALL in arm.speedup]
    if not arms:
        return None
    found = [arm.speedup[OVERALL] for arm in arms]
    bars = go.Bar(
        x=[estimate.value for estimate in found],
        y=[arm.name for arm in arms],
        orientation="h",
        marker_color=[_color(results, arm) for arm in arms],
        error_x=_whiskers(found),
        text=[f"{estimate.value:.2f}" for estimate in found],
        textposition="inside",
        insidetextanchor="start",
        textfont={"color": "white"},
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        width=0.6,
    )
    layout = _layout(x="Speed-up", y=None, legend=False)
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["xaxis"] |= {"rangemode": "tozero"}
    layout["shapes"] = [_line_at_one("x")]
    return Figure(
        "speedup",
        "speed",
        "Speed-up",
        f"Tokens per second over those of {results.baseline}, which is the dashed line at 1. "
        "Whiskers: confidence interval.",
        90 + 44 * len(arms),
        _json([bars], layout),
    )


def _by_category(results: Results) -> Figure | None:
    arms = [arm for arm in results.arms if any(name in arm.speedup for name in results.categories)]
    if not arms or len(results.categories) < 2:
        return None
    places = {name: place for place, name in enumerate(results.categories)}
    traces = []
    for index, arm in enumerate(arms):
        names = [name for name in results.categories if name in arm.speedup]
        found = [arm.speedup[name] for name in names]
        shift = 0.7 * ((index + 0.5) / len(arms) - 0.5)  # beside each other, not on top
        traces.append(
            go.Scatter(
                x=[estimate.value for estimate in found],
                y=[places[name] + shift for name in names],
                customdata=names,
                name=arm.name,
                mode="markers",
                marker={"size": 9, "symbol": _symbol(results, arm)},
                marker_color=_color(results, arm),
                error_x=_whiskers(found),
                hovertemplate="%{customdata}: %{x:.3f}<extra>" + arm.name + "</extra>",
            )
        )
    layout = _layout(x="Speed-up", y=None)
    layout["yaxis"] |= {
        "tickvals": list(places.values()),
        "ticktext": list(places),
        "range": [len(places) - 0.5, -0.5],
        "showgrid": False,
    }
    between = [place + 0.5 for place in range(len(places) - 1)]
    layout["shapes"] = [_line_at_one("x"), *(_rule(y) for y in between)]
    return Figure(
        "by-category",
        "speed",
        "Speed-up by category",
        "Each a ratio of sums over the prompts of the category. Whiskers: confidence interval, "
        "where there are prompts enough for one.",
        150 + len(results.categories) * max(34, 15 * len(arms)),
        _json(traces, layout),
    )


def _by_depth(results: Results) -> Figure | None:
    lines = {arm: arm.by_depth for arm in results.arms}
    return _acceptance(
        results,
        lines,
        "depth",
        "How often a draft was accepted, given that its parent was. Points of fewer than "
        f"{LEAST_TRIES} tries are in the table alone.",
    )


def _by_rank(results: Results) -> Figure | None:
    lines = {arm: arm.by_rank for arm in results.arms}
    return _acceptance(
        results,
        lines,
        "rank",
        "How often the first, second, ... child of an accepted node was the one accepted, where "
        "there was one.",
    )


def _acceptance(
    results: Results,
    lines: Mapping[Arm, Mapping[int, tuple[int, int]]],
    by: str,
    caption: str,
) -> Figure | None:
    traces, most = [], 0
    for index, (arm, counts) in enumerate(lines.items()):
        places = sorted(place for place, (tries, _) in counts.items() if tries >= LEAST_TRIES)
        if not places:
            continue
        most = max(most, places[-1])
        traces.append(
            go.Scatter(
                x=places,
                y=[counts[place][1] / counts[place][0] for place in places],
                customdata=[counts[place][0] for place in places],
                name=arm.name,
                mode="lines+markers",
                marker={"size": 8, "symbol": _symbol(results, arm)},
                line={"color": _color(results, arm), "dash": DASHES[index % len(DASHES)]},
                hovertemplate=by
                + " %{x}: %{y:.1%} of %{customdata}<extra>"
                + arm.name
                + "</extra>",
            )
        )
    if not traces:
        return None
    layout = _layout(x=by.capitalize(), y="Accepted")
    layout["xaxis"] |= {"dtick": 1 if most <= 12 else 2}
    layout["yaxis"] |= {"range": [0, 1.03], "tickformat": ".0%"}
    title = f"Acceptance by {by}"
    return Figure(f"by-{by}", "acceptance", title, caption, 400, _json(traces, layout))


def _by_size(results: Results) -> Figure | None:
    drafting = [arm for arm in results.arms if arm.drafted and OVERALL in arm.speedup]
    families = dict.fromkeys(arm.family for arm in drafting)
    traces = []
    for index, family in enumerate(families):
        arms = [arm for arm in drafting if arm.family == family]
        arms.sort(key=lambda arm: arm.nodes)
        found = [arm.speedup[OVERALL] for arm in arms]
        traces.append(
            go.Scatter(
                x=[arm.nodes for arm in arms],
                y=[estimate.value for estimate in found],
                customdata=[arm.name for arm in arms],
                name=family,
                mode="lines+markers",
                marker={"size": 9, "symbol": SYMBOLS[index % len(SYMBOLS)]},
                line={"color": COLORS[index % len(COLORS)], "dash": DASHES[index % len(DASHES)]},
                error_y=_whiskers(found),
                hovertemplate="%{customdata}: %{y:.3f}<extra></extra>",
            )
        )
    sizes = sorted({arm.nodes for arm in drafting})
    if len(sizes) < 2:
        return None
    layout = _layout(x="Nodes of the tree, its root included", y="Speed-up")
    layout["xaxis"] |= {"type": "log", "tickvals": sizes, "ticktext": [str(n) for n in sizes]}
    layout["shapes"] = [_line_at_one("y")]
    return Figure(
        "by-size",
        "trees",
        "Speed against tree size",
        "A larger tree gives more tokens per step and makes every step slower.",
        380,
        _json(traces, layout),
    )


def _pareto(results: Results) -> Figure | None:
    points = [
        (arm.draft_cost, arm.tokens_per_step[OVERALL].value, arm)
        for arm in results.arms
        if arm.drafted and arm.draft_cost and OVERALL in arm.tokens_per_step
    ]
    if len(points) < 2:
        return None
    points.sort(key=lambda point: (point[0], -point[1]))
    front, best = [], float("-inf")
    for cost, tokens, arm in points:
        if tokens > best:
            front.append((cost, tokens, arm))
            best = tokens
    traces = [
        go.Scatter(
            x=[cost for cost, _, _ in front],
            y=[tokens for _, tokens, _ in front],
            name="Pareto front",
            mode="lines",
            line={"color": "#7f8896", "dash": "dash", "shape": "hv"},
            hoverinfo="skip",
        )
    ]
    for cost, tokens, arm in points:
        traces.append(
            go.Scatter(
                x=[cost],
                y=[tokens],
                name=arm.name,
                mode="markers",
                marker={"size": 12, "symbol": _symbol(results, arm)},
                marker_color=_color(results, arm),
                error_y=_whiskers([arm.tokens_per_step[OVERALL]]),
                hovertemplate="draft cost %{x:.1%}, %{y:.2f} tokens per step<extra>"
                + arm.name
                + "</extra>",
            )
        )
    layout = _layout(x="Draft time / target time", y="Tokens per step")
    wide = points[-1][0] > 10 * points[0][0]
    layout["xaxis"] |= {"type": "log", "dtick": 1} if wide else {"rangemode": "tozero"}
    layout["xaxis"] |= {"tickformat": "~%"}
    return Figure(
        "pareto",
        "trees",
        "Tokens per step against draft cost",
        "Up and to the left is better: no configuration that drafts as cheaply gives more tokens "
        "than one on the dashed front. Plain decoding drafts nothing and gives 1.",
        400,
        _json(traces, layout),
    )


def _time(results: Results) -> Figure | None:
    phases = phases_of(results.arms)
    arms = [arm for arm in results.arms if milliseconds_per_token(arm, phases)]
    if not arms:
        return None
    traces = [
        go.Bar(
            x=[milliseconds_per_token(arm, phases)[phase] for arm in arms],
            y=[arm.name for arm in arms],
            name=phase,
            orientation="h",
            marker_color=COLORS[index % len(COLORS)],
            marker_pattern={
                "shape": PATTERNS[index % len(PATTERNS)],
                "fillmode": "overlay",
                "fgopacity": 0.5,
            },
            hovertemplate="%{y}, " + phase + ": %{x:.2f} ms<extra></extra>",
            width=0.6,
        )
        for index, phase in enumerate(phases)
    ]
    layout = _layout(x="Milliseconds per emitted token", y=None)
    layout["barmode"] = "stack"
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["legend"] |= {"traceorder": "normal"}
    return Figure(
        "time",
        "time",
        "Where time goes",
        "Time by phase over emitted tokens, so that a shorter bar is a faster configuration.",
        130 + 44 * len(arms),
        _json(traces, layout),
    )


def _layout(*, x: str, y: str | None, legend: bool = True) -> dict[str, Any]:
    return {
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "xref": "container",
            "yref": "container",
            "x": 0,
            "y": 1,
            "yanchor": "top",
        },
        "xaxis": {"title": _heading(x), "automargin": True, "zeroline": False},
        "yaxis": {"title": _heading(y or ""), "automargin": True, "zeroline": False},
        "dragmode": False,
    }


def _heading(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}}


def _line_at_one(axis: str) -> dict[str, Any]:
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": 1, f"{axis}1": 1, f"{other}0": 0, f"{other}1": 1}
    return {"type": "line", f"{other}ref": "paper", **ends, "line": {"dash": "dash", "width": 1.5}}


def _rule(y: float) -> dict[str, Any]:
    ends = {"x0": 0, "x1": 1, "y0": y, "y1": y}
    return {"type": "line", "xref": "paper", **ends, "line": {"width": 0.5}}


def _whiskers(found: Sequence[Estimate]) -> dict[str, Any] | None:
    """Error bars for the estimates that have an interval."""
    if all(each.low is None for each in found):
        return None
    above = [None if each.high is None else each.high - each.value for each in found]
    below = [None if each.low is None else each.value - each.low for each in found]
    ends = {"array": above, "arrayminus": below, "thickness": 1.5, "width": 5}
    return {"type": "data", "symmetric": False, **ends}


def _color(results: Results, arm: Arm) -> str:
    return COLORS[results.arms.index(arm) % len(COLORS)]


def _symbol(results: Results, arm: Arm) -> str:
    return SYMBOLS[results.arms.index(arm) % len(SYMBOLS)]


def _json(traces: Sequence[Any], layout: dict[str, Any]) -> dict[str, Any]:
    return {"data": [trace.to_plotly_json() for trace in traces], "layout": layout}
