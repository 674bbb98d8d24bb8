"""Settings and data recorded in a run folder, compared with those of a command. Needs no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from coconut_ds import strict_json
from coconut_ds.config.data_paths import on_hub
from coconut_ds.config.ds_json import leaves
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.errors import InputError
from coconut_ds.runs.atomic_folder import fingerprint
from coconut_ds.runs.paths import RunFolder

DATA_KEYS = ("train_path", "val_path")
_PLACE = ("save_path", "name")
_SHOWN_OF_HASH = 12


def changed_keys(folder: Path, asked: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose value in the run folder is not the one asked for, each as (there, asked).

    A value of `auto` is not known before the run starts and differs from none; where the folder lies does not count.
    Raises InputError if the folder's configuration cannot be read.
    """
    stored = load_run_config(RunFolder(folder).run_config).model_dump(mode="json")
    values = asked.model_dump(mode="json")
    return {
        key: (stored[key], value)
        for key, value in values.items()
        if key not in _PLACE and value not in ("auto", stored[key])
    }


class DataFile(BaseModel):
    """A data file of a run, as `environment.json` has it."""

    path: str
    sha256: str
    examples: int

    def __str__(self) -> str:
        return f"{self.examples} examples, SHA-256 {self.sha256[:_SHOWN_OF_HASH]}"


def data_files(config: RunConfig, sets: Mapping[str, tuple[int, str | None]]) -> dict[str, DataFile]:
    """The sets trained and validated on as they are now, by key. Raises InputError for a file that cannot be read.

    `sets` has the number of examples of each, and its hash if it is no file.
    """
    return {
        key: DataFile(path=path, sha256=sets[key][1] or _sha256(path), examples=sets[key][0])
        for key in DATA_KEYS
        if (path := getattr(config, key))
    }


def _object_in(file: Path) -> dict[str, Any]:
    """What a JSON file of a run folder holds; empty if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(file.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def earlier_changes(folder: Path) -> list[Any]:
    """Changes between earlier starts, as `environment.json` lists them; none if it is damaged."""
    found = _object_in(RunFolder(folder).environment).get("changes")
    return found if isinstance(found, list) else []


def stored_data_files(folder: Path) -> dict[str, DataFile]:
    """The files a run was trained with; empty for runs of earlier versions."""
    with contextlib.suppress(ValidationError):
        return TypeAdapter(dict[str, DataFile]).validate_python(_object_in(RunFolder(folder).environment).get("data"))
    return {}


def changed_contents(folder: Path, config: RunConfig) -> list[str]:
    """Keys of data files whose content differs from that of the training; a set of the hub is not read for this."""
    paths = {key: getattr(config, key) for key in DATA_KEYS}
    files = {key: path for key, path in paths.items() if path and on_hub(path) is None}
    stored = stored_data_files(folder)
    return [key for key, path in files.items() if key in stored and _sha256(path) != stored[key].sha256]


def changes(
    asked: RunConfig, data: Mapping[str, DataFile], ranks: int, ds_config: Mapping[str, Any] | None = None
) -> list[str]:
    """One line, `there -> here`, per difference between the run folder and this command; none in a new folder.

    `ds_config` is the resolved DeepSpeed configuration, if known: the file can have new content under the same path,
    and `auto` can resolve to another value on another machine.
    """
    folder = asked.run_folder
    if not RunFolder(folder).run_config.is_file():
        return []
    stored, lines = stored_data_files(folder), []
    try:
        for key, (there, here) in changed_keys(folder, asked).items():
            is_same = key in stored and key in data and stored[key].sha256 == data[key].sha256
            change = f"{key}: {strict_json.dumps(there)} -> {strict_json.dumps(here)}"
            lines.append(change + is_same * " (the same content)")
    except InputError as error:
        lines.append(f"what else differs is not known: {error}")
    before = _object_in(RunFolder(folder).environment).get("ranks", ranks)
    if before != ranks:
        lines.append(f"ranks: {before} -> {ranks}")
    lines += _changes_of_deepspeed(folder, ds_config) if ds_config is not None else []
    lines += [
        f"content of {key}: {stored[key]} -> {file}"
        for key, file in data.items()
        if key in stored and stored[key].sha256 != file.sha256
    ]
    return lines


def _changes_of_deepspeed(folder: Path, ds_config: Mapping[str, Any]) -> list[str]:
    """Changes of memory strategy and precision; batch sizes follow from the run and the ranks."""
    stored = _object_in(RunFolder(folder).ds_config)
    if not stored:
        return []
    sections = ("zero_optimization", "bf16", "fp16", "data_types")
    there, here = (dict(leaves({key: each.get(key) for key in sections})) for each in (stored, ds_config))
    return [
        f"deepspeed, {key}: {strict_json.dumps(there.get(key))} -> {strict_json.dumps(here.get(key))}"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]


def _sha256(path: str) -> str:
    try:
        return str(fingerprint(Path(path))["sha256"])
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; data/README.md says how to get the data") from None
