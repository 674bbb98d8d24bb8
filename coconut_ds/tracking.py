"""Records of a run: JSON lines always, wandb when asked for. The only importer of wandb."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coconut_ds.config import RunConfig

_WANDB_WAIT_S = 20


class Tracker:
    """Writes `metrics.jsonl`, one object a line with its `event`; keeps quiet on every rank but the first.

    wandb never stops a run: where it cannot be reached the run goes on with one warning.
    """

    def __init__(self, config: RunConfig, is_main: bool):
        self.path = config.run_folder / "metrics.jsonl"
        self._file = None
        self._wandb: Any = None
        if is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            if config.wandb != "disabled" and not config.debug:
                self._wandb = _guarded(lambda: _start_wandb(config))

    def log(self, event: str, **values: Any) -> None:
        """Write one event; a dict among the values goes to the file only."""
        if self._file is None:
            return
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            flat = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
            if _guarded(lambda: self._wandb.log(flat) or True) is None:
                self._wandb = None

    def rewind(self, epochs: int) -> None:
        """Drop what an interrupted run wrote after its first `epochs` epochs, which is done again."""
        if self._file is None:
            return
        self._file.close()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _epoch_of(line) <= epochs]
        self.path.write_text("".join(kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            _guarded(self._wandb.finish)
        self._file = self._wandb = None


def _epoch_of(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except ValueError:  # the last line of a run that was killed while writing it
        return float("inf")


def _start_wandb(config: RunConfig) -> Any:
    import wandb

    if config.wandb == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise RuntimeError("no login found (`wandb login`, or WANDB_API_KEY)")
    return wandb.init(
        project=config.project,
        name=config.name,
        dir=str(config.run_folder),
        mode=config.wandb,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(init_timeout=_WANDB_WAIT_S, silent=True),
    )


def _guarded(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # wandb raises many kinds, and none of them is worth a run
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"wandb: {reason}; the run goes on without it, metrics.jsonl has everything", stacklevel=2)
        return None


def read_events(path: Path, event: str) -> list[dict[str, Any]]:
    """The records of one kind in a `metrics.jsonl`, oldest first."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["event"] == event]


def describe_environment() -> dict[str, Any]:
    """Versions, commit and hardware, for `environment.json`."""
    packages = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "pydantic", "wandb")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
