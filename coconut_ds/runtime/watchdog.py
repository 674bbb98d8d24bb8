"""Ends a process that hangs: a rank that waits for one that is stuck would wait for ever.

When the time is up the process prints where each of its threads stands, and exits with status 1; the launcher then
ends the other ranks. It works while the process is inside a collective, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from typing import IO

_STDERR = 2
_armed: tuple[int, int] | None = None
"""Seconds, and the descriptor for the threads' places; None where nothing is watched."""


@contextlib.contextmanager
def watching(limit_s: int, file: IO[str]) -> Iterator[None]:
    """Inside it `alive` has to be called every `limit_s` seconds; `file` gets the threads' places.

    A `file` without a descriptor, as a notebook has, is replaced by the standard error of the process.
    """
    global _armed
    before, descriptor = _armed, _STDERR
    with contextlib.suppress(AttributeError, OSError, ValueError):
        descriptor = file.fileno()
    _armed = limit_s, descriptor
    try:
        alive()
        yield
    finally:
        _armed = before
        faulthandler.cancel_dump_traceback_later()


def alive() -> None:
    """The time starts anew; nothing happens where nothing is watched."""
    if _armed is not None:
        limit_s, descriptor = _armed
        faulthandler.dump_traceback_later(limit_s, exit=True, file=descriptor)
