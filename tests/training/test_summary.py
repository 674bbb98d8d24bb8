"""What a run says at its end, and how its stages are named at its start."""

from __future__ import annotations

import subprocess

import pytest

from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config, override
from coconut_ds.data.stages import Curriculum
from coconut_ds.runs.metrics import EpochEvaluation
from coconut_ds.runs.paths import RunFolder
from coconut_ds.training.summary import _stages_text, closing


def evaluation(epoch: int, stage: int, n_correct: int) -> EpochEvaluation:
    return EpochEvaluation(
        event="eval",
        epoch=epoch,
        stage=stage,
        step=10 * epoch,
        valid_loss=0.5,
        accuracy=n_correct / 100,
        n_correct=n_correct,
        n_total=100,
        mean_new_tokens=4.0,
        examples_per_s=10.0,
    )


def config(tmp_path, **values) -> RunConfig:
    values = {"method": "coconut", "max_latent_stage": 2, **values}
    return RunConfig(save_path=str(tmp_path), name="run", **values)


def closed(tmp_path, accuracies: list[tuple[int, int]], **values) -> list[str]:
    rows = [evaluation(epoch, *row) for epoch, row in enumerate(accuracies, start=1)]
    run = config(tmp_path, **values)
    return closing(run, RunFolder(run.run_folder), rows).splitlines()


def test_an_earlier_stage_that_was_better_is_told_from_the_last_one(tmp_path):
    lines = closed(tmp_path, [(0, 90), (1, 80), (2, 70)])
    assert "  best      accuracy 90.0% (90/100) after epoch 1, stage 0" in lines
    assert "  last      accuracy 70.0% (70/100) after epoch 3, stage 2, the best of the last stage" in lines


def test_stages_without_a_step_left_count_as_one(tmp_path):
    lines = closed(tmp_path, [(2, 70), (3, 95), (4, 94), (5, 93)])
    assert "  best      accuracy 95.0% (95/100) after epoch 2, stage 3" in lines
    assert not [line for line in lines if line.startswith("  last ")]


def test_of_equal_evaluations_the_one_that_sees_fewer_steps_is_named(tmp_path):
    assert "  best      accuracy 90.0% (90/100) after epoch 2, stage 2" in closed(tmp_path, [(0, 90), (2, 90), (2, 90)])


def test_the_command_to_evaluate_names_a_checkpoint_that_is_there(tmp_path):
    assert not [line for line in closed(tmp_path, [(0, 90)]) if line.startswith("  evaluate")]
    (tmp_path / "run" / "checkpoints" / "epoch_0001").mkdir(parents=True)
    command = f"  evaluate  ./launch.sh eval {tmp_path}/run/checkpoints/epoch_0001"
    assert command in closed(tmp_path, [(0, 90)])
    assert f"{command} test_path=t.json" in closed(tmp_path, [(0, 90)], test_path="t.json")


def test_where_the_last_stage_was_not_kept_the_best_checkpoint_is_named(tmp_path):
    (tmp_path / "run" / "checkpoints" / "epoch_0001").mkdir(parents=True)
    lines = closed(tmp_path, [(0, 90), (1, 80), (2, 70)])
    assert f"  evaluate  ./launch.sh eval {tmp_path}/run/checkpoints/epoch_0001" in lines


def test_stages_of_icot_stay_apart(tmp_path):
    lines = closed(tmp_path, [(0, 95), (1, 90), (2, 40)], method="icot", max_latent_stage=0)
    assert "  last      accuracy 40.0% (40/100) after epoch 3, stage 2, the best of the last stage" in lines


def test_without_an_evaluation_there_is_still_a_report_to_name(tmp_path):
    assert closed(tmp_path, []) == [f"  report    python -m coconut_ds.report {tmp_path}/run"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_epochs": 7, "epochs_per_stage": 2}, "0 in 1-2, 1 in 3-4, 2 in 5-6, no step left in 7 of 7 epochs"),
        ({"num_epochs": 14}, "0 in 1, 1 in 2, 2 in 3, no step left in 4-14 of 14 epochs"),
        ({"num_epochs": 3, "epochs_per_stage": 5}, "0 in 1-3 of 3 epochs"),
        ({"num_epochs": 4, "resume": 2}, "2 in 3, no step left in 4 of 4 epochs"),
        ({"num_epochs": 4, "method": "cot"}, "0 in 1-4 of 4 epochs"),
        ({"num_epochs": 3, "method": "icot", "max_latent_stage": 0}, "0 in 1, 1 in 2, 2 in 3 of 3 epochs"),
        ({"num_epochs": 4, "method": "no_curriculum"}, "no step left in 1-4 of 4 epochs"),
    ],
)
def test_stages_are_named_with_their_epochs(values, expected):
    run = RunConfig(**{"method": "coconut", "max_latent_stage": 2, **values})
    assert _stages_text(run, Curriculum.of(run), 10) == f"{expected}, 10 steps each"


ODD = [
    "a b",
    "it's",
    'say "x"',
    "$HOME",
    "$(touch x)",
    "a;b",
    "ünïcode 数",
    "x #1",
    "a: b",
    "[1]",
    "2024",
    "null",
    "*",
    "~",
]


@pytest.mark.parametrize("checkout", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_the_commands_at_the_end_can_be_pasted(tmp_path, monkeypatch, name, checkout):
    """A shell and the reader of overrides get back the folder and the file."""
    monkeypatch.chdir(tmp_path)
    if checkout:
        (tmp_path / "launch.sh").touch()
    run = RunConfig(save_path=f"runs of {name}", name=name, method="coconut", test_path=f"{name}.json")
    checkpoint = run.run_folder / "checkpoints" / "epoch_0001"
    checkpoint.mkdir(parents=True)
    lines = closing(run, RunFolder(run.run_folder), [evaluation(1, 0, 90)]).splitlines()
    (evaluate,) = (line.removeprefix("  evaluate  ") for line in lines if line.startswith("  evaluate"))
    (report,) = (line.removeprefix("  report    ") for line in lines if line.startswith("  report"))
    assert typed(report) == ["python", "-m", "coconut_ds.report", str(run.run_folder)]
    words = typed(evaluate)
    if checkout:
        assert words[:3] == ["./launch.sh", "eval", str(checkpoint)]
    else:
        assert words[:5] == ["python", "-m", "coconut_ds", "eval", str(checkpoint)]
    (tmp_path / "run.yaml").write_text("method: coconut\nval_path: v\nload_model_path: w\nonly_eval: true\n")
    again = load_run_config("run.yaml", words[3:] if checkout else words[5:])
    assert (again.test_path, again.load_model_path) == (f"{name}.json", "w")


def typed(command: str) -> list[str]:
    """The words a shell makes of a command."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "text", [*ODD, "true", "1e3", "- a", "{", "'", "a\tb", "", " a", "%x", "@x", "key=value", "a, b"]
)
def test_an_override_is_read_back_as_it_was(tmp_path, text):
    (tmp_path / "run.yaml").write_text("method: coconut\nval_path: v\ntrain_path: t\n")
    assert load_run_config(tmp_path / "run.yaml", [override("name", text)]).name == text
