"""Names of DeepSpeed and torch that no public call replaces. They stand here and nowhere else outside `model/`.

`demand_internals` looks for them when an engine is built and refuses to train without one: a reset that resets nothing,
or a checkpoint with wrong fp32 weights, would be found weeks later. The others are looked up when a run starts. Nothing
here has a default to fall back to. What each ZeRO stage has was read in DeepSpeed 0.19.8;
tests/engine/test_internals.py takes every name away and expects the refusal.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from coconut_ds.errors import InputError

if TYPE_CHECKING:
    import deepspeed

_KNOWN_TO_WORK = {"deepspeed": "0.19.8", "torch": "2.13.0"}
LAUNCHER, RANK_STARTER = "deepspeed.launcher.runner", "deepspeed.launcher.launch"
"""Modules of DeepSpeed's launcher: the command a user gives, and its child that starts the ranks of a machine."""
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_AT_MINIMUM = "loss scale already at minimum"
_OFFLOADED = ("update_offload_overflow_tracker", "local_overflow", "_has_inf_or_nan", "norm_for_param_grads")
_NORM = "complete_grad_norm_calculation_for_cpu_offload"
_HOOKS = ("_remove_module_hooks", "setup_zero_stage3_hooks", "forward_hooks", "backward_hooks")


class InternalsError(InputError):
    """A library without a name that this project relies on."""

    def __init__(self, library: str, problem: str):
        known = f"{library}=={_KNOWN_TO_WORK[library]}"
        super().__init__(f"{library} {version(library)}: {problem}, which this trainer relies on; install {known}")


try:
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import tree_iter as tree_iter
    from torch.utils._pytree import tree_map_only as tree_map_only
except ImportError as error:
    raise InternalsError("torch", str(error)) from error


def demand(library: str, holder: Any, names: Iterable[str]) -> None:
    """Raise InternalsError unless `holder`, an object of `library`, has attributes of these names."""
    missing = [name for name in names if not hasattr(holder, name)]
    if missing:
        kind = holder if isinstance(holder, type) else type(holder)
        raise InternalsError(library, f"{kind.__module__}.{kind.__qualname__} has no {', '.join(missing)}")


def demand_internals(engine: deepspeed.DeepSpeedEngine) -> None:
    """Raise InternalsError if a name that the functions below use with this engine is not there."""
    demand("deepspeed", engine, ("basic_optimizer", "optimizer", "global_steps"))
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if wrapper is not engine.basic_optimizer:
        demand("deepspeed", wrapper, ("optimizer",))
    if stage == 0:
        if wrapper is not engine.basic_optimizer:
            demand("deepspeed", wrapper, ("fp16_groups", "fp32_groups"))
        masters = fp32_masters(engine)
        updated = [masters.get(parameter) for parameter in trained]
        if {id(tensor) for tensor in updated} != set(map(id, updated_tensors(engine))):
            raise InternalsError("deepspeed", "no fp32 tensor for each parameter at stage 0")
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
    if updates_on_host(engine):
        if stage in (1, 2):
            demand("deepspeed", wrapper, (*_OFFLOADED, _NORM))
        demand("deepspeed", engine.basic_optimizer, ("ds_opt_adam", "opt_id"))
        demand("deepspeed", engine.basic_optimizer.ds_opt_adam, ("adam_update",))
    if engine.fp16_enabled():
        demand("deepspeed", wrapper, ("loss_scaler",))
        demand("deepspeed", wrapper.loss_scaler, ("dynamic",))
        demand("deepspeed", wrapper.loss_scaler, _scale_names(wrapper.loss_scaler))
        if wrapper.loss_scaler.dynamic and _AT_MINIMUM not in inspect.getsource(type(wrapper.loss_scaler)):
            raise InternalsError("deepspeed", f"no error that says {_AT_MINIMUM!r}")


def named(library: str, module: str, name: str) -> Any:
    """`name` of a module that is not part of the library's documented interface."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise InternalsError(library, f"no {name} in {module}") from None


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


def updates_on_host(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether DeepSpeed's CPU Adam makes the updates."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return isinstance(engine.basic_optimizer, DeepSpeedCPUAdam)


def check_gradients_on_device(engine: deepspeed.DeepSpeedEngine) -> None:
    """Have ZeRO-1 and ZeRO-2 with offload check and measure gradients without waiting for each of them.

    DeepSpeed's own code makes the host wait twice per parameter and step: in the backward, for whether the gradient is
    finite, and in the update, for its norm. Here both stay on the device until the update; the values are the same.
    """
    if not (updates_on_host(engine) and engine.zero_optimization_stage() in (1, 2)):
        return
    wrapper = engine.optimizer
    norm_of_all = getattr(wrapper, _NORM)

    def note_overflow(gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            wrapper.local_overflow = wrapper.local_overflow | wrapper._has_inf_or_nan(gradient.data)

    def norm(parameters: Any) -> torch.Tensor:
        norms: dict[int, torch.Tensor] = wrapper.norm_for_param_grads
        if norms:
            wrapper.norm_for_param_grads = dict(zip(norms, torch.stack([*norms.values()]).cpu(), strict=True))
        total: torch.Tensor = norm_of_all(parameters)
        return total

    wrapper.update_offload_overflow_tracker = note_overflow
    setattr(wrapper, _NORM, norm)


def fp32_masters(engine: deepspeed.DeepSpeedEngine) -> dict[nn.Parameter, torch.Tensor]:
    """At stage 0, the fp32 tensor that is updated for each parameter: itself, or a copy in half precision.

    Empty at other stages, where ranks share them.
    """
    if engine.zero_optimization_stage() > 0:
        return {}
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return {parameter: parameter for parameter in engine.module.parameters()}
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def updated_tensors(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """What the optimizer keeps moments for."""
    if engine.zero_optimization_stage() == 3:
        # Its groups are empty between steps.
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [each for group in engine.basic_optimizer.param_groups for each in group["params"]]


def n_elements(engine: deepspeed.DeepSpeedEngine) -> int:
    """Elements of all that is trained, of which each rank has a share under ZeRO-3."""
    is_divided = engine.zero_optimization_stage() == 3
    trained = (each for each in engine.module.parameters() if each.requires_grad)
    return sum(each.ds_numel if is_divided else each.numel() for each in trained)


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


def repeat_bias_corrections(engine: deepspeed.DeepSpeedEngine, updates: int) -> None:
    """Have DeepSpeed's C++ Adam multiply its bias corrections up again: as powers they differ in the last bits."""
    if not updates_on_host(engine):
        return
    optimizer: Any = engine.basic_optimizer
    weight, gradient, *moments = (torch.zeros(1) for _ in range(4))
    group = optimizer.param_groups[0]
    for update in range(1, updates + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, update, 0.0, *group["betas"], group["eps"], 0.0, True, weight, gradient, *moments
        )


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """The state of fp16's loss scale; empty in other precisions."""
    if not engine.fp16_enabled():
        return {}
    scaler = engine.optimizer.loss_scaler
    return {key: getattr(scaler, key) for key in _scale_names(scaler)}


def restore_loss_scale(engine: deepspeed.DeepSpeedEngine, state: Mapping[str, float]) -> None:
    """Set what `loss_scale` returned; no effect in other precisions."""
    if engine.fp16_enabled():
        for key, value in state.items():
            setattr(engine.optimizer.loss_scaler, key, value)


def _scale_names(scaler: Any) -> tuple[str, ...]:
    return _LOSS_SCALE if scaler.dynamic else _LOSS_SCALE[:1]


def is_scale_at_minimum(error: Exception) -> bool:
    """Whether DeepSpeed stops fp16 because the loss scale cannot be lowered; it raises a bare Exception."""
    return _AT_MINIMUM in str(error)


def default_timeout() -> timedelta:
    """How long DeepSpeed lets a collective wait unless it is given a limit."""
    limit: timedelta = named("deepspeed", "deepspeed.constants", "default_pg_timeout")
    return limit


def all_reduce_buffer() -> Path:
    """The shared memory that DeepSpeed's all-reduce between CPU ranks leaves of this rank, 66 MiB for each port.

    Its name is in C++, where it cannot be looked up; a test compares it.
    """
    address, port, rank = (os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    return Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}")


def demand_launcher() -> None:
    """Raise InternalsError if the command lines of DeepSpeed's launcher cannot be recognised."""
    for module in (LAUNCHER, RANK_STARTER):
        if find_spec(module) is None:
            raise InternalsError("deepspeed", f"no module {module}")


def launcher_options(arguments: list[str]) -> tuple[str, str]:
    """(script, hostfile) that the launcher reads from its arguments."""
    given = named("deepspeed", LAUNCHER, "parse_args")(arguments)
    demand("deepspeed", given, ("user_script", "hostfile"))
    return given.user_script, given.hostfile


def file_baton() -> Any:
    """torch's class for the lock file of an operator that is compiled."""
    baton = named("torch", "torch.utils.file_baton", "FileBaton")
    demand("torch", baton(""), ("try_acquire", "wait", "release", "lock_file_path"))
    return baton


def cpu_operators() -> list[Any]:
    """Builders of the operators that CPU ranks need, new ones."""
    names = ("CPUAdamBuilder", "ShareMemCommBuilder")
    return [named("deepspeed", "deepspeed.ops.op_builder.cpu", name)() for name in names]
