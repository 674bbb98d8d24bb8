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

from coconut_ds.runtime import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second moment, Adam (arXiv 1412.6980), algorithm 1."""
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Tensors = Mapping[str, torch.Tensor]


def n_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, of which ZeRO-3 may hold none here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def updates_done(engine: deepspeed.DeepSpeedEngine) -> int:
    """Adam's t: updates since the optimizer was new, overflown steps not counted."""
    steps = [int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    return steps[0] if steps else 0


def gather(engine: deepspeed.DeepSpeedEngine, moment: str | None = None) -> dict[str, torch.Tensor]:
    """A moment, or the fp32 weights, of every parameter in host memory on rank 0; empty elsewhere.

    Called on every rank. There have to be moments: `updates_done` is not 0.
    """
    masters = _masters(engine)
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        whole = _get(engine, masters.get(parameter, parameter), parameter, moment)
        if distributed.is_main():
            gathered[name] = whole.detach().float().cpu()
    return gathered


def restore(engine: deepspeed.DeepSpeedEngine, updates: int, weights: Tensors, moments: Mapping[str, Tensors]) -> None:
    """Bring an engine that was built on `weights` to where another was after `updates` of its optimizer.

    Called on every rank, each with all of the tensors.
    """
    if updates:
        _allocate_moments(engine, updates)
    masters = _masters(engine)
    for name, parameter in engine.module.named_parameters():
        updated = masters.get(parameter, parameter)
        if parameter.dtype != torch.float32:
            _set(engine, updated, parameter, None, weights[name])
        for moment in moments if updates else ():
            _set(engine, updated, parameter, moment, moments[moment][name])
    if isinstance(engine.basic_optimizer, DeepSpeedCPUAdam):
        _repeat_bias_corrections(engine.basic_optimizer, updates)


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """The state of fp16's loss scale; empty in other precisions."""
    scaler = engine.optimizer.loss_scaler if engine.fp16_enabled() else None
    return {key: getattr(scaler, key) for key in _LOSS_SCALE if hasattr(scaler, key)}


def restore_loss_scale(engine: deepspeed.DeepSpeedEngine, state: Mapping[str, float]) -> None:
    """Set what `loss_scale` returned; an engine that does not scale its loss is left as it is."""
    if engine.fp16_enabled():
        for key, value in state.items():
            setattr(engine.optimizer.loss_scaler, key, value)


def _masters(engine: deepspeed.DeepSpeedEngine) -> dict[nn.Parameter, torch.Tensor]:
    """At stage 0 in half precision, the fp32 tensor that is updated in place of each parameter."""
    wrapper = engine.optimizer
    groups = zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()))
    is_partitioned = engine.zero_optimization_stage() > 0
    return {} if is_partitioned else {low: high for lows, highs in groups for low, high in zip(lows, highs)}


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _get(
    engine: deepspeed.DeepSpeedEngine, updated: torch.Tensor, parameter: nn.Parameter, moment: str | None
) -> torch.Tensor:
    if moment is None:
        # Where weights are whole and fp32 on every rank, they are the fp32 weights.
        is_whole = parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id")
        return updated if is_whole or not _is_partitioned(parameter) else safe_get_full_fp32_param(parameter)
    if _is_partitioned(parameter):
        return safe_get_full_optimizer_state(parameter, moment)
    return engine.basic_optimizer.state[updated][moment]


def _set(
    engine: deepspeed.DeepSpeedEngine,
    updated: torch.Tensor,
    parameter: Any,
    moment: str | None,
    whole: torch.Tensor,
) -> None:
    if hasattr(parameter, "ds_id"):
        # DeepSpeed cuts no share from a tensor that does not divide by the ranks, so the share is cut here.
        share = parameter.ds_tensor.numel()
        padded = F.pad(whole.flatten(), (0, share * distributed.world_size() - whole.numel()))
        own = padded[share * distributed.rank() :][:share]
        if moment is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, moment)
    elif moment is None:
        if _is_partitioned(parameter):
            safe_set_full_fp32_param(parameter, whole)
        else:
            updated.data.copy_(whole)
    elif _is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, whole, moment)
    else:
        engine.basic_optimizer.state[updated][moment].copy_(whole)


def _allocate_moments(engine: deepspeed.DeepSpeedEngine, updates: int) -> None:
    """What the optimizer allocates at its first update, and ZeRO's links from the parameters to it."""
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    # At stage 3 the groups are empty between steps.
    held = getattr(wrapper, "fp32_partitioned_groups_flat", None)
    for tensor in held or [each for group in optimizer.param_groups for each in group["params"]]:
        is_on_host = isinstance(optimizer, DeepSpeedCPUAdam)
        step: Any = updates if is_on_host else torch.tensor(float(updates), device=tensor.device)
        optimizer.state[tensor] = {"step": step, **{name: torch.zeros_like(tensor.data) for name in MOMENTS}}
    if hasattr(wrapper, "_hp_optimizer_states_linked"):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def _repeat_bias_corrections(optimizer: DeepSpeedCPUAdam, updates: int) -> None:
    """Let the C++ part multiply its bias corrections up again: as powers they differ in the last bits."""
    weight, gradient, *moments = (torch.zeros(1) for _ in range(4))
    group = optimizer.param_groups[0]
    for update in range(1, updates + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, update, 0.0, *group["betas"], group["eps"], 0.0, True, weight, gradient, *moments
        )
