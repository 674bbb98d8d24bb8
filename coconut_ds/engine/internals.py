"""Names of DeepSpeed and torch that no public call replaces. They stand here and nowhere else in the engine.

`demand_internals` looks for them when an engine is built and refuses to train without one: a reset that resets nothing,
or a checkpoint with wrong fp32 weights, would be found weeks later. What each ZeRO stage has was read in DeepSpeed
0.19.8; tests/engine/test_internals.py takes every name away and expects the refusal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from coconut_ds.errors import InputError

_KNOWN_TO_WORK = {"deepspeed": "0.19.8", "torch": "2.13.0"}
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_HOOKS = ("_remove_module_hooks", "setup_zero_stage3_hooks", "forward_hooks", "backward_hooks")


class InternalsError(InputError):
    """A library without a name that this project relies on."""


def demand(library: str, holder: Any, names: Iterable[str]) -> None:
    """Raise InternalsError unless `holder`, an object of `library`, has attributes of these names."""
    missing = [name for name in names if not hasattr(holder, name)]
    if missing:
        kind = holder if isinstance(holder, type) else type(holder)
        raise InternalsError(
            f"{library} {version(library)}: {kind.__module__}.{kind.__qualname__} has no {', '.join(missing)}, which "
            f"exact resets and checkpoints need; install {library}=={_KNOWN_TO_WORK[library]}"
        )


def demand_internals(engine: deepspeed.DeepSpeedEngine) -> None:
    """Raise InternalsError if a name that the functions below use with this engine is not there."""
    demand("deepspeed", engine, ("basic_optimizer", "optimizer", "global_steps"))
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if stage == 0 and engine.bfloat16_enabled():
        demand("deepspeed", wrapper, ("fp16_groups", "fp32_groups"))
    elif stage in (1, 2):
        demand("deepspeed", wrapper, ("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"))
        for parameter in trained:
            demand("deepspeed", parameter, ("_hp_mapping",))
            if parameter._hp_mapping is not None:
                demand("deepspeed", parameter._hp_mapping, ("optim_fragment",))
    elif stage == 3:
        demand("deepspeed", wrapper, ("fp32_partitioned_groups_flat", "parameter_offload"))
        demand("deepspeed", wrapper.parameter_offload, _HOOKS)
        for parameter in trained:
            demand("deepspeed", parameter, ("ds_id", "ds_tensor", "ds_numel"))
    if isinstance(engine.basic_optimizer, DeepSpeedCPUAdam):
        demand("deepspeed", engine.basic_optimizer, ("ds_opt_adam", "opt_id"))
        demand("deepspeed", engine.basic_optimizer.ds_opt_adam, ("adam_update",))
    if engine.fp16_enabled():
        demand("deepspeed", wrapper, ("loss_scaler",))
        demand("deepspeed", wrapper.loss_scaler, _LOSS_SCALE if engine.dynamic_loss_scale() else _LOSS_SCALE[:1])


def named(library: str, module: str, name: str) -> Any:
    """`name` of a module that is not part of the library's documented interface."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        known = f"{library}=={_KNOWN_TO_WORK[library]}"
        raise InternalsError(f"{library} {version(library)}: no {name} in {module}; install {known}") from None


def unlink_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """Undo ZeRO-1's and ZeRO-2's links from the parameters to moments that are no longer the optimizer's."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        for parameter in engine.module.parameters():
            # None where another rank has all of a parameter.
            if parameter.requires_grad and parameter._hp_mapping is not None:
                parameter._hp_mapping.optim_fragment = None


def link_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """Link the parameters to the optimizer's moments, as ZeRO-1 and ZeRO-2 do at their first update."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def fp32_twins(engine: deepspeed.DeepSpeedEngine) -> dict[nn.Parameter, torch.Tensor]:
    """At stage 0 in half precision, the fp32 tensor that is updated in place of each parameter; empty elsewhere."""
    if engine.zero_optimization_stage() > 0 or not engine.bfloat16_enabled():
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups)
    return {low: high for lows, highs in groups for low, high in zip(lows, highs)}


def updated_tensors(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """What the optimizer keeps moments for."""
    if engine.zero_optimization_stage() == 3:
        # Its groups are empty between steps.
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [each for group in engine.basic_optimizer.param_groups for each in group["params"]]


def n_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, of which ZeRO-3 may hold none here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def elements_per_rank(parameter: Any) -> int:
    """Elements of a rank's share of a parameter under ZeRO-3, padding included."""
    share: torch.Tensor = parameter.ds_tensor
    return share.numel()


@contextmanager
def gathering_switched_off(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside it ZeRO-3's layers do not gather their weights."""
    hooks = engine.optimizer.parameter_offload
    hooks._remove_module_hooks()
    hooks.forward_hooks.clear()
    hooks.backward_hooks.clear()
    try:
        yield
    finally:
        hooks.setup_zero_stage3_hooks()


def repeat_bias_corrections(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Have DeepSpeed's C++ Adam multiply its bias corrections up again: as powers they differ in the last bits."""
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    weight, gradient, *moments = (torch.zeros(1) for _ in range(4))
    group = optimizer.param_groups[0]
    for update in range(1, updates + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, update, 0.0, *group["betas"], group["eps"], 0.0, True, weight, gradient, *moments
        )


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """The state of fp16's loss scale; empty in other precisions."""
    scaler = engine.optimizer.loss_scaler if engine.fp16_enabled() else None
    return {key: getattr(scaler, key) for key in _LOSS_SCALE if hasattr(scaler, key)}


def restore_loss_scale(engine: deepspeed.DeepSpeedEngine, state: Mapping[str, float]) -> None:
    """Set what `loss_scale` returned; an engine that does not scale its loss is left as it is."""
    if engine.fp16_enabled():
        for key, value in state.items():
            setattr(engine.optimizer.loss_scaler, key, value)
