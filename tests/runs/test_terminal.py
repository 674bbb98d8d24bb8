"""What a person sees, and what goes to the log: in processes of their own, since descriptors are diverted."""

from __future__ import annotations

import os
import sys
import textwrap

import launching
import pytest

from coconut_ds.errors import InputError
from coconut_ds.runs import terminal
from coconut_ds.runs.terminal import EpochProgress, Pace, libraries_to, say

_NOISY = """
import os, sys, warnings
from pathlib import Path
from coconut_ds.runs.terminal import libraries_to, say, terminal

print("before")
with libraries_to(Path(sys.argv[1]) if len(sys.argv) > 1 else None):
    say("a line")
    print("from Python")
    warnings.warn("a warning", stacklevel=1)
    os.write(2, b"from a library in C\\n")
    os.system("echo from a compiler")
    print("what went wrong", file=terminal())
print("after")
"""


def run(*arguments: str) -> str:
    done = launching.finish(launching.start([sys.executable, "-c", _NOISY, *arguments]), 60)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_libraries_go_to_the_log_and_lines_to_the_person(tmp_path):
    assert run(str(tmp_path / "run" / "run.log")).splitlines() == ["before", "a line", "what went wrong", "after"]
    log = (tmp_path / "run" / "run.log").read_text()
    for noise in ("from Python", "a warning", "from a library in C", "from a compiler"):
        assert noise in log


def test_a_second_process_adds_to_the_log(tmp_path):
    for _ in range(2):
        run(str(tmp_path / "run.log"))
    assert (tmp_path / "run.log").read_text().count("from a compiler") == 2


def test_verbose_shows_everything():
    shown = run()
    for noise in ("a line", "from Python", "a warning", "from a library in C", "from a compiler", "what went wrong"):
        assert noise in shown


def test_streams_are_put_back_after_an_error(tmp_path, capsys):
    streams = sys.stdout, sys.stderr

    def fails() -> None:
        with libraries_to(tmp_path / "run.log"):
            print("lost")
            say("seen")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert (sys.stdout, sys.stderr) == streams
    assert capsys.readouterr().out == "seen\n"
    assert (tmp_path / "run.log").read_text() == "lost\n"


def test_streams_are_put_back_where_the_disk_of_the_log_is_full(tmp_path, capfd):
    (tmp_path / "run.log").symlink_to("/dev/full")
    streams, places = (sys.stdout, sys.stderr), [os.fstat(number).st_ino for number in (1, 2)]

    def prints() -> None:
        with libraries_to(tmp_path / "run.log"):
            print("more than the disk holds")

    with pytest.raises(OSError, match="No space left on device"):
        prints()
    assert (sys.stdout, sys.stderr) == streams
    assert [os.fstat(number).st_ino for number in (1, 2)] == places
    print("seen")
    assert capfd.readouterr().out == "seen\n"


def test_a_log_within_a_log_gives_back_to_the_outer_one(tmp_path, capsys):
    with libraries_to(tmp_path / "outer.log"):
        with libraries_to(tmp_path / "inner.log"):
            print("inner")
        print("outer")
        say("seen")
    assert (tmp_path / "inner.log").read_text() == "inner\n"
    assert (tmp_path / "outer.log").read_text() == "outer\n"
    assert capsys.readouterr().out == "seen\n"


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"save_path: .*/file cannot be made or written to"),
        libraries_to(tmp_path / "file" / "run.log"),
    ):
        pass


_BAR = """
import time

from coconut_ds.runs.terminal import EpochProgress, Pace, progress, say

pace = Pace(steps=8, evaluations=2)
with EpochProgress("epoch 1/2, stage 0", 4, pace) as bar:
    for _ in range(4):
        pace.stepped(64, 0.5)
        time.sleep(0.15)  # tqdm draws ten times a second at most
        bar.step(1.25)
list(progress(range(3), 3, "evaluating"))
say("epoch 1/2, stage 0: accuracy 50.0%")
"""


def test_a_bar_on_a_terminal_says_loss_speed_and_time_left_and_goes():
    shown = launching.on_terminal([sys.executable, "-c", _BAR])
    assert "| 2/4, loss 1.250, 128 examples/s, ETA 0:01 this epoch, 0:03 this run" in shown
    assert "evaluating" in shown
    last = shown.rstrip("\r\n").split("\r")[-1]
    assert last == "epoch 1/2, stage 0: accuracy 50.0%"


def test_elsewhere_there_is_no_bar():
    done = launching.finish(launching.start([sys.executable, "-c", textwrap.dedent(_BAR)]), 60)
    assert done.stdout == "epoch 1/2, stage 0: accuracy 50.0%\n"


def test_long_epochs_say_where_they_stand(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_PLAIN_LINES_APART_S", 0)
    pace = Pace(steps=8, evaluations=1)
    with EpochProgress("epoch 1/1, stage 0", 8, pace) as bar:
        for _ in range(8):
            pace.stepped(64, 60.0)
            bar.step(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 1/1, stage 0: 2/8, loss 0.500, 1.07 examples/s, ETA 6:00 this epoch, 6:00 this run"
    assert [line.split()[4] for line in lines] == ["2/8,", "4/8,", "6/8,"]


def test_before_the_first_step_nothing_is_promised():
    assert Pace(steps=10, evaluations=2).seconds_left() == 0


def test_steps_and_evaluations_that_are_left_take_as_long_as_the_latest():
    pace = Pace(steps=10, evaluations=2)
    pace.stepped(64, 2.0)
    assert pace.examples_per_s == 32
    assert pace.seconds_for(4) == 8
    assert pace.seconds_left() == 9 * 2
    pace.evaluated(5.0)
    assert pace.seconds_left() == 9 * 2 + 1 * 5


def test_a_slow_step_moves_the_average_by_a_tenth():
    pace = Pace(steps=10, evaluations=0)
    pace.stepped(64, 1.0)
    pace.stepped(64, 2.0)
    assert pace.seconds_for(1) == pytest.approx(1.1)
    assert pace.examples_per_s == pytest.approx(64 - 3.2)
