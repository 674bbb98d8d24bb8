"""Peak memory of a training step, and how well it is predicted.

    python benchmarks/memory.py --tokenizer FOLDER [--deepspeed ds_configs/*.json] [--micro-batch 2 4 8]
        [--precision fp32 bf16] [--activations recomputed kept]
    python benchmarks/memory.py --toy

One process for every ZeRO file, precision and treatment of activations. On a CPU what is counted is live tensor bytes
of an optimizer step through the engine, the host's part included; on a GPU the allocator's peak, and in the JSON line
what it had reserved then. Columns:
  step      peak of the step beyond what lives between steps
  beyond    the same without gradients (one full set of them): activations and temporaries
  planned   `memory.activations` from micro-batches of 2 and 3, as a run plans it (on the CPU, for a card as well), and
            the plain forward and backward it stands for
A row that runs out of memory stays in the table. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workload

from coconut_ds import Coconut, strict_json
from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import resolve_ds_config
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.batches import Batch
from coconut_ds.engine.build import build_engine, describe_device, process_group
from coconut_ds.memory.activations import ActivationCost, batch_of, measure, measured_peak
from coconut_ds.memory.meter import LiveTensorMeter
from coconut_ds.runtime import distributed
from coconut_ds.training.step import optimizer_step

MIB = 2**20
_TOY_COLUMNS = 40
TREATMENTS = ("recomputed", "kept")


def main() -> None:
    parser = workload.parser(__doc__)
    parser.add_argument("--deepspeed", nargs="+", default=sorted(map(str, Path("ds_configs").glob("*.json"))))
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--activations", nargs="+", choices=TREATMENTS, default=list(TREATMENTS))
    parser.add_argument("--columns", type=int, default=workload.PROSQA_COLUMNS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    zero2 = str(Path(__file__).resolve().parent.parent / "ds_configs" / "zero2.json")
    options = workload.parse(
        parser, deepspeed=[zero2], micro_batch=[2, 3], activations=["recomputed"], columns=_TOY_COLUMNS
    )
    if options.one:
        with process_group():
            print(strict_json.dumps(peaks(options)))
        return
    print("ZeRO file        precision  activations  micro-batch  step MiB  beyond MiB  an example  planned / measured")
    rows = []
    for path, precision, how in itertools.product(options.deepspeed, options.precision, options.activations):
        for row in in_a_process(options, path, precision, how):
            rows.append({"deepspeed": path, "precision": precision, "activations": how, **row})
            print(_line(rows[-1]), flush=True)
    counted = [row for row in rows if row["activations"] == "recomputed" and "per_example_mib" in row]
    headline = counted[-1]["per_example_mib"] if counted else None
    workload.finish(options, per_example_mib=headline, rows=rows)


def in_a_process(options: argparse.Namespace, path: str, precision: str, how: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--one", "--deepspeed", path]
    command += ["--toy"] if options.toy else ["--tokenizer", options.tokenizer]
    command += ["--precision", precision, "--activations", how, "--columns", str(options.columns)]
    command += ["--thoughts", str(options.thoughts), "--micro-batch", *map(str, options.micro_batch)]
    if options.memory_limit:
        command += ["--memory-limit", str(options.memory_limit)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return [{"micro_batch": micro, "failed": f"exit status {done.returncode}"} for micro in options.micro_batch]
    return json.loads(done.stdout.splitlines()[-1])


def peaks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one ZeRO file, precision and treatment, each of which `options` has as a list of one."""
    workload.begin(options)
    precision = options.precision[0]
    model = workload.coconut(workload.backbone_of(options))
    if options.activations == ["recomputed"]:
        model.enable_activation_checkpointing()
    sequence = workload.sequence_of(options.columns, options.thoughts, int(model.latent_token_id or 0))
    dtype = workload.DTYPES[precision]
    # What is planned and measured without an engine first: it needs the weights as they are before ZeRO holds them.
    # A run plans on the CPU, for a card as well.
    cost = measure(model.cpu(), sequence, dtype, for_card=torch.cuda.is_available())
    plain = workload.cast(model.to(distributed.device()), dtype)
    measured = {micro: _unless_full(_plain_peak, plain, batch_of(sequence, micro)) for micro in options.micro_batch}
    engine = engine_of(model, options.deepspeed[0], precision)
    gradients = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    optimizer_step(engine, [batch_of(sequence, 1)], "token")
    rows = []
    for micro in options.micro_batch:
        peak = _unless_full(step_peak, engine, batch_of(sequence, micro))
        rows.append(_row(micro, peak, gradients, cost, measured[micro]) | reserved())
    return rows


def engine_of(model: Coconut, path: str, precision: str) -> Any:
    """The engine of a ZeRO file for micro-batches of any size, with `model` in fp32."""
    config = RunConfig(deepspeed=path, precision=precision)
    settings = resolve_ds_config(read_ds_json(path), config, BatchSizes(1, 1, 1), describe_device())
    return build_engine(workload.cast(model, torch.float32), config, settings)


def _plain_peak(model: Coconut, batch: Batch) -> int:
    """Bytes that a forward and backward adds at most: by the allocator of a GPU, else of live tensors."""
    if torch.cuda.is_available():
        return _allocated(lambda: measured_peak(model, batch))
    return measured_peak(model, batch)


def step_peak(engine: Any, batch: Batch) -> int:
    """Bytes that an optimizer step over one micro-batch adds at most to those between steps."""
    if torch.cuda.is_available():
        return _allocated(lambda: optimizer_step(engine, [batch], "token"))
    with LiveTensorMeter() as meter:
        optimizer_step(engine, [batch], "token")
    return meter.peak


def _allocated(work: Callable[[], Any]) -> int:
    """Bytes that the allocator of the GPU gave out at most during `work`, beyond those before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def reserved() -> dict[str, float]:
    """What the allocator held at most since the last `step_peak` began; with its fragments it decides what fits."""
    return {"reserved_mib": torch.cuda.max_memory_reserved() / MIB} if torch.cuda.is_available() else {}


def _unless_full(measure: Callable[..., int], *arguments: Any) -> int | None:
    """What `measure` says, None where it runs out of memory."""
    found: list[int] = []
    return found[0] if workload.fits(lambda: found.append(measure(*arguments))) else None


def _row(micro: int, peak: int | None, gradients: int, cost: ActivationCost, measured: int | None) -> dict[str, Any]:
    """A line of the table: bytes of a step, of a full set of gradients, of a plain forward and backward."""
    row: dict[str, Any] = {"micro_batch": micro, "planned_mib": cost.peak(micro) / MIB}
    if measured is not None:
        row["planned_over_measured"] = cost.peak(micro) / measured
    if peak is None or measured is None:
        return row | {"failed": "out of memory"}
    beyond = peak - gradients
    return row | {"step_mib": peak / MIB, "beyond_mib": beyond / MIB, "per_example_mib": beyond / micro / MIB}


def _line(row: dict[str, Any]) -> str:
    head = (
        f"{Path(row['deepspeed']).stem:<15}  {row['precision']:>9}  {row['activations']:>11}  {row['micro_batch']:>11}"
    )
    if "failed" in row:
        return f"{head}  {row['failed']}"
    return (
        f"{head}  {row['step_mib']:>8.0f}  {row['beyond_mib']:>10.0f}  {row['per_example_mib']:>10.1f}  "
        f"{row['planned_over_measured']:>18.3f}"
    )


if __name__ == "__main__":
    main()
