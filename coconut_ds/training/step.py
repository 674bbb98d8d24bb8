"""One optimizer step over its accumulated micro-batches, normalised over all of them on all ranks.

A step makes one transfer from device to host, in `fetch`; the forward and backward passes make none. Outside this
module, DeepSpeed's update may make its own, the training loop makes one to agree on whether to stop, and a logged step
one for the norm of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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

    losses: torch.Tensor
    """This rank's part of the step's losses, (2,): of the sequences, and of the steps written from thoughts."""
    totals: torch.Tensor
    """Over all ranks, int64 (6,): supervised tokens, micro-batches with any, the same two of written steps, tokens,
    cells."""
    indices: list[int]
    """The training examples this rank had."""


@dataclass(frozen=True)
class StepMetrics:
    """One step over all ranks. `n_tokens` cells are tokens; `padding_share` is the padded fraction.

    `step_loss` is that of the steps written from thoughts, without its weight; None if none is written.
    """

    loss: float
    n_targets: int
    n_tokens: int
    padding_share: float
    step_loss: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {key: value for key, value in asdict(self).items() if value is not None}


Normalization = Literal["token", "micro_batch"]


def accumulate_gradients(
    engine: deepspeed.DeepSpeedEngine, batches: list[Batch], normalization: Normalization, step_weight: float = 0.0
) -> Pending:
    """Forward and backward over `batches`, without synchronising with the device.

    Every rank must pass the same number of micro-batches.

    `token`: the mean over all supervised tokens of the batches on all ranks, so the gradient does not depend on how
    the examples are split. `micro_batch`: the mean of the micro-batches' means, as published; fillers do not count.
    Steps written from thoughts are a loss of their own, normalised in the same way by their own tokens and added with
    `step_weight`.
    """
    device, world = distributed.device(), distributed.world_size()
    totals = distributed.sum_over_ranks(_to_device_async(_counts(batches), device))
    counted = totals[:4].view(2, 2)[:, 0 if normalization == "token" else 1]
    shares = 1 / counted.clamp_min(1).float()  # (2,)
    losses = torch.zeros(2, device=device)
    for number, batch in enumerate(batches, start=1):
        # Accumulation ends with the epoch, not with DeepSpeed's count. Told before the last backward, an offloaded
        # optimizer gets its gradients from that backward; otherwise `step` would fetch each one back from the host.
        engine.set_gradient_accumulation_boundary(number == len(batches))
        output = engine(**to_device(batch.inputs))
        share, step_share = shares
        if normalization == "micro_batch":
            share, step_share = share / max(batch.n_targets, 1), step_share / max(batch.n_step_targets, 1)
        part = output.loss_sum * share
        losses[0] += part.detach()
        if output.step_loss_sum is not None:
            of_steps = output.step_loss_sum * step_share
            losses[1] += of_steps.detach()
            part = part + step_weight * of_steps
        # DeepSpeed averages gradients over ranks, the shares are meant to be summed.
        engine.backward(part * world, scale_wrt_gas=False)
    return Pending(losses, totals, [index for batch in batches for index in batch.indices])


def fetch(step: Pending, number: int) -> StepMetrics:
    """The metrics of optimizer step `number` (from 1), in one transfer.

    Raises NonFiniteLossError on every rank when the loss is not finite.
    """
    losses = distributed.sum_over_ranks(step.losses.clone())
    # float64 holds both exactly: losses in fp32, and counts up to 2**53.
    figures = torch.cat([losses.double(), step.totals.double()]).tolist()
    loss, step_loss, n_targets, _, n_step_targets, _, n_tokens, cells = figures
    if not math.isfinite(loss + step_loss):
        shares = distributed.from_main(distributed.gather_to_main(step.indices))
        examples = [f"rank {rank} had training examples {indices}" for rank, indices in enumerate(shares)]
        raise NonFiniteLossError(
            f"loss {loss + step_loss} at optimizer step {number}, nothing was updated; {'; '.join(examples)}; "
            "lower lr, set max_grad_norm, or use bf16 or fp32 instead of fp16"
        )
    padding = 1 - n_tokens / cells
    return StepMetrics(loss, int(n_targets), int(n_tokens), padding, step_loss if n_step_targets else None)


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine, batches: list[Batch], normalization: Normalization, step_weight: float = 0.0
) -> StepMetrics:
    """Gradients of `batches`, their check and the update. Raises NonFiniteLossError before anything is updated."""
    pending = accumulate_gradients(engine, batches, normalization, step_weight)
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
    rows = []
    for batch in batches:
        cells = batch.inputs["input_ids"].numel() * (batch.n_tokens > 0)
        targets = (batch.n_targets, batch.n_targets > 0, batch.n_step_targets, batch.n_step_targets > 0)
        rows.append((*targets, batch.n_tokens, cells))
    return torch.tensor(rows).sum(dim=0)


def _to_device_async(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
