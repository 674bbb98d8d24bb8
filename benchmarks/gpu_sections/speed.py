"""Tokens per second of a step, over the floor and over the published loop, and what the host does in a step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import train_step
import workload
from torch.profiler import ProfilerActivity, profile

from coconut_ds.memory.activations import batch_of
from gpu_sections import Row, begin, benchmark_options, left_out, limit_memory, seconds_left, synchronize, tried

_SIZES = (32, 8, 64, 16, 128, 4, 256)
"""Micro-batches of a precision in order of importance."""
_AT_LEAST_S = 12
_PUBLISHED, _OURS = "straightforward", ("window of 3", "recomputed")
_AIM = 10
Measured = dict[tuple[str, int], Row]
"""Rows by precision and micro-batch."""


def rows(options: argparse.Namespace) -> Iterator[Row]:
    device = begin(options)
    limit_memory(options)
    backbone = workload.backbone_of(benchmark_options(options))
    measured: Measured = {}
    precisions = ("fp32", "bf16") if options.toy else ("fp16", "fp32", "bf16")
    sizes = (1, 2) if options.toy else _SIZES
    for precision in precisions:
        yield tried(f"profiled: {precision}", _profiled, backbone, device, precision, sizes[0], options)
        for micro in sizes[: None if precision == "fp16" else 5]:
            name = f"step: {precision}, micro-batch {micro}"
            if seconds_left(options) < _AT_LEAST_S:
                yield left_out(name, "no time was left")
                continue
            row = tried(name, _measured, backbone, precision, micro, options)
            measured[precision, micro] = row
            yield row
    yield tried("best step", _best_step, measured, precisions[0])
    for precision in precisions:
        yield tried(f"over the published loop: {precision}", _compared, measured, precision, precisions[0])


def _batch(backbone: Any, micro: int, options: argparse.Namespace) -> Any:
    columns, thoughts = (30, 2) if options.toy else (workload.PROSQA_COLUMNS, 6)
    return batch_of(workload.sequence_of(columns, thoughts, workload.tokens_of(backbone).latent or 0, 5), micro)


def _measured(backbone: Any, precision: str, micro: int, options: argparse.Namespace) -> Row:
    return train_step.measure(backbone, _batch(backbone, micro, options), precision, rounds=1 if options.toy else 5)


def _best(measured: Measured, precision: str, kinds: Sequence[str]) -> tuple[float, int]:
    """Most tokens per second over the micro-batches that fit, and the micro-batch."""
    rates = [
        (row["tokens_per_second"][kind], micro)
        for (of, micro), row in measured.items()
        for kind in kinds
        if of == precision and kind in row.get("tokens_per_second", {})
    ]
    return max(rates)


def _best_step(measured: Measured, precision: str) -> Row:
    rate, micro = _best(measured, precision, ["coconut"])
    over_floor = measured[precision, micro].get("step_over_floor", float("inf"))
    value = f"{precision}, micro-batch {micro}: {rate:,.0f}, {over_floor:.2f}"
    return {"tokens_per_second": rate, "fills": "tokens per second, over the floor", "value": value}


def _compared(measured: Measured, precision: str, first: str) -> Row:
    """Ours at its best micro-batch that fits over the published loop at its own, in one precision."""
    mine, other = _best(measured, precision, _OURS), _best(measured, precision, [_PUBLISHED])
    ratio = mine[0] / other[0]
    found = {"ratio": ratio, "aim": _AIM, "tokens_per_second": {"ours": mine[0], "published": other[0]}}
    found["micro_batch"] = {"ours": mine[1], "published": other[1]}
    if precision != first:
        return found
    value = f"{precision}: {ratio:.1f} (micro-batch {mine[1]}, theirs {other[1]})"
    return {**found, "fills": "tokens per second, over the published loop", "value": value}


def _profiled(backbone: Any, device: torch.device, precision: str, micro: int, options: argparse.Namespace) -> Row:
    """Kernels of one step, how long the device worked on them, and how long the host took to start them."""
    model = workload.cast(workload.coconut(backbone), workload.DTYPES[precision])
    inputs = {key: _there(value, device) for key, value in _batch(backbone, micro, options).inputs.items()}

    def step() -> None:
        model(**inputs).loss.backward()

    step()
    synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    started = time.perf_counter()
    step()
    host = time.perf_counter() - started
    synchronize()
    whole = time.perf_counter() - started
    with profile(activities=activities) as profiled:
        step()
        synchronize()
    model.zero_grad(set_to_none=True)
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    kernels = [event for event in profiled.events() or [] if event.device_type == kind]
    busy = sum(event.time_range.elapsed_us() for event in kernels)
    figures = {"host_ms": 1000 * host, "whole_ms": 1000 * whole, "busy_share": busy / 1e6 / whole}
    return {"kernels": len(kernels), **figures, "micro_batch": micro}


def _there(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
