"""What a stage switch resets: the optimizer, in place, and the learning-rate schedule.

The engine stays, and is built once per process: DeepSpeed keeps a destroyed engine alive through its root hooks.
"""

from __future__ import annotations

import deepspeed
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.stages import Curriculum
from coconut_ds.engine.internals import unlink_states


def resets_before(epoch: int, config: RunConfig, curriculum: Curriculum) -> bool:
    """Whether the optimizer is reset before `epoch` (from 0)."""
    if epoch == 0 or config.reset_optimizer is False:
        return False
    return config.reset_optimizer == "epoch" or curriculum.stage(epoch) != curriculum.stage(epoch - 1)


def epochs_until_reset(epoch: int, config: RunConfig, curriculum: Curriculum) -> int:
    """Number of epochs, starting with `epoch`, until the next reset or the end of the run."""
    end = epoch + 1
    while end < config.num_epochs and not resets_before(end, config, curriculum):
        end += 1
    return end - epoch


def reset_optimizer_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """Clear moments and step counts in place; master weights and the loss scale stay.

    Bit-identical to a new optimizer on the same weights. There is no public call for it: ZeRO links parts of the
    states to the parameters at the first step.
    """
    engine.basic_optimizer.state.clear()
    unlink_states(engine)


def new_schedule(engine: deepspeed.DeepSpeedEngine, config: RunConfig, n_steps: int, done: int = 0) -> LRScheduler:
    """The run's learning-rate schedule over `n_steps` optimizer steps, warmup included, of which `done` are taken."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.lr
    name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    schedule = get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=n_steps)
    if done:
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": done - 1, "_step_count": done + 1})
        schedule.step()
    return schedule
