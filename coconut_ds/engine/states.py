"""What an engine holds, whole and by parameter name: the same whatever ZeRO does with it.

DeepSpeed's own checkpoints hold each rank's share as it lies in memory. They load under the same number of ranks, the
same kind of stage and the same precision only; what is here goes from any engine into any other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.utils as ds_utils
import torch
import torch.nn.functional as F
from torch import nn

from coconut_ds.engine import internals
from coconut_ds.model.backbone import trained_parameters
from coconut_ds.runtime import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second moment, Adam (arXiv 1412.6980), algorithm 1."""

Tensors = Mapping[str, torch.Tensor]
_Masters = Mapping[nn.Parameter, torch.Tensor]


def updates_done(engine: deepspeed.DeepSpeedEngine) -> int:
    """Adam's t: updates since the optimizer was new; steps that fp16 skipped do not count."""
    steps = [int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    return steps[0] if steps else 0


def gather(engine: deepspeed.DeepSpeedEngine, moment: str | None = None) -> dict[str, torch.Tensor]:
    """A moment, or the fp32 weights, of every trained parameter in host memory on rank 0; empty on other ranks.

    Called on every rank. For a moment the optimizer must have made an update (`updates_done`).
    """
    masters = internals.fp32_masters(engine)
    gathered = {}
    for name, parameter in trained_parameters(engine.module).items():
        whole = _held(engine, masters, parameter, moment)
        if distributed.is_main():
            gathered[name] = whole.detach().float().cpu()
    return gathered


def restore(engine: deepspeed.DeepSpeedEngine, updates: int, weights: Tensors, moments: Mapping[str, Tensors]) -> None:
    """Bring an engine that was built on `weights` to the state of another after `updates` of its optimizer.

    Called on every rank, each with all of the tensors.
    """
    if updates:
        _allocate_moments(engine, updates)
    masters = internals.fp32_masters(engine)
    for name, parameter in trained_parameters(engine.module).items():
        if parameter.dtype != torch.float32:
            _set(engine, masters, parameter, None, weights[name])
        for moment in moments if updates else ():
            _set(engine, masters, parameter, moment, moments[moment][name])
    internals.repeat_bias_corrections(engine, updates)


@contextmanager
def whole_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside it the module works on each rank by itself, like any other; called on every rank.

    Under ZeRO-3 every layer otherwise gathers its weights from all ranks, so that all ranks would have to decode the
    same number of batches and tokens. At other stages the weights are whole anyway.
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())), internals.gathering_switched_off(engine):
        yield


def _allocate_moments(engine: deepspeed.DeepSpeedEngine, updates: int) -> None:
    """Allocate what the optimizer allocates at its first update, and ZeRO's links from the parameters to it."""
    is_on_host = internals.updates_on_host(engine)
    for tensor in internals.updated_tensors(engine):
        step: Any = updates if is_on_host else torch.tensor(float(updates), device=tensor.device)
        moments = {name: torch.zeros_like(tensor.data) for name in MOMENTS}
        engine.basic_optimizer.state[tensor] = {"step": step, **moments}
    internals.link_states(engine)


def _held(
    engine: deepspeed.DeepSpeedEngine, masters: _Masters, parameter: nn.Parameter, moment: str | None
) -> torch.Tensor:
    """A moment or the fp32 weight of a parameter; at stage 0 the tensor itself, else it may be a copy."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        master = masters[parameter]
        return master if moment is None else engine.basic_optimizer.state[master][moment]
    if moment is not None:
        return ds_utils.safe_get_full_optimizer_state(parameter, moment)
    # Below stage 3 weights are whole on every rank, and in fp32 they are their own masters.
    is_master = stage < 3 and parameter.dtype == torch.float32
    return parameter if is_master else ds_utils.safe_get_full_fp32_param(parameter)


def _set(
    engine: deepspeed.DeepSpeedEngine,
    masters: _Masters,
    parameter: nn.Parameter,
    moment: str | None,
    whole: torch.Tensor,
) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        # DeepSpeed cuts no share from a tensor that does not divide by the ranks, so the share is cut here.
        share = internals.elements_per_rank(parameter)
        padded = F.pad(whole.flatten(), (0, share * distributed.world_size() - whole.numel()))
        whole = padded[share * distributed.rank() :][:share]
    if stage == 0:
        _held(engine, masters, parameter, moment).data.copy_(whole)
    elif moment is None:
        set_weight = ds_utils.safe_set_local_fp32_param if stage == 3 else ds_utils.safe_set_full_fp32_param
        set_weight(parameter, whole)
    else:
        set_moment = ds_utils.safe_set_local_optimizer_state if stage == 3 else ds_utils.safe_set_full_optimizer_state
        set_moment(parameter, whole, moment)
