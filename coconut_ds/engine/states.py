"""fp32 weights and Adam's moments of an engine, whole and by parameter name: the same whatever ZeRO does with them.

DeepSpeed's own checkpoints hold each rank's share as it lies in memory. They load under the same number of ranks, the
same kind of stage and the same precision only; what is here goes from any engine into any other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from coconut_ds.engine import internals
from coconut_ds.runtime import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second moment, Adam (arXiv 1412.6980), algorithm 1."""

Tensors = Mapping[str, torch.Tensor]


def updates_done(engine: deepspeed.DeepSpeedEngine) -> int:
    """Adam's t: updates since the optimizer was new, overflown steps not counted."""
    steps = [int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    return steps[0] if steps else 0


def gather(engine: deepspeed.DeepSpeedEngine, moment: str | None = None) -> dict[str, torch.Tensor]:
    """A moment, or the fp32 weights, of every parameter in host memory on rank 0; empty elsewhere.

    Called on every rank. There have to be moments: `updates_done` is not 0.
    """
    twins = internals.fp32_twins(engine)
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        whole = _get(engine, twins.get(parameter, parameter), parameter, moment)
        if distributed.is_main():
            gathered[name] = whole.detach().float().cpu()
    return gathered


def restore(engine: deepspeed.DeepSpeedEngine, updates: int, weights: Tensors, moments: Mapping[str, Tensors]) -> None:
    """Bring an engine that was built on `weights` to where another was after `updates` of its optimizer.

    Called on every rank, each with all of the tensors.
    """
    if updates:
        _allocate_moments(engine, updates)
    twins = internals.fp32_twins(engine)
    for name, parameter in engine.module.named_parameters():
        updated = twins.get(parameter, parameter)
        if parameter.dtype != torch.float32:
            _set(engine, updated, parameter, None, weights[name])
        for moment in moments if updates else ():
            _set(engine, updated, parameter, moment, moments[moment][name])
    internals.repeat_bias_corrections(engine.basic_optimizer, updates)


def _get(
    engine: deepspeed.DeepSpeedEngine, updated: torch.Tensor, parameter: nn.Parameter, moment: str | None
) -> torch.Tensor:
    stage = engine.zero_optimization_stage()
    if moment is None:
        # Where weights are whole and fp32 on every rank, they are the fp32 weights.
        is_whole = parameter.dtype == torch.float32 and stage < 3
        return updated if is_whole or stage == 0 else safe_get_full_fp32_param(parameter)
    if stage > 0:
        return safe_get_full_optimizer_state(parameter, moment)
    return engine.basic_optimizer.state[updated][moment]


def _set(
    engine: deepspeed.DeepSpeedEngine,
    updated: torch.Tensor,
    parameter: Any,
    moment: str | None,
    whole: torch.Tensor,
) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        # DeepSpeed cuts no share from a tensor that does not divide by the ranks, so the share is cut here.
        share = internals.elements_per_rank(parameter)
        padded = F.pad(whole.flatten(), (0, share * distributed.world_size() - whole.numel()))
        own = padded[share * distributed.rank() :][:share]
        if moment is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, moment)
    elif moment is None:
        if stage > 0:
            safe_set_full_fp32_param(parameter, whole)
        else:
            updated.data.copy_(whole)
    elif stage > 0:
        safe_set_full_optimizer_state(parameter, whole, moment)
    else:
        engine.basic_optimizer.state[updated][moment].copy_(whole)


def _allocate_moments(engine: deepspeed.DeepSpeedEngine, updates: int) -> None:
    """What the optimizer allocates at its first update, and ZeRO's links from the parameters to it."""
    optimizer = engine.basic_optimizer
    is_on_host = isinstance(optimizer, DeepSpeedCPUAdam)
    for tensor in internals.updated_tensors(engine):
        step: Any = updates if is_on_host else torch.tensor(float(updates), device=tensor.device)
        optimizer.state[tensor] = {"step": step, **{name: torch.zeros_like(tensor.data) for name in MOMENTS}}
    internals.link_states(engine)
