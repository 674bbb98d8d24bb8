"""Memory of a run before it is started.

    python -m coconut_ds plan --run RUN.yaml --memory GIB [--ranks N] [key=value ...]
    python -m coconut_ds plan --model NAME --memory GIB [--ranks N] [--question N --steps N --answer N --thoughts N]

GIB is what torch sees of a card ("total capacity" in its messages): 10.76 of an 11 GB card. Of it the CUDA context and
NCCL take about 0.7, and 7% of the rest are left to fragments and to what kernels need while they run.

Reads the run's data and the shape of its model (of a folder or hub id only config.json and the tokenizer), measures the
activations of every stage on tensors without data (about twenty seconds per stage for GPT-2 on 2 CPU cores), and prints
what fits on a card of that size: per stage with the run's DeepSpeed file, and for every file of `ds_configs/`.

Without a run file, --model names a folder, a config.json or a hub id, of which config.json alone is read: the largest
micro-batch with all weights or LoRA, activations kept or recomputed, for every file of `ds_configs/`, and a line to
start with. The lengths are those of the longest example, in tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coconut_ds.commands.command_line import PROG, add_overrides, new_parser, run_command
from coconut_ds.commands.plan_model import Lengths, plan_of_model
from coconut_ds.config.batch_sizes import BatchSizes, batch_sizes, stated_micro_batch
from coconut_ds.config.deepspeed_config import (
    Device,
    ignored_note,
    resolve_checkpointing,
    resolve_ds_config,
    resolve_precision,
)
from coconut_ds.config.ds_json import ds_json_path, read_ds_json, shipped_ds_jsons
from coconut_ds.config.rules import ConfigError
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.config.sections import ActivationCheckpointingConfig
from coconut_ds.errors import InputError
from coconut_ds.memory.activations import ActivationCost, measure, widest_sequence
from coconut_ds.memory.batch_size import (
    CARD_OVERHEAD_GIB,
    CARD_SHARE,
    card_budget,
    distinct_stages,
    memory_dtype,
)
from coconut_ds.memory.faster_file import faster_file
from coconut_ds.memory.meter import GIB
from coconut_ds.memory.model_states import Elements, ModelStates, bucket_note
from coconut_ds.runs.terminal import quiet_libraries
from coconut_ds.training.setup import Setup, load_setup

# The plan is for the card given by --memory, not for this machine.
_CARD = Device(kind="cuda", has_bf16=True, has_fp16=True)


_LENGTHS = {"question": 128, "steps": 96, "answer": 12, "thoughts": 6, "rank": 16}
"""For --model; by default room for nearly all of GSM8K-Aug, and the rank of the adapters."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: its longest sequence, and the memory that a forward and backward over it costs."""

    stage: int
    thoughts: int
    columns: int
    cost: ActivationCost


def main(arguments: list[str] | None = None, prog: str = f"{PROG} plan") -> int:
    """0 if a plan was printed; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", help="run YAML, see run_configs/")
    which.add_argument("--model", metavar="NAME", help="a model without a run file")
    parser.add_argument("--memory", type=float, required=True, help="GiB that torch sees of one card (11 GB: 10.76)")
    parser.add_argument("--ranks", "--gpus", type=int, default=2, help="number of cards (default 2)")
    for name, usual in _LENGTHS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"with --model (default {usual})")
    add_overrides(parser)
    return run_command(_plan, parser, arguments)


def _plan(options: argparse.Namespace) -> None:
    quiet_libraries()
    if not 0 < options.memory < float("inf") or options.ranks < 1:
        raise InputError(f"--memory {options.memory:g} --ranks {options.ranks}: both must be above 0, memory in GiB")
    lengths = {name: getattr(options, name) for name in _LENGTHS}
    if options.model is not None:
        if options.overrides:
            raise InputError(f"{options.overrides[0]}: values are for --run; leave them out")
        given = _LENGTHS | {name: value for name, value in lengths.items() if value is not None}
        if wrong := [name for name, value in given.items() if value < 1]:
            raise InputError(f"--{wrong[0]} {given[wrong[0]]}: must be at least 1")
        rank = given.pop("rank")
        print(plan_of_model(options.model, options.memory, options.ranks, Lengths(**given), rank))
        return
    if wrong := [name for name, value in lengths.items() if value is not None]:
        raise InputError(f"--{wrong[0]} is for --model; leave it out")
    config = load_run_config(options.run, options.overrides)
    raw = read_ds_json(config.deepspeed)
    _resolved(raw, config, BatchSizes(1, 1, options.ranks))
    torch.manual_seed(config.seed)
    checkpointing = resolve_checkpointing(raw, config)
    setup = load_setup(config, config.load_model_path, checkpointing, with_weights=False)
    stages = plan_stages(config, setup)
    print(report(config, checkpointing, setup, stages, options.memory, options.ranks))


def plan_stages(config: RunConfig, setup: Setup) -> list[StagePlan]:
    """Measure every distinct stage of the run on a card's kernels, in the precision of its training."""
    dtype = memory_dtype(_resolved(read_ds_json(config.deepspeed), config, BatchSizes(1, 1, 1)))
    plans = []
    for stage in distinct_stages(config, setup.curriculum):
        sequence = widest_sequence(setup.train_set, setup.curriculum, stage, setup.tokens)
        cost = measure(setup.model, sequence, dtype, for_card=True)
        plans.append(StagePlan(stage, sequence.n_thoughts, len(sequence.ids), cost))
    return plans


def report(
    config: RunConfig,
    checkpointing: ActivationCheckpointingConfig,
    setup: Setup,
    stages: list[StagePlan],
    memory: float,
    ranks: int,
) -> str:
    """The tables; sizes in GiB per card."""
    states = _states(config.deepspeed, config, setup, ranks)
    resolved = _resolved(read_ds_json(config.deepspeed), config, BatchSizes(1, 1, ranks))
    note = bucket_note(resolved, config.deepspeed)
    budget = card_budget(memory)
    micro = stated_micro_batch(config)
    how = "recomputed" if checkpointing.enabled else "kept"
    lines = [
        f"{config.name}: {ranks} cards of {memory:g} GiB; {resolve_precision(config, _CARD)}, activations {how}, "
        f"{config.deepspeed}",
        f"Counted on are {budget / GIB:.2f} GiB: {CARD_SHARE:.0%} of what CUDA and NCCL leave, which take about "
        f"{CARD_OVERHEAD_GIB:g}.",
        f"stage  thoughts  columns  model states  activations at {micro:>3}  total  largest micro-batch",
    ]
    for each in stages:
        activations = each.cost.peak(micro)
        lines.append(
            f"{each.stage:>5}  {each.thoughts:>8}  {each.columns:>7}  {states.device / GIB:>12.2f}  "
            f"{activations / GIB:>18.2f}  {(states.device + activations) / GIB:>5.2f}  "
            f"{each.cost.most_rows(budget - states.device):>19}"
        )
    ignored = ignored_note(read_ds_json(config.deepspeed), config.deepspeed)
    lines += ["", f"ignored: {ignored}"] if ignored else []
    lines += ["", f"buckets: {note}"] if note else []
    lines += ["", "deepspeed file                  on the card  in host memory  largest micro-batch, all stages"]
    shipped = shipped_ds_jsons()
    is_shipped = ds_json_path(config.deepspeed) in map(ds_json_path, shipped)
    for path in sorted({*shipped, *([] if is_shipped else [str(Path(config.deepspeed))])}):
        lines.append(_file_line(path, config, setup, stages, budget, ranks))
    sizes = BatchSizes(micro, _accumulation(config, ranks), ranks)
    left = budget - max(each.cost.peak(micro) for each in stages)
    faster = faster_file(config, resolved, sizes, _CARD, Elements.of(setup.model), left)
    lines += ["", f"faster: {faster}"] if faster else []
    return "\n".join(lines)


def _accumulation(config: RunConfig, ranks: int) -> int:
    try:
        return batch_sizes(config, ranks).accumulation
    except ConfigError:  # the file is for another number of ranks
        return 1


def _file_line(path: str, config: RunConfig, setup: Setup, stages: list[StagePlan], budget: int, ranks: int) -> str:
    try:
        states = _states(path, config, setup, ranks)
    except InputError as error:
        return f"{path:<30}  {str(error).splitlines()[-1].strip()}"
    largest = min(each.cost.most_rows(budget - states.device) for each in stages)
    return f"{path:<30}  {states.device / GIB:>11.2f}  {states.host / GIB:>14.2f}  {largest:>31}"


def _states(path: str, config: RunConfig, setup: Setup, ranks: int) -> ModelStates:
    return Elements.of(setup.model).states(_resolved(read_ds_json(path), config, BatchSizes(1, 1, ranks)), ranks)


def _resolved(raw: dict[str, Any], config: RunConfig, sizes: BatchSizes) -> dict[str, Any]:
    # Batch sizes do not affect memory between steps, and those in a DeepSpeed file may be for other ranks.
    free = {key: value for key, value in raw.items() if "batch" not in key and key != "gradient_accumulation_steps"}
    return resolve_ds_config(free, config, sizes, _CARD)
