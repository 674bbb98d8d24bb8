"""Atomic folder writes: temporary name, manifest of sizes and SHA-256, fsync, rename; checked when read.

Everything is on the disk before the name appears, so a folder is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from coconut_ds import strict_json
from coconut_ds.runs.paths import DAMAGED, REMOVED, UNFINISHED

MANIFEST = "manifest.json"


def begin(path: Path) -> Path:
    """A new empty folder that `publish` renames to `path`; leftovers of interrupted attempts are removed."""
    sweep(path.parent)
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.mkdir(parents=True)
    return unfinished


def publish(unfinished: Path) -> Path:
    """Write the manifest of a folder made by `begin` and rename it; an existing folder of that name is replaced."""
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    entries = {path.relative_to(unfinished).as_posix(): fingerprint(path) for path in files}
    (unfinished / MANIFEST).write_text(strict_json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")
    flush_folder(unfinished)
    path = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED))
    if path.exists():
        remove(path)
    os.replace(unfinished, path)
    flush(path.parent)
    return path


def faults(path: Path) -> list[str]:
    """Problems of a published folder; empty if every file is as it was written. Raises OSError."""
    if not (path / MANIFEST).is_file():
        return [f"{MANIFEST} is missing"]
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {path / name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is damaged"]
    found = []
    for file, (size, digest) in expected.items():
        name = file.relative_to(path).as_posix()
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != size:
            found.append(f"{name} has {file.stat().st_size} bytes and should have {size}")
        elif fingerprint(file)["sha256"] != digest:
            found.append(f"{name} is not what was written (SHA-256)")
    return found


def remove(path: Path) -> None:
    """Remove a published folder; interrupted, it leaves nothing under its name."""
    doomed = path.with_name(path.name + REMOVED)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> None:
    """Rename a damaged folder, so that it is no longer found as a checkpoint."""
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def sweep(parent: Path) -> None:
    """Remove leftovers of interrupted attempts in `parent`."""
    for ending in (UNFINISHED, REMOVED):
        for left in parent.glob(f"*{ending}"):
            shutil.rmtree(left)


def flush_folder(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, `bytes` and `sha256`; raises OSError."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
