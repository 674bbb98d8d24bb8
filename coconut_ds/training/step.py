"""One optimizer step over an accumulation window, normalised over all its micro-batches on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from coconut_ds import distributed
from coconut_ds.curriculum.collator import Batch
from coconut_ds.training.evaluator import to_device

if TYPE_CHECKING:
    import deepspeed


class NonFiniteLossError(RuntimeError):
    """The loss of an optimizer step was not a finite number; raised on every rank."""


@dataclass(frozen=True)
class Pending:
    """Figures of a step that are still on the device; `fetch` brings them to the host."""

    loss: torch.Tensor
    """This rank's part of the step's loss, 0-d."""
    totals: torch.Tensor
    """Over all ranks, int64 (4,): supervised tokens, micro-batches with any, tokens, cells."""
    indices: list[int]
    """The training examples this rank had."""


@dataclass(frozen=True)
class Figures:
    """Figures of a step over all ranks; `padding_share` is the share of the batches' cells that is padding."""

    loss: float
    n_targets: int
    padding_share: float


def accumulate_gradients(
    engine: deepspeed.DeepSpeedEngine, window: list[Batch], normalization: Literal["token", "micro_batch"]
) -> Pending:
    """Forward and backward over `window`, which has as many micro-batches on every rank; the host waits for nothing.

    `token`: the mean over all supervised tokens of the window on all ranks, so the gradient does not depend on how
    the examples are split. `micro_batch`: the mean of the micro-batches' means, as published; fillers do not count.
    """
    device, world = distributed.device(), distributed.world_size()
    totals = distributed.sum_over_ranks(_to_device_async(_counts(window), device))
    share = 1 / (totals[0] if normalization == "token" else totals[1]).float()
    loss = torch.zeros((), device=device)
    for batch in window:
        output = engine(**to_device(batch.inputs))
        part = (output.loss_sum if normalization == "token" else output.loss) * share
        # DeepSpeed averages gradients over ranks, the shares are meant to be summed.
        engine.backward(part * world, scale_wrt_gas=False)
        loss += part.detach()
    return Pending(loss, totals, [index for batch in window for index in batch.indices])


def fetch(steps: Sequence[Pending], newest: int) -> list[Figures]:
    """The figures of consecutive steps, the last of them the optimizer step `newest` (from 1), in one transfer.

    Raises NonFiniteLossError on every rank when a loss is not finite.
    """
    losses = distributed.sum_over_ranks(torch.stack([step.loss for step in steps])).tolist()
    totals = torch.stack([step.totals for step in steps]).tolist()
    bad = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        late = len(losses) - 1 - bad
        raise NonFiniteLossError(
            f"loss {losses[bad]} at optimizer step {newest - late}, "
            f"{f'found {late} steps later (log_every_steps)' if late else 'nothing was updated'}; rank "
            f"{distributed.rank()} had training examples {steps[bad].indices}; lower lr, set max_grad_norm, or use "
            "bf16 or fp32 in place of fp16"
        )
    return [
        Figures(loss, n_targets, 1 - n_tokens / cells)
        for loss, (n_targets, _, n_tokens, cells) in zip(losses, totals, strict=True)
    ]


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine, window: list[Batch], normalization: Literal["token", "micro_batch"]
) -> Figures:
    """Gradients of `window`, their check and the update. Raises NonFiniteLossError before anything is updated."""
    pending = accumulate_gradients(engine, window, normalization)
    (figures,) = fetch([pending], engine.global_steps + 1)
    engine.step()
    return figures


def _counts(window: list[Batch]) -> torch.Tensor:
    rows = [
        (batch.n_targets, batch.n_targets > 0, batch.n_tokens, batch.inputs["input_ids"].numel() * (batch.n_tokens > 0))
        for batch in window
    ]
    return torch.tensor(rows).sum(dim=0)


def _to_device_async(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
