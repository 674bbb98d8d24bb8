"""Runs compared by what they answered: groups of seeds, intervals, tests, and notes on what the numbers mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from coconut_ds.analysis import intervals
from coconut_ds.config.run_config import RunConfig
from coconut_ds.errors import InputError
from coconut_ds.runs.paths import RunFolder, epoch_of
from coconut_ds.runs.predictions import Prediction, chosen_file, cut_answers, cut_warning, read_predictions
from coconut_ds.runs.read_run import read_config

DRAWS, BOOTSTRAP_SEED = 10_000, 0
_FEW = 10  # with fewer differing answers a bootstrap of them says little
# Keys that may differ within a group: seed, names and records of a run.
_FREE_KEYS = {
    *("project", "name", "save_path", "seed", "wandb"),
    *("save_only_improve", "save_every_steps", "keep_checkpoints", "hang_limit_s", "log_every_steps"),
    "num_workers",
    # Each seed can start from its own first stage; the others spell out `method`.
    *("load_model_path", "coconut", "cot", "no_cot", "no_thoughts"),
    # The same answers and, within rounding, the same steps.
    *("eval_batch_size", "deepspeed", "activation_checkpointing", "fast", "deterministic"),
}
_SPLIT_KEYS = {"batch_size_training", "gradient_accumulation_steps"}  # free if `train_batch_size` sets the total


@dataclass(frozen=True)
class Run:
    """A run folder and the predictions chosen from it, in order of their index."""

    folder: Path
    group: str
    config: RunConfig
    predictions: str
    answers: tuple[Prediction, ...]

    @property
    def epoch(self) -> int | None:
        """The epoch after which the questions were answered; None for another set's predictions."""
        return epoch_of(self.predictions)

    @property
    def hits(self) -> list[bool]:
        return [answer.correct for answer in self.answers]


Groups = Mapping[str, Sequence[Run]]


def read_run(text: str, predictions: str | None = None) -> Run:
    """The run that `[LABEL=]RUN` names, with the predictions of its last epoch or those named `predictions`.

    Raises InputError for missing or damaged files.
    """
    label, equals, rest = text.partition("=")
    # A folder's own name may hold an equals sign.
    is_labelled = bool(equals) and not Path(text).is_dir()
    if is_labelled and not (label and rest):
        raise InputError(f"{text!r}: a label is written LABEL=RUN")
    folder = Path(rest if is_labelled else text)
    config = read_config(folder)
    path = chosen_file(RunFolder(folder), predictions)
    return Run(folder, label if is_labelled else group_of(config), config, path.stem, read_predictions(path))


def group_of(config: RunConfig) -> str:
    """The name of the run without a trailing `_seedN`, `-seedN`, `_sN` or `-sN` where N is its seed."""
    return re.sub(rf"(?<=.)[_-]s(eed)?{config.seed}$", "", config.name)


def grouped(runs: Sequence[Run]) -> Groups:
    """Runs by group, in order of seeds; raises InputError for differing methods in a group or differing questions."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    for members in groups.values():
        members.sort(key=lambda run: run.config.seed)
        for other in members[1:]:
            _demand_same_method(members[0], other)
        for run, other in pairwise(members):
            if run.config.seed == other.config.seed:
                same = f"{run.folder} and {other.folder} both have seed {run.config.seed}"
                raise InputError(f"{run.group}: {same}; name one of them, or label them apart with LABEL=RUN")
    for other in runs[1:]:
        _demand_same_questions(runs[0], other)
    return groups


def _demand_same_method(run: Run, other: Run) -> None:
    first, second = run.config.model_dump(), other.config.model_dump()
    free = _FREE_KEYS | (_SPLIT_KEYS if run.config.train_batch_size else set())
    differing = [key for key in first if key not in free and first[key] != second[key]]
    pair = f"{run.group}: {run.folder} and {other.folder}"
    if differing:
        values = ", ".join(f"{key} ({first[key]} and {second[key]})" for key in differing)
        rule = f"are not seeds of one method: they differ in {values}"
        raise InputError(f"{pair} {rule}; label them apart with LABEL=RUN")
    if run.epoch != other.epoch:
        raise InputError(
            f"{pair}: the last predictions are of epochs {run.epoch} and {other.epoch}; finish the runs, or name an "
            "epoch that both have with --predictions"
        )


def _demand_same_questions(run: Run, other: Run) -> None:
    pair = f"{run.folder} ({run.predictions}) and {other.folder} ({other.predictions})"
    rule = "compare runs that answered the same set"
    if len(run.answers) != len(other.answers):
        raise InputError(f"{pair} have {len(run.answers)} and {len(other.answers)} answers; {rule}")
    for first, second in zip(run.answers, other.answers):
        if first.index != second.index:
            raise InputError(f"{pair}: index {min(first.index, second.index)} is in one of them only; {rule}")
        for key in ("question", "expected", "n_steps"):
            if getattr(first, key) != getattr(second, key):
                raise InputError(f"{pair} differ first at index {first.index}, in `{key}`; {rule}")


def compare(groups: Groups) -> dict[str, Any]:
    """Everything that is printed, drawn and written as JSON.

    Shares and their intervals from 0 to 1, tokens and thoughts per question.
    """
    hits = {name: np.array([run.hits for run in runs]) for name, runs in groups.items()}
    draws = intervals.bootstrap(hits, DRAWS, BOOTSTRAP_SEED)
    described = [
        {**_describe(name, runs, hits[name]), "interval": intervals.percentile_interval(draws[name])}
        for name, runs in groups.items()
    ]
    pairs: list[dict[str, Any]] = []
    for first, second in combinations(groups, 2):
        pairs.append(
            {
                "first": first,
                "second": second,
                "difference": float(hits[first].mean() - hits[second].mean()),
                "interval": intervals.percentile_interval(draws[first] - draws[second]),
                "mcnemar": _mcnemar(groups[first], groups[second]),
            }
        )
    tests = [test for pair in pairs for test in pair["mcnemar"]]
    for test, adjusted in zip(tests, intervals.holm([test["p"] for test in tests])):
        test["p_holm"] = adjusted
    return {
        "examples": described[0]["examples"],
        "level": intervals.LEVEL,
        "bootstrap": {"draws": DRAWS, "seed": BOOTSTRAP_SEED},
        "groups": described,
        "pairs": pairs,
        "notes": _notes(groups, described, pairs),
    }


def _describe(name: str, runs: Sequence[Run], hits: np.ndarray) -> dict[str, Any]:
    steps = np.array([answer.n_steps for answer in runs[0].answers])
    thoughts = np.array([[answer.n_thoughts for answer in run.answers] for run in runs])
    tokens = np.array([[answer.n_new_tokens for answer in run.answers] for run in runs])
    described = [_describe_run(run) for run in runs]
    by_steps = {
        str(count): {"examples": int((steps == count).sum()), "accuracy": float(hits[:, steps == count].mean())}
        for count in sorted(set(steps.tolist()))
    }
    return {
        "group": name,
        "seeds": [run.config.seed for run in runs],
        "predictions": runs[0].predictions,
        "examples": hits.shape[1],
        "accuracy": float(hits.mean()),
        "resampled": ["seeds", "questions"] if len(runs) > 1 else ["questions"],
        "mean_tokens": float((thoughts + tokens).mean()),
        "mean_thoughts": float(thoughts.mean()),
        "n_cut": None if any(each["n_cut"] is None for each in described) else sum(each["n_cut"] for each in described),
        "accuracy_by_steps": by_steps,
        "runs": described,
    }


def _describe_run(run: Run) -> dict[str, Any]:
    total, correct = len(run.hits), sum(run.hits)
    thoughts = sum(answer.n_thoughts for answer in run.answers)
    cut = cut_answers(run.answers)
    return {
        "name": run.config.name,
        "folder": str(run.folder),
        "seed": run.config.seed,
        "n_correct": correct,
        "accuracy": correct / total,
        "interval": intervals.wilson(correct, total),
        "mean_tokens": (thoughts + sum(answer.n_new_tokens for answer in run.answers)) / total,
        "mean_thoughts": thoughts / total,
        "n_cut": cut.count if cut else None,
    }


def _mcnemar(first: Sequence[Run], second: Sequence[Run]) -> list[dict[str, Any]]:
    others = {run.config.seed: run for run in second}
    tests = []
    for run in first:
        if run.config.seed in others:
            other = others[run.config.seed]
            only_first, only_second, p = intervals.mcnemar(np.array(run.hits), np.array(other.hits))
            tests.append({"seed": run.config.seed, "only_first": only_first, "only_second": only_second, "p": p})
    return tests


def _notes(groups: Groups, described: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> list[str]:
    """What a reader of the numbers has to know, one line each."""
    notes = [
        "Intervals are meant to cover 95%. Of a run: Wilson score. Of a group and of a difference: percentile "
        f"bootstrap, {DRAWS:,} draws of seeds and, crossed with them, of questions."
    ]
    alone = [name for name, runs in groups.items() if len(runs) == 1]
    if alone:
        notes.append(f"One seed only, so the bootstrap intervals leave out the spread over seeds: {', '.join(alone)}.")
    if any(1 < len(runs) <= 10 for runs in groups.values()):
        notes.append(
            "Few seeds make the bootstrap too narrow: if their spread dominates, it covers about 50% with 2 seeds, "
            "75% with 3, 83% with 5, 89% with 10."
        )
    flat = [each["group"] for each in described if each["accuracy"] in (0, 1)]
    if flat:
        notes.append(
            f"All answers right, or all wrong, so the bootstrap has nothing to vary; read Wilson: {', '.join(flat)}."
        )
    differing = [test["only_first"] + test["only_second"] for pair in pairs for test in pair["mcnemar"]]
    if any(count < _FEW for count in differing):
        notes.append(f"If fewer than {_FEW} answers differ, trust McNemar and not the interval of the difference.")
    if any(pair["mcnemar"] for pair in pairs):
        notes.append("McNemar compares two trained models on these questions, not two methods.")
    apart = [f"{pair['first']} and {pair['second']}" for pair in pairs if not pair["mcnemar"]]
    if apart:
        notes.append(f"No seed in common, so no McNemar test: {'; '.join(apart)}.")
    return notes + _notes_on_cut_answers(groups) + _notes_on_epochs(groups)


def _notes_on_cut_answers(groups: Groups) -> list[str]:
    notes = []
    for run in (run for runs in groups.values() for run in runs):
        cut = cut_answers(run.answers)
        if cut and cut.count:
            notes.append(f"Warning, {run.config.name}: {cut_warning(cut.count, len(run.answers), max(cut.limits))}.")
    return notes


def _notes_on_epochs(groups: Groups) -> list[str]:
    notes = []
    if len({runs[0].predictions for runs in groups.values()}) > 1:
        epochs = ", ".join(f"{name} {runs[0].epoch}" for name, runs in groups.items())
        notes.append(f"The epochs differ: {epochs}.")
    for name, (run, *_) in groups.items():
        if run.epoch is not None and run.epoch < run.config.num_epochs:
            notes.append(f"{name}: epoch {run.epoch} of {run.config.num_epochs}, not the end of the run.")
    return notes
