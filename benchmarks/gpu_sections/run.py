"""The trainer as it is started: stopped by a signal to its session, resumed, and its thoughts inspected."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import workload

from coconut_ds import strict_json
from coconut_ds.runs.paths import RunFolder, is_within_epoch
from gpu_sections import ROOT, Row, begin, seconds_left, tried

_TRAINER = str(ROOT / "coconut_ds" / "train.py")
_EPOCHS = 2


def rows(options: argparse.Namespace) -> Iterator[Row]:
    begin(options)
    folder = RunFolder(options.work / "runs" / "gpu_check")
    command = _command(options)
    yield tried("stopped by SIGTERM to the session", _stopped, options, command, folder)
    yield tried("resumed to its end", _resumed, command, folder)
    yield tried("inspected with interventions", _inspected, options, folder)


def _command(options: argparse.Namespace) -> list[str]:
    """The small ProsQA run, shorter; a toy's smaller still."""
    sets = {"train": 64 if options.toy else 6400, "valid": 8 if options.toy else 64}
    for name, count in sets.items():
        questions = workload.prosqa.generate(count, name, n_nodes=7, min_steps=2, max_steps=2, form="edges")
        _data(options, name).write_text(strict_json.dumps(list(questions)), encoding="utf-8")
    values = {"name": "gpu_check", "save_path": options.work / "runs", "num_epochs": _EPOCHS, "epochs_per_stage": 1}
    values |= {"train_path": _data(options, "train"), "val_path": _data(options, "valid"), "test_path": "null"}
    if options.toy:
        values |= {"batch_size_training": 2, "train_batch_size": 2, "model.n_embd": 16, "model.n_head": 2}
    overrides = [f"{key}={value}" for key, value in values.items()]
    return [sys.executable, _TRAINER, "--run", str(ROOT / "run_configs" / "demo_prosqa.yaml"), *overrides]


def _data(options: argparse.Namespace, name: str) -> Path:
    return Path(options.work) / f"{name}.json"


def _stopped(options: argparse.Namespace, command: list[str], folder: RunFolder) -> Row:
    """As SLURM does it, the signal reaches the rank, its loader workers and all else of the session."""
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            while process.poll() is None and seconds_left(options) > 1 and not _has_step(folder):
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGTERM)
            # Not to the last second: whoever kills this section does not reach another session.
            status = process.wait(max(1, seconds_left(options) - 3))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    found = [path.name for path in folder.found_checkpoints() if is_within_epoch(path)]
    return {"ok": status == 0 and len(found) == 1, "status": status, "checkpoints": found}


def _has_step(folder: RunFolder) -> bool:
    return folder.metrics.exists() and '"train_step"' in folder.metrics.read_text(encoding="utf-8")


def _resumed(command: list[str], folder: RunFolder) -> Row:
    status = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    done = folder.checkpoint(_EPOCHS).is_dir()
    return {"ok": status == 0 and done, "status": status, "finished": done}


def _inspected(options: argparse.Namespace, folder: RunFolder) -> Row:
    command = [sys.executable, "-m", "coconut_ds", "inspect", str(folder.checkpoint(_EPOCHS)), "--all", "--intervene"]
    command += ["--data", str(_data(options, "valid")), "--limit", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"ok": done.returncode == 0, "status": done.returncode, "printed": (done.stdout + done.stderr)[-1500:]}
