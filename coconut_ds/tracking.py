"""Records of a run: JSON lines always, wandb when asked for. The only importer of wandb."""

from __future__ import annotations

import contextlib
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
from coconut_ds.console import say
from coconut_ds.errors import InputError

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
        try:
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if self._wandb is not None:
            flat = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
            if _guarded(lambda: self._wandb.log(flat) or True) is None:
                self._wandb = None

    def position(self) -> int:
        """Length of the file in bytes, all of it on the disk; 0 on ranks that write none."""
        if self._file is None:
            return 0
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return self.path.stat().st_size

    def rewind(self, position: int) -> None:
        """Drop what an interrupted run wrote after `position`, which is done again.

        The record of the checkpoint made there, the first line after it, stays.
        """
        if self._file is None:
            return
        self._file.close()
        written = self.path.read_bytes()
        if len(written) < position:
            say(f"{self.path} has lost its last {position - len(written)} bytes; the steps in them are missing from it")
        kept, after = written[:position], written[position:].splitlines(keepends=True)
        if after and after[0].startswith(b'{"event": "checkpoint"') and after[0].endswith(b"\n"):
            kept += after[0]
        # A disk that lost the end of the file can leave half a line.
        kept = kept[: kept.rfind(b"\n") + 1]
        # Cut and not written anew: a process killed in between would leave nothing of it.
        os.truncate(self.path, len(kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        if self._file is not None:
            # What a full disk did not take was reported when it was logged.
            with contextlib.suppress(OSError):
                self._file.close()
        if self._wandb is not None:
            _guarded(self._wandb.finish)
        self._file = self._wandb = None


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


def write_record(path: Path, text: str) -> None:
    """Write one file of a run's records; raises InputError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be written: {error.strerror}; put that right and start the run again, it goes on from its "
        "newest checkpoint"
    )


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
