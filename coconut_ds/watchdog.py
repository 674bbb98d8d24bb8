"""Ends a process that hangs: a rank that waits for one that is stuck would wait for ever.

When the time is up the process prints where each of its threads stands, and exits with status 1; the launcher then
ends the other ranks. It works while the process is inside a collective, too.
"""

from __future__ import annotations

import faulthandler
from typing import IO

_limit_s: int | None = None
_file: IO[str] | None = None


def start(limit_s: int, file: IO[str]) -> None:
    """From now on `alive` has to be called every `limit_s` seconds; `file` gets the threads' places."""
    global _limit_s, _file
    _limit_s, _file = limit_s, file
    alive()


def alive() -> None:
    """The time starts anew; nothing happens where no watchdog was started."""
    if _limit_s is not None and _file is not None:
        faulthandler.dump_traceback_later(_limit_s, exit=True, file=_file)


def stop() -> None:
    global _limit_s, _file
    _limit_s = _file = None
    faulthandler.cancel_dump_traceback_later()
