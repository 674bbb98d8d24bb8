"""Nothing of a run outlives it in the process, wherever it fails: watchdog, streams, environment, signals, group."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import launching
import pytest
import tiny
import torch
import torch.distributed as dist
import transformers
from transformers import AttentionInterface

from coconut_ds import train
from coconut_ds.errors import InputError
from coconut_ds.model.fast import low_rank_linear
from coconut_ds.runtime import watchdog


@pytest.fixture
def alarms(monkeypatch) -> list[Any]:
    """The alarm under way: its keywords, or None once it is cancelled."""
    seen: list[Any] = [None]

    def later(seconds: float, **options: Any) -> None:
        seen.append({"seconds": seconds, **options})

    monkeypatch.setattr(faulthandler, "dump_traceback_later", later)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: seen.append(None))
    return seen


class Faceless:
    """A stream without a descriptor, as a notebook has."""

    def fileno(self) -> int:
        raise OSError("no descriptor")


def test_a_watchdog_is_off_after_an_error(alarms, tmp_path):
    def fails() -> None:
        with open(tmp_path / "places", "w") as file, watchdog.watching(7, file):
            assert alarms[-1] == {"seconds": 7, "exit": True, "file": file.fileno()}
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fails()
    assert alarms[-1] is None
    n_alarms = len(alarms)
    watchdog.alive()
    assert len(alarms) == n_alarms


def test_a_watchdog_without_a_descriptor_uses_the_standard_error(alarms):
    with watchdog.watching(7, Faceless()):
        watchdog.alive()
        assert [alarm["file"] for alarm in alarms[1:]] == [2, 2]
    assert alarms[-1] is None


def test_a_watchdog_within_another_leaves_that_one_s_limit(alarms, tmp_path):
    with open(tmp_path / "places", "w") as file, watchdog.watching(7, file):
        with watchdog.watching(3, file):
            pass
        watchdog.alive()
        assert alarms[-1]["seconds"] == 7


def open_files() -> list[Path]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # of the folder being read
            found.append(link.readlink())
    return found


def module_values() -> dict[str, str]:
    """The values in the modules of the package, without functions, classes and modules."""
    return {
        f"{name}.{key}": repr(value)
        for name, module in sorted(sys.modules.items())
        if name.startswith("coconut_ds")
        for key, value in vars(module).items()
        if not (key.startswith("__") or callable(value) or isinstance(value, ModuleType))
    }


def state(folder: Path) -> dict[str, Any]:
    """Whatever of this process a run in `folder` changes. (Sockets stay: DeepSpeed holds on to its engines.)"""
    return {
        "modules": module_values(),
        "streams": (sys.stdout, sys.stderr),
        "descriptors": [os.fstat(number).st_ino for number in (1, 2)],
        "files": [path for path in open_files() if path.is_relative_to(folder)],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)],
        "group": dist.is_initialized(),
        "pass": low_rank_linear.current_pass(),
        "torch": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "bars": (datasets.are_progress_bars_disabled(), transformers.logging.is_progress_bar_enabled()),
        "attention": sorted(AttentionInterface().valid_keys()),
        # Advice of torch for DeepSpeed's authors may stay hidden.
        "warnings": [kept for kept in warnings.filters if kept[2] is not FutureWarning],
        "folder": Path.cwd(),
    }


def run_in(folder: Path) -> dict[str, Any]:
    """Two epochs of one step, evaluated and saved."""
    return tiny.run(folder) | {
        "save_path": str(folder / "runs"),
        "deepspeed": str(launching.ROOT / "ds_configs" / "zero2.json"),
        "num_epochs": 2,
        "batch_size_training": 8,
        "eval_batch_size": "auto",
    }


@pytest.fixture
def run(tmp_path) -> dict[str, Any]:
    return run_in(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _not_the_first_run(tmp_path_factory) -> None:
    """What libraries keep of a first run is there before the state is taken: DeepSpeed builds, setuptools' own path."""
    folder = tmp_path_factory.mktemp("first")
    assert train.main(["--run", str(launching.write_run(run_in(folder), folder))]) == 0


PLACES = (
    "engine.build.describe_device",
    "training.session.load_setup",
    "config.resolved_run.batch_sizes",
    "training.session.describe_environment",
    "training.session.build_engine",
    "training.session.choose_eval_batch",
    "training.summary.opening",
    "training.trainer.new_schedule",
    "training.trainer.terminal",
    "training.trainer.TrainingSteps",
    "training.step.accumulate_gradients",
    "training.step.update",
    "inference.replies.decode",
    "training.trainer.write_predictions",
    "training.trainer.latent_settings",
    "training.summary.closing",
)


def fail_at(place: str, error: BaseException, monkeypatch) -> None:
    module, _, name = place.rpartition(".")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module(f"coconut_ds.{module}"), name, fails)


KINDS = [(RuntimeError("a fault"), 1), (InputError("a mistake"), 2), (KeyboardInterrupt(), 130)]
FAILURES = [(place, *KINDS[0]) for place in PLACES]
FAILURES += [(place, *kind) for place in (PLACES[1], PLACES[4], PLACES[10], PLACES[12]) for kind in KINDS[1:]]


@pytest.mark.parametrize(("place", "error", "status"), FAILURES, ids=lambda value: str(value) or "interrupt")
def test_a_run_that_fails_leaves_the_process_as_it_was(run, tmp_path, monkeypatch, capsys, place, error, status):
    fail_at(place, error, monkeypatch)
    file = str(launching.write_run(run, tmp_path))
    before = state(tmp_path)
    assert train.main(["--run", file]) == status
    assert state(tmp_path) == before
    assert str(error) in capsys.readouterr().err


def test_a_run_that_ends_leaves_the_process_as_it_was_also_when_it_evaluates(run, tmp_path, capsys):
    file = str(launching.write_run(run, tmp_path))
    before = state(tmp_path)
    assert train.main(["--run", file]) == 0
    assert state(tmp_path) == before
    trained = tmp_path / "runs" / "run" / "checkpoints" / "epoch_0002"
    assert train.main(["--run", file, "only_eval=true", f"load_model_path={trained}", "name=evaluated"]) == 0
    assert state(tmp_path) == before
    assert "accuracy" in capsys.readouterr().out


def test_a_start_that_needs_weights_the_run_does_not_have_is_refused_before_records_change(run, tmp_path, capsys):
    file = str(launching.write_run(run, tmp_path))
    assert train.main(["--run", file]) == 0
    records = [tmp_path / "runs" / "run" / name for name in ("run_config.yaml", "environment.json", "metrics.jsonl")]
    before = [path.read_bytes() for path in records]
    assert train.main(["--run", file, "num_epochs=3", "supervision.steps.decoder=copy"]) == 2
    assert "has no step_decoder." in capsys.readouterr().err
    assert [path.read_bytes() for path in records] == before


def test_to_import_the_entry_changes_nothing(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ), list(sys.path)
    importlib.reload(train)
    assert (dict(os.environ), sys.path) == before
