"""One process at a time writes to a run folder or an exported one; who comes second is told and touches nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import launching
import psutil
import pytest
import tiny

from coconut_ds.commands import export, sweep
from coconut_ds.errors import InputError
from coconut_ds.runs import lock as run_lock
from coconut_ds.runs.lock import HeldError, run_folder_held

RUN_LOCK = "run.lock"
HOLD = """
import sys, time
from pathlib import Path
from coconut_ds.runs.lock import run_folder_held
with run_folder_held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path, code: str = HOLD, **more: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=launching.environment(**more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def contents(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every file and folder with the time it was changed and what it holds."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (folder, *folder.rglob("*"))
    }


def test_the_holder_says_who_it_is_and_leaves_nothing(tmp_path):
    with run_folder_held(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / RUN_LOCK).read_text())
    assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert abs(time.time() - time.mktime(time.strptime(holder["since"][:19], "%Y-%m-%d %H:%M:%S"))) < 60
    assert holder["command"]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_process_is_told_who_holds_it_and_touches_nothing(tmp_path):
    folder = tmp_path / "with blank" / "run"
    with held_elsewhere(folder) as process:
        (folder / "metrics.jsonl").write_text("{}\n")
        before = contents(folder)
        with pytest.raises(HeldError) as raised, run_folder_held(folder):
            pytest.fail("it is held")
        assert contents(folder) == before
    said = str(raised.value)
    assert f"{folder} is in use by process {process.pid} on {socket.gethostname()} since " in said
    assert f"wait until it ends, stop it (kill {process.pid}), or set another name= or save_path=" in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_holder_leaves_a_file_that_keeps_nobody_out(tmp_path, number):
    with held_elsewhere(tmp_path) as process:
        process.send_signal(number)
        process.wait()
        assert json.loads((tmp_path / RUN_LOCK).read_text())["pid"] == process.pid
        assert not run_lock.run_folder_is_held(tmp_path)
        with run_folder_held(tmp_path):
            assert json.loads((tmp_path / RUN_LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "other_path",
    [
        lambda folder: Path(os.path.relpath(folder)),
        lambda folder: folder.parent / "link",
        lambda folder: folder.parent / "." / "other" / ".." / folder.name,
    ],
    ids=["relative", "symlink", "dots"],
)
def test_it_is_the_folder_that_is_held_and_not_its_spelling(tmp_path, other_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(folder)
    with held_elsewhere(folder), pytest.raises(HeldError), run_folder_held(other_path(folder)):
        pass
    with held_elsewhere(other_path(folder)), pytest.raises(HeldError), run_folder_held(folder):
        pass


@pytest.mark.parametrize("text", ["", '{"pid": 12', "[]", "null", '{"pid": "x", "host": 1}', "\udcff"])
def test_a_holder_that_cannot_be_read(tmp_path, text):
    file = tmp_path / RUN_LOCK
    content = text.encode("utf-8", "surrogateescape")
    with held_elsewhere(tmp_path):
        file.write_bytes(content)
        with pytest.raises(HeldError, match=r"another process .* does not say which.*fuser"), run_folder_held(tmp_path):
            pass
        assert file.read_bytes() == content
    file.write_bytes(content)
    with run_folder_held(tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_forked_children_do_not_keep_the_lock(tmp_path):
    """A loader's worker that outlives a killed rank."""
    code = """
import os, sys, time
from pathlib import Path
from coconut_ds.runs.lock import run_folder_held
with run_folder_held(Path(sys.argv[1])):
    if not (child := os.fork()):
        time.sleep(60)
    Path(sys.argv[1], "child").write_text(str(child))
    print("held", flush=True)
    sys.stdin.readline()
"""
    with held_elsewhere(tmp_path, code) as process:
        process.kill()
        process.wait()
        child = int((tmp_path / "child").read_text())
        try:
            with run_folder_held(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_of_many_starts_at_once_one_gets_the_folder(tmp_path):
    """Over and over: the holder removes its file while others open it."""
    code = """
import sys, time
from pathlib import Path
from coconut_ds.runs import lock as run_lock
run_lock._PATIENCE_S = 200
folder = Path(sys.argv[1])
for _ in range(20):
    with run_lock.run_folder_held(folder / "run"):
        (folder / "inside").mkdir()
        time.sleep(0.001)
        (folder / "inside").rmdir()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, env=launching.environment(), stderr=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate(timeout=launching.TIME_LIMIT_S)[1].decode() for process in processes] == [""] * 4


def test_the_same_process_is_kept_out_and_does_not_lose_its_lock(tmp_path):
    with run_folder_held(tmp_path):
        with pytest.raises(HeldError, match=f"process {os.getpid()} "), run_folder_held(tmp_path):
            pass
        assert run_lock.run_folder_is_held(tmp_path)
        code = "import sys; from pathlib import Path; from coconut_ds.runs import lock as run_lock\n"
        code += "print(run_lock.run_folder_is_held(Path(sys.argv[1])))"
        asked = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(asked, env=launching.environment(), capture_output=True, text=True, check=True)
        assert done.stdout == "True\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fails)
    with run_folder_held(tmp_path):
        assert json.loads((tmp_path / RUN_LOCK).read_text())["pid"] == os.getpid()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"{tmp_path}/run.lock cannot be locked ({os.strerror(number)}): nothing keeps a second start"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, number):
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fails)
    expected = rf"save_path: {tmp_path} cannot be made or written to: {os.strerror(number)}; name a folder to write in"
    with pytest.raises(InputError, match=expected), run_folder_held(tmp_path):
        pass


def test_a_start_that_writes_nothing_needs_no_lock(tmp_path):
    with held_elsewhere(tmp_path), run_folder_held(None):
        pass


# Ranks other than 0.

WAIT = HOLD.replace('print("held"', 'print("goes on"')


def start_rank(folder: Path, code: str = WAIT, **more: str) -> subprocess.Popen:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": more["RANK"], "CROSS_RANK": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=launching.environment(**(place | more)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def first_line(process: subprocess.Popen, within_s: float) -> str | None:
    """The first line it writes; None if there is none in that time."""
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.append(process.stdout.readline()), daemon=True)
    reader.start()
    reader.join(within_s)
    return lines[0] if lines else None


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("left", [False, True], ids=["no file", "a killed run's file"])
def test_a_rank_of_the_same_machine_waits_for_rank_0(tmp_path, ended, left):
    folder = tmp_path / "run"
    if left:
        folder.mkdir()
        launch = {"host": socket.gethostname(), "launcher": 1, "master": "127.0.0.1:29500"}
        (folder / RUN_LOCK).write_text(json.dumps({"pid": 1, "launch": launch}))
    before = contents(folder) if left else None
    waiting = start_rank(folder, RANK="1")
    ended.append(waiting)
    # A second reader of the same stream would take a part of what comes later.
    assert select.select([waiting.stdout], [], [], 1.0)[0] == []
    assert (contents(folder) if folder.exists() else None) == before
    ended.append(start_rank(folder, RANK="0"))
    assert first_line(ended[-1], 20) == "goes on\n"
    assert waiting.poll() is None
    waiting.stdin.write("\n")
    out, _ = waiting.communicate(timeout=20)
    assert out.endswith("released\n")


@pytest.mark.parametrize(
    "place",
    [
        {"RANK": "1", "LOCAL_RANK": "0", "CROSS_RANK": "1"},
        # DeepSpeed on a machine of three after one of two.
        {"RANK": "2", "LOCAL_RANK": "2", "CROSS_RANK": "1"},
    ],
)
def test_ranks_of_other_machines_do_not_wait(tmp_path, ended, place):
    ended.append(start_rank(tmp_path, **place))
    assert first_line(ended[0], 20) == "goes on\n"


def test_a_rank_does_not_wait_for_ever(tmp_path, ended):
    code = "from coconut_ds.runs import lock as run_lock\nrun_lock._RANK_0_COMES_S = 0.3\n" + WAIT
    ended.append(start_rank(tmp_path, code, RANK="1"))
    assert re.match(r"\[rank 1\] rank 0 has not locked .*run.lock for 0.3 s", first_line(ended[0], 20))


@pytest.mark.ranks
def test_a_run_that_goes_on_is_not_started_again_evaluated_or_debugged(tmp_path):
    """The published command on two ranks, which are stopped: a file that changes was changed by another start."""
    endless = {"save_path": str(tmp_path / "my runs"), "num_epochs": 4000, "save_every_steps": 2, "keep_checkpoints": 1}
    run_file = launching.write_run(tiny.run(tmp_path) | endless | {"batch_size_training": 2}, tmp_path)
    folder = tmp_path / "my runs" / "run"
    process = launching.start(launching.train_command(run_file, 2))
    try:
        wait_for(lambda: (folder / "checkpoints" / "latest").exists(), process)
        ranks = [
            each
            for each in psutil.Process(process.pid).children(recursive=True)
            if any(part.startswith("--local_rank") for part in each.cmdline())
        ]
        for rank in ranks:
            rank.suspend()
        before = contents(tmp_path)
        checkpoint = next((folder / "checkpoints").glob("epoch_*[0-9]"))
        for count, words in ((2, []), (1, ["only_eval=true", f"load_model_path={checkpoint}"]), (1, ["debug=true"])):
            done = launching.on_warm_ranks(count, ["coconut_ds/train.py", "--run", str(run_file), *words])
            assert done.returncode == 2, done.stdout[-3000:]
            (said,) = re.findall(r"^error: (.* is in use by .*)$", done.stdout, re.MULTILINE)
            assert said.startswith(f"{folder} is in use by process {ranks[0].pid} on ")
            assert f"--run {run_file}" in said
            assert "Traceback" not in done.stdout
            assert contents(tmp_path) == before
        launching.train(tiny.run(tmp_path / "dry") | endless, tmp_path / "dry", 1, "--dry-run")
        for rank in ranks:
            rank.resume()
        ranks[0].send_signal(signal.SIGTERM)
        done = process.communicate(timeout=launching.TIME_LIMIT_S)[0]
        assert process.returncode == 0, done
    finally:
        launching.end(process)
    assert not (folder / RUN_LOCK).exists()
    steps = [event["step"] for event in launching.events(folder, "train_step")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.ranks
def test_a_run_killed_with_its_launcher_is_started_again_at_once(tmp_path):
    run_file = launching.write_run(tiny.run(tmp_path) | {"save_path": str(tmp_path), "num_epochs": 400}, tmp_path)
    folder = tmp_path / "run"
    process = launching.start(launching.train_command(run_file, 2))
    try:
        wait_for(lambda: (folder / "checkpoints" / "latest").exists(), process)
    finally:
        launching.end(process)
    assert json.loads((folder / RUN_LOCK).read_text())["pid"]
    epoch = 1 + max(event["epoch"] for event in launching.events(folder, "train_step"))
    done = launching.on_warm_ranks(2, ["coconut_ds/train.py", "--run", str(run_file), f"num_epochs={epoch}"])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "resuming from " in done.stdout
    assert not (folder / RUN_LOCK).exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    give_up = time.monotonic() + launching.TIME_LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < give_up
        time.sleep(0.05)


# Sweeps.


def test_a_sweep_passes_over_a_run_that_is_going_on(tmp_path, capsys):
    run = launching.write_run(tiny.run(tmp_path) | {"save_path": str(tmp_path / "runs")}, tmp_path)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{run} name=a\n{run} name=b\n")
    folder = tmp_path / "runs" / "b"
    with held_elsewhere(folder) as process:
        before = contents(folder)
        assert sweep.main(["--list", str(listed)]) == 0
        assert contents(folder) == before
    captured = capsys.readouterr()
    assert f"{folder} is in use by process {process.pid} on " in captured.err
    assert captured.out == f"{run} name=a\n"
    # The file of a killed run is no lock.
    assert (folder / RUN_LOCK).exists()
    assert sweep.main(["--list", str(listed)]) == 0
    assert capsys.readouterr().out == f"{run} name=a\n{run} name=b\n"


# Exports.

EXPORT = """
import sys, time
from pathlib import Path
from coconut_ds.commands import export
write = export.write_folder
def slow(folder, *arguments, **more):
    write(folder, *arguments, **more)
    print("held", flush=True)
    sys.stdin.readline()
export.write_folder = slow
sys.exit(export.main([str(Path(sys.argv[1]).parent / "model"), sys.argv[1]]))
"""


@pytest.fixture
def model(tmp_path) -> Path:
    tiny.coconut().save_pretrained(tmp_path / "model", tokenizer())
    return tmp_path / "model"


def tokenizer():
    from coconut_ds.model.scratch import word_tokenizer

    return word_tokenizer([f"w{number}" for number in range(30)], 96)


def test_a_second_export_into_one_folder_is_told_and_the_first_is_whole(tmp_path, model, capsys):
    out = tmp_path / "out"
    with held_elsewhere(out, EXPORT) as process:
        assert not out.exists()
        before = contents(tmp_path)
        assert export.main([str(model), str(out)]) == 2
        assert contents(tmp_path) == before
        assert f"error: {out} is being written by process {process.pid} on " in capsys.readouterr().err
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert {"config.json", "model.safetensors", "coconut.json", "README.md"} <= {path.name for path in out.iterdir()}


def test_a_killed_export_leaves_no_folder_of_that_name_and_the_next_one_writes_it(tmp_path, model, capsys):
    out = tmp_path / "out"
    with held_elsewhere(out, EXPORT) as process:
        process.kill()
        process.wait()
    assert not out.exists()
    assert (tmp_path / "out.unfinished").is_dir()
    (tmp_path / "out.unfinished" / "left").touch()
    assert export.main([str(model), str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert not (out / "left").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path, model, monkeypatch, capsys):
    def fails(folder: Path, *_: object, **__: object) -> None:
        folder.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "write_folder", fails)
    assert export.main([str(model), str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path}/out cannot be written: No space left on device" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_an_export_into_a_place_that_is_no_folder(tmp_path, model, capsys):
    (tmp_path / "file").touch()
    assert export.main([str(model), str(tmp_path / "file" / "out")]) == 2
    assert "out cannot be written: " in capsys.readouterr().err
