"""DeepSpeed compiles its operators on first use: reports a long compilation and a wait for a lock file.

    python -m coconut_ds.engine.operator_build LOG

compiles the operators that CPU ranks need, which `./launch.sh` does once; the compilers' output goes to LOG.

torch locks an operator's folder during a build with a file `lock`; other processes wait until it is removed. A process
that is killed while it compiles leaves the file behind, and every later run would wait forever.
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
"""Seconds until the first line; loading a compiled operator takes about one second."""
_AGAIN_S = 60.0


@contextlib.contextmanager
def builds_announced() -> Iterator[None]:
    """Context in which one rank per machine reports what it compiles, or which lock file it waits for."""
    if distributed.local_rank() != 0:
        yield
        return
    baton = file_baton()
    acquire, wait, release = baton.try_acquire, baton.wait, baton.release
    compiling = contextlib.ExitStack()

    def acquire_aloud(self: Any) -> bool | None:
        acquired = acquire(self)
        if acquired:
            operator = Path(self.lock_file_path).parent.name
            text = f"compiling DeepSpeed's operator {operator}, which is done once and takes a minute or two"
            compiling.enter_context(_repeated(lambda: text))
        return acquired

    def wait_aloud(self: Any) -> None:
        with _repeated(lambda: waiting_text(Path(self.lock_file_path))):
            wait(self)

    def release_and_stop(self: Any) -> None:
        compiling.close()
        release(self)

    # Methods and not the class, which torch.utils.cpp_extension has imported by name.
    replaced = {"try_acquire": acquire_aloud, "wait": wait_aloud, "release": release_and_stop}
    with contextlib.ExitStack() as undo:
        for name, method in replaced.items():
            undo.callback(setattr, baton, name, getattr(baton, name))
            setattr(baton, name, method)
        yield


def waiting_text(lock: Path) -> str | None:
    """The line for a wait for `lock`: another process compiles, or the file is stale; None if it no longer exists."""
    operator = lock.parent.name
    with contextlib.suppress(FileNotFoundError):
        age = timedelta(seconds=round(time.time() - lock.stat().st_mtime))
        if builder := _builder(lock.parent):
            return f"waiting for process {builder}, which compiles DeepSpeed's operator {operator} ({lock}, {age} old)"
        # torch does not compile after it has waited.
        then = "and this run continues" if list(lock.parent.glob("*.so")) else "and rerun the same command"
        return (
            f"waiting for {lock}, {age} old: it locks DeepSpeed's operator {operator}, and no process of this machine "
            "compiles that; a killed run leaves such a file. Unless another machine that shares the folder compiles "
            f"it, remove it (rm {shlex.quote(str(lock))}) {then}"
        )
    return None


def _builder(folder: Path) -> int | None:
    """The id of a process on this machine whose working directory is the folder, as for ninja and compilers."""
    folder = folder.resolve()
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] and Path(process.info["cwd"]) == folder:
            return int(process.pid)
    return None


@contextlib.contextmanager
def _repeated(text: Callable[[], str | None]) -> Iterator[None]:
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
    """Exit status 0 if the operators are compiled, 1 if that fails; the log has the reason."""
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
