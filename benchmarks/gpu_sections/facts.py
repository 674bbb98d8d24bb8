"""What the machine is: versions, driver, context, transfers, products, and the attention kernel of each case."""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from coconut_ds.runs.environment import describe_environment
from gpu_sections import Row, begin, left_out, synchronize, tried

_MIB = 2**20
_ROUNDS = 5


def rows(options: argparse.Namespace) -> Iterator[Row]:
    device = begin(options)
    # First, while nothing else of this process is on the card.
    yield tried("context", _context, device) if device.type == "cuda" else left_out("context")
    yield tried("environment", _environment)
    yield tried("card", _card, device) if device.type == "cuda" else left_out("card")
    yield tried("transfers", _transfers, device, 1 if options.toy else 256)
    yield tried("fp16 product", _product, device, 64 if options.toy else 8192)
    yield tried("attention kernels", _attention_kernels, device)


def _context(device: torch.device) -> Row:
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    used = total - free - torch.cuda.memory_reserved(device)
    return {"context_mib": used / _MIB, "total_mib": total / _MIB, "note": "with whatever else is on the card"}


def _environment() -> Row:
    return {"environment": describe_environment(), "threads": torch.get_num_threads()}


def _card(device: torch.device) -> Row:
    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "processors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "built_for": torch.cuda.get_arch_list(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Driver, power limit and clock of the first card; None in a container without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def _best_seconds(work: Callable[[], Any]) -> float:
    work()
    found = []
    for _ in range(_ROUNDS):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def _transfers(device: torch.device, mib: int) -> Row:
    """GB per second between pinned host memory and the device."""
    host = torch.empty(mib * _MIB, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    down = _best_seconds(lambda: there.copy_(host, non_blocking=True))
    up = _best_seconds(lambda: host.copy_(there, non_blocking=True))
    return {"to_device_gb_s": host.nbytes / down / 1e9, "to_host_gb_s": host.nbytes / up / 1e9}


def _product(device: torch.device, size: int) -> Row:
    left = torch.randn(size, size, device=device).half()
    return {"tflop_s": 2 * size**3 / _best_seconds(lambda: left @ left) / 1e12, "size": size}


def _attention_kernels(device: torch.device) -> Row:
    """The operation that attention takes, by precision and by the columns of a pass: all of a prefix, or one."""
    found = {}
    for (name, dtype), queries, dropout in itertools.product(
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.items(), (64, 1), (0.0, 0.1)
    ):
        query = torch.randn(2, 4, queries, 64, device=device, dtype=dtype, requires_grad=True)
        keys = torch.randn(2, 4, 72, 64, device=device, dtype=dtype, requires_grad=True)
        mask = torch.zeros(2, 1, queries, 72, device=device, dtype=dtype)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask, dropout_p=dropout)
        taken = {event.key for event in profiled.key_averages()}
        kernels = sorted(key for key in taken if key.startswith("aten::_scaled_dot_product"))
        found[f"{name}, {queries} columns, dropout {dropout}"] = kernels
    return {"kernels": found}
