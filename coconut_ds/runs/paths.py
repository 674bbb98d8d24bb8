"""Names and paths of everything in a run folder. No other module spells them. Needs the standard library only."""

from __future__ import annotations

import re
from pathlib import Path

UNFINISHED, REMOVED, DAMAGED = ".tmp", ".removed", ".damaged"
"""Endings of folders that are being written, being removed, or were set aside."""
REPORT_PAGE = "report.html"
_EPOCH = re.compile(r"epoch_(\d+)")
_STEP = "_step_"


def epoch_name(epoch: int) -> str:
    """Of the checkpoint and the predictions after `epoch`, counted from 1."""
    return f"epoch_{epoch:04d}"


def epoch_of(name: str) -> int | None:
    """The epoch that `epoch_name` names; None for other names."""
    found = _EPOCH.fullmatch(name)
    return int(found[1]) if found else None


def is_within_epoch(checkpoint: Path) -> bool:
    """Whether a checkpoint was made before its epoch ended."""
    return _STEP in checkpoint.name


class RunFolder:
    """The folder `path`, `save_path/name` of the run file; nothing in it needs to exist."""

    def __init__(self, path: Path):
        self.path = path
        # What the run was last started with
        self.run_config = path / "run_config.yaml"
        self.ds_config = path / "ds_config.json"
        self.environment = path / "environment.json"
        # What it leaves
        self.metrics = path / "metrics.jsonl"
        self.log = path / "run.log"
        self.lock = path / "run.lock"
        self.tensorboard = path / "tensorboard"
        self.wandb_id = path / "wandb_run_id.txt"
        self.report = path / "report"  # of this run alone
        self.thought_use = path / "thoughts.json"  # what `inspect --by-stage` finds
        self.predictions = path / "predictions"
        self.checkpoints = path / "checkpoints"
        self.latest = self.checkpoints / "latest"  # a line with the name of the newest checkpoint

    def __str__(self) -> str:
        return str(self.path)

    def predictions_file(self, name: str) -> Path:
        """`name` is an epoch's, or `eval_` and the name of another set."""
        return self.predictions / f"{name}.jsonl"

    def prediction_names(self) -> list[str]:
        """Names of the predictions files, sorted, without their ending."""
        return sorted(path.stem for path in self.predictions.glob("*.jsonl"))

    def checkpoint(self, epochs: int, step: int | None = None) -> Path:
        """`epoch_0003` after 3 whole epochs; `epoch_0003_step_00000420` within the next, after optimizer step 420."""
        within = "" if step is None else f"{_STEP}{step:08d}"
        return self.checkpoints / f"{epoch_name(epochs)}{within}"

    def found_checkpoints(self) -> list[Path]:
        """Published checkpoints, oldest first, not checked; none if the folder is missing."""
        return sorted(self.checkpoints.glob("epoch_*[0-9]"))
