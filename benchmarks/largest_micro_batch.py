"""The largest micro-batch that a card of a given size trains, and its tokens per second, by steps of the engine.

    python benchmarks/largest_micro_batch.py --tokenizer FOLDER --memory-limit 10.06 [--precision fp16]
        [--deepspeed ds_configs/zero2_offload.json] [--activations recomputed]
    python benchmarks/largest_micro_batch.py --toy

Sizes are doubled until one does not fit, then those between are tried in eighths of the gap, until it is a 64th of the
size. A process ends with the first size that does not fit, since ZeRO cannot use an engine whose backward ran out of
memory. --memory-limit is what the allocator of the GPU may use, in GiB, without the CUDA context; on a CPU it is what a
step may add in live tensors. Each size takes two optimizer steps, the second one is timed. Prints a table and one JSON
line.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import memory
import torch
import workload

from coconut_ds import strict_json
from coconut_ds.data.batches import Batch
from coconut_ds.engine.build import process_group
from coconut_ds.memory.activations import batch_of
from coconut_ds.memory.meter import GIB
from coconut_ds.training.step import optimizer_step

Walk = Callable[[argparse.Namespace, list[int]], list[dict[str, Any]]]
_DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
_MOST = 2**14
_PIECES, _PRECISION = 8, 64
_TOY_COLUMNS, _TOY_LIMIT = 40, 0.001


def main() -> None:
    parser = workload.parser(__doc__)
    parser.add_argument("--deepspeed", default=str(_DS_CONFIGS / "zero2_offload.json"))
    parser.add_argument("--precision", choices=workload.DTYPES, default="fp16")
    parser.add_argument("--activations", choices=memory.TREATMENTS, default="recomputed")
    parser.add_argument("--columns", type=int, default=workload.PROSQA_COLUMNS)
    parser.add_argument("--sizes", type=int, nargs="+", help=argparse.SUPPRESS)
    zero0 = str(_DS_CONFIGS / "zero0.json")
    options = workload.parse(parser, columns=_TOY_COLUMNS, memory_limit=_TOY_LIMIT, precision="fp32", deepspeed=zero0)
    if options.memory_limit is None:
        parser.error("name --memory-limit, the GiB of the card less 0.7 for the CUDA context and NCCL")
    if options.sizes:
        print(strict_json.dumps(steps(options, options.sizes)))
        return
    print("micro-batch  tokens/s")
    tried: list[dict[str, Any]] = []
    for row in search(options):
        print(f"{row['micro_batch']:>11}  {row.get('tokens_per_second') or row['failed']}", flush=True)
        tried.append(row)
    fitting = [row for row in tried if "failed" not in row]
    largest = max(fitting, key=lambda row: row["micro_batch"], default={"micro_batch": 0})
    best = max((row["tokens_per_second"] for row in fitting), default=None)
    workload.finish(options, largest=largest["micro_batch"], best_tokens_per_second=best, tried=tried)


def search(options: argparse.Namespace, walk: Walk | None = None) -> Iterator[dict[str, Any]]:
    """The sizes tried, in order; `walk` takes sizes from small to large, by default in a process of its own."""
    walk = walk or _in_a_process
    fits, full = 0, _MOST
    sizes = [2**n for n in range(_MOST.bit_length() - 1)]
    while sizes:
        rows = walk(options, sizes)
        yield from rows
        fits = max([fits, *(row["micro_batch"] for row in rows if "failed" not in row)])
        full = min([full, *(row["micro_batch"] for row in rows if "failed" in row)])
        gap = full - fits
        step = max(1, gap // _PIECES)
        sizes = list(range(fits + step, full, step)) if fits and gap > max(1, fits // _PRECISION) else []


def _in_a_process(options: argparse.Namespace, sizes: list[int]) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--memory-limit", str(options.memory_limit), "--deepspeed", options.deepspeed]
    command += ["--toy"] if options.toy else ["--tokenizer", options.tokenizer]
    command += ["--precision", options.precision, "--activations", options.activations]
    command += ["--columns", str(options.columns), "--thoughts", str(options.thoughts), "--sizes", *map(str, sizes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return [{"micro_batch": sizes[0], "failed": f"exit status {done.returncode}"}]
    return json.loads(done.stdout.splitlines()[-1])


def steps(options: argparse.Namespace, sizes: list[int]) -> list[dict[str, Any]]:
    """Optimizer steps over micro-batches of `sizes`, up to the first one that does not fit."""
    workload.begin(options)
    with process_group():
        model = workload.coconut(workload.backbone_of(options))
        if options.activations == "recomputed":
            model.enable_activation_checkpointing()
        sequence = workload.sequence_of(options.columns, options.thoughts, int(model.latent_token_id or 0))
        engine = memory.engine_of(model, options.deepspeed, options.precision)
        rows: list[dict[str, Any]] = []
        for micro in sizes:
            rows.append({"micro_batch": micro, **_step(engine, batch_of(sequence, micro), options.memory_limit)})
            if "failed" in rows[-1]:
                break
        return rows


def _step(engine: Any, batch: Batch, limit: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not workload.fits(functools.partial(_time_into, found, engine, batch)):
        return {"failed": "out of memory"}
    # Nothing stops a CPU at a limit.
    if not torch.cuda.is_available() and found["peak_mib"] * memory.MIB > limit * GIB:
        return {"failed": "over the limit"}
    return found


def _time_into(found: dict[str, Any], engine: Any, batch: Batch) -> None:
    """Two optimizer steps over `batch`: peak of the first, tokens per second of the second."""
    peak = memory.step_peak(engine, batch)
    reserved = memory.reserved()
    started = time.perf_counter()
    optimizer_step(engine, [batch], "token")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    rate = batch.n_tokens / (time.perf_counter() - started)
    found |= {"peak_mib": peak / memory.MIB, **reserved, "tokens_per_second": round(rate, 1)}


if __name__ == "__main__":
    main()
