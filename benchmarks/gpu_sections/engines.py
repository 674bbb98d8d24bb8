"""Engines of tiny models for the sections, on the device of this process and with every ZeRO file."""

from __future__ import annotations

import functools
from typing import Any

import cpuinfo
import tiny
import torch
from datasets import Dataset

from coconut_ds import Coconut, LatentContext
from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import resolve_ds_config
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.batches import Batch, Tokens
from coconut_ds.data.loaders import TrainingSteps
from coconut_ds.data.stages import Curriculum
from coconut_ds.engine.build import build_engine, describe_device
from coconut_ds.runtime import distributed
from gpu_sections import ROOT

# DeepSpeed's CPU Adam asks for the processor's name each time it is made, which takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
FILES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
PRECISIONS = ("fp32", "fp16", "bf16")
RATE = 3e-3
_TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
# With a parameter outside the backbone, which some micro-batches do not use.
_CONTEXT = LatentContext((0.6, 0.3, 0.1), learned=True, norm="embedding")
_CURRICULUM = Curriculum("coconut", 1, 1, 3, False, 0.5, 0)


def model(weights: dict[str, torch.Tensor] | None = None) -> Coconut:
    """The tiny model, always of the same weights if none are given."""
    made = tiny.coconut(context=_CONTEXT).to(distributed.device()).train()
    with torch.no_grad():
        for name, parameter in made.named_parameters() if weights else ():
            parameter.copy_((weights or {})[name])
    return made


def examples(count: int) -> Dataset:
    return Dataset.from_list([tiny.row(4 + index % 5, [3, 2 + index % 3, 4], 3, index) for index in range(count)])


def steps_of(file: str, count: int, total: int, micro: int) -> list[list[Batch]]:
    """The micro-batches of this rank for each optimizer step over `total` of `count` examples, some with no thought."""
    world = distributed.world_size()
    sizes = BatchSizes(micro, total // (micro * world), world)
    in_step = file.startswith("zero3")
    return _all(TrainingSteps(examples(count), _CURRICULUM, _TOKENS, sizes, distributed.rank(), 1, in_step=in_step))


def undivided(count: int, total: int) -> list[list[Batch]]:
    """The same steps as one micro-batch each, of all ranks."""
    return _all(TrainingSteps(examples(count), _CURRICULUM, _TOKENS, BatchSizes(total, 1, 1), 0, 1))


def _all(steps: TrainingSteps) -> list[list[Batch]]:
    return [steps[number] for number in range(len(steps))]


def lacks(file: str, precision: str) -> str | None:
    """Why this device or DeepSpeed cannot train so; None if it can."""
    device = describe_device()
    if not {"fp32": True, "fp16": device.has_fp16, "bf16": device.has_bf16}[precision]:
        return f"this device has no {precision}"
    return "fp16 at stage 0 is refused" if (file, precision) == ("zero0", "fp16") else None


def engine(file: str, precision: str, of: Coconut | None = None, scale_power: int = 14, micro: int = 2) -> Any:
    """A fresh engine of a tiny model, at its first step's rate."""
    path = str(ROOT / "ds_configs" / f"{file}.json")
    config = RunConfig(lr=RATE, precision=precision, deepspeed=path)
    settings = resolve_ds_config(
        read_ds_json(path), config, BatchSizes(micro, 1, distributed.world_size()), describe_device()
    )
    settings["fp16"]["initial_scale_power"] = scale_power
    made = build_engine(of or model(), config, settings)
    for group in made.basic_optimizer.param_groups:
        group["lr"] = RATE
    return made


def plain_steps(steps: list[list[Batch]]) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What torch alone makes of undivided steps in fp32: losses, weights, and which elements had a gradient at all.

    Where a gradient is rounding alone, as for the biases of the keys, Adam makes whole steps of it in any direction.
    """
    plain = model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.01)
    moved = {name: torch.ones_like(value, dtype=torch.bool) for name, value in plain.named_parameters()}
    losses = []
    for batches in steps:
        (batch,) = batches
        loss = plain(**{key: _there(value) for key, value in batch.inputs.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, value in plain.named_parameters():
            moved[name] &= optimizer.state[value]["exp_avg_sq"].sqrt() > 1e-5
    weights = {name: value.detach().cpu() for name, value in plain.named_parameters()}
    return losses, weights, {name: value.cpu() for name, value in moved.items()}


def _there(value: Any) -> Any:
    return value.to(distributed.device()) if isinstance(value, torch.Tensor) else value
