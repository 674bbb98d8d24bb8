"""Writes the records of a run: JSON lines always, wandb and TensorBoard if asked for."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coconut_ds import strict_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.errors import InputError, in_one_line
from coconut_ds.runs.dashboards import Dashboard, dashboards_of, forget_earlier_run
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.terminal import say

_LONGEST_REASON = 200


class Tracker:
    """Writes `metrics.jsonl`, one object a line with its `event`; writes on rank 0 only.

    `rewind` starts wandb and TensorBoard if the run asks for them. Neither ever stops a run: it continues without the
    one that fails, with a line that says so.
    """

    def __init__(self, config: RunConfig, is_main: bool):
        self._folder = RunFolder(config.run_folder)
        self.path = self._folder.metrics
        self._config = config
        self._file = None
        self._dashboards: list[Dashboard] = []
        self._summary = _Summary()
        if is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, event: str, **values: Any) -> None:
        """Write one event; its numbers become curves."""
        if self._file is None:
            return
        with _writing(self.path):
            self._file.write(strict_json.dumps({"event": event, **values}) + "\n")
            self._file.flush()
        self._summary.see({"event": event, **values})
        self._draw(lambda dashboard: dashboard.log(event, values))

    def log_predictions(self, epoch: int, stage: int, rows: list[dict[str, Any]]) -> None:
        """Show the predictions of the evaluation after `epoch`, counted from 1; they are not in `metrics.jsonl`."""
        step = self._summary.step
        self._draw(lambda dashboard: dashboard.predictions(step, epoch, stage, rows))

    def position(self) -> int:
        """Length of the file in bytes, all of it on the disk; 0 on ranks that write none."""
        if self._file is None:
            return 0
        with _writing(self.path):
            os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def rewind(self, position: int) -> None:
        """Begin a run: drop the events that an interrupted run wrote after `position`; those steps are done again.

        The record of the checkpoint made there, the first line after it, stays. At 0 the run starts anew, and
        dashboards do not continue an earlier run of the same folder.
        """
        if self._file is None:
            return
        self._file.close()
        written = self.path.read_bytes()
        if len(written) < position:
            say(f"{self.path} has lost its last {position - len(written)} bytes; the steps in them are missing from it")
        kept, after = written[:position], written[position:].splitlines(keepends=True)
        if after and after[0].startswith(b'{"event": "checkpoint"') and after[0].endswith(b"\n"):
            kept += after[0]
        # A disk that lost the end of the file can leave half a line.
        kept = kept[: kept.rfind(b"\n") + 1]
        # Truncated, not rewritten: a process killed in between would lose the file.
        os.truncate(self.path, len(kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        earlier = _whole_events(kept)
        for event in earlier:
            self._summary.see(event)
        if position == 0:
            _guarded("dashboards of an earlier run", forget_earlier_run, self._folder)
        for kind in dashboards_of(self._config):
            _guarded(_key(kind), self._start, kind, earlier)

    def _start(self, kind: type[Dashboard], earlier: list[dict[str, Any]]) -> None:
        self._dashboards.append(kind(self._config, earlier))

    def _draw(self, what: Callable[[Dashboard], None]) -> None:
        self._dashboards = [each for each in self._dashboards if _guarded(_key(type(each)), what, each)]

    def close(self) -> None:
        if self._file is not None:
            # What a full disk did not take was reported when it was logged.
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
        self._draw(lambda dashboard: dashboard.finish(self._summary.figures()))
        self._dashboards = []


class _Summary:
    """Results of a run, from its events, those before an interruption included."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._evaluations: list[dict[str, Any]] = []
        self._is_complete = False
        self.step = 0

    def see(self, event: dict[str, Any]) -> None:
        self.step = event.get("step", self.step)
        if event["event"] == "eval":
            self._evaluations.append(event)
        self._is_complete = self._is_complete or event["event"] == "end"

    def figures(self) -> dict[str, float]:
        """Accuracies from 0 to 1, epochs from 1, optimizer steps, and the seconds since this start of the run."""
        figures = {
            "complete": self._is_complete,
            "steps": self.step,
            "seconds_since_last_start": time.monotonic() - self._started,
        }
        if self._evaluations:
            last, best = self._evaluations[-1], max(self._evaluations, key=lambda event: event["accuracy"])
            figures |= {"best_accuracy": best["accuracy"], "best_epoch": best["epoch"]}
            figures |= {"last_accuracy": last["accuracy"], "last_epoch": last["epoch"]}
        return figures


def _whole_events(written: bytes) -> list[dict[str, Any]]:
    """The events in lines of `metrics.jsonl`, without those that a disk has damaged."""
    events = []
    for line in written.splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict) and "event" in event]


def _key(kind: type[Dashboard]) -> str:
    """The key of the run file that asks for it, and the name of the library."""
    return kind.__name__.lower()


def _guarded(name: str, call: Callable[..., object], *arguments: Any) -> bool:
    """Whether `call` succeeded."""
    try:
        call(*arguments)
    except Exception as error:  # these libraries raise many kinds, and none of them should end a run
        reason = in_one_line(error, _LONGEST_REASON)
        say(f"{name}: {reason}; the run continues without it; metrics.jsonl has everything")
        return False
    return True


def write_record(path: Path, text: str) -> None:
    """Write one file of a run's records; raises InputError where it cannot be written."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_predictions(folder: RunFolder, name: str, predictions: list[dict[str, Any]]) -> None:
    """One prediction per line in `predictions/NAME.jsonl` of the run folder."""
    lines = "".join(strict_json.dumps(row) + "\n" for row in predictions)
    write_record(folder.predictions_file(name), lines)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; fix this and rerun the same command; it resumes from the "
            "newest checkpoint"
        ) from None
