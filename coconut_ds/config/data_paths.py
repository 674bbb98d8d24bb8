"""Names of data sets in a run file: a file, or `hub:OWNER/NAME[/CONFIG]:SPLIT`, a dataset of the hub."""

from __future__ import annotations

from pathlib import Path

_HUB = "hub:"


def on_hub(path: str) -> str | None:
    """OWNER/NAME[/CONFIG]:SPLIT of a dataset of the hub; None for a file."""
    return path.removeprefix(_HUB) if path.startswith(_HUB) else None


def is_there(path: str) -> bool:
    """Whether a file is there; of a dataset of the hub that is not known before it is loaded."""
    return on_hub(path) is not None or Path(path).is_file()


def file_name(path: str) -> str:
    """Without folders, which are nobody's business: `prosqa_test.json`, or the name on the hub."""
    return on_hub(path) or Path(path).name


def short_name(path: str) -> str:
    """For names of files: `prosqa_test`, or `owner_name_split`."""
    name = on_hub(path)
    return Path(path).stem if name is None else name.replace("/", "_").replace(":", "_")
