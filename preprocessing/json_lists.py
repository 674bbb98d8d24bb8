"""Writes record files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_list(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as one JSON list, as the trainer reads it, and print their number; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path}: {len(records)} examples")
