"""Starts ranks for the tests, each start with a time limit, and leaves none of them running."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

import warm_server
import yaml

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 300
_TO_END_S = 30  # what the launcher gives ranks that it ends
_TO_FOLLOW_S = 5
"""For ranks with the same error to report it. The launcher looks once a second; a busy machine takes longer."""
may_start_ranks = True
"""False while a test runs that does not have the marker `ranks`."""
fresh_ranks = False
"""Set by the option `--fresh-ranks`: every rank is started by the launcher."""
_LAUNCHER = Path(sys.executable).with_name("deepspeed")


def environment(**more: str) -> dict[str, str]:
    quiet = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = (ROOT / "tests" / "fault_site", ROOT, ROOT / "tests", ROOT / "preprocessing")
    # Ranks share the cores of the machine, whatever number of threads the tests were given.
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return {
        **inherited,
        **quiet,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        **more,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], **more: str) -> subprocess.Popen:
    """A process in a group of its own, so that all of it can be ended."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, time_limit_s: float = TIME_LIMIT_S) -> subprocess.CompletedProcess:
    """Wait for a started process; whatever happens, nothing of its group stays."""
    try:
        output, _ = process.communicate(timeout=time_limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {time_limit_s} s: {process.args}\n{output[-4000:]}") from None
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def on_terminal(command: list[str], time_limit_s: float = TIME_LIMIT_S, columns: int = 110, **more: str) -> str:
    """What a command writes to a terminal of its own, carriage returns included; it has to end with status 0."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    os.close(its)
    timer = threading.Timer(time_limit_s, end, [process])
    timer.start()
    shown = b""
    try:
        # Reading fails once no process holds the other end.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                shown += data
        status = process.wait()
    finally:
        timer.cancel()
        end(process)
        os.close(ours)
    assert status == 0, f"exit status {status}\n{shown[-6000:].decode()}"
    return shown.decode().replace("\r\n", "\n")


def end(process: subprocess.Popen) -> None:
    """End the whole group, and remove what ranks that did not end by themselves left in shared memory."""
    ended_well = process.poll() == 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if "--master_port" in process.args and not ended_well:
        _remove_shared_memory(process.args[process.args.index("--master_port") + 1])


def _demand_marker() -> None:
    assert may_start_ranks, "a test that starts ranks has the marker `ranks`: pytest -m 'not ranks' is the quick part"


def train_command(run_file: Path, ranks: int, *arguments: str) -> list[str]:
    """The published command, with a port of its own."""
    _demand_marker()
    launcher = [str(_LAUNCHER), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [*launcher, "coconut_ds/train.py", "--run", str(run_file), *arguments]


def train(run: dict[str, Any], folder: Path, ranks: int, *arguments: str, expect: int = 0, **more: str) -> str:
    """Run the trainer's entry on warm ranks with `run` as its YAML; its output, once its exit status is as expected."""
    result = on_warm_ranks(ranks, ["coconut_ds/train.py", "--run", str(write_run(run, folder)), *arguments], **more)
    assert result.returncode == expect, f"exit status {result.returncode}\n{result.stdout[-6000:]}"
    return result.stdout


def write_run(run: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def events(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def on_ranks(ranks: int, code: str, **values: Any) -> list[Any]:
    """Run `code` on gloo ranks; what each assigned to `result` (JSON), by rank. `code` sees `values` as variables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "script.py"
        prologue = f"import json, os\nglobals().update(json.loads({json.dumps(json.dumps(values))}))\n"
        epilogue = (
            f"\nopen(f'{folder}/result' + os.environ['RANK'], 'w').write(json.dumps(result))\n"
            "from coconut_ds.runtime import distributed\ndistributed.close()\ndistributed.end_process(0)\n"
        )
        script.write_text(prologue + code + epilogue, encoding="utf-8")
        # One thread each, however many cores there are: the last bits of a result hang on their number, and ranks that
        # share cores wait for each other at every turn.
        done = on_warm_ranks(ranks, [str(script)], OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout[-6000:]
        return [json.loads((folder / f"result{rank}").read_text()) for rank in range(ranks)]


def on_warm_ranks(
    ranks: int, command: list[str], time_limit_s: float = TIME_LIMIT_S, abruptly: bool = False, **more: str
) -> subprocess.CompletedProcess:
    """What the launcher would do with the script and arguments of `command`: its output and exit status.

    Once a rank has failed, the others are ended: by SIGKILL if `abruptly`, else by SIGTERM.
    """
    if fresh_ranks:
        options = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        _demand_marker()
        return finish(start([str(_LAUNCHER), *options, *command], **more), time_limit_s)
    return WarmRanks(ranks, command, **more).finish(time_limit_s, abruptly)


def without_launcher(arguments: list[str], threads: int = 2, **more: str) -> subprocess.CompletedProcess:
    """What `python ARGUMENTS` would do, a script with its arguments, on a warm process: its output and exit status."""
    if fresh_ranks:
        return finish(start([sys.executable, *arguments], OMP_NUM_THREADS=str(threads), **more))
    with tempfile.NamedTemporaryFile() as output:
        streams = [output.name] * 2
        process = warm_server.fork(warm_server.become, arguments, str(ROOT), environment(**more), streams, threads)
        try:
            status = _first_failure([process], time.monotonic() + TIME_LIMIT_S, abruptly=True)
        finally:
            process.kill()
            process.join()
        shown = Path(output.name).read_text(encoding="utf-8", errors="replace")
    assert status is not None, f"no end after {TIME_LIMIT_S} s: {arguments}\n{shown[-4000:]}"
    return subprocess.CompletedProcess(arguments, status, shown, "")


class WarmRanks:
    """Ranks that run the script and arguments of `command`, started as under the launcher but without imports.

    The first rank that fails ends the others and gives the status. `finish` or `end` has to be called.
    """

    def __init__(self, ranks: int, command: list[str], **more: str):
        _demand_marker()
        self.command, self._port = command, str(free_port())
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name) / "output"
        placed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port, "WORLD_SIZE": str(ranks)}
        placed |= {"LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
        threads = int(more.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // ranks)))
        streams = [str(self._output)] * 2
        self.processes: list[Any] = []
        for rank in range(ranks):
            environ = environment(**more, **placed, RANK=str(rank), LOCAL_RANK=str(rank))
            arguments = [command[0], f"--local_rank={rank}", *command[1:]]
            self.processes.append(warm_server.fork(warm_server.become, arguments, str(ROOT), environ, streams, threads))

    def poll(self) -> int | None:
        """The status of the first rank that failed, 0 when all ended well, None while they run."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def shown(self) -> str:
        """What the ranks have written so far."""
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    def finish(self, time_limit_s: float = TIME_LIMIT_S, abruptly: bool = False) -> subprocess.CompletedProcess:
        try:
            status = _first_failure(self.processes, time.monotonic() + time_limit_s, abruptly)
            shown = self.shown()
        finally:
            self.end()
        if status is None:
            raise AssertionError(f"no end after {time_limit_s} s: {self.command}\n{shown[-4000:]}")
        return subprocess.CompletedProcess(self.command, status, shown, "")

    def end(self) -> None:
        """End them all, and remove what ranks that did not end by themselves left in shared memory."""
        ended_well = self.poll() == 0
        for process in self.processes:
            process.kill()
            process.join()
        if not ended_well:
            _remove_shared_memory(self._port)
        self._folder.cleanup()


def _first_failure(processes: list[Any], give_up: float, abruptly: bool) -> int | None:
    """The status of the first process that failed, 0 when all ended well, None when the time was up.

    Once one fails, the others are ended: by SIGKILL if `abruptly`, else by SIGTERM.
    """
    running = {process.sentinel: process for process in processes}
    status = 0
    while running:
        left = give_up - time.monotonic()
        ended = connection.wait(list(running), timeout=max(0, left))
        if not ended:
            return None
        for process in [running.pop(sentinel) for sentinel in ended]:
            process.join()
            if process.exitcode and not status:
                status = process.exitcode
                for other in running.values():
                    if abruptly:
                        other.kill()
                    else:
                        other.join(_TO_FOLLOW_S)
                        other.terminate()
                give_up = min(give_up, time.monotonic() + _TO_END_S)
    return status


def _remove_shared_memory(port: str) -> None:
    """What DeepSpeed's all-reduce leaves of ranks that did not end by themselves."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)
