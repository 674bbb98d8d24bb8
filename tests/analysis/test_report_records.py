"""What a run has left behind is read back whole, in part, or named as damaged."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import recorded
from safetensors.numpy import save_file

from coconut_ds.errors import InputError
from coconut_ds.runs.metrics import read_metrics
from coconut_ds.runs.predictions import last_epoch, read_predictions
from coconut_ds.runs.read_run import read_run


def test_a_finished_run_is_read_back(tmp_path):
    run = read_run(recorded.write_run(tmp_path, epochs=3, n_questions=5))
    metrics = run.metrics
    assert [len(kind) for kind in (metrics.stages, metrics.steps, metrics.evaluations, metrics.checkpoints)] == [
        3,
        12,
        3,
        3,
    ]
    assert (run.epochs_done, run.steps_done, run.is_finished) == (3, 12, True)
    assert metrics.steps[0].n_tokens == 100
    assert metrics.evaluations[0].accuracy_by_steps == {"2": 0.9, "3": 0.7}
    assert [row.index for row in run.predictions["epoch_0003"]] == [0, 1, 2, 3, 4]
    assert run.predictions["epoch_0003"][0].thoughts[0][0] == ("n3>n7", 0.91)
    assert run.environment["packages"] == {"torch": "2.13.0"}
    assert run.problems == ()


def test_the_best_evaluation_is_the_first_of_the_highest(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0)
    shares = [0.5, 0.9, 0.9, 0.7]
    recorded.write_events(folder, [recorded.evaluation(epoch, accuracy=share) for epoch, share in enumerate(shares, 1)])
    run = read_run(folder)
    assert (run.best.epoch, run.last.epoch) == (2, 4)


def test_a_run_is_finished_when_its_last_epoch_is_and_not_when_it_was_prolonged(tmp_path):
    assert not read_run(recorded.write_run(tmp_path, "going_on", finished=False)).is_finished
    assert not read_run(recorded.write_run(tmp_path, "prolonged", epochs=3, num_epochs=5)).is_finished


def test_half_a_line_at_the_end_is_not_damage(tmp_path):
    path = recorded.write_events(tmp_path, recorded.training(1))
    whole = read_metrics(path)
    with path.open("a") as file:
        file.write('{"event": "train_step", "epo')
    assert read_metrics(path) == whole
    assert whole.n_damaged == 0


@pytest.mark.parametrize(
    "line",
    [b'{"event": "train_step", "epo', b"", b"[]", b"\xff\xfe", b'{"event": "train_step", "epoch": 1}', b'{"step": 3}'],
)
def test_a_damaged_line_is_counted_and_the_others_are_read(line, tmp_path):
    path = recorded.write_events(tmp_path, recorded.training(1))
    path.write_bytes(line + b"\n" + path.read_bytes())
    metrics = read_metrics(path)
    assert metrics.n_damaged == 1
    assert len(metrics.steps) == 4


def test_events_of_later_versions_are_no_damage(tmp_path):
    path = recorded.write_events(tmp_path, [{"event": "weather", "rain": True}, recorded.train_step(1, 1, wind=3)])
    metrics = read_metrics(path)
    assert (metrics.n_damaged, len(metrics.steps)) == (0, 1)


def test_records_of_earlier_versions_lack_what_came_later(tmp_path):
    step = recorded.train_step(1, 1)
    del step["n_tokens"], step["padding_share"]
    (read,) = read_metrics(recorded.write_events(tmp_path, [step])).steps
    assert (read.n_tokens, read.padding_share, read.loss) == (None, None, 4.0)
    folder = recorded.write_run(tmp_path, epochs=1)
    row = recorded.prediction(0, True)
    del row["thoughts"]
    (prediction,) = read_predictions(recorded.write_predictions(folder, "epoch_0001", [row]))
    assert prediction.thoughts == ()


def test_what_cannot_be_read_is_named_and_the_rest_is_there(tmp_path):
    folder = recorded.write_run(tmp_path)
    (folder / "environment.json").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("?\n?\n")
    (folder / "predictions" / "eval_test.jsonl").write_text("half a li")
    run = read_run(folder)
    environment, predictions = run.problems[1], run.problems[2]
    assert run.problems[0] == f"{folder / 'metrics.jsonl'}: 2 damaged lines"
    assert environment.startswith(f"{folder / 'environment.json'} cannot be read: Expecting property name")
    assert predictions.startswith(f"{folder / 'predictions' / 'eval_test.jsonl'}, line 1: Invalid JSON")
    assert (run.environment, list(run.predictions), len(run.metrics.steps)) == ({}, ["epoch_0003"], 12)


def test_an_environment_that_is_no_object_is_named(tmp_path):
    folder = recorded.write_run(tmp_path)
    (folder / "environment.json").write_text("[1]")
    assert read_run(folder).problems == (f"{folder / 'environment.json'} holds no object of names and values",)


def test_a_run_that_has_not_taken_a_step_is_empty_and_says_so(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert (run.last, run.best, run.epochs_done, run.steps_done, run.predictions) == (None, None, 0, 0, {})
    (problem,) = run.problems
    missing = f"{folder / 'metrics.jsonl'} cannot be read: No such file or directory"
    assert problem == f"{missing}; it comes with the first optimizer step"


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a run folder, it has no run_config\.yaml; name a folder"):
        read_run(tmp_path)


def test_predictions_are_of_the_last_epoch_and_of_other_sets(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=2)
    for name in ("eval_test", "epoch_0001", "eval_ood"):
        recorded.write_predictions(folder, name, [recorded.prediction(0, True)])
    assert list(read_run(folder).predictions) == ["epoch_0002", "eval_ood", "eval_test"]


def test_predictions_are_not_those_of_a_former_run_that_came_further(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=2)
    recorded.write_predictions(folder, "epoch_0009", [recorded.prediction(0, True)])
    assert list(read_run(folder).predictions) == ["epoch_0002"]


def test_a_run_started_anew_shows_nothing_of_the_former_one(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=9)
    recorded.write_predictions(folder, "eval_test", [recorded.prediction(0, True)])
    recorded.write_events(folder, [recorded.train_step(1, 1)])
    assert list(read_run(folder).predictions) == ["eval_test"]
    # Its first evaluation is recorded, and the predictions file of that is gone.
    recorded.write_events(folder, recorded.training(1))
    assert list(read_run(folder).predictions) == ["eval_test"]


def test_a_run_has_taken_as_many_steps_as_any_of_its_events_says(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0)
    step, evaluated = recorded.train_step(1, 5), recorded.evaluation(1, step=7)
    written = {"event": "checkpoint", "epoch": 1, "step": 8, "path": "there", "seconds": 0.5}
    end = {"event": "end", "epochs": 1, "step": 9}
    done = []
    for events in ([step], [step, evaluated], [step, evaluated, written], [step, evaluated, written, end]):
        recorded.write_events(folder, events)
        done.append(read_run(folder).steps_done)
    assert done == [5, 7, 8, 9]


def test_epochs_are_told_apart_by_number_and_not_by_name():
    assert last_epoch(["epoch_10000", "epoch_9999", "eval_test"]) == "epoch_10000"
    assert last_epoch(["eval_test"]) is None


def test_parameters_are_counted_in_the_first_checkpoint_that_can_be_read(tmp_path):
    folder = recorded.write_run(tmp_path)
    assert read_run(folder).n_parameters is None
    for name in ("epoch_0001", "epoch_0002"):
        (folder / "checkpoints" / name / "model").mkdir(parents=True)
    (folder / "checkpoints" / "epoch_0001" / "model" / "model.safetensors").write_bytes(b"half")
    model = folder / "checkpoints" / "epoch_0002" / "model"
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}, model / "model.safetensors")
    save_file({"logits": np.zeros(3, np.float32)}, model / "latent_window.safetensors")
    assert read_run(folder).n_parameters == 12 + 5 + 3


def test_a_checkpoint_that_is_being_written_does_not_count_as_one_without_parameters(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=1)
    for name in ("epoch_0001", "epoch_0002.tmp", "epoch_0003.damaged"):
        (folder / "checkpoints" / name / "model").mkdir(parents=True)
        if name != "epoch_0001":
            weights = {"a": np.zeros(3, np.float32)}
            save_file(weights, folder / "checkpoints" / name / "model" / "model.safetensors")
    assert read_run(folder).n_parameters is None


def test_reading_a_run_loads_nothing_heavy(tmp_path):
    folder = recorded.write_run(tmp_path)
    code = (
        "import sys; from pathlib import Path; import coconut_ds.report; "
        "from coconut_ds.runs.read_run import read_run; "
        f"read_run(Path({json.dumps(str(folder))})); "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
