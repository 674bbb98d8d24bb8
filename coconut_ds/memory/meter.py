"""Peak memory: the allocator's on a GPU; live tensor bytes or the resident set on a CPU."""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from coconut_ds.engine.internals import TorchDispatchMode, tree_iter
from coconut_ds.runtime import distributed

GIB = 2**30


def peak_memory() -> dict[str, float]:
    """Highest memory use for an event, in GiB: on a CPU the resident set since the process started.

    On a GPU since `begin_peak`: allocated by tensors, and reserved for them, which decides whether a run fits, because
    it holds the fragments, too.
    """
    if distributed.device().type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_memory_gib": allocated / GIB, "peak_reserved_gib": reserved / GIB}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


def begin_peak() -> None:
    """Forget the peak so far on a GPU; does nothing on a CPU."""
    if distributed.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()


class LiveTensorMeter(TorchDispatchMode):
    """Counts the bytes of live tensors created inside the context, as an allocator would, without a GPU.

    `live` and `peak` are bytes; `history` is `live` after each operation. A storage counts once, however many views it
    has, and not at all if it existed before; temporaries inside a kernel are not seen. Slow: every operation passes
    through Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.history: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._register(storage, n_bytes=0)
        result = function(*args, **kwargs)
        for storage in _storages(result):
            self._register(storage, storage.nbytes())
        self.history.append(self.live)
        return result

    def _register(self, storage: torch.UntypedStorage, n_bytes: int) -> None:
        key = id(storage)  # torch keeps one Python object per storage for its whole life
        if key in self._known:
            return
        self._known.add(key)
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, n_bytes)

    def _release(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.live -= n_bytes


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor))
