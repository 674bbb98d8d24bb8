"""JSON as RFC 8259 defines it, which has no NaN and no Infinity: floats that are not finite are written as null.

The only caller of `json.dumps`. Python's own `NaN` and `Infinity` are refused by jq, browsers and most other readers.
"""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """`value` as JSON; `options` are those of `json.dumps`."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_nulls(value), allow_nan=False, **options)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(key): _with_nulls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(key: Any) -> Any:
    # A key is text, so it keeps its name.
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
