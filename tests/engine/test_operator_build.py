"""DeepSpeed's operators: a person sees what is compiled, and which lock file of a killed build everything waits for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
import tiny
from torch.utils.file_baton import FileBaton

from coconut_ds.engine import operator_build
from coconut_ds.engine.operator_build import builds_announced, waiting_text

OPERATORS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"))


@pytest.fixture
def soon(monkeypatch):
    """Things are said after a moment, and again after another."""
    monkeypatch.setattr(operator_build, "_QUIET_S", 0.2)
    monkeypatch.setattr(operator_build, "_AGAIN_S", 0.3)


@pytest.fixture
def lock(tmp_path) -> Path:
    """Of an operator that was built once, left by a killed process three hours ago."""
    lock = tmp_path / "with blank" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    (lock.parent / "cpu_adam.so").touch()
    lock.touch()
    past = time.time() - 3 * 3600
    os.utime(lock, (past, past))
    return lock


def wait_until_removed(lock: Path, after_s: float) -> None:
    timer = threading.Timer(after_s, lock.unlink)
    timer.start()
    assert not FileBaton(str(lock)).try_acquire()
    FileBaton(str(lock)).wait()
    timer.join()


def test_a_lock_that_was_left_is_named_with_its_age_and_the_way_out_again_and_again(lock, soon, capsys):
    with builds_announced():
        wait_until_removed(lock, 0.8)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    for line in lines:
        assert line.startswith(f"waiting for {lock}, 3:00:0")
        assert "no process of this machine compiles that" in line
        assert line.endswith(f"remove it (rm {shlex.quote(str(lock))}) and this run continues")


def test_without_a_built_operator_the_run_has_to_be_started_again(lock):
    (lock.parent / "cpu_adam.so").unlink()
    assert str(waiting_text(lock)).endswith(" and rerun the same command")


def test_a_process_that_compiles_is_named(lock):
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as builder:
        try:
            assert f"waiting for process {builder.pid}, which compiles DeepSpeed's operator cpu_adam" in waiting_text(
                lock
            )
        finally:
            builder.kill()


def test_what_takes_no_time_is_not_said(lock, capsys):
    with builds_announced():
        wait_until_removed(lock, 0.3)
        baton = FileBaton(str(lock))
        assert baton.try_acquire()
        baton.release()
    assert capsys.readouterr().err == ""


def test_a_first_build_says_that_it_compiles_and_no_more(lock, soon, capsys):
    lock.unlink()
    with builds_announced():
        baton = FileBaton(str(lock))
        assert baton.try_acquire()
        time.sleep(0.4)
        baton.release()
        time.sleep(0.4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiling DeepSpeed's operator cpu_adam")


def test_one_rank_of_a_machine_speaks(lock, soon, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with builds_announced():
        wait_until_removed(lock, 0.5)
    assert capsys.readouterr().err == ""


def test_torch_is_left_as_it_was():
    names = ("try_acquire", "wait", "release")
    before = [getattr(FileBaton, name) for name in names]
    with pytest.raises(KeyError), builds_announced():
        raise KeyError
    assert [getattr(FileBaton, name) for name in names] == before


def named(process: subprocess.Popen, lock: Path) -> str:
    """What a process writes until it names the lock."""
    written = ""
    assert process.stdout is not None
    timer = threading.Timer(launching.TIME_LIMIT_S, launching.end, [process])
    timer.start()
    for line in process.stdout:
        written += line
        if f"waiting for {lock}, " in line:
            timer.cancel()
            return written
    raise AssertionError(f"not named: {lock}\n{written}")


@pytest.fixture
def operators() -> Callable[[Path], Path]:
    def copy(to: Path) -> Path:
        if not (OPERATORS / "cpu_adam" / "cpu_adam.so").is_file():
            pytest.skip("DeepSpeed's operators are not in TORCH_EXTENSIONS_DIR; ./launch.sh setup builds them")
        # With the times of its files, else all of it would be compiled.
        shutil.copytree(OPERATORS, to, dirs_exist_ok=True)
        return to

    return copy


@pytest.mark.ranks
def test_a_run_names_each_lock_on_the_terminal_and_continues_when_it_is_removed(tmp_path, operators):
    folder = operators(tmp_path / "extensions")
    locks = [folder / name / "lock" for name in ("deepspeed_shm_comm", "cpu_adam")]
    for lock in locks:
        lock.touch()
    run_file = launching.write_run(tiny.run(tmp_path) | {"save_path": str(tmp_path), "num_epochs": 1}, tmp_path)
    process = launching.start(launching.train_command(run_file, 2), TORCH_EXTENSIONS_DIR=str(folder))
    try:
        for lock in locks:
            # Once for two ranks.
            assert named(process, lock).count("waiting for ") == 1
            lock.unlink()
        done = launching.finish(process)
    finally:
        launching.end(process)
    assert done.returncode == 0, done.stdout
    assert "waiting for" not in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.ranks
def test_the_set_up_names_a_lock_in_torch_s_own_folder(tmp_path, operators):
    environment = launching.environment(XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    del environment["TORCH_EXTENSIONS_DIR"]
    ask = "from torch.utils.cpp_extension import _get_build_directory; print(_get_build_directory('cpu_adam', False))"
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    folder = operators(Path(asked.stdout.strip()).parent)
    assert folder.is_relative_to(tmp_path)
    lock = folder / "cpu_adam" / "lock"
    lock.touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "coconut_ds.engine.operator_build", str(tmp_path / "log")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        named(process, lock)
        lock.unlink()
        assert process.wait(launching.TIME_LIMIT_S) == 0
    finally:
        launching.end(process)


def test_what_cannot_be_compiled_is_in_the_log(tmp_path, monkeypatch):
    class Fails:
        def load(self, verbose: bool) -> None:
            raise RuntimeError("no compiler")

    monkeypatch.setattr("deepspeed.ops.op_builder.cpu.CPUAdamBuilder", Fails)
    assert operator_build.main([str(tmp_path / "log")]) == 1
    assert re.search("RuntimeError: no compiler", (tmp_path / "log").read_text())
