"""Libraries that only an extra installs: said to be missing before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from coconut_ds.errors import InputError


def demand_libraries(names: Sequence[str], extra: str) -> None:
    """Raises InputError with the command that installs `extra` where a library of `names` is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} missing: pip install 'coconut_ds[{extra}]'")
