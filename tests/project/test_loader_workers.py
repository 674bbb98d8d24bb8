"""Ranks with processes that make batches ahead, as beside a GPU: asked to stop they save, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults
import launching
import psutil
import pytest
from torch.utils.data import DataLoader

from coconut_ds.data.loaders import _loading

pytestmark = pytest.mark.ranks
# An open loader when the interpreter ends, which waits for its worker.
_OPEN_LOADER = """
import torch
from torch.utils.data import DataLoader
from coconut_ds.data.loaders import _loading

batches = iter(DataLoader(range(1000), **_loading(1)))
next(batches)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and a run without workers that is left alone."""
    folder = tmp_path_factory.mktemp("workers")
    faults.prepare(folder)
    return folder


def workers_of(ranks: list[psutil.Process], process: Any) -> list[psutil.Process]:
    """The loader workers of all ranks, once a step is logged and each rank has one."""
    give_up = time.monotonic() + launching.TIME_LIMIT_S
    while True:
        assert process.poll() is None, f"ended with {process.poll()}"
        assert time.monotonic() < give_up
        workers = [rank.children() for rank in ranks]
        if all(workers):
            return [worker for some in workers for worker in some]
        time.sleep(0.005)


def wait_for_a_step(folder: Path, name: str, process: Any) -> None:
    metrics = folder / "runs" / name / "metrics.jsonl"
    give_up = time.monotonic() + launching.TIME_LIMIT_S
    while not metrics.exists() or metrics.read_text().count('"train_step"') < 2:
        assert process.poll() is None, f"ended with {process.poll()}"
        assert time.monotonic() < give_up
        time.sleep(0.02)


def saved(folder: Path, name: str, output: str) -> None:
    """The stopped run saved a checkpoint within an epoch, and the resumed run equals one that was not stopped."""
    (checkpoint,) = (folder / "runs" / name / "checkpoints").glob("epoch_*[0-9]")
    assert f"stopped as requested; the same command resumes from {checkpoint}" in output
    launching.train(faults.run_of(folder, name, save_every_steps=None, num_workers=1), folder / name, ranks=2)
    faults.assert_same(folder, name, "alone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_every_process_of_the_ranks_saves(folder, number):
    """As a scheduler sends it, and a terminal where no launcher stands between."""
    name = f"all_{number.name}"
    run = faults.run_of(folder, name, save_every_steps=None, num_workers=1)
    ranks = launching.WarmRanks(2, ["coconut_ds/train.py", "--run", str(launching.write_run(run, folder / name))])
    try:
        wait_for_a_step(folder, name, ranks)
        started = [psutil.Process(process.pid) for process in ranks.processes]
        workers = workers_of(started, ranks)
        for process in (*workers, *started):
            process.send_signal(number)
    finally:
        done = ranks.finish()
    assert done.returncode == 0, done.stdout
    assert not psutil.wait_procs(workers, timeout=30)[1]
    saved(folder, name, done.stdout)


@pytest.mark.parametrize(
    ("send", "number"), [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)], ids=["SIGTERM", "Ctrl-C"]
)
def test_the_command_line_stops_ranks_with_workers(folder, send, number):
    name = f"command_{number.name}"
    run = faults.run_of(folder, name, save_every_steps=None, num_workers=1)
    run_file = str(launching.write_run(run, folder / name))
    options = ["--ranks", "2", "--master-port", str(launching.free_port())]
    process = launching.start([sys.executable, "-m", "coconut_ds", "train", "--run", run_file, *options])
    try:
        wait_for_a_step(folder, name, process)
        send(process.pid, number)
    finally:
        done = launching.finish(process)
    assert done.returncode == 0, done.stdout
    assert [left.pid for left in psutil.process_iter(["cmdline"]) if run_file in (left.info["cmdline"] or ())] == []
    saved(folder, name, done.stdout)


def test_a_worker_ends_with_its_rank_that_leaves_a_loader_open():
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_LOADER], env=launching.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 100


def test_a_worker_ignores_signals_and_ends_with_its_loader():
    before = set(psutil.Process().children())
    batches = iter(DataLoader(range(1000), **_loading(1)))
    assert next(batches) == 0
    (worker,) = set(psutil.Process().children()) - before
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    time.sleep(0.3)
    assert next(batches) == 1
    del batches
    assert worker.wait(timeout=30) in (0, None)
