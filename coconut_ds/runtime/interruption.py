"""SIGTERM and SIGINT end a run after the current step, with a checkpoint, instead of at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from coconut_ds.runtime import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Inside it (`with`), a signal is noted; `agreed` asks all ranks whether one of them has been given one.

    A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self._noted = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *raised: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop, the same answer on every rank; called on all of them."""
        return distributed.any_over_ranks(self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = True
