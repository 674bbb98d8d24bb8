"""One optimizer step over an accumulation window, normalised over all its micro-batches on all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from coconut_ds import distributed
from coconut_ds.curriculum.collator import Batch
from coconut_ds.training.evaluator import to_device

if TYPE_CHECKING:
    import deepspeed


class NonFiniteLossError(RuntimeError):
    """The loss of an optimizer step was not a finite number; raised on every rank before the update."""


@dataclass(frozen=True)
class Step:
    """`loss` and `n_targets` (supervised tokens) over all ranks; `applied` is False when fp16 overflowed."""

    loss: float
    n_targets: int
    applied: bool


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine, window: list[Batch], normalization: Literal["token", "micro_batch"]
) -> Step:
    """Forward, backward and update over `window`, which has as many micro-batches on every rank.

    `token`: the mean over all supervised tokens of the window on all ranks, so the gradient does not depend on how
    the examples are split. `micro_batch`: the mean of the micro-batches' means, as published; fillers do not count.
    Raises NonFiniteLossError, on every rank, before anything is updated.
    """
    device, world = distributed.device(), distributed.world_size()
    counts = torch.tensor([[batch.n_targets, batch.n_targets > 0] for batch in window], device=device).sum(dim=0)
    n_targets, n_batches = distributed.sum_over_ranks(counts)
    share = 1 / (n_targets if normalization == "token" else n_batches).float()
    loss = torch.zeros((), device=device)
    for batch in window:
        output = engine(**to_device(batch.inputs))
        part = (output.loss_sum if normalization == "token" else output.loss) * share
        # DeepSpeed averages gradients over ranks, the shares are meant to be summed.
        engine.backward(part * world, scale_wrt_gas=False)
        loss += part.detach()
    value = distributed.sum_over_ranks(loss).item()
    if not math.isfinite(value):
        indices = [index for batch in window for index in batch.indices]
        raise NonFiniteLossError(
            f"loss {value} at optimizer step {engine.global_steps + 1}, nothing was updated; rank {distributed.rank()} "
            f"had training examples {indices}; lower lr, set max_grad_norm, or use bf16 or fp32 in place of fp16"
        )
    engine.step()
    return Step(value, int(n_targets), engine.was_step_applied())
