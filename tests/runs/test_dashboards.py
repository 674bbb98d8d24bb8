"""wandb and TensorBoard: what they show of a run that goes on after a crash, read back from the files they write."""

from __future__ import annotations

import errno
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launching
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from wandb.proto import wandb_internal_pb2

from coconut_ds.config.run_config import RunConfig
from coconut_ds.errors import InputError
from coconut_ds.runs.dashboards import demand_libraries_of
from coconut_ds.runs.tracker import Tracker

N_QUESTIONS, FIRST_WRONG = 150, 130


def tracker_of(folder: Path, **values: Any) -> Tracker:
    return Tracker(RunConfig(save_path=str(folder), name="run", **values), is_main=True)


def train(tracker: Tracker, epochs: range, loss: float) -> int:
    """Two steps an epoch, a stage an epoch, accuracy falling; the position of the first epoch's checkpoint."""
    position = 0
    for epoch in epochs:
        place = {"epoch": epoch, "stage": epoch - 1}
        tracker.log("stage", **place, step=2 * epoch - 2, n_thoughts=epoch - 1, optimizer_reset=True)
        for step in (2 * epoch - 1, 2 * epoch):
            tracker.log("train_step", **place, step=step, loss=loss / step, grad_norm=None)
        figures = {"accuracy": 1 / epoch, "accuracy_by_steps": {"2": 0.5}, "latent_weights": [0.75, 0.25]}
        tracker.log("eval", **place, step=2 * epoch, **figures)
        tracker.log_predictions(**place, rows=[prediction(index) for index in range(N_QUESTIONS)])
        position = position or tracker.position()
        tracker.log("checkpoint", epoch=epoch, step=2 * epoch, path=f"epoch_{epoch}", seconds=0.5)
    return position


def prediction(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "question": "a rex | is a wump",
        "expected": "wump",
        "given": "wump" if index < FIRST_WRONG else "<|latent|>",
        "correct": index < FIRST_WRONG,
        "cot_correct": False,
        "text": "### wump\n",
        "n_steps": 2,
        "n_thoughts": 1,
        "n_new_tokens": 3,
        "cut": False,
        "thoughts": [[["wump", 0.5], ["rex", 0.25]]],
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of three epochs that lost all after its first checkpoint, in epoch 2, and had other losses then."""
    folder = tmp_path_factory.mktemp("resumed")
    asked = {"wandb": "offline", "tensorboard": True, "lr": 0.25}
    first = tracker_of(folder, **asked)
    first.rewind(0)
    position = train(first, range(1, 3), loss=8)
    first.close()
    second = tracker_of(folder, **asked)
    second.rewind(position)
    train(second, range(2, 4), loss=2)
    second.log("end", epochs=3, step=6)
    second.close()
    run = folder / "run"
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    return SimpleNamespace(files=files, records=[list(wandb_records(file)) for file in files], board=board)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records in a `.wandb` file: LevelDB's log format, after a header of 7 bytes."""
    data, at, record, block = path.read_bytes(), 7, b"", 32768
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        is_whole = kind in (1, 4)
        if is_whole:
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def items(entries: Any) -> dict[str, Any]:
    """Values by key; a key of several parts is joined by dots."""
    return {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def wandb_curve(records: list[Any], name: str) -> dict[int, float]:
    rows = [items(history.item) for history in of_kind(records, "history")]
    return {row["step"]: row[name] for row in rows if name in row}


def wandb_tables(file: Path, pattern: str) -> list[dict[str, Any]]:
    found = (file.parent / "files" / "media" / "table").glob(pattern)
    return [json.loads(path.read_text()) for path in sorted(found, key=lambda path: int(path.name.split("_")[-2]))]


def test_a_run_that_goes_on_is_the_same_wandb_run(resumed):
    starts = [of_kind(records, "run")[0] for records in resumed.records]
    assert len(starts) == 2
    assert starts[0].run_id == starts[1].run_id
    assert starts[1].resume


def test_wandb_draws_every_curve_over_optimizer_steps(resumed):
    for records in resumed.records:
        definitions = {metric.name or metric.glob_name: metric for metric in of_kind(records, "metric")}
        assert definitions["*"].step_metric == "step"
    assert wandb_curve(resumed.records[0], "train/loss") == {1: 8, 2: 4, 3: 8 / 3, 4: 2}
    assert wandb_curve(resumed.records[1], "train/loss") == {3: 2 / 3, 4: 0.5, 5: 0.4, 6: 1 / 3}
    assert wandb_curve(resumed.records[1], "eval/accuracy_by_steps/2") == {4: 0.5, 6: 0.5}
    assert wandb_curve(resumed.records[1], "eval/latent_weights/1") == {4: 0.75, 6: 0.75}


def test_wandb_shows_where_stages_begin(resumed):
    assert wandb_curve(resumed.records[0], "stage") == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    assert wandb_curve(resumed.records[0], "loss_by_stage/stage_1") == {3: 8 / 3, 4: 2}
    chart = wandb_tables(resumed.files[1], "Custom Chart Tables/accuracy_by_stage*")[-1]
    assert sorted(chart["data"]) == [[2, "stage 0", 1.0], [4, "stage 1", 0.5], [6, "stage 2", 1 / 3]]


def test_wandb_has_the_configuration(resumed):
    config = items(of_kind(resumed.records[0], "run")[0].config.update)
    assert (config["lr"], config["name"], config["tensorboard"]) == (0.25, "run", True)


def test_wandb_shows_wrong_answers_first_in_a_table_for_every_evaluation(resumed):
    tables = wandb_tables(resumed.files[1], "predictions_*")
    rows = [dict(zip(table["columns"], row)) for table in tables for row in table["data"]]
    assert [row["epoch"] for row in rows] == [2] * 100 + [3] * 100
    wrong = list(range(FIRST_WRONG, N_QUESTIONS))
    assert [row["index"] for row in rows[:100]] == wrong + list(range(100 - len(wrong)))
    assert rows[0]["given"] == "<|latent|>"
    assert rows[0]["thoughts"] == "wump (50%)"


def test_the_summary_knows_the_evaluations_before_the_crash(resumed):
    summary = {
        key: value
        for update in of_kind(resumed.records[1], "summary")
        for key, value in items(update.update).items()
        if not key.startswith(("_", "predictions"))
    }
    best = {"best_accuracy": 1.0, "best_epoch": 1, "last_accuracy": 1 / 3, "last_epoch": 3, "steps": 6}
    assert best.items() <= summary.items()
    assert summary["complete"] is True
    assert summary["seconds_since_last_start"] > 0
    assert [of_kind(records, "exit")[0].exit_code for records in resumed.records] == [1, 0]


def board_curve(board: EventAccumulator, name: str) -> dict[int, float]:
    return {event.step: pytest.approx(event.value) for event in board.Scalars(name)}


def board_text(board: EventAccumulator, name: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{name}/text_summary")}


def test_tensorboard_shows_repeated_steps_once_as_they_were_last(resumed):
    assert board_curve(resumed.board, "train/loss") == {1: 8, 2: 4, 3: 2 / 3, 4: 0.5, 5: 0.4, 6: 1 / 3}
    assert [event.step for event in resumed.board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in resumed.board.Scalars("eval/accuracy")] == [2, 4, 6]


def test_tensorboard_shows_where_stages_begin(resumed):
    assert board_curve(resumed.board, "loss_by_stage/stage_1") == {3: 2 / 3, 4: 0.5}
    assert set(board_text(resumed.board, "stage")) == {0, 2, 4}
    chart = resumed.board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"loss_by_stage/.*" in chart


def test_tensorboard_has_configuration_and_summary(resumed):
    assert "lr: 0.25" in board_text(resumed.board, "config")[0]
    assert board_curve(resumed.board, "summary/best_accuracy") == {6: 1.0}
    assert "_hparams_/session_start_info" in resumed.board.PluginTagToContent("hparams")


def test_tensorboard_keeps_bars_in_questions_out_of_its_table(resumed):
    title, _, header, rule, *rows = board_text(resumed.board, "predictions")[4].splitlines()
    assert title == "Epoch 2, stage 1"
    assert len(rows) == 100
    assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}
    assert "a rex &#124; is a wump" in rows[0]


def test_a_run_that_starts_anew_leaves_the_curves_of_an_earlier_one_alone(tmp_path):
    old = tracker_of(tmp_path, tensorboard=True)
    old.rewind(0)
    train(old, range(1, 4), loss=8)
    old.close()
    wandb_id = tmp_path / "run" / "wandb_run_id.txt"
    wandb_id.write_text("of-the-earlier-run")
    # Dashboards are switched on when the new run goes on; until then nothing of the old one may wait for them.
    new = tracker_of(tmp_path)
    new.rewind(0)
    position = train(new, range(1, 2), loss=2)
    new.close()
    assert not wandb_id.exists()
    again = tracker_of(tmp_path, tensorboard=True)
    again.rewind(position)
    train(again, range(2, 3), loss=2)
    again.close()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert board_curve(board, "train/loss") == {3: 2 / 3, 4: 0.5}


def test_a_damaged_line_hinders_no_dashboard(tmp_path, capsys):
    tracker = tracker_of(tmp_path, tensorboard=True)
    position = train(tracker, range(1, 2), loss=2)
    tracker.close()
    written = tracker.path.read_bytes()
    tracker.path.write_bytes(b"\0" * 20 + written[20:])
    again = tracker_of(tmp_path, tensorboard=True)
    again.rewind(position)
    train(again, range(2, 3), loss=2)
    again.close()
    assert capsys.readouterr().out == ""
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert board_curve(board, "train/loss") == {3: 2 / 3, 4: 0.5}


def test_debug_starts_no_dashboard(tmp_path):
    tracker = tracker_of(tmp_path, wandb="offline", tensorboard=True, debug=True)
    tracker.rewind(0)
    train(tracker, range(1, 2), loss=2)
    tracker.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_run_goes_on_where_the_folders_cannot_be_made(tmp_path, capsys):
    tracker = tracker_of(tmp_path, wandb="offline", tensorboard=True)
    for name in ("wandb", "tensorboard"):
        (tmp_path / "run" / name).touch()
    tracker.rewind(0)
    train(tracker, range(1, 2), loss=2)
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["wandb", "tensorboard"]
    assert all("the run continues without it" in line for line in lines)
    assert len(launching.events(tracker.path.parent, "train_step")) == 2


# The thread that writes for TensorBoard reports the error as well.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_goes_on_when_the_disk_fills_under_tensorboard(tmp_path, capsys, monkeypatch):
    before = set(threading.enumerate())
    tracker = tracker_of(tmp_path, tensorboard=True)
    tracker.rewind(0)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    train(tracker, range(1, 4), loss=2)
    tracker.close()
    # What it reports after the test would be taken for the next test's.
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    (line,) = capsys.readouterr().out.splitlines()
    assert "No space left on device; the run continues without it" in line
    assert len(launching.events(tracker.path.parent, "train_step")) == 6


def test_tensorboard_without_its_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("coconut_ds.errors.find_spec", lambda name: None)
    asked = RunConfig(tensorboard=True)
    demand_libraries_of(RunConfig())
    demand_libraries_of(asked.model_copy(update={"debug": True}))
    with pytest.raises(InputError, match=r"tensorboard: true, but .*pip install 'coconut_ds\[tensorboard\]'"):
        demand_libraries_of(asked)
