"""Averages over the questions of a file, each with a 95% interval: percentile bootstrap over questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from coconut_ds.analysis.inspection.graphs import QuestionGraph
from coconut_ds.analysis.inspection.next_steps import NextStep, among_nodes
from coconut_ds.analysis.inspection.readings import QuestionReading, ThoughtReading
from coconut_ds.analysis.intervals import bootstrap, percentile_interval

DRAWS, SEED = 10_000, 0

Average = dict[str, float]
"""`mean`, and the ends `low` and `high` of its interval."""


def averages(quantities: Mapping[str, Sequence[float]]) -> dict[str, Average]:
    """The average of each quantity over the same questions, at least one."""
    arrays: dict[str, Any] = {name: np.array(values)[None] for name, values in quantities.items()}
    draws = bootstrap(arrays, DRAWS, SEED)
    found = {}
    for name, values in arrays.items():
        low, high = percentile_interval(draws[name])
        found[name] = {"mean": float(values.mean()), "low": low, "high": high}
    return found


def average_readings(readings: Sequence[QuestionReading]) -> dict[str, Any]:
    """Accuracy, cut answers and embedding norms; the readings of each thought over the questions that have it."""
    whole = averages(
        {
            "accuracy": [each.correct for each in readings],
            "embedding_norm": [each.embedding_norms["mean"] for each in readings],
        }
    )
    most = max(len(each.thoughts) for each in readings)
    counts = {"n_questions": len(readings), "n_cut": sum(each.cut for each in readings)}
    return {**counts, **whole, "thoughts": [_thought(readings, place) for place in range(most)]}


def _thought(readings: Sequence[QuestionReading], place: int) -> dict[str, Any]:
    these = [each.thoughts[place] for each in readings if place < len(each.thoughts)]
    reach = max(len(each.window) for each in these)
    # A shorter window has no state there: a share of 0.
    shares = {f"window_{back + 1}": [_share(each, back) for each in these] for back in range(reach)}
    found = averages(
        {
            "norm": [each.norm for each in these],
            "entropy_bits": [each.entropy_bits for each in these],
            "top_probability": [each.top[0][1] for each in these],
            **shares,
        }
    )
    window = [found.pop(name) for name in shares]
    return {"thought": place + 1, "n_questions": len(these), **found, "window": window}


def _share(reading: ThoughtReading, back: int) -> float:
    return reading.window[back][1] if back < len(reading.window) else 0.0


def average_next_steps(graphs: Sequence[QuestionGraph], steps: Sequence[Sequence[NextStep]]) -> list[dict[str, Any]]:
    """For each k the averages of the masses in `describe`."""
    most = max(len(each) for each in steps)
    return [_after(graphs, steps, place) for place in range(most)]


def _after(graphs: Sequence[QuestionGraph], steps: Sequence[Sequence[NextStep]], place: int) -> dict[str, Any]:
    these = [(graph, each[place]) for graph, each in zip(graphs, steps) if place < len(each)]
    described = [describe(graph, step) for graph, step in these]
    parts = [part for part, value in described[0].items() if isinstance(value, dict)]
    # Walks of different lengths share the masses of the shortest.
    names = [name for name in described[0][parts[0]] if all(name in each[parts[0]] for each in described)]
    quantities = {f"{part}.{name}": [each[part][name] for each in described] for part in parts for name in names}
    found = averages(quantities)
    by_part: dict[str, dict[str, Average]] = {part: {} for part in parts}
    for key, average in found.items():
        part, name = key.split(".")
        by_part[part][name] = average
    first = these[0][1]
    return {
        "n_thoughts": first.n_thoughts,
        "n_replaced": first.n_replaced,
        "n_questions": len(these),
        **by_part,
    }


def describe(graph: QuestionGraph, step: NextStep) -> dict[str, Any]:
    """The distributions of one question after k thoughts, with their masses.

    `node_shares` are the masses of a uniform distribution over the nodes: of a model that ignores the graph.
    """
    return {
        **asdict(step),
        "step_masses": graph.masses(step.step, step.n_replaced),
        "step_among_nodes_masses": graph.masses(among_nodes(step.step), step.n_replaced),
        "answer_masses": graph.masses(step.answer, step.n_replaced),
        "answer_among_nodes_masses": graph.masses(among_nodes(step.answer), step.n_replaced),
        "node_shares": graph.masses(among_nodes([1.0] * len(graph.idx_to_symbol)), step.n_replaced),
    }
