"""DeepSpeed compiles its operators on first use: a person is told when that takes long or waits for a lock file.

    python -m coconut_ds.engine.operator_build LOG

compiles those that CPU ranks need, which `./launch.sh` does once; what compilers print goes to LOG.

torch keeps other processes out of a build by a file `lock` in the operator's folder, and they wait until it is gone. A
process that is killed while it compiles leaves the file behind, and every later run would wait for ever.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from coconut_ds.engine.internals import cpu_operators, file_baton
from coconut_ds.runs.terminal import libraries_to, terminal
from coconut_ds.runtime import distributed

_QUIET_S = 10.0
"""Seconds until something is said; an operator that is compiled already is loaded in one."""
_AGAIN_S = 60.0


@contextlib.contextmanager
def builds_announced() -> Iterator[None]:
    """Inside it one rank of each machine says on the terminal what it compiles, or which lock file it waits for."""
    if distributed.local_rank() != 0:
        yield
        return
    baton = file_baton()
    acquire, wait, release = baton.try_acquire, baton.wait, baton.release
    compiling = contextlib.ExitStack()

    def acquire_aloud(self: Any) -> bool | None:
        acquired = acquire(self)
        if acquired:
            compiling.enter_context(_said_now_and_then(lambda: _compiling_text(Path(self.lock_file_path))))
        return acquired

    def wait_aloud(self: Any) -> None:
        with _said_now_and_then(lambda: waiting_text(Path(self.lock_file_path))):
            wait(self)

    def release_and_stop(self: Any) -> None:
        compiling.close()
        release(self)

    # Methods and not the class, which torch.utils.cpp_extension has imported by name.
    replaced = {"try_acquire": acquire_aloud, "wait": wait_aloud, "release": release_and_stop}
    before = {name: getattr(baton, name) for name in replaced}
    for name, method in replaced.items():
        setattr(baton, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(baton, name, method)


def _compiling_text(lock: Path) -> str:
    return f"compiling DeepSpeed's operator {lock.parent.name}, which is done once and takes a minute or two"


def waiting_text(lock: Path) -> str | None:
    """What a wait for `lock` comes to: somebody compiles, or the file was left behind; None if it is gone."""
    operator = lock.parent.name
    with contextlib.suppress(FileNotFoundError):
        age = timedelta(seconds=round(time.time() - lock.stat().st_mtime))
        if builder := _builder(lock.parent):
            return f"waiting for process {builder}, which compiles DeepSpeed's operator {operator} ({lock}, {age} old)"
        # torch does not compile after it has waited.
        then = "and this run goes on" if list(lock.parent.glob("*.so")) else "and start the run again"
        return (
            f"waiting for {lock}, {age} old: it locks DeepSpeed's operator {operator}, and no process of this machine "
            "compiles that; a killed run leaves such a file. Unless another machine that shares the folder compiles "
            f"it, remove it (rm {shlex.quote(str(lock))}) {then}"
        )
    return None


def _builder(folder: Path) -> int | None:
    """A process of this machine that works in an operator's folder, as ninja and its compilers do."""
    folder = folder.resolve()
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] and Path(process.info["cwd"]) == folder:
            return int(process.pid)
    return None


@contextlib.contextmanager
def _said_now_and_then(text: Callable[[], str | None]) -> Iterator[None]:
    ended = threading.Event()

    def speak() -> None:
        pause = _QUIET_S
        while not ended.wait(pause):
            if line := text():
                print(line, file=terminal(), flush=True)
            pause = _AGAIN_S

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


def main(arguments: list[str]) -> int:
    """0 when the operators are there, 1 with everything in the log when they cannot be compiled."""
    with libraries_to(Path(arguments[0])), builds_announced():
        try:
            for builder in cpu_operators():
                builder.load(verbose=False)
        except Exception:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
