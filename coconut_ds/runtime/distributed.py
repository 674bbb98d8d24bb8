"""Rank, world size and the few collectives the loop needs; all of it works with no process group at all."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

_STORE_LIMIT_S = 5


def has_group() -> bool:
    """Whether this rank has joined the others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process; read from the launcher's environment until the process group exists."""
    return dist.get_rank() if has_group() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of ranks; read from the launcher's environment until the process group exists."""
    return dist.get_world_size() if has_group() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_here() -> int:
    """Number of ranks on this machine, from the launcher's environment (DeepSpeed's, or torchrun's)."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: its GPU if torch sees one and DS_ACCELERATOR, which DeepSpeed follows, is not `cpu`."""
    wants_gpu = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return torch.device("cuda", local_rank()) if wants_gpu and torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, in place and returned."""
    if has_group():
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def min_over_ranks(value: int) -> int:
    """The smallest of the ranks' values."""
    if not has_group():
        return value
    values = torch.tensor(value, device=device())
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return int(values)


def any_over_ranks(value: bool) -> bool:
    """Whether `value` is true on any rank; the host waits for it."""
    return bool(sum_over_ranks(torch.tensor(int(value), device=device())))


def gather_to_main(value: Any) -> list[Any] | None:
    """The picklable `value` of every rank, on rank 0; None elsewhere."""
    if not has_group():
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def from_main(value: Any) -> Any:
    """The picklable `value` of rank 0, on every rank."""
    if not has_group():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def report_failure(problem: str, status: int) -> int:
    """Print `problem`, unless another rank has failed before: those that miss a rank have nothing to tell. The status.

    Before there is a process group each rank tells, but for mistakes of the user (status 2), which all ranks of a
    machine find: of those its first one tells. The group is left as it is: to leave it while the other ranks are inside
    a collective can wait for them.
    """
    if _is_first_to_fail() if has_group() else status != 2 or local_rank() == 0:
        # Rank 0 speaks for all of them otherwise.
        speaker = "" if rank() == 0 else f"[rank {rank()}] "
        print(f"{speaker}{problem}", file=sys.stderr, flush=True)
    return status


def _is_first_to_fail() -> bool:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun keeps its store over the restarts of a run.
    key = f"coconut_ds/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        # torch would try for a while and print where, if rank 0, which keeps the store, has ended.
        socket.create_connection((address, port), _STORE_LIMIT_S).close()
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_LIMIT_S))
        return store.compare_set(key, "", str(rank())) == str(rank()).encode()
    except (OSError, RuntimeError):
        return False


def close() -> None:
    """Leave the process group."""
    if has_group():
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End this process: exit handlers run, the interpreter is not taken apart.

    DeepSpeed keeps references to process groups, so gloo's threads outlive `close`. One that lets go of a tensor of the
    last collective while the interpreter ends is denied the GIL, and the process aborts (SIGABRT) after it was done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
