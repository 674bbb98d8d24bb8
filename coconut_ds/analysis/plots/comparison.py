"""The plot of a comparison."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coconut_ds.analysis.plots.canvas import LIGHT, new_figure

_WIDTH, _HEIGHT, _DPI = 6, 5, 100  # inches per panel and dots per inch: 1200 x 500 px for two panels


def draw(comparison: dict[str, Any]) -> Figure:
    """The plot of what `comparison.compare` returns.

    Left, accuracy of each group with its interval and a dot per seed. Beside it, if it is known, when each seed solved
    the task, and accuracy by number of steps if questions differ in it. With neither, accuracy over generated tokens,
    and nothing if that is the same too.
    """
    groups, solved = comparison["groups"], comparison.get("solved")
    panels = [partial(_draw_accuracies, groups=groups)]
    if solved:
        panels.append(partial(_draw_solved, solved=solved))
    if len(groups[0]["accuracy_by_steps"]) > 1:
        panels.append(partial(_draw_steps, groups=groups))
    elif not solved and len({group["mean_tokens"] for group in groups}) > 1:
        panels.append(partial(_draw_tokens, groups=groups))
    figure = new_figure(_WIDTH * max(2, len(panels)), _HEIGHT, _DPI)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        panel(axes)
    return figure


def _draw_accuracies(axes: Axes, groups: list[dict[str, Any]]) -> None:
    for row, group in enumerate(groups):
        colour, marker = LIGHT.look(row)
        accuracy, (low, high) = 100 * group["accuracy"], group["interval"]
        spread = [[max(0, accuracy - 100 * low)], [max(0, 100 * high - accuracy)]]
        axes.errorbar(accuracy, row, xerr=spread, fmt=marker, color=colour, capsize=5, markersize=8)
        shares = [100 * run["accuracy"] for run in group["runs"]]
        # Each seed a little lower, so that equal ones do not hide each other.
        heights = [row + 0.18 + 0.3 * place / len(shares) for place in range(len(shares))]
        axes.scatter(shares, heights, s=28, facecolors="none", edgecolors=colour, linewidths=1.2)
    axes.set_xlabel("accuracy (%)\nmean, 95% interval, one circle per seed")
    _finish_rows(axes, groups)


def _draw_solved(axes: Axes, solved: dict[str, Any]) -> None:
    groups = solved["groups"]
    reached = [each for group in groups for each in group["steps"] if each is not None]
    never = 1.15 * max(reached, default=1)
    for row, group in enumerate(groups):
        colour, marker = LIGHT.look(row)
        places = [never if each is None else each for each in group["steps"]]
        heights = [row - 0.3 + 0.6 * (place + 0.5) / len(places) for place in range(len(places))]
        axes.scatter(places, heights, s=28, marker=marker, facecolors="none", edgecolors=colour, linewidths=1.2)
        axes.annotate(f"{group['n_solved']} of {group['n_seeds']}", (1.01, row), xycoords=("axes fraction", "data"))
    axes.axvline(never, color="0.7", linewidth=0.8)
    ticks = sorted(set(reached))
    axes.set_xticks([*ticks, never], [*map(str, ticks), "never"])
    axes.set_xlabel(
        f"optimizer steps to {100 * solved['share']:.4g}% of the validation set\n(right: seeds that solve the test)"
    )
    _finish_rows(axes, groups)


def _finish_rows(axes: Axes, groups: list[dict[str, Any]]) -> None:
    """One group per row, so that long names can be read."""
    axes.set_yticks(range(len(groups)), [group["group"] for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def _draw_steps(axes: Axes, groups: list[dict[str, Any]]) -> None:
    steps = list(groups[0]["accuracy_by_steps"])
    for index, group in enumerate(groups):
        colour, marker = LIGHT.look(index)
        shares = [100 * group["accuracy_by_steps"][each]["accuracy"] for each in steps]
        # Side by side, so that equal accuracies do not hide each other.
        places = [place + 0.06 * (index - (len(groups) - 1) / 2) for place in range(len(steps))]
        axes.plot(places, shares, marker=marker, color=colour, markersize=7, linewidth=1.2, label=group["group"])
    counts = [groups[0]["accuracy_by_steps"][each]["examples"] for each in steps]
    axes.set_xticks(range(len(steps)), [f"{each}\nn = {count}" for each, count in zip(steps, counts)])
    axes.set_xlabel("steps of the solution, number of questions n")
    _finish(axes)


def _draw_tokens(axes: Axes, groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        colour, marker = LIGHT.look(index)
        # Hollow and of decreasing size, so that groups at the same point stay visible.
        axes.plot(
            group["mean_tokens"],
            100 * group["accuracy"],
            marker=marker,
            color=colour,
            fillstyle="none",
            markersize=18 - 12 * index / len(groups),
            markeredgewidth=1.8,
            linestyle="none",
            label=group["group"],
        )
    axes.margins(0.15)
    axes.set_xlim(0, axes.get_xlim()[1])
    axes.set_xlabel("generated tokens and thoughts per answer (mean)")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, markerscale=0.6)
