"""How a rank ends."""

from __future__ import annotations

import sys

import launching

from coconut_ds.runtime import distributed

_SCRIPT = """
import atexit, sys
from coconut_ds.runtime.distributed import end_process

class Torn:
    def __del__(self):
        print("taken apart")

kept = Torn()
atexit.register(print, "exit handler")
sys.stdout.write("no newline, ")
end_process(3)
"""


def test_before_there_is_a_group_a_mistake_of_the_user_is_told_once_and_anything_else_by_each_rank(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert distributed.report_failure(f"mistake, {rank}", 2) == 2
        assert distributed.report_failure(f"fault, {rank}", 1) == 1
    assert capsys.readouterr().err.splitlines() == ["mistake, 0", "fault, 0", "fault, 1"]


def test_a_process_ends_after_its_exit_handlers_and_without_the_interpreter_s_teardown():
    done = launching.finish(launching.start([sys.executable, "-c", _SCRIPT]))
    assert done.returncode == 3
    assert done.stdout == "no newline, exit handler\n"
