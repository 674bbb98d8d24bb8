"""How torch computes in this process: on which device, with which kernels; settled before anything is computed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from coconut_ds.errors import InputError
from coconut_ds.runtime import distributed
from coconut_ds.runtime.usable_gpu import demand_usable_gpus

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def prepare_device() -> None:
    """Take the device of this rank and choose its kernels; comes before any other question to a GPU.

    Raises InputError for a GPU that torch cannot use, and for a rank that has none of its own.
    """
    device = distributed.device()
    if device.type == "cuda":
        ranks, gpus = distributed.ranks_here(), torch.cuda.device_count()
        if ranks > gpus:
            raise InputError(
                f"{ranks} ranks on this machine, and torch sees {gpus} GPU{'s' * (gpus > 1)}; start as many ranks as "
                f"there are GPUs: RANKS={gpus} ./launch.sh ..., or deepspeed --num_gpus {gpus} ..."
            )
        # First, or every rank would open a context of some hundred MiB on the first GPU.
        torch.cuda.set_device(device)
    demand_usable_gpus()
    # cuDNN's attention makes a plan for every new shape, up to a second each, and shapes differ from batch to batch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Weight gradients are sums over 10^4 rows, which cuBLAS may otherwise add up in half precision.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Context in which torch takes deterministic kernels if `wanted`, and refuses operations that have none."""
    if not wanted:
        yield
        return
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    workspace = os.environ.get(_CUBLAS)
    # cuBLAS reads it when it starts.
    os.environ.setdefault(_CUBLAS, ":4096:8")
    try:
        torch.use_deterministic_algorithms(True)
        # It would fill every new buffer: what is read before it is written is a fault the tests look for.
        memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
