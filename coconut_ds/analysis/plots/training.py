"""The plots of a run report: metrics over optimizer steps, several runs in one plot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coconut_ds.analysis.plots.canvas import Theme, panel
from coconut_ds.analysis.plots.curves import (
    Quantity,
    Runs,
    add_legend,
    draw_evaluations,
    draw_training,
    how_averaged,
    how_marked,
    legend_inches,
    steps_panel,
)
from coconut_ds.runs.metrics import TrainStep
from coconut_ds.runs.paths import epoch_name

_LOG_FROM = 20  # ratio of largest to smallest loss from which a linear scale would hide the end of a run
_LABELLED_BARS = 10
_NO_STEP = "No optimizer step has been recorded yet."
_NO_EVALUATION = "No evaluation yet: the first one comes at the end of the first epoch."


@dataclass(frozen=True)
class Picture:
    """One plot of a report: the stem of its file name, its title, its caption, and the drawing."""

    name: str
    title: str
    caption: str
    """How to read it, or why nothing is drawn."""
    draw: Callable[[Theme], Figure] | None


def pictures(runs: Runs) -> list[Picture]:
    """All plots of a report of at least one run, including those without data."""
    return [
        _loss(runs),
        *_losses_of_supervision(runs),
        _accuracy(runs),
        _accuracy_by_steps(runs),
        _step_value(runs, "throughput", "Tokens per second", _SPEED, "tokens per second", _ABOUT_TOKENS),
        _step_value(runs, "memory", "Memory", _MEMORY, "GiB", _ABOUT_MEMORY),
        _step_value(runs, "padding", "Padding", _PADDING, "padding (% of cells)", _ABOUT_PADDING),
    ]


def _loss(runs: Runs) -> Picture:
    if not any(run.metrics.steps or run.metrics.evaluations for run in runs.values()):
        return Picture("loss", "Loss", _NO_STEP, None)
    caption = f"Training: {how_averaged(runs, _LOSS)}. Validation, marks: at the end of each epoch. {how_marked(runs)}"
    return Picture("loss", "Loss", caption, partial(_draw_loss, runs))


def _draw_loss(runs: Runs, theme: Theme) -> Figure:
    figure, axes = steps_panel(runs, theme, has_kinds=True)
    draw_training(axes, runs, _LOSS, theme)
    for index, run in enumerate(runs.values()):
        rows = run.metrics.evaluations
        losses = [row.valid_loss for row in rows]
        draw_evaluations(axes, [row.step for row in rows], losses, theme.look(index), line_width=0)
    axes.set_ylabel("loss")
    _scale_loss(axes, runs)
    return figure


def _scale_loss(axes: Axes, runs: Runs) -> None:
    losses = [step.loss for run in runs.values() for step in run.metrics.steps]
    losses += [row.valid_loss for run in runs.values() for row in run.metrics.evaluations]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > _LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylabel("loss (log scale)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(which="minor", axis="y", length=0, labelleft=False)
    else:
        axes.set_ylim(bottom=0)


def _losses_of_supervision(runs: Runs) -> list[Picture]:
    """A plot for each loss beside that of the sequence that any run has."""
    recorded = [step for run in runs.values() for step in run.metrics.steps]
    return [
        _step_value(
            runs, name, title, Quantity(attrgetter(name)), name.replace("_", " "), f"{about}, without its weight"
        )
        for name, (title, about) in _SUPERVISION.items()
        if any(getattr(step, name) is not None for step in recorded)
    ]


def _accuracy(runs: Runs) -> Picture:
    if not any(run.metrics.evaluations for run in runs.values()):
        return Picture("accuracy", "Accuracy", _NO_EVALUATION, None)
    caption = (
        f"Validation questions answered correctly, measured after each epoch; the best is ringed. {how_marked(runs)}"
    )
    return Picture("accuracy", "Accuracy", caption, partial(_draw_accuracy, runs))


def _draw_accuracy(runs: Runs, theme: Theme) -> Figure:
    figure, axes = steps_panel(runs, theme)
    lowest = 100.0
    for index, run in enumerate(runs.values()):
        look = theme.look(index)
        shares = [100 * row.accuracy for row in run.metrics.evaluations]
        draw_evaluations(axes, [row.step for row in run.metrics.evaluations], shares, look, line_width=1.4)
        if run.best:
            place = ([run.best.step], [100 * run.best.accuracy])
            axes.scatter(*place, s=90, facecolors="none", edgecolors=look[0], linewidths=1.4, zorder=4, clip_on=False)
        lowest = min([lowest, *shares])
    # From a round number below the lowest value, because a scale from 0 would hide small improvements.
    axes.set_ylim(max(0, 10 * math.floor((lowest - 2) / 10)), 101)
    axes.set_ylabel("accuracy (%)")
    return figure


def _accuracy_by_steps(runs: Runs) -> Picture:
    name, title = "accuracy_by_steps", "Accuracy by number of steps"
    if not any(run.last and run.last.accuracy_by_steps for run in runs.values()):
        has_evaluation = any(run.last for run in runs.values())
        return Picture(name, title, _OLD if has_evaluation else _NO_EVALUATION, None)
    epochs = sorted({run.last.epoch for run in runs.values() if run.last})
    which = f"after epoch {epochs[0]}" if len(epochs) == 1 else "after the last evaluation of each run"
    caption = f"Validation questions by the number of steps of their solution, {which}."
    return Picture(name, title, caption, partial(_draw_accuracy_by_steps, runs))


def _draw_accuracy_by_steps(runs: Runs, theme: Theme) -> Figure:
    figure, axes = panel(theme, legend_inches(runs))
    shares = [run.last.accuracy_by_steps if run.last else {} for run in runs.values()]
    lengths = sorted({length for each in shares for length in each}, key=lambda length: (len(length), length))
    width = min(0.8 / len(runs), 0.3)
    for index, each in enumerate(shares):
        shift = width * (index - (len(runs) - 1) / 2)
        answered = [length for length in lengths if length in each]
        places = [lengths.index(length) + shift for length in answered]
        bars = axes.bar(places, [100 * each[length] for length in answered], 0.88 * width, color=theme.look(index)[0])
        if len(runs) * len(lengths) <= _LABELLED_BARS:
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8, color=theme.text)
    counts = _questions_by_steps(runs)
    axes.set_xticks(range(len(lengths)), [f"{each}\nn = {counts[each]}" if counts else each for each in lengths])
    # Room for at least three places, so that a single one does not fill the plot.
    room = max(0, 3 - len(lengths)) / 2
    axes.set_xlim(-0.5 - room, len(lengths) - 0.5 + room)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("steps of the solution")
    axes.set_ylabel("accuracy (%)")
    add_legend(figure, runs, theme)
    return figure


def _questions_by_steps(runs: Runs) -> Counter[str]:
    """Numbers of questions by length in the last evaluations; empty if unknown or different between runs."""
    counts = []
    for run in runs.values():
        rows = run.predictions.get(epoch_name(run.epochs_done), ())
        counts.append(Counter(str(row.n_steps) for row in rows))
    return counts[0] if all(each == counts[0] for each in counts) else Counter()


_OLD = "Not in the records: they were written by an earlier version."
_ABOUT_TOKENS = "Tokens of a step over all ranks, without padding"
_ABOUT_MEMORY = (
    "Peak of the first rank: on a GPU of tensors since the step recorded before, on a CPU the resident set so far"
)
_ABOUT_PADDING = "Share of the cells of a step's batches that is padding"


def _tokens_per_s(step: TrainStep) -> float | None:
    return None if step.n_tokens is None or step.step_time_s <= 0 else step.n_tokens / step.step_time_s


def _padding_percent(step: TrainStep) -> float | None:
    return None if step.padding_share is None else 100 * step.padding_share


_LOSS = Quantity(lambda step: step.loss)
_SUPERVISION = {
    "step_loss": (
        "Steps written from thoughts",
        "Cross entropy per token of the steps that a decoder writes from their thoughts",
    ),
    "verbal_loss": (
        "All steps in sight",
        "Cross entropy per token of steps and answer without thoughts, a teacher's or a mixture's",
    ),
    "direct_loss": ("Answer alone", "Cross entropy per token of the answer right after the question"),
    "distance": (
        "Distance from the teacher",
        "Distance of the states before the answer from those of the teacher",
    ),
}
"""Title and explanation of each loss beside that of the sequence, by its name in the records."""
_MEMORY = Quantity(lambda step: step.peak_memory_gib)
_PADDING = Quantity(_padding_percent)
# Weighted by time, so that a block is all its tokens over all its seconds.
_SPEED = Quantity(
    _tokens_per_s,
    weight=lambda step: step.step_time_s,
    of_block="all tokens of {} recorded steps over all their seconds",
)


def _step_value(runs: Runs, name: str, title: str, quantity: Quantity, unit: str, about: str) -> Picture:
    """A curve of one quantity of training steps."""
    begun = {label: run for label, run in runs.items() if run.metrics.steps}
    without = [
        label for label, run in begun.items() if all(quantity.of_step(step) is None for step in run.metrics.steps)
    ]
    if len(without) == len(begun):
        return Picture(name, title, _OLD if begun else _NO_STEP, None)
    missing = f" Not in the records of {', '.join(without)}." if without else ""
    caption = f"{about}; {how_averaged(runs, quantity)}.{missing}"
    return Picture(name, title, caption, partial(_draw_step_value, runs, quantity, unit))


def _draw_step_value(runs: Runs, quantity: Quantity, unit: str, theme: Theme) -> Figure:
    figure, axes = steps_panel(runs, theme)
    draw_training(axes, runs, quantity, theme)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1] or 1)
    axes.set_ylabel(unit)
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:,.10g}")
    return figure
