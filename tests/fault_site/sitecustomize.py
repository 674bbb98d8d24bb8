"""Imported by Python itself in every process that has this folder on its path: lets a rank fail at a chosen call.

FAULT="RANK MODULE FUNCTION COUNT ACTION": the COUNT-th call of MODULE.FUNCTION on that rank kills the process, raises,
hangs, or fails like a full disk. The trainer under test knows nothing of it. MODULE is one of the standard library: to
import torch here, before the trainer has set its threads, would change the last bits of what it computes.

CPU_PRECISIONS="bf16 fp16" says what the CPU can compute in, see `hardware.py`.
"""

import errno
import importlib
import os
import signal
import sys
import time


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise RuntimeError("a fault put here by a test")
    elif action == "hang":
        time.sleep(3600)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _arm(module_name: str, function: str, count: int, action: str) -> None:
    module = importlib.import_module(module_name)
    original = getattr(module, function)
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            _act(action)
        return original(*args, **kwargs)

    setattr(module, function, counted)


# The launcher and its helpers have no rank, or are not the trainer.
if os.environ.get("FAULT") and any(argument.startswith("--local_rank") for argument in sys.orig_argv):
    _rank, _module, _function, _count, _action = os.environ["FAULT"].split()
    if os.environ.get("RANK") == _rank:
        _arm(_module, _function, int(_count), _action)

if "CPU_PRECISIONS" in os.environ:
    import hardware

    hardware.settle()
