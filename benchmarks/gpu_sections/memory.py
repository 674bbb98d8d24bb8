"""Planned against measured peaks, and the largest micro-batch of a card of --memory-limit."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import largest_micro_batch
import memory
import workload

from coconut_ds.engine.build import process_group
from gpu_sections import ROOT, Row, begin, benchmark_options, left_out, seconds_left, tried

_LARGEST_S, _PEAKS_S = 45, 15
"""Seconds a GPU takes at most for a search and for a process that measures peaks."""
_FILE = str(ROOT / "ds_configs" / "zero2_offload.json")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    begin(options)
    # In order of importance: what is left of the section's time decides how many are done.
    yield _in_time(options, _LARGEST_S, "largest micro-batch: zero2_offload", _largest, options, "zero2_offload")
    precisions = ("fp32",) if options.toy else ("fp16", "fp32")
    for precision, how in itertools.product(precisions, memory.TREATMENTS):
        yield _in_time(options, _PEAKS_S, f"peaks: {precision} {how}", _peaks, options, precision, how)
    if not options.toy:
        yield _in_time(options, _LARGEST_S, "largest micro-batch: zero2", _largest, options, "zero2")


def _in_time(options: argparse.Namespace, seconds: float, name: str, *work: Any) -> Row:
    if seconds_left(options) < seconds:
        return left_out(name, "no time was left")
    return tried(name, *work)


def _largest(options: argparse.Namespace, file: str) -> Row:
    precision, columns = ("fp32", 40) if options.toy else ("fp16", workload.PROSQA_COLUMNS)
    asked = benchmark_options(
        options,
        deepspeed=str(ROOT / "ds_configs" / f"{'zero0' if options.toy else file}.json"),
        precision=precision,
        activations="recomputed",
        columns=columns,
        memory_limit=0.001 if options.toy else options.memory_limit,
    )
    # A CPU does not run out of memory, so nothing has to be started anew.
    tried_sizes = list(largest_micro_batch.search(asked, largest_micro_batch.steps if options.toy else None))
    fitting = [row for row in tried_sizes if "failed" not in row]
    if not fitting:
        return {"ok": False, "tried": tried_sizes}
    largest = max(row["micro_batch"] for row in fitting)
    rate = max(row["tokens_per_second"] for row in fitting)
    found = {"largest": largest, "tokens_per_second": rate, "precision": precision, "tried": tried_sizes}
    if file != "zero2_offload":
        return found
    return {**found, "fills": "largest micro-batch, recomputed", "value": f"{largest} ({rate:,.0f} tokens per second)"}


def _peaks(options: argparse.Namespace, precision: str, how: str) -> Row:
    """As `memory.py` prints them; the plan may be at most a tenth below what a forward and backward takes."""
    sizes, columns = ([2, 3], 40) if options.toy else ([8, 16, 32], workload.PROSQA_COLUMNS)
    asked = benchmark_options(options, micro_batch=sizes, columns=columns, memory_limit=options.memory_limit)
    if options.toy:
        with process_group():
            one = {"deepspeed": [_FILE], "precision": [precision], "activations": [how]}
            peaks = memory.peaks(argparse.Namespace(**{**vars(asked), **one}))
    else:
        peaks = memory.in_a_process(asked, _FILE, precision, how)
    ratios = [row["planned_over_measured"] for row in peaks if "planned_over_measured" in row]
    found: Row = {"ok": bool(ratios) and min(ratios) > 0.9, "peaks": peaks}
    if (precision, how) == ("fp32" if options.toy else "fp16", "recomputed") and ratios:
        found |= {"fills": "planned / measured peak", "value": f"{precision}: {min(ratios):.3f} to {max(ratios):.3f}"}
    return found
