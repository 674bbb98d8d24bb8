"""The DeepSpeed engine: process group, optimizer, `deepspeed.initialize`."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from coconut_ds.config.deepspeed_config import Device, offloads_optimizer
from coconut_ds.config.run_config import RunConfig
from coconut_ds.engine.hostfile import demand_hostfile
from coconut_ds.engine.internals import (
    all_reduce_buffer,
    check_gradients_on_device,
    default_timeout,
    demand_internals,
)
from coconut_ds.engine.operator_build import builds_announced
from coconut_ds.errors import InputError
from coconut_ds.runtime import distributed

_LONGER = timedelta(minutes=1)
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets in the environment of a rank."""


@contextlib.contextmanager
def process_group(hang_limit_s: float = 0) -> Iterator[None]:
    """`start_process_group` for a run. Without a launcher the process is restored, however the run ends.

    Under a launcher the group stays: a failed rank must not wait for ranks inside a collective (`report_failure`).
    """
    before = {key: os.environ.get(key) for key in _LAUNCHED}
    try:
        start_process_group(hang_limit_s)
        yield
    finally:
        if before["RANK"] is None:
            if distributed.has_group():
                # torch's function would leave destroyed groups in DeepSpeed, and a later run here would fail.
                deepspeed.comm.destroy_process_group()
            for key in _LAUNCHED:
                os.environ.pop(key, None)
            os.environ.update({key: value for key, value in before.items() if value is not None})


def start_process_group(hang_limit_s: float = 0) -> None:
    """Join the ranks the launcher started: NCCL on GPUs, gloo on CPUs. Without a launcher this is the only rank.

    Collectives wait longer than `hang_limit_s` (seconds), so that a hanging rank is ended before the others time out.
    `prepare_device` comes before it. Raises InputError if the port is in use, if the hostfile given to the launcher
    does not exist, or if DeepSpeed computes on another device.
    """
    demand_hostfile()
    _demand_agreement()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(dict(zip(_LAUNCHED, ("0", "0", "1", "127.0.0.1", str(port)))))
    timeout = max(default_timeout(), timedelta(seconds=hang_limit_s) + _LONGER)
    try:
        with builds_announced():
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise InputError(
            f"port {os.environ['MASTER_PORT']} is in use, perhaps by another run; give this one another: "
            "MASTER_PORT=29501 ./launch.sh ..., or deepspeed --master_port 29501 ..."
        ) from None
    atexit.register(all_reduce_buffer().unlink, missing_ok=True)


def describe_device() -> Device:
    """The kind of accelerator of this rank, and the half precisions in its hardware; after `prepare_device`."""
    if distributed.device().type == "cuda":
        # torch and DeepSpeed say that every GPU supports bf16, which older ones emulate, slowly. The oldest card of
        # this machine's ranks decides for all of them.
        capability = min(map(torch.cuda.get_device_capability, range(distributed.ranks_here())))
        return Device("cuda", has_bf16=capability >= (8, 0), has_fp16=capability >= (7, 0))
    accelerator = get_accelerator()
    has_bf16, has_fp16 = accelerator.is_bf16_supported(), accelerator.is_fp16_supported()
    return Device("cpu", bool(has_bf16), bool(has_fp16))


def _demand_agreement() -> None:
    theirs, ours = get_accelerator().device_name(), distributed.device().type
    if theirs != ours:
        raise InputError(
            f"DeepSpeed computes on {theirs} and this trainer on {ours} "
            f"(DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', '')}); set DS_ACCELERATOR=cpu to train on the CPU, or "
            "unset it to train on GPUs"
        )


def build_engine(model: nn.Module, config: RunConfig, ds_config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` in a DeepSpeed engine for the life of the process; the learning rate is 0 until a schedule starts.

    Raises InternalsError for a DeepSpeed that lacks what resets and checkpoints rely on.
    """
    with builds_announced():
        optimizer = _optimizer(model, config, on_host=offloads_optimizer(ds_config))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    demand_internals(engine)
    if config.fast == "auto":
        check_gradients_on_device(engine)
    # At stage 0 with bf16 DeepSpeed 0.19.8 takes an update without gradients here: it would decay the weights, which a
    # rate of 0 prevents, and Adam would begin to count at 1.
    engine.basic_optimizer.state.clear()
    return engine


def _optimizer(model: nn.Module, config: RunConfig, on_host: bool) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": config.adam_betas,
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if on_host:
        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)
