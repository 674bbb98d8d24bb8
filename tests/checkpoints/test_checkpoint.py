"""The checkpoints of a run folder: which one is resumed, how many are kept, and errors when one cannot be written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coconut_ds.checkpoints import store as checkpoint
from coconut_ds.checkpoints.store import CheckpointError, Checkpoints, Progress, Stored
from coconut_ds.config.run_config import RunConfig
from coconut_ds.engine.reset import new_schedule
from coconut_ds.runs import atomic_folder


def publish(folder: Path, name: str) -> Path:
    unfinished = atomic_folder.begin(folder / "checkpoints" / name)
    (unfinished / "progress.json").write_text("{}")
    return atomic_folder.publish(unfinished)


def damage(path: Path) -> None:
    (path / "progress.json").write_text("{")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_damaged_checkpoints_do_not_count_as_kept_ones(tmp_path):
    """Otherwise the next save would keep them, the newest by name, and remove the one the run resumes from."""
    for name in ("epoch_0001", "epoch_0002", "epoch_0003", "epoch_0004"):
        publish(tmp_path, name)
    for name in ("epoch_0003", "epoch_0004"):
        damage(tmp_path / "checkpoints" / name)
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest_intact() == tmp_path / "checkpoints" / "epoch_0002"
    assert [path.name for path in checkpoints.found()] == ["epoch_0001", "epoch_0002"]
    assert names(tmp_path)[2:] == ["epoch_0003.damaged", "epoch_0004.damaged"]


def test_if_all_are_damaged_they_stay_where_they_are(tmp_path):
    damage(publish(tmp_path, "epoch_0001"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
            Checkpoints(tmp_path, keep=None).newest_intact()
    assert names(tmp_path) == ["epoch_0001"]


def save(folder: Path) -> None:
    engine = SimpleNamespace(module=nn.Linear(8, 8), zero_optimization_stage=lambda: 0)
    Checkpoints(folder, keep=None).save(engine, None, {}, Stored(Progress(2), 8, 0, 0, 0, {}))  # type: ignore[arg-type]


def test_free_space_is_checked_after_leftovers_are_removed_and_before_anything_is_written(tmp_path, monkeypatch):
    publish(tmp_path, "epoch_0001")
    (tmp_path / "checkpoints" / "epoch_0002.tmp").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(CheckpointError) as error:
        save(tmp_path)
    assert "checkpoint epoch_0002 cannot be written" in str(error.value)
    assert f"(the newest is {tmp_path}/checkpoints/epoch_0001): " in str(error.value)
    assert "0.00 GiB are free, 0.06 GiB are needed; free some space" in str(error.value)
    assert names(tmp_path) == ["epoch_0001"]


def test_a_library_that_reports_a_full_disk_in_its_own_way(tmp_path, monkeypatch):
    def full(path: Path) -> Path:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(atomic_folder, "begin", full)
    with pytest.raises(CheckpointError, match=r"there is no earlier one.*No space left on device"):
        save(tmp_path)


def test_values_that_are_not_finite_are_not_saved():
    with pytest.raises(CheckpointError, match=r"wte.weight holds values that are not finite; lower lr"):
        checkpoint._on_main("failed", checkpoint._demand_finite, {"wte.weight": torch.tensor([1.0, float("inf")])})


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_schedule_resumes_where_it_stopped_at_the_rate_of_the_run_file(kind):
    def schedule(rate: float, done: int = 0):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.0)
        config = RunConfig(lr=rate, lr_schedule=kind, warmup_steps=2)
        return new_schedule(SimpleNamespace(basic_optimizer=optimizer), config, 10, done)  # type: ignore[arg-type]

    whole, rates = schedule(1e-3), []
    for _ in range(10):
        rates.append(whole.get_last_lr()[0])
        whole.step()
    for done in range(10):
        later, halved = schedule(1e-3, done), schedule(5e-4, done)
        for expected in rates[done:]:
            assert later.get_last_lr() == [expected] == [group["lr"] for group in later.optimizer.param_groups]
            assert halved.get_last_lr()[0] == pytest.approx(expected / 2)
            later.step()
            halved.step()
