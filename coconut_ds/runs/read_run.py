"""Reads a run folder: configuration, environment, events, predictions. Needs no torch.

A run may still be training or have been cut off: what it has not written yet is empty.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.errors import InputError
from coconut_ds.runs.metrics import EpochEvaluation, Metrics, read_metrics
from coconut_ds.runs.paths import RunFolder, epoch_of
from coconut_ds.runs.predictions import Prediction, last_epoch, read_predictions
from coconut_ds.runs.thought_use import ThoughtUse, read_thought_use


@dataclass(frozen=True)
class RunRecords:
    """Everything a run folder says about its run."""

    folder: Path
    config: RunConfig
    environment: dict[str, Any]
    metrics: Metrics
    predictions: dict[str, tuple[Prediction, ...]]
    """The last epoch's first, then those of other sets, by the name of their file."""
    thought_use: ThoughtUse | None
    """None before `inspect --by-stage`."""
    n_parameters: int | None
    """Of its checkpoints; None before the first one."""
    problems: tuple[str, ...]
    """Files that could not be read, a sentence each."""

    @property
    def last(self) -> EpochEvaluation | None:
        return self.metrics.evaluations[-1] if self.metrics.evaluations else None

    @property
    def best(self) -> EpochEvaluation | None:
        """The first evaluation with the highest accuracy."""
        return max(self.metrics.evaluations, key=lambda each: each.accuracy, default=None)

    @property
    def epochs_done(self) -> int:
        return self.last.epoch if self.last else self.config.resume

    @property
    def steps_done(self) -> int:
        """The highest of all events: the last steps can be left out of the records (`log_every_steps`)."""
        metrics = self.metrics
        events = (*metrics.steps, *metrics.evaluations, *metrics.checkpoints, *metrics.ends)
        return max((event.step for event in events), default=0)

    @property
    def n_skipped(self) -> int:
        """Optimizer steps that fp16 skipped, as far as they are recorded; 0 in other precisions."""
        counts = [event.n_skipped_in_run for event in self.metrics.steps]
        counts += [event.n_skipped_in_run for event in self.metrics.ends]
        return max((count or 0 for count in counts), default=0)

    @property
    def is_finished(self) -> bool:
        return self.metrics.is_finished(self.config.num_epochs)


def read_run(folder: Path) -> RunRecords:
    """Everything in a run folder; damaged parts are left out and named in `problems`.

    Raises InputError if `folder` is not a run folder or its configuration cannot be read.
    """
    config = read_config(folder)
    files = RunFolder(folder)
    problems: list[str] = []
    metrics = Metrics()
    try:
        metrics = read_metrics(files.metrics)
    except InputError as error:
        problems.append(str(error))
    if metrics.n_damaged:
        problems.append(f"{files.metrics}: {metrics.n_damaged} damaged line{'s' * (metrics.n_damaged > 1)}")
    return RunRecords(
        folder,
        config,
        _read_environment(files.environment, problems),
        metrics,
        _read_predictions(files, metrics, problems),
        _read_thought_use(files.thought_use, problems),
        _count_parameters(files),
        tuple(problems),
    )


def read_config(folder: Path) -> RunConfig:
    """The resolved configuration of a run folder; raises InputError for any other folder."""
    run_file = RunFolder(folder).run_config
    if not run_file.is_file():
        raise InputError(f"{folder} is not a run folder, it has no {run_file.name}; name a folder save_path/name")
    return load_run_config(run_file)


def _read_predictions(folder: RunFolder, metrics: Metrics, problems: list[str]) -> dict[str, tuple[Prediction, ...]]:
    """Predictions of the last epoch and of other sets."""
    names = folder.prediction_names()
    # A run that was started anew in its folder has not come as far as the files of the former one.
    evaluated = {evaluation.epoch for evaluation in metrics.evaluations}
    last = last_epoch([name for name in names if epoch_of(name) in evaluated])
    chosen = [*([last] if last else []), *(name for name in names if epoch_of(name) is None)]
    found = {}
    for name in chosen:
        try:
            found[name] = read_predictions(folder.predictions_file(name))
        except InputError as error:
            problems.append(str(error))
    return found


def _read_thought_use(path: Path, problems: list[str]) -> ThoughtUse | None:
    try:
        return read_thought_use(path) if path.exists() else None
    except InputError as error:
        problems.append(str(error))
    return None


def _read_environment(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        problems.append(f"{path} holds no object of names and values")
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}")
    return {}


def _count_parameters(folder: RunFolder) -> int | None:
    """Numbers in the `model/` folder of one checkpoint, a learned window's included; the same for all checkpoints.

    They are read from the files' headers. None if no checkpoint is complete.
    """
    for checkpoint in folder.found_checkpoints():
        # Damaged, or just being removed: another one tells as much.
        with contextlib.suppress(OSError, SafetensorError):
            if counts := [_numbers_in(path) for path in (checkpoint / "model").glob("*.safetensors")]:
                return sum(counts)
    return None


def _numbers_in(path: Path) -> int:
    with safe_open(path, framework="numpy") as tensors:
        names = tensors.keys()
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
