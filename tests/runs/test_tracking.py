"""Records: JSON lines, rewinding after a crash, and wandb that never stops a run."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import launching
import pytest

from coconut_ds.config.run_config import RunConfig
from coconut_ds.errors import InputError
from coconut_ds.runs.environment import describe_environment
from coconut_ds.runs.tracker import Tracker, write_record


def config(tmp_path, **values) -> RunConfig:
    return RunConfig(save_path=str(tmp_path), name="run", **values)


def test_events_are_lines_and_only_rank_zero_writes(tmp_path):
    other = Tracker(config(tmp_path), is_main=False)
    other.log("train_step", step=1)
    assert not other.path.exists()
    tracker = Tracker(config(tmp_path), is_main=True)
    tracker.log("train_step", step=1, loss=2.5)
    tracker.log("eval", step=1, accuracy=0.5, accuracy_by_steps={"2": 0.5})
    tracker.close()
    assert launching.events(tracker.path.parent, "train_step") == [{"event": "train_step", "step": 1, "loss": 2.5}]


def test_what_a_crashed_run_wrote_after_its_checkpoint_is_dropped(tmp_path):
    tracker = Tracker(config(tmp_path), is_main=True)
    tracker.log("train_step", step=1)
    position = tracker.position()
    tracker.log("checkpoint", step=1, path="one")
    tracker.log("train_step", step=2)
    tracker.log("checkpoint", step=2, path="two")
    tracker.close()
    with tracker.path.open("a") as file:
        file.write('{"event": "train_step", "ste')
    again = Tracker(config(tmp_path), is_main=True)
    again.rewind(position)
    again.log("train_step", step=2)
    again.close()
    assert [event["step"] for event in launching.events(again.path.parent, "train_step")] == [1, 2]
    assert [event["path"] for event in launching.events(again.path.parent, "checkpoint")] == ["one"]


def test_a_full_disk_is_reported_and_closing_adds_nothing(tmp_path):
    tracker = Tracker(config(tmp_path), is_main=True)
    tracker.close()
    tracker.path.unlink()
    tracker.path.symlink_to("/dev/full")
    tracker = Tracker(config(tmp_path), is_main=True)
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be written: No space left on device"):
        tracker.log("train_step", step=1)
    tracker.close()


def test_a_record_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "predictions").touch()
    with pytest.raises(InputError, match=r"predictions/epoch_0001.jsonl cannot be written: .*fix this and rerun"):
        write_record(tmp_path / "predictions" / "epoch_0001.jsonl", "{}\n")


@pytest.mark.parametrize("cut", [1, 20], ids=["its newline", "half a line"])
def test_a_file_that_lost_its_end_keeps_whole_lines(tmp_path, cut):
    tracker = Tracker(config(tmp_path), is_main=True)
    tracker.log("train_step", step=1)
    tracker.log("train_step", step=2)
    position = tracker.position()
    tracker.close()
    tracker.path.write_bytes(tracker.path.read_bytes()[:-cut])
    again = Tracker(config(tmp_path), is_main=True)
    again.rewind(position)
    again.close()
    assert [event["step"] for event in launching.events(again.path.parent, "train_step")] == [1]


def test_environment_names_versions_commit_and_hardware():
    found = describe_environment()
    assert found["packages"]["deepspeed"]
    assert found["cpus"] >= 1
    assert json.dumps(found)


def test_environment_has_none_for_a_package_that_is_not_installed(monkeypatch):
    def version(name: str) -> str:
        if name in ("wandb", "datasets"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("coconut_ds.runs.environment.version", version)
    packages = describe_environment()["packages"]
    assert {name for name, found in packages.items() if found is None} == {"wandb", "datasets"}
    assert packages["torch"] == "1.0"


def run_with_wandb(tmp_path: Path, mode: str, **environment: str) -> subprocess.CompletedProcess:
    code = f"""
    from coconut_ds.runs import dashboards
    from coconut_ds.config.run_config import RunConfig
    from coconut_ds.runs.tracker import Tracker

    dashboards._WANDB_WAIT_S = 1
    tracker = Tracker(RunConfig(save_path={str(tmp_path)!r}, name="run", wandb={mode!r}), is_main=True)
    tracker.rewind(0)
    for step in range(1, 4):
        tracker.log("train_step", epoch=1, stage=0, step=step, loss=1.0 / step)
    tracker.close()
    print("the run went on")
    """
    return launching.finish(launching.start([sys.executable, "-c", textwrap.dedent(code)], **environment), 120)


def test_wandb_offline_writes_its_files_and_nothing_on_the_terminal(tmp_path):
    result = run_with_wandb(tmp_path, "offline", WANDB_MODE="offline")
    assert (result.returncode, result.stdout) == (0, "the run went on\n")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("key", "reason"), [("", "no login found"), ("0" * 40, "refused")], ids=["no login", "no network"]
)
def test_a_run_goes_on_with_one_line_where_wandb_cannot_be_used(tmp_path, key, reason):
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": key, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    # A closed port of this machine stands for a network that is not there.
    environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{launching.free_port()}"
    result = run_with_wandb(tmp_path, "online", **environment)
    assert result.returncode == 0, result.stdout
    first, *others = result.stdout.splitlines()
    assert first.startswith("wandb: ")
    assert reason in first
    assert first.endswith("; the run continues without it; metrics.jsonl has everything")
    assert others == ["the run went on"]
    assert [event["step"] for event in launching.events(tmp_path / "run", "train_step")] == [1, 2, 3]
