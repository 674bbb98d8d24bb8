"""A forward and backward does not synchronise with the device, as torch itself says in its debug mode for that."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from coconut_ds.data.batches import to_device
from coconut_ds.engine.build import start_process_group
from coconut_ds.training.step import accumulate_gradients, fetch, update
from gpu_sections import NOT_ON_A_CPU, Row, begin, engines, synchronize, tried


def rows(options: argparse.Namespace) -> Iterator[Row]:
    device = begin(options)
    start_process_group()
    for how in ("kept", "recomputed"):
        yield _only_on_a_gpu(device, tried(f"forward and backward: {how}", _passes, device, how))
    for file in ("zero1", "zero2", "zero3"):
        yield _only_on_a_gpu(device, tried(f"accumulate_gradients: {file}", _accumulated, file))
    # DeepSpeed waits for each gradient it moves to the host: counted, no check.
    for file in ("zero1", "zero2_offload"):
        yield _only_on_a_gpu(device, tried(f"waits of a whole step: {file}", _whole_step, file))


def _only_on_a_gpu(device: torch.device, row: Row) -> Row:
    """On a CPU the same code runs, but proves nothing: it only shows errors in the code."""
    return row if device.type == "cuda" or row["ok"] is False else {**row, "ok": None, "why": NOT_ON_A_CPU}


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Context in which what synchronises with the GPU raises."""
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def _counted() -> Iterator[list[str]]:
    """Context that lists what synchronises with the GPU inside it, complete when it is left."""
    found: list[str] = []
    synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            found += [f"{each.filename.rsplit('/', 1)[-1]}:{each.lineno}" for each in caught if _is_wait(each)]


def _is_wait(caught: Any) -> bool:
    return "synchronizing" in str(caught.message)


def _passes(device: torch.device, how: str) -> Row:
    model = engines.model()
    if how == "recomputed":
        model.enable_activation_checkpointing()
    ((batch,),) = engines.undivided(4, 4)
    inputs = to_device(batch.inputs, device)
    # Once before: constants are made on first use.
    model(**inputs).loss_sum.backward()
    with _refused():
        model(**inputs).loss_sum.backward()
    return {"ok": True}


def _accumulated(file: str) -> Row:
    engine = engines.engine(file, "fp32")
    batches = engines.steps_of(file, 4, 4, 2)[0]
    _step(engine, batches)
    with _refused():
        pending = accumulate_gradients(engine, batches, "token")
    fetch(pending, 2)
    return {"ok": True}


def _step(engine: Any, batches: Any) -> None:
    fetch(accumulate_gradients(engine, batches, "token"), 1)
    update(engine)


def _whole_step(file: str) -> Row:
    engine = engines.engine(file, "fp32")
    batches = engines.steps_of(file, 4, 4, 2)[0]
    _step(engine, batches)
    with _counted() as accumulating:
        pending = accumulate_gradients(engine, batches, "token")
    with _counted() as fetching:
        fetch(pending, 2)
    with _counted() as updating:
        update(engine)
    counts = {"accumulating": len(accumulating), "fetching": len(fetching), "updating": len(updating)}
    return {**counts, "parameters": len(list(engine.module.parameters())), "where": sorted({*accumulating, *updating})}
