"""The hardware that the tests see, set by them: no result may depend on the machine they run on.

GPUs are hidden. A CPU with `avx512_fp16` computes in fp16 for DeepSpeed and another one does not: once `settle` was
called in a process, its CPU has fp32 and what the environment variable CPU_PRECISIONS lists. `conftest.py`,
`fault_site/` and `warm_commands.py` call it, so a test sets the variable for its own process (`monkeypatch.setenv`) in
the same way as for one that it starts. Only the standard library is imported here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

VARIABLE = "CPU_PRECISIONS"
PLAIN = "bf16"
"""What most processors have: the tests run on it, but for those that are about another one."""
WITH_FP16 = "bf16 fp16"
_ACCELERATOR = "deepspeed.accelerator.cpu_accelerator"


def settle() -> None:
    """No GPU, and a CPU that has what CPU_PRECISIONS lists at the time DeepSpeed asks; nothing is imported for it."""
    # In every process anew: DeepSpeed's launcher gives its ranks GPUs by number.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if _ACCELERATOR in sys.modules:
        _patch(sys.modules[_ACCELERATOR])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _patch(module: ModuleType) -> None:
    for precision in ("bf16", "fp16"):
        has = _has(precision)
        setattr(module.CPU_Accelerator, f"is_{precision}_supported", has)


def _has(precision: str) -> Any:
    return lambda self: precision in os.environ.get(VARIABLE, PLAIN).split()


class _Finder(importlib.abc.MetaPathFinder):
    """Patches the module when something imports it: to import torch before the trainer does changes its threads."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _ACCELERATOR:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module
            loader.exec_module = lambda module: (execute(module), _patch(module))
        return spec
