"""Optimizer steps that fp16 skips: counted in the events, on the terminal and in the report, also after a resume."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import launching
import pytest
import recorded
import tiny
from test_documentation import TROUBLES, blocks, general
from test_report_page import page_of
from test_strict_json import strictly
from test_summary import config as closing_config

from coconut_ds.analysis import report_tables
from coconut_ds.runs import terminal as console
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.read_run import read_run
from coconut_ds.runs.terminal import Pace
from coconut_ds.training.summary import closing

# DeepSpeed refuses fp16 on a CPU without the instructions for it; torch computes in it all the same.
_FP16 = """
import sys
from deepspeed.accelerator import get_accelerator
type(get_accelerator()).is_fp16_supported = lambda self: True
from coconut_ds import train
from coconut_ds.runs import terminal
terminal._PLAIN_LINES_APART_S = 0
status = train.main(ARGUMENTS)
"""
N_STEPS = 24


def run_of(folder: Path, fp16: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of 3 epochs of 8 steps in fp16."""
    settings = json.loads((launching.ROOT / "ds_configs" / "zero2.json").read_text())
    (folder / "ds.json").write_text(json.dumps(settings | {"fp16": {"enabled": "auto", "min_loss_scale": 1, **fp16}}))
    run = tiny.run(folder) | {"deepspeed": str(folder / "ds.json"), "save_path": str(folder), "num_epochs": 3}
    return run | {"precision": "fp16", "batch_size_training": 1, "train_batch_size": 1, **changes}


def alone(run: dict[str, Any], folder: Path) -> list[str]:
    """Started without a launcher; the lines it prints."""
    arguments = f"['--run', {str(launching.write_run(run, folder))!r}]"
    script = folder / "script.py"
    script.write_text(_FP16.replace("ARGUMENTS", arguments) + "sys.exit(status)\n")
    done = launching.without_launcher([str(script)], threads=1)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def launched(run: dict[str, Any], folder: Path) -> None:
    arguments = f"['--run', {str(launching.write_run(run, folder))!r}]"
    code = _FP16.replace("ARGUMENTS", arguments) + "result = status"
    assert launching.on_ranks(1, code) == [0]


@pytest.fixture(scope="module")
def searching(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run whose loss scale starts far too high, and what it printed."""
    folder = tmp_path_factory.mktemp("searching")
    return folder / "run", alone(run_of(folder, {"initial_scale_power": 32, "hysteresis": 1}), folder)


def demand_counted(steps: list[dict[str, Any]]) -> int:
    """The events agree with each other; the number of skipped steps."""
    n_skipped = 0
    for event in steps:
        n_skipped += event["skipped"]
        assert event["n_skipped_in_run"] == n_skipped
        assert (event["grad_norm"] is None) is event["skipped"]
    return n_skipped


def test_events_count_and_are_json(searching):
    run, _ = searching
    events = [strictly(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "train_step"]
    assert len(steps) == N_STEPS
    assert N_STEPS / 2 < demand_counted(steps) < N_STEPS
    # A step that is skipped does not move the schedule and is followed by another.
    assert [event["skipped"] for event in steps] == sorted((event["skipped"] for event in steps), reverse=True)
    assert events[-1]["n_skipped_in_run"] == steps[-1]["n_skipped_in_run"]
    for path in run.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strictly(line)


def test_the_terminal_says_it_at_the_end_and_warns_as_soon_as_it_is_seen(searching):
    run, lines = searching
    n_skipped = launching.events(run, "train_step")[-1]["n_skipped_in_run"]
    assert f"  skipped   {n_skipped} of 24 steps skipped (fp16, gradients overflowed)" in lines
    assert [line for line in lines if re.match(r"epoch 1/3, stage 0: 4/8, loss [\d.]+, 4 of 4 steps skipped, ", line)]
    warnings = [line for line in lines if "steps were skipped" in line]
    assert warnings[0].startswith("warning: fp16: 8 of 8 optimizer steps were skipped because their gradients overflow")
    assert warnings[1].startswith(f"  warning   fp16: {n_skipped} of 24 optimizer steps were skipped")
    assert f"the weights were updated {24 - n_skipped} times; lower initial_scale_power" in warnings[1]
    assert len(warnings) == 2
    assert lines.index(warnings[0]) < next(place for place, line in enumerate(lines) if line.startswith("epoch 2/3"))


@pytest.mark.ranks
def test_the_log_has_a_line_for_each_with_a_launcher_and_without(searching, tmp_path):
    """What the page of troubles promises."""
    launched(run_of(tmp_path, {"initial_scale_power": 32, "hysteresis": 1}), tmp_path)
    quoted = {general(line) for _, block in blocks(TROUBLES, "text") for line in block.splitlines()}
    for run in (searching[0], tmp_path / "run"):
        log = [line for line in (run / "run.log").read_text().splitlines() if line.startswith("fp16: optimizer step")]
        assert len(log) == launching.events(run, "train_step")[-1]["n_skipped_in_run"]
        assert log[0].startswith("fp16: optimizer step 1 was skipped, its gradients overflowed and no weight was")
        assert {general(line) for line in log} <= quoted


def test_the_count_survives_a_resume(searching, tmp_path):
    """Ended after its first epoch, and begun again for all three: as in one go."""
    fp16 = {"initial_scale_power": 32, "hysteresis": 1}
    first = alone(run_of(tmp_path, fp16, num_epochs=1), tmp_path)
    assert "  skipped   8 of 8 steps skipped (fp16, gradients overflowed)" in first
    progress = json.loads((tmp_path / "run" / "checkpoints" / "epoch_0001" / "progress.json").read_text())["progress"]
    assert (progress["skipped"], progress["step"]) == (8, 8)
    alone(run_of(tmp_path, fp16), tmp_path)
    steps, expected = (launching.events(run, "train_step") for run in (tmp_path / "run", searching[0]))
    keys = ("step", "skipped", "n_skipped_in_run", "loss")
    assert [[event[key] for key in keys] for event in steps] == [[event[key] for key in keys] for event in expected]


def test_a_fixed_loss_scale_that_is_too_high_is_noticed(tmp_path):
    """DeepSpeed skips every step, for ever."""
    lines = alone(run_of(tmp_path, {"loss_scale": 2.0**40}, num_epochs=1, log_every_steps=3), tmp_path)
    assert [event["n_skipped_in_run"] for event in launching.events(tmp_path / "run", "train_step")] == [3, 6]
    assert launching.events(tmp_path / "run", "end")[0]["n_skipped_in_run"] == 8
    assert any("fp16: 8 of 8 optimizer steps were skipped" in line for line in lines)
    run = read_run(tmp_path / "run")
    assert (run.n_skipped, run.steps_done) == (8, 8)


def test_a_run_that_skips_nothing_says_nothing(tmp_path):
    lines = alone(run_of(tmp_path, {"initial_scale_power": 8}, num_epochs=1), tmp_path)
    assert demand_counted(launching.events(tmp_path / "run", "train_step")) == 0
    assert not [line for line in lines if "skipped" in line]


def test_other_precisions_have_no_such_keys(tmp_path):
    alone(run_of(tmp_path, {}, precision="fp32", num_epochs=1), tmp_path)
    for event in launching.events(tmp_path / "run", "train_step"):
        assert not {"skipped", "n_skipped_in_run"} & set(event)


def test_bars_and_plain_lines_have_the_count(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PLAIN_LINES_APART_S", 0)
    pace = Pace(steps=8, evaluations=1)
    with console.EpochProgress("epoch 1/1, stage 0", 8, pace) as bar:
        for _ in range(8):
            pace.stepped(64, 60.0)
            bar.step(0.5, "3 of 7 steps skipped")
    assert ": 2/8, loss 0.500, 3 of 7 steps skipped, 1.07 examples/s, ETA " in capsys.readouterr().out.splitlines()[0]


def test_few_are_counted_without_a_warning(tmp_path):
    assert closing(closing_config(tmp_path), RunFolder(tmp_path), [], 12, 24).splitlines()[:-1] == [
        "  skipped   12 of 24 steps skipped (fp16, gradients overflowed)"
    ]
    assert "  warning   fp16: 13 of 24" in closing(closing_config(tmp_path), RunFolder(tmp_path), [], 13, 24)
    assert "skipped" not in closing(closing_config(tmp_path), RunFolder(tmp_path), [], 0, 24)


@pytest.mark.parametrize("skipped", [0, 5, 9])
def test_a_report_shows_them_and_warns_of_most(tmp_path, skipped):
    folder = recorded.write_run(tmp_path, name="a")
    events = recorded.training(3)
    steps = [event for event in events if event["event"] == "train_step"]
    for number, event in enumerate(steps, start=1):
        event |= {"skipped": number <= skipped, "n_skipped_in_run": min(number, skipped), "grad_norm": None}
    recorded.write_events(folder, events)
    run = read_run(folder)
    assert run.n_skipped == skipped
    assert report_tables.head("a", run).skipped == (f"{skipped} skipped by fp16" if skipped else "")
    assert (f"{skipped} skipped by fp16" in page_of(folder)) is (skipped > 0)
    warnings = report_tables.warnings({"a": run})
    assert [warning.split("because")[0] for warning in warnings] == (
        ["a: fp16: 9 of 12 optimizer steps were skipped "] if skipped == 9 else []
    )
