"""Curves over the optimizer steps of several runs: averages, evaluations, stage lines, the legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from coconut_ds.analysis.plots.canvas import Theme, panel
from coconut_ds.runs.metrics import TrainStep
from coconut_ds.runs.read_run import RunRecords

Runs = Mapping[str, RunRecords]
"""Runs by the name they are shown with; their colours follow this order."""

_POINTS = 120  # per curve: more cannot be distinguished in a plot of this size
_LARGE_MARKS = 20  # with more evaluations the marks would overlap
_LONGEST_NAME, _LEGEND_ROW_INCHES = 26, 0.2


@dataclass(frozen=True)
class Quantity:
    """A quantity of training steps to draw."""

    of_step: Callable[[TrainStep], float | None]
    """None if its record does not have it."""
    weight: Callable[[TrainStep], float] = lambda step: 1.0
    """Weight of a step in the mean of its block."""
    of_block: str = "means of {} recorded steps"


@dataclass(frozen=True)
class Curve:
    """Weighted means of blocks of neighbouring steps, with the lowest and highest value of each; all (points,)."""

    steps: NDArray[np.float64]
    means: NDArray[np.float64]
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]


def averaged(steps: Sequence[int], values: Sequence[float], weights: Sequence[float], size: int) -> Curve:
    """Means of blocks of `size` values, of which the last may be smaller; a block is drawn at the mean of its steps.

    A block with a value that is not finite is NaN, which is drawn as a gap.
    """
    starts = np.arange(0, len(values), size)
    counts = np.diff([*starts, len(values)])
    x, y, w = (np.asarray(each, dtype=float) for each in (steps, values, weights))
    y = np.where(np.isfinite(y), y, np.nan)
    return Curve(
        np.add.reduceat(x, starts) / counts,
        np.add.reduceat(w * y, starts) / np.add.reduceat(w, starts),
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )


def draw_training(axes: Axes, runs: Runs, quantity: Quantity, theme: Theme) -> None:
    """One averaged curve per run, interrupted at stage boundaries, where values jump."""
    size = _block_size(runs)
    for index, run in enumerate(runs.values()):
        colour, _ = theme.look(index)
        pairs = [(step, drawn) for step in run.metrics.steps if (drawn := quantity.of_step(step)) is not None]
        for _, part in groupby(pairs, key=lambda pair: pair[0].stage):
            steps, values = zip(*part)
            weights = [quantity.weight(step) for step in steps]
            curve = averaged([step.step for step in steps], values, weights, size)
            marker = "." if len(curve.steps) == 1 else ""
            axes.plot(curve.steps, curve.means, color=colour, linewidth=1.3, marker=marker)
            if len(runs) == 1 and size > 1:
                axes.fill_between(curve.steps, curve.lows, curve.highs, color=colour, alpha=0.2, linewidth=0)


def how_averaged(runs: Runs, quantity: Quantity) -> str:
    """Explains a point of `draw_training`, as the end of a sentence."""
    size = _block_size(runs)
    if size == 1:
        return "one point per recorded step"
    band = ", in a band from the lowest to the highest" if len(runs) == 1 else ""
    return f"{quantity.of_block.format(size)}{band}"


def _block_size(runs: Runs) -> int:
    """Recorded steps per block, the same for all runs so that their curves are equally smooth."""
    return max(1, *(math.ceil(len(run.metrics.steps) / _POINTS) for run in runs.values()))


def draw_evaluations(
    axes: Axes, steps: Sequence[int], values: Sequence[float], look: tuple[str, str], line_width: float
) -> None:
    """A filled mark per evaluation, joined by a line if `line_width`, in points, is not 0.

    `look` is the colour and the marker.
    """
    colour, marker = look
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=line_width,
        marker=marker,
        markersize=4.5 if len(steps) <= _LARGE_MARKS else 2.8,
        markeredgecolor=axes.get_facecolor(),
        markeredgewidth=0.7 if len(steps) <= _LARGE_MARKS else 0.0,
        zorder=3,
    )


def stage_starts(run: RunRecords) -> list[tuple[int, int]]:
    """Optimizer steps done and stage, for every stage entered; resets within a stage do not count."""
    starts = [(mark.step, mark.stage) for mark in run.metrics.stages]
    return starts[:1] + [mark for before, mark in pairwise(starts) if mark[1] != before[1]]


def share_stages(runs: Runs) -> bool:
    """Whether the stages of all runs begin at the same steps, up to the last stage of each run."""
    longest, *others = sorted((stage_starts(run) for run in runs.values()), key=len, reverse=True)
    return all(longest[: len(each)] == each for each in others)


def how_marked(runs: Runs) -> str:
    """Explains the vertical lines in a sentence."""
    if share_stages(runs):
        return "Vertical lines: a new stage."
    return "Vertical lines: a new stage of the run of that colour."


def _mark_stages(axes: Axes, runs: Runs, theme: Theme) -> None:
    if not share_stages(runs):
        for index, run in enumerate(runs.values()):
            for step, _ in stage_starts(run):
                axes.axvline(step, color=theme.look(index)[0], linewidth=0.8, linestyle=":", alpha=0.7, zorder=0)
        return
    starts = max((stage_starts(run) for run in runs.values()), key=len)
    above: dict[str, Any] = {"color": theme.text, "fontsize": 7.5, "va": "bottom"}
    if starts:
        axes.text(-0.01, 1.02, "stage", transform=axes.transAxes, ha="right", **above)
    for step, stage in starts:
        axes.axvline(step, color=theme.text, linewidth=0.7, alpha=0.5, zorder=0)
        axes.text(step, 1.02, str(stage), transform=axes.get_xaxis_transform(), ha="left", **above)


def steps_panel(runs: Runs, theme: Theme, has_kinds: bool = False) -> tuple[Figure, Axes]:
    """A panel over optimizer steps with its marks and legend.

    `has_kinds`: it shows training and validation, which the legend distinguishes.
    """
    figure, axes = panel(theme, legend_inches(runs, has_kinds))
    furthest = max(1, *(run.steps_done for run in runs.values()))
    axes.set_xlim(-0.01 * furthest, 1.02 * furthest)
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    axes.locator_params(axis="x", nbins=6, integer=True)
    _mark_stages(axes, runs, theme)
    add_legend(figure, runs, theme, has_kinds)
    return figure, axes


def add_legend(figure: Figure, runs: Runs, theme: Theme, has_kinds: bool = False) -> None:
    """Names of several runs, below the axes."""
    entries = []
    if len(runs) > 1:
        for index, name in enumerate(runs):
            colour, marker = theme.look(index)
            entries.append(Line2D([], [], color=colour, linewidth=2, marker=marker, label=_shortened(name)))
    if has_kinds:
        colour = theme.look(0)[0] if len(runs) == 1 else theme.text
        entries.append(Line2D([], [], color=colour, linewidth=1.3, label="training"))
        entries.append(Line2D([], [], color=colour, linestyle="none", marker="o", markersize=4.5, label="validation"))
    if entries:
        figure.legend(
            handles=entries,
            loc="outside lower left",
            ncols=2,
            frameon=False,
            fontsize=8,
            labelcolor=theme.text,
            handlelength=1.4,
        )


def legend_inches(runs: Runs, has_kinds: bool = False) -> float:
    """Height of the legend, which a panel adds so that the axes keep theirs."""
    entries = (len(runs) if len(runs) > 1 else 0) + 2 * has_kinds
    return _LEGEND_ROW_INCHES * math.ceil(entries / 2)


def _shortened(name: str) -> str:
    """A long name without its middle, because names of runs differ at their ends."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
