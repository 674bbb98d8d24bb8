"""Processes that start with torch, DeepSpeed and transformers loaded: forked from a server that imported them.

Importing them takes a rank some seconds, three times in a row under the launcher. What is forked here starts in a few
hundredths of a second and is a process of its own, so nothing that one test leaves behind reaches the next one.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

_context: Any = get_context("forkserver")
_context.set_forkserver_preload(["warm_libraries"])


def fork(target: Any, *arguments: Any) -> BaseProcess:
    """Start `target(*arguments)`, a function of a module of the tests."""
    # The server is started as `python -c` and ignores a preload it cannot import, so it is told where the tests are.
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
        forkserver.ensure_running()
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def become(
    arguments: Sequence[str], folder: str, environment: dict[str, str], streams: Sequence[str], threads: int
) -> None:
    """Be `python ARGUMENTS` in `folder`, a script or `-m MODULE`; `streams` are files for stdout and stderr."""
    assert "warm_libraries" in sys.modules, "the server of forks has not imported tests/warm_libraries.py"
    threading.Thread(target=_end_with_tests, daemon=True).start()
    import hardware
    import torch

    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    torch.set_num_threads(threads)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    hardware.settle()
    is_module = arguments[0] == "-m"
    name, sys.argv = (arguments[1], list(arguments[1:])) if is_module else (arguments[0], list(arguments))
    sys.orig_argv = [sys.executable, *arguments]
    first = folder if is_module else str(Path(name).parent.resolve())
    named = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *named, *map(str, _libraries())]
    if "FAULT" in environment:
        # Python itself imports it only when an interpreter starts.
        runpy.run_path(str(Path(__file__).with_name("fault_site") / "sitecustomize.py"))
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")


def _end_with_tests() -> None:
    """Tests that are killed cannot end what they have started."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _libraries() -> list[Path]:
    """The paths of the interpreter and its packages, without those that pytest has put there."""
    entries = [Path(entry) for entry in sys.path if entry]
    return [entry for prefix in (sys.base_prefix, sys.prefix) for entry in entries if entry.is_relative_to(prefix)]
