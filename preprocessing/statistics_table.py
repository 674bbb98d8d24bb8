"""The output of every `stats` command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_statistics(found: Mapping[str, Any]) -> None:
    """Print one line per figure; dicts are shares, floats have four digits."""
    for name, value in found.items():
        if isinstance(value, dict):
            text = "  ".join(f"{key}: {share:.1%}" for key, share in value.items())
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:>20}  {text}")
