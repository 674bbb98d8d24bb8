"""One process at a time writes to a folder: a lock that the kernel releases when its holder dies.

The lock file says who holds it, as JSON: `pid`, `host`, `command`, `since`, and the `launch` the process belongs to.
The file alone means nothing: a killed process leaves it behind without the lock. Needs the standard library only, so
that a second start of a run ends before anything is imported or written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from coconut_ds import strict_json
from coconut_ds.errors import InputError, unwritable_output, unwritable_save_path
from coconut_ds.runs.paths import RunFolder

_HELD = (errno.EACCES, errno.EAGAIN)
_PATIENCE_S = 0.5
"""How long a lock is tried for: a look at it (`holder`) takes it for an instant, and a holder has to write its name."""
_POLL_S = 0.01
_RANK_0_COMES_S = 60
_LONGEST_COMMAND = 160
_held_here: dict[tuple[int, int], dict[str, Any]] = {}
"""What the files this process has locked say, by device and inode. Such a lock does not keep out the process that holds
it, and closing any other descriptor of the file releases it: these are neither opened nor read again."""


class HeldError(InputError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def run_folder_held(folder: Path | None) -> Iterator[None]:
    """Rank 0 holds the run folder, which is made if it is missing. The other ranks of its machine wait until it does.

    Ranks of other machines do not wait: they may see the folder late. None is a start that writes nothing. Raises
    HeldError if another process holds the folder, InputError if it cannot be written; then nothing in it was touched.
    """
    with contextlib.ExitStack() as held:
        if folder is not None and int(os.environ.get("RANK", 0)) == 0:
            file, way_out = RunFolder(folder).lock, "set another name= or save_path="
            held.enter_context(_held(file, folder, unwritable_save_path, "in use", way_out))
        elif folder is not None and _is_on_machine_of_rank_0():
            _wait_for_rank_0(RunFolder(folder).lock)
        yield


def output_held(folder: Path) -> contextlib.AbstractContextManager[None]:
    """A folder to be written is held by a lock file beside it, `NAME.lock`; missing parents are made.

    Raises HeldError if another process is writing it, InputError if it cannot be written.
    """
    file = folder.with_name(f"{folder.name}.lock")
    return _held(file, folder, unwritable_output, "being written", "name another folder")


def run_folder_is_held(folder: Path) -> bool:
    """Whether a process holds a run folder now; nothing is written. False also where it cannot be found out."""
    file = RunFolder(folder).lock
    if _holder_here(file):
        return True
    with contextlib.suppress(OSError), file.open("rb") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _HELD
    return False


def holder_text(file: Path) -> str:
    """Who holds a lock file, since when, and what to do."""
    holder = _holder(file)
    try:
        pid, host = int(holder["pid"]), str(holder["host"])
        command = textwrap.shorten(str(holder["command"]), _LONGEST_COMMAND)
        who = f"process {pid} on {host} since {holder['since']} ({command})"
        stop = f"kill {pid}" if host == socket.gethostname() else f"kill {pid} on {host}"
    except (KeyError, TypeError, ValueError):
        # Damaged, or on a full disk: the lock itself is the kernel's and true.
        who, stop = f"another process ({file} does not say which)", f"fuser {shlex.quote(str(file))} finds it"
    return f"{who}; wait until it ends, stop it ({stop})"


@contextlib.contextmanager
def _held(
    file: Path, folder: Path, unwritable: Callable[[Path, OSError], InputError], use: str, way_out: str
) -> Iterator[None]:
    """Hold `folder` by its lock `file`; what `use` another process makes of it, and the `way_out` beside waiting."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(file)
    except OSError as error:
        raise unwritable(folder, error) from None
    if descriptor is None:
        raise HeldError(f"{folder} is {use} by {holder_text(file)}, or {way_out}")
    key = _key(os.fstat(descriptor))
    try:
        yield
    finally:
        # Removed before it is released: whoever has opened it by then finds that the name is gone, and tries again.
        with contextlib.suppress(OSError):
            if _key(os.stat(file)) == key:
                file.unlink()
        os.close(descriptor)
        del _held_here[key]


def _acquire(file: Path) -> int | None:
    """A descriptor that holds the lock, the holder written; None if another process keeps it. Raises OSError."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        if not _holder_here(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            with contextlib.ExitStack() as failed:
                failed.callback(os.close, descriptor)
                if _lock(descriptor, file):
                    _held_here[_key(os.fstat(descriptor))] = _write_holder(descriptor)
                    failed.pop_all()
                    return descriptor
        if time.monotonic() > give_up:
            return None
        time.sleep(_POLL_S)


def _lock(descriptor: int, file: Path) -> bool:
    """Whether the lock was had, on the file that has the name now: a holder that ends removes its file."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        problem = f"{file} cannot be locked ({error.strerror}): nothing keeps a second start out of this folder"
        print(problem, file=sys.stderr, flush=True)
    with contextlib.suppress(FileNotFoundError):
        return _key(os.stat(file)) == _key(os.fstat(descriptor))
    return False


def _holder_here(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError):
        return _held_here.get(_key(os.stat(file)))
    return None


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _write_holder(descriptor: int) -> dict[str, Any]:
    holder: dict[str, Any] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "launch": _launch(),
    }
    # In one write: whoever reads meanwhile finds all of it or nothing.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (strict_json.dumps(holder) + "\n").encode(), 0)
    return holder


def _holder(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        holder = _holder_here(file) or json.loads(file.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else {}
    return {}


def _launch() -> dict[str, Any]:
    """What all ranks of one start on one machine have in common, and no other start has."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return {"host": socket.gethostname(), "launcher": os.getppid(), "master": f"{address}:{port}"}


def _is_on_machine_of_rank_0() -> bool:
    # DeepSpeed's name and torchrun's. LOCAL_RANK alone does not tell: DeepSpeed counts it modulo the machine's slots.
    machine = os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK"))
    return machine == "0" if machine is not None else os.environ.get("RANK") == os.environ.get("LOCAL_RANK")


def _wait_for_rank_0(file: Path) -> None:
    """Until rank 0 of this launch holds the lock; if it does not get it, it ends and the launcher ends this rank."""
    launch, give_up = _launch(), time.monotonic() + _RANK_0_COMES_S
    while _holder(file).get("launch") != launch:
        if time.monotonic() > give_up:
            problem = f"rank 0 has not locked {file} for {_RANK_0_COMES_S} s; no longer waiting"
            print(f"[rank {os.environ.get('RANK')}] {problem}", file=sys.stderr)
            return
        time.sleep(_POLL_S)
