"""Which seeds of a method learn a task, and after how many optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from coconut_ds.analysis import intervals
from coconut_ds.analysis.comparison import Groups, Run
from coconut_ds.errors import InputError
from coconut_ds.runs.metrics import EpochEvaluation, read_metrics
from coconut_ds.runs.paths import RunFolder


def solved(groups: Groups, share: float) -> dict[str, Any]:
    """Seeds of each group whose compared answers reach the accuracy `share`, and steps until the validation set does.

    Steps are those of the first evaluation that reaches it without a visible step (or, under methods that keep or drop
    the chain in every epoch, of any); None if none does. Pairs of groups: the Mann-Whitney test of the steps, never
    being later than any, and Fisher's exact test of the solved seeds, two-sided, each with Holm's adjustment over all
    pairs; groups of one seed are not tested. Raises InputError for a run without such an evaluation, and for icot,
    which removes the chain token by token.
    """
    steps = {name: [steps_to(run, share) for run in runs] for name, runs in groups.items()}
    counts = {name: sum(_accuracy(run) >= share for run in runs) for name, runs in groups.items()}
    pairs: list[dict[str, Any]] = []
    for first, second in combinations([name for name, runs in groups.items() if len(runs) > 1], 2):
        sizes = len(groups[first]), len(groups[second])
        p_solved = intervals.fisher(counts[first], sizes[0], counts[second], sizes[1])
        p_steps = intervals.mann_whitney(_or_never(steps[first]), _or_never(steps[second]))
        pairs.append({"first": first, "second": second, "p_steps": p_steps, "p_solved": p_solved})
    for key in ("p_steps", "p_solved"):
        for pair, adjusted in zip(pairs, intervals.holm([pair[key] for pair in pairs])):
            pair[f"{key}_holm"] = adjusted
    described = [
        {"group": name, "n_seeds": len(runs), "n_solved": counts[name], "steps": steps[name]}
        for name, runs in groups.items()
    ]
    return {"share": share, "groups": described, "pairs": pairs}


def steps_to(run: Run, share: float) -> int | None:
    """Optimizer steps until the validation accuracy reaches `share` in the last stage; None if it never does."""
    reached = (each.step for each in _last_stage(run) if each.accuracy >= share)
    return min(reached, default=None)


def _last_stage(run: Run) -> list[EpochEvaluation]:
    """Evaluations in the layout of the end of the curriculum: where steps are replaced by stage, none is visible."""
    if run.config.traits.steps == "dropped by token":
        raise InputError(f"{run.folder}: --solved needs a stage without steps, and icot removes the chain by tokens")
    records, first = RunFolder(run.folder).metrics, 0
    evaluations = read_metrics(records).evaluations if records.is_file() else ()
    if run.config.traits.steps == "replaced by stage":
        # Stage S replaces S steps, the stage after it drops what is left.
        longest = max(answer.n_steps for answer in run.answers)
        first = run.config.max_latent_stage + (longest > run.config.max_latent_stage)
    if not (found := [each for each in evaluations if each.stage >= first]):
        raise InputError(f"{run.folder}: no evaluation of stage {first} or later in its metrics.jsonl; finish the run")
    return found


def _accuracy(run: Run) -> float:
    return sum(run.hits) / len(run.hits)


def _or_never(steps: Sequence[int | None]) -> list[float]:
    return [math.inf if each is None else each for each in steps]
