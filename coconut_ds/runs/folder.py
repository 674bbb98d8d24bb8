"""Names and paths of everything in a run folder. No other module spells them. Needs the standard library only.

run_config.yaml  ds_config.json  environment.json     what the run was last started with
metrics.jsonl                                         its events
predictions/NAME.jsonl                                NAME: epoch_0003, or eval_ and the name of another set
checkpoints/epoch_0003/                               after the third epoch; .tmp while it is written
checkpoints/epoch_0003_step_00000420/                 within the fourth epoch, after optimizer step 420
checkpoints/latest                                    a line with the name of the newest checkpoint
run.log  run.lock  tensorboard/  wandb_run_id.txt  report/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RunFolder:
    """The folder `path`, `save_path/name` of the run file; nothing in it needs to exist."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def run_config(self) -> Path:
        return self.path / "run_config.yaml"

    @property
    def ds_config(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_run_id.txt"

    @property
    def report(self) -> Path:
        """Where the report of this run alone is written."""
        return self.path / "report"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    def predictions_file(self, name: str) -> Path:
        return self.predictions / f"{name}.jsonl"

    def prediction_names(self) -> list[str]:
        """Names of the predictions files, sorted, without their ending."""
        return sorted(path.stem for path in self.predictions.glob("*.jsonl"))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        return self.checkpoints / "latest"

    def checkpoint(self, epochs: int, step: int | None = None) -> Path:
        """After `epochs` whole epochs, or within the next one after optimizer step `step` of the run."""
        within = "" if step is None else f"{_STEP}{step:08d}"
        return self.checkpoints / f"{epoch_name(epochs)}{within}"

    def found_checkpoints(self) -> list[Path]:
        """Published checkpoints, oldest first, not checked; none if the folder is missing."""
        return sorted(self.checkpoints.glob("epoch_*[0-9]"))
