"""One optimizer step over its accumulated micro-batches, normalised over all of them on all ranks.

A step makes one transfer from device to host, in `fetch`; the forward and backward passes make none. Outside this
module, DeepSpeed's update may make its own, the training loop makes one to agree on whether to stop, and a logged step
one for the norm of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from coconut_ds.data.batches import Batch, to_device
from coconut_ds.engine.internals import is_scale_at_minimum
from coconut_ds.errors import InputError
from coconut_ds.runtime import distributed

if TYPE_CHECKING:
    import deepspeed


class NonFiniteLossError(InputError):
    """The loss of an optimizer step was not a finite number; raised on every rank before the update."""


class LossScaleError(InputError):
    """fp16 training whose loss scale cannot be lowered any further."""


@dataclass(frozen=True)
class Pending:
    """The metrics of a step while they are still on the device; `fetch` brings them to the host."""

    loss: torch.Tensor
    """This rank's part of the step's loss, 0-d."""
    totals: torch.Tensor
    """Over all ranks, int64 (4,): supervised tokens, micro-batches with any, tokens, cells."""
    indices: list[int]
    """The training examples this rank had."""


@dataclass(frozen=True)
class StepMetrics:
    """One step over all ranks. `n_tokens` cells are tokens; `padding_share` is the padded fraction."""

    loss: float
    n_targets: int
    n_tokens: int
    padding_share: float


def accumulate_gradients(
    engine: deepspeed.DeepSpeedEngine, batches: list[Batch], normalization: Literal["token", "micro_batch"]
) -> Pending:
    """Forward and backward over `batches`, without synchronising with the device.

    Every rank must pass the same number of micro-batches.

    `token`: the mean over all supervised tokens of the batches on all ranks, so the gradient does not depend on how
    the examples are split. `micro_batch`: the mean of the micro-batches' means, as published; fillers do not count.
    """
    device, world = distributed.device(), distributed.world_size()
    totals = distributed.sum_over_ranks(_to_device_async(_counts(batches), device))
    share = 1 / (totals[0] if normalization == "token" else totals[1]).float()
    loss = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        # Accumulation ends with the epoch, not with DeepSpeed's count. Told before the last backward, an offloaded
        # optimizer gets its gradients from that backward; otherwise `step` would fetch each one back from the host.
        engine.set_gradient_accumulation_boundary(number == len(batches))
        output = engine(**to_device(batch.inputs))
        part = output.loss_sum * (share if normalization == "token" else share / max(batch.n_targets, 1))
        # DeepSpeed averages gradients over ranks, the shares are meant to be summed.
        engine.backward(part * world, scale_wrt_gas=False)
        loss += part.detach()
    return Pending(loss, totals, [index for batch in batches for index in batch.indices])


def fetch(step: Pending, number: int) -> StepMetrics:
    """The metrics of optimizer step `number` (from 1), in one transfer.

    Raises NonFiniteLossError on every rank when the loss is not finite.
    """
    loss_sum = distributed.sum_over_ranks(step.loss.clone())
    # float64 holds both exactly: a loss in fp32, and counts up to 2**53.
    loss, n_targets, _, n_tokens, cells = torch.cat([loss_sum.double()[None], step.totals.double()]).tolist()
    if not math.isfinite(loss):
        shares = distributed.from_main(distributed.gather_to_main(step.indices))
        examples = [f"rank {rank} had training examples {indices}" for rank, indices in enumerate(shares)]
        raise NonFiniteLossError(
            f"loss {loss} at optimizer step {number}, nothing was updated; {'; '.join(examples)}; "
            "lower lr, set max_grad_norm, or use bf16 or fp32 instead of fp16"
        )
    return StepMetrics(loss, int(n_targets), int(n_tokens), 1 - n_tokens / cells)


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine, batches: list[Batch], normalization: Literal["token", "micro_batch"]
) -> StepMetrics:
    """Gradients of `batches`, their check and the update. Raises NonFiniteLossError before anything is updated."""
    pending = accumulate_gradients(engine, batches, normalization)
    # Before the update: a loss that is not finite must not reach the weights.
    metrics = fetch(pending, engine.global_steps + 1)
    update(engine)
    return metrics


def update(engine: deepspeed.DeepSpeedEngine) -> None:
    """The optimizer's step; raises LossScaleError on every rank where fp16 has no smaller loss scale left."""
    try:
        engine.step()
    except Exception as error:
        if not is_scale_at_minimum(error):
            raise
        raise LossScaleError(
            f"fp16: gradients overflow at the smallest loss scale, after {engine.global_steps} optimizer steps; lower "
            "lr, set warmup_steps or max_grad_norm, or use bf16 or fp32"
        ) from None


def _counts(batches: list[Batch]) -> torch.Tensor:
    rows = [
        (batch.n_targets, batch.n_targets > 0, batch.n_tokens, batch.inputs["input_ids"].numel() * (batch.n_tokens > 0))
        for batch in batches
    ]
    return torch.tensor(rows).sum(dim=0)


def _to_device_async(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
