"""Finds and reads the file that `deepspeed: NAME` means. Needs neither torch nor DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coconut_ds.errors import InputError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent


class DeepSpeedConfigError(InputError):
    """Everything wrong with a ds JSON, or with it and the run YAML together, found in one pass."""


def ds_json_path(name: str | Path) -> Path:
    """The file that `deepspeed: NAME` means: a path as it is given, else a file of `ds_configs/`, here or shipped.

    `zero2` and `ds_configs/zero2.json` are the same file of `ds_configs/`. That is a folder of the checkout and, by a
    link, of the package, so an installed trainer has it in any working directory.
    """
    path = Path(name)
    if path.is_file():
        return path
    is_bare = path.parent == Path() and not path.suffix
    named = Path("ds_configs", f"{name}.json") if is_bare else path
    places = (named, _PACKAGE / named) if named.parts[:1] == ("ds_configs",) else ()
    return next((place for place in places if place.is_file()), path)


def shipped_ds_jsons() -> list[str]:
    """The names under which the files of `ds_configs/`, here and in the package, can be given."""
    return sorted({f"ds_configs/{file.name}" for root in (Path(), _PACKAGE) for file in root.glob("ds_configs/*.json")})


def read_ds_json(path: str | Path) -> dict[str, Any]:
    """Read a ds JSON file, found as `ds_json_path` says; raises DeepSpeedConfigError for anything but a JSON object."""
    try:
        raw = json.loads(ds_json_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        known = shipped_ds_jsons()
        hint = did_you_mean(str(path), [*known, *(Path(name).stem for name in known)])
        raise DeepSpeedConfigError(
            f"deepspeed file {path} cannot be read: {error.strerror}{hint}; name one of {', '.join(known)}, by this "
            "path or by its name alone (zero2)"
        ) from None
    except ValueError as error:
        raise DeepSpeedConfigError(f"deepspeed file {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DeepSpeedConfigError(f"deepspeed file {path} must hold a JSON object, found {type(raw).__name__}")
    return raw


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects by their key, `section.key`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
