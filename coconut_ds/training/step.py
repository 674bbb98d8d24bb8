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


LOSSES = ("loss", "step_loss", "verbal_loss", "distance", "direct_loss")
"""Of the sequences; of steps written from thoughts; of the sequences with all steps, a teacher's, and the distance of
states from the teacher's; of the answers alone."""
Weights = tuple[float, float, float, float, float]
"""Of each loss in the gradient."""
SEQUENCES_ALONE: Weights = (1.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Pending:
    """The metrics of a step while they are still on the device; `fetch` brings them to the host."""

    losses: torch.Tensor
    """This rank's part of each loss of the step, (5,)."""
    totals: torch.Tensor
    """Over all ranks, int64 (12,): for each loss what it is a mean over and the micro-batches with any, then tokens,
    cells."""
    indices: list[int]
    """The training examples this rank had."""


@dataclass(frozen=True)
class StepMetrics:
    """One step over all ranks. `n_tokens` cells are tokens; `padding_share` is the padded fraction.

    Losses have no weights; those that a step has not are None.
    """

    loss: float
    n_targets: int
    n_tokens: int
    padding_share: float
    step_loss: float | None = None
    verbal_loss: float | None = None
    distance: float | None = None
    direct_loss: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {key: value for key, value in asdict(self).items() if value is not None}


Normalization = Literal["token", "micro_batch"]


def accumulate_gradients(
    engine: deepspeed.DeepSpeedEngine,
    batches: list[Batch],
    normalization: Normalization,
    weights: Weights = SEQUENCES_ALONE,
) -> Pending:
    """Forward and backward over `batches`, without synchronising with the device.

    Every rank must pass the same number of micro-batches.

    `token`: the mean over all supervised tokens of the batches on all ranks, so the gradient does not depend on how
    the examples are split. `micro_batch`: the mean of the micro-batches' means, as published; fillers do not count.
    Each loss is normalised in this way by its own tokens, the distance of states by its examples; `weights` are those
    of their sum.
    """
    device, world = distributed.device(), distributed.world_size()
    totals = distributed.sum_over_ranks(_to_device_async(_counts(batches), device))
    counted = totals[:-2].view(len(LOSSES), 2)[:, 0 if normalization == "token" else 1]
    shares = 1 / counted.clamp_min(1).float()  # (5,)
    losses = torch.zeros(len(LOSSES), device=device)
    for number, batch in enumerate(batches, start=1):
        # Accumulation ends with the epoch, not with DeepSpeed's count. Told before the last backward, an offloaded
        # optimizer gets its gradients from that backward; otherwise `step` would fetch each one back from the host.
        engine.set_gradient_accumulation_boundary(number == len(batches))
        output = engine(**to_device(batch.inputs))
        parts = []
        for place, (loss_sum, count) in enumerate(zip(output.sums_of_losses, batch.counts_of_losses, strict=True)):
            if loss_sum is not None:
                share = shares[place] if normalization == "token" else shares[place] / max(count, 1)
                part = loss_sum * share
                losses[place] += part.detach()
                parts.append(weights[place] * part)
        # DeepSpeed averages gradients over ranks, the shares are meant to be summed.
        engine.backward(torch.stack(parts).sum() * world, scale_wrt_gas=False)
    return Pending(losses, totals, [index for batch in batches for index in batch.indices])


def fetch(step: Pending, number: int) -> StepMetrics:
    """The metrics of optimizer step `number` (from 1), in one transfer.

    Raises NonFiniteLossError on every rank when the loss is not finite.
    """
    losses = distributed.sum_over_ranks(step.losses.clone())
    # float64 holds both exactly: losses in fp32, and counts up to 2**53.
    figures = torch.cat([losses.double(), step.totals.double()]).tolist()
    values, counts, (n_tokens, cells) = figures[: len(LOSSES)], figures[len(LOSSES) : -2 : 2], figures[-2:]
    if not math.isfinite(sum(values)):
        shares = distributed.from_main(distributed.gather_to_main(step.indices))
        examples = [f"rank {rank} had training examples {indices}" for rank, indices in enumerate(shares)]
        raise NonFiniteLossError(
            f"loss {sum(values)} at optimizer step {number}, nothing was updated; {'; '.join(examples)}; "
            "lower lr, set max_grad_norm, or use bf16 or fp32 instead of fp16"
        )
    others = {name: value for name, value, count in list(zip(LOSSES, values, counts))[1:] if count}
    return StepMetrics(values[0], int(counts[0]), int(n_tokens), 1 - n_tokens / cells, **others)


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: list[Batch],
    normalization: Normalization,
    weights: Weights = SEQUENCES_ALONE,
) -> StepMetrics:
    """Gradients of `batches`, their check and the update. Raises NonFiniteLossError before anything is updated."""
    pending = accumulate_gradients(engine, batches, normalization, weights)
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
        targets = [value for count in batch.counts_of_losses for value in (count, count > 0)]
        rows.append((*targets, batch.n_tokens, cells))
    return torch.tensor(rows).sum(dim=0)


def _to_device_async(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
