"""Runs shell commands whose trainer and tools start in a second: torch and DeepSpeed are imported once for all of them.

`deepspeed` and `python` on the PATH of a `Shell` hand what belongs to the project (`coconut_ds/`, pytest, benchmarks)
to a process forked from one that has the libraries; anything else goes to the real interpreter. So do the commands that
start a trainer, which find a module in place of DeepSpeed's launcher that does what `deepspeed` does here. The trainer
runs as the only rank: the launcher's options are read by its own parser, and the launcher itself is started by others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Listener
from pathlib import Path

import warm_server
from deepspeed.launcher.runner import parse_args

TIME_LIMIT_S = 100
_CLIENT = """
import os, sys
from multiprocessing.connection import Client
arguments = ["deepspeed", *sys.argv[1:]] if sys.argv[0].endswith("runner.py") else sys.argv[1:]
with Client(os.environ["WARM_SOCKET"]) as server:
    server.send((arguments, os.getcwd(), dict(os.environ)))
    status, output, errors = server.recv()
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(status)
"""
_STAND_IN = """#!/usr/bin/env bash
# {name} of a Shell, see tests/warm_commands.py
case "{name} $*" in
  *'print(sys.prefix)'*) echo "$WARM_PREFIX" ;;
  *'-m pip '*) echo "nothing is installed by a test" >&2; exit 1 ;;
  'python -m coconut_ds train'* | 'python -m coconut_ds eval'* | \\
  'python -m coconut_ds demo'* | 'python -m coconut_ds sweep'*)
    PYTHONPATH=$(dirname "$0")/stand_in exec {python} "$@" ;;
  deepspeed\\ * | 'python -m coconut_ds'* | 'python -m pytest'* | 'python coconut_ds/'* | 'python benchmarks/'*)
    exec {python} -I "$(dirname "$0")/client.py" {name} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `output` is what it wrote to stdout and stderr."""

    status: int
    output: str


class Shell:
    """Runs commands by bash in `tree`, a copy of the project, as one who has set it up would. A context manager.

    `python` and `deepspeed` are stand-ins kept in `folder`. `launch.sh` finds the environment set up: the mark it looks
    for lies in `folder` as well, and DeepSpeed's operators are those of this interpreter's environment.
    """

    def __init__(self, tree: Path, folder: Path):
        self.tree = tree
        folder.mkdir()
        (folder / "client.py").write_text(_CLIENT, encoding="utf-8")
        launcher = folder / "stand_in" / "deepspeed" / "launcher"
        launcher.mkdir(parents=True)
        for package in (launcher, launcher.parent):
            (package / "__init__.py").touch()
        (launcher / "runner.py").write_text(_CLIENT, encoding="utf-8")
        for name in ("python", "deepspeed"):
            stand_in = folder / name
            stand_in.write_text(_STAND_IN.format(name=name, python=sys.executable), encoding="utf-8")
            stand_in.chmod(0o755)
        # As launch.sh makes it.
        files = (tree / "constraints.txt").read_bytes() + (tree / "setup.cfg").read_bytes()
        mark = subprocess.run(["cksum"], input=files, capture_output=True, check=True).stdout
        (folder / ".coconut_ds").write_bytes(mark)
        self._sockets = tempfile.TemporaryDirectory()
        socket = str(Path(self._sockets.name) / "socket")
        operators = os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
        # Nothing of the tests' own paths: the copy's modules are to be found, not those of the project.
        inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
        self._environment = inherited | {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "TORCH_EXTENSIONS_DIR": operators,
            "RANKS": "1",
            "WARM_SOCKET": socket,
            "WARM_PREFIX": str(folder),
        }
        self._listener = Listener(socket, backlog=8)

    def __enter__(self) -> Shell:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._listener.close()
        self._sockets.cleanup()

    def run(self, command: str, **more: str) -> Outcome:
        """Run one command with `more` in its environment; what takes longer than TIME_LIMIT_S is killed (status -9)."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.tree,
            env=self._environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Outcome(done.returncode, done.stdout)

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # closed
                return
            # A client that its shell has given up does not wait for an answer.
            with connection, suppress(OSError, EOFError), tempfile.TemporaryDirectory() as folder:
                streams = [str(Path(folder) / name) for name in ("stdout", "stderr")]
                arguments, *place = connection.recv()
                # Small models gain nothing from a second thread and lose much where other tests want the cores.
                process = warm_server.fork(warm_server.become, _arguments(arguments), *place, streams, 1)
                process.join(TIME_LIMIT_S)
                process.kill()
                process.join()
                written = [Path(stream).read_text(encoding="utf-8", errors="replace") for stream in streams]
                connection.send((process.exitcode, *written))


def _arguments(arguments: list[str]) -> list[str]:
    """What an interpreter would be given for `python ...` or `deepspeed ...`."""
    if arguments[0] != "deepspeed":
        return arguments[1:]
    given = parse_args(arguments[1:])
    return [given.user_script, *given.user_args]
