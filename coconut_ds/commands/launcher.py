"""Starts the trainer on every GPU, or on CPU ranks without one, and forwards signals to the ranks.

DeepSpeed's launcher kills its ranks when it gets a signal. Here it runs in a new session, where neither Ctrl-C on a
terminal nor a signal to the caller's process group reaches it, and only the ranks are asked to stop.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from coconut_ds.commands.command_line import add_overrides
from coconut_ds.errors import InputError
from coconut_ds.runtime.nvidia_smi import visible_gpus

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TRAINER = Path(__file__).resolve().parent.parent / "train.py"


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Options for starting ranks, read by `trainer_command`."""
    parser.add_argument(
        "--ranks", metavar="N", help="default: RANKS, else every GPU; without a GPU 2, or 1 on a single core"
    )
    parser.add_argument(
        "--master-port", metavar="N", help="port of this run, one per run on a machine (default: MASTER_PORT, or 29500)"
    )
    parser.add_argument("--verbose", action="store_true", help="show what libraries print, instead of run.log")
    parser.set_defaults(dry_run=False)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """`add_launch_options`, `--dry-run` and overrides, for commands that start one run."""
    add_launch_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and DeepSpeed configurations")
    add_overrides(parser)


def trainer_command(
    run_file: str | Path, overrides: Sequence[str], options: argparse.Namespace, most_ranks: int | None = None
) -> list[str]:
    """The command line of DeepSpeed's launcher for a run, from `deepspeed` on.

    Raises InputError for a number of ranks or a port that is not a whole number above 0, and for more ranks than GPUs.
    """
    gpus = gpus_to_use()
    wanted = _number("--ranks", options.ranks, "RANKS") or len(gpus) or min(2, os.cpu_count() or 1)
    words = ["deepspeed", *_placed(min(wanted, most_ranks or wanted), gpus)]
    if port := _number("--master-port", options.master_port, "MASTER_PORT"):
        words += ["--master_port", str(port)]
    if not options.verbose:
        words.append("--quiet")
    flags = [flag for flag, given in (("--dry-run", options.dry_run), ("--verbose", options.verbose)) if given]
    return [*words, as_seen_from_here(_TRAINER), "--run", str(run_file), *flags, *overrides]


def gpus_to_use() -> list[int]:
    """The visible GPUs of this machine by number; none where DS_ACCELERATOR chooses the CPU."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return []
    return [gpu.index for gpu in visible_gpus()]


def _placed(ranks: int, gpus: list[int]) -> list[str]:
    """Options that start `ranks` ranks on the first of `gpus`, or on the CPU."""
    if gpus and ranks > len(gpus):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        which = f" visible (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise InputError(
            f"{ranks} ranks on {len(gpus)} GPU{'s' * (len(gpus) > 1)}{which}: each rank needs its own; set RANKS or "
            f"--ranks to {len(gpus)} at most, or DS_ACCELERATOR=cpu to train on the CPU"
        )
    if gpus and "CUDA_VISIBLE_DEVICES" in os.environ:
        # With --num_gpus DeepSpeed's launcher drops the variable and takes the first GPUs of the machine.
        return ["--include", f"localhost:{','.join(map(str, gpus[:ranks]))}"]
    return ["--num_gpus", str(ranks)]


def as_seen_from_here(path: Path) -> str:
    """`path` relative to the working directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _number(option: str, given: str | None, variable: str) -> int | None:
    text = given or os.environ.get(variable) or None
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option if given else variable} {text!r}: must be a whole number above 0")
    return int(text)


class Launcher:
    """Runs `trainer_command`s one after another; a context manager that forwards signals to the ranks.

    The first signal asks the ranks to stop, which they do after the current step, with a checkpoint; before there are
    ranks it ends the launcher. The second one kills everything.
    """

    def __init__(self) -> None:
        self._n_signals = 0
        self._running: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Launcher:
        # Signals that the caller ignores stay ignored: SIGHUP under nohup, SIGINT in a background job of a script.
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._pass_on) for number in heeded}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def is_asked_to_stop(self) -> bool:
        return self._n_signals > 0

    def run(self, words: Sequence[str]) -> int:
        """The exit status of a `trainer_command`, as in a shell: 128 + N for a process that signal N ended."""
        if "--quiet" not in words:
            print(f"+ {shlex.join(words)}", flush=True)
        environment = dict(os.environ)
        if not gpus_to_use():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        if "--include" in words:
            # It stands in the words now, and DeepSpeed's launcher would say that it ignores the variable.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        # With this interpreter, because the first `deepspeed` on PATH may belong to another environment.
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *words[1:]]
        self._running = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
        if self._n_signals:  # it came while the process was being started
            self._stop(self._running.pid)
        status = self._running.wait()
        self._running = None
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        if self._running is not None:
            self._stop(self._running.pid)

    def _stop(self, session: int) -> None:
        ranks = list(_ranks_in(session))
        with contextlib.suppress(ProcessLookupError):
            if self._n_signals > 1:
                os.killpg(session, signal.SIGKILL)
            elif not ranks:
                os.killpg(session, signal.SIGTERM)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.terminate()


def _ranks_in(session: int) -> Iterator[psutil.Process]:
    """The ranks that DeepSpeed's launcher has started, without their children: loader workers look the same."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            parent = process.parent()
            if os.getsid(process.pid) == session and _has_rank(process) and not (parent and _has_rank(parent)):
                yield process


def _has_rank(process: psutil.Process) -> bool:
    return any(word.startswith("--local_rank=") for word in process.cmdline())
