"""Starts the process with fake CUDA, once for all cases of a test file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import launching

from fake_cuda import LIBRARY
from fake_cuda.library import library


class Facts:
    """What a function found in each of its cases; a case that failed, or was not reached, fails the test that asks."""

    def __init__(self, cases: Sequence[dict[str, Any]], output: str):
        self._cases, self._output = list(cases), output
        lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"case": ')]
        self._results = {line["case"]: line for line in lines}

    def of(self, **case: Any) -> Any:
        result = self._results.get(self._cases.index(case), {"error": f"did not run:\n{self._output[-4000:]}"})
        assert "error" not in result, result["error"]
        return result["facts"]


def on_fake_cuda(target: str, cases: Sequence[dict[str, Any]], time_limit_s: float = 300) -> Facts:
    """`MODULE:FUNCTION(**case)` of every case, in one process with fake CUDA; cases and facts are JSON.

    Skips where fake CUDA cannot be compiled. MODULE is imported there, after the hooks and before any case.
    """
    command = [sys.executable, "-m", "fake_cuda.child", target, json.dumps(list(cases))]
    done = launching.finish(launching.start(command, **{LIBRARY: str(library())}), time_limit_s)
    return Facts(cases, done.stdout)
