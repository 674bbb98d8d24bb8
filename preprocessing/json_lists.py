"""How the generators write their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_list(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as the trainer reads them, one JSON list, and print how many; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path}: {len(records)} examples")
