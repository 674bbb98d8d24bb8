"""Plots of a walk along edges (the hops task): where the model is after each thought."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from coconut_ds.analysis.plots.canvas import LIGHT, Theme, new_figure, panel
from coconut_ds.runs.thought_use import StageUse

_DPI = 200
_CIRCLE_INCHES, _MOST_COLUMNS = 2.0, 5

Place = tuple[float, float]


def readings(steps: Sequence[dict[str, Any]], n_edges: int) -> list[str]:
    """For each k what says where the model is: the next step while one is left, at the end of the walk the answer."""
    return ["answer" if after["n_replaced"] >= n_edges else "step" for after in steps]


def draw_walk(found: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """The graph of a question once for every k: its nodes on a circle, coloured by their probability.

    `found` is what `Inspection.of_question` returns for a question with a walk.
    """
    graph, steps = found["graph"], found["next_steps"]
    columns = min(len(steps), _MOST_COLUMNS)
    rows = math.ceil(len(steps) / columns)
    figure = new_figure(columns * _CIRCLE_INCHES, rows * (_CIRCLE_INCHES + 0.25), _DPI)
    figure.set_facecolor(theme.background)
    places = on_circle(graph)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, after, kind in zip(panels, steps, readings(steps, len(graph["walk"]) - 1)):
        total = sum(after[kind])
        shares = [each / total if total else 0.0 for each in after[kind]]
        _draw_circle(axes, graph, places, shares, after["n_replaced"], theme)
        count = after["n_thoughts"]
        what = "answer" if kind == "answer" else "next step from"
        best = graph["idx_to_symbol"][int(np.argmax(shares))]
        axes.set_title(
            f"{count} thought{'s' * (count != 1)}: {what} {best} {max(shares):.0%}", fontsize=7, color=theme.text
        )
    return figure


def on_circle(graph: Mapping[str, Any]) -> dict[int, Place]:
    """Places on the unit circle, from the top clockwise: the walk first, then the others along their edges."""
    following = {edge[-2]: edge[-1] for edge in graph["edges"]}
    order = list(dict.fromkeys(graph["walk"]))
    waiting = [node for node in range(len(graph["idx_to_symbol"])) if node not in order]
    while waiting:
        node = following.get(order[-1])
        order.append(node if node in waiting else waiting[0])
        waiting.remove(order[-1])
    turn = 2 * math.pi / len(order)
    return {node: (math.sin(turn * rank), math.cos(turn * rank)) for rank, node in enumerate(order)}


def _draw_circle(
    axes: Axes,
    graph: Mapping[str, Any],
    places: Mapping[int, Place],
    shares: Sequence[float],
    n_followed: int,
    theme: Theme,
) -> None:
    walk = graph["walk"]
    followed = set(pairwise(walk[: n_followed + 1]))
    shades = LinearSegmentedColormap.from_list("shares", [theme.background, theme.series[0]])
    for edge in graph["edges"]:
        before, after = edge[-2:]
        is_followed = (before, after) in followed
        arrow = {
            "arrowstyle": "-|>",
            "color": theme.series[0] if is_followed else theme.faint,
            "linewidth": 1.6 if is_followed else 0.8,
            "shrinkA": 9,
            "shrinkB": 9,
        }
        axes.annotate("", places[after], places[before], arrowprops=arrow, zorder=1)
    for node, (x, y) in places.items():
        colour = shades(shares[node])
        is_start, is_end = node == walk[0], node == walk[-1]
        edge_colour = theme.text if is_start else theme.series[2] if is_end else theme.faint
        width = 1.6 if is_start or is_end else 0.8
        axes.scatter(x, y, s=260, color=[colour], edgecolors=edge_colour, linewidths=width, zorder=2)
        is_dark = sum(to_rgb(colour)) < 1.6
        axes.text(
            x,
            y,
            graph["idx_to_symbol"][node],
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if is_dark else LIGHT.text,
            zorder=3,
        )
    axes.set_xlim(-1.35, 1.35)
    axes.set_ylim(-1.35, 1.35)
    axes.set_aspect("equal")


def walk_heat(steps: Sequence[dict[str, Any]]) -> tuple[list[list[float]], list[str]]:
    """Shares of the nodes after 0..k edges, one row for every number of thoughts, and the reading of each row.

    `steps` are the averages of `Inspection.of_file`; a row is normalised over the nodes.
    """
    names = [name for name in steps[0]["step_masses"] if name != "no_node"]
    kinds = readings(steps, len(names) - 1)
    parts = {"step": "step_among_nodes_masses", "answer": "answer_among_nodes_masses"}
    return [[after[parts[kind]][name]["mean"] for name in names] for after, kind in zip(steps, kinds)], kinds


def draw_walk_heat(axes: Axes, found: dict[str, Any], theme: Theme = LIGHT) -> None:
    """A heat map with a diagonal if the node after j edges is known after the thoughts of j steps."""
    steps = found["next_steps"]
    shares, kinds = walk_heat(steps)
    shades = LinearSegmentedColormap.from_list("shares", [theme.background, theme.series[0]])
    axes.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            is_dark = sum(to_rgb(shades(share))) < 1.6
            axes.text(
                column,
                row,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if is_dark else theme.text,
            )
    axes.set_xticks(range(len(shares[0])), [str(edges) for edges in range(len(shares[0]))])
    rows = [f"{after['n_thoughts']}{', answer' * (kind == 'answer')}" for after, kind in zip(steps, kinds)]
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("node after this many edges")
    axes.set_ylabel("read after this many thoughts")
    axes.grid(visible=False)


def draw_heat(found: dict[str, Any], theme: Theme) -> Figure:
    """`draw_walk_heat` in a figure of its own."""
    figure, axes = panel(theme)
    draw_walk_heat(axes, found, theme)
    return figure


def draw_exchange(stages: Sequence[StageUse], theme: Theme) -> Figure:
    """Accuracy at the end of every stage, with own thoughts and with another question's, with 95% intervals."""
    figure, axes = panel(theme)
    own = [(each.n_thoughts, each.own) for each in stages]
    exchanged = [(each.n_thoughts, each.exchanged) for each in stages if each.exchanged]
    for look, (label, points) in enumerate((("own thoughts", own), ("another question's thoughts", exchanged))):
        places, shares = [place for place, _ in points], [share for _, share in points]
        means = [100 * each.share for each in shares]
        spread = [
            [mean - 100 * each.low for mean, each in zip(means, shares)],
            [100 * each.high - mean for mean, each in zip(means, shares)],
        ]
        colour, marker = theme.look(look)
        axes.errorbar(
            places, means, yerr=spread, color=colour, marker=marker, markersize=5, linewidth=1.3, capsize=3, label=label
        )
    axes.set_ylim(0, 108)
    axes.set_xticks([each.n_thoughts for each in stages])
    axes.set_xlabel("number of thoughts, at the end of each stage")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8, labelcolor=theme.text)
    return figure
