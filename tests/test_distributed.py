"""How a rank ends."""

from __future__ import annotations

import sys

import launching

_SCRIPT = """
import atexit, sys
from coconut_ds.distributed import end_process

class Torn:
    def __del__(self):
        print("taken apart")

kept = Torn()
atexit.register(print, "exit handler")
sys.stdout.write("no newline, ")
end_process(3)
"""


def test_a_process_ends_after_its_exit_handlers_and_without_the_interpreter_s_teardown():
    done = launching.finish(launching.start([sys.executable, "-c", _SCRIPT]))
    assert done.returncode == 3
    assert done.stdout == "no newline, exit handler\n"
