"""Memory of one forward and backward as a function of the micro-batch: measured on two rows and on three, then scaled.

What is counted is live tensor bytes (`memory.LiveTensorMeter`), so it works without a GPU, and on tensors that have
shapes and no data (torch's fake tensors), so nothing is computed. Every operation is counted apart: the two runs do the
same operations in the same order, each operation's live bytes grow linearly with the rows, and the peak for any number
of rows is the largest of those lines, also where it moves to another operation. One row would not do: some copies of
more rows are views there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn

from coconut_ds.data.batches import Batch, Tokens, TokenSequence, collate_training, to_device, training_sequence
from coconut_ds.data.loaders import ID_COLUMNS
from coconut_ds.data.stages import Curriculum
from coconut_ds.engine.internals import FakeTensorMode
from coconut_ds.memory.meter import LiveTensorMeter
from coconut_ds.model.coconut import Coconut


@dataclass(frozen=True)
class ActivationCost:
    """Live bytes of a forward and backward beyond weights and accumulated gradients, after each operation."""

    two: torch.Tensor
    three: torch.Tensor
    """int64 (operations,), with two rows and with three."""

    def peak(self, rows: int) -> int:
        """Bytes at the peak of a micro-batch of `rows`; an upper bound where two and three rows differ."""
        if len(self.two) != len(self.three):
            return max(int(self.two.max()), int(self.three.max()) * rows // 3)
        return int((self.two + (rows - 2) * (self.three - self.two)).max())

    def most_rows(self, budget: int) -> int:
        """The largest micro-batch whose peak is within `budget` bytes; 0 when one row is too much."""
        if self.peak(1) > budget:
            return 0
        low, high = 1, 2
        while self.peak(high) <= budget and high < 2**20:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= budget else (low, middle)
        return low


def measure(model: Coconut, sequence: TokenSequence, dtype: torch.dtype | None = None) -> ActivationCost:
    """The cost of micro-batches whose rows are all as long as `sequence`, in `dtype` or that of `model`."""
    histories = _predicted(model, [batch_of(sequence, rows) for rows in (2, 3)], dtype)
    return ActivationCost(*map(torch.tensor, histories))


def predicted_peak(model: Coconut, batch: Batch, dtype: torch.dtype | None = None) -> int:
    """What `measured_peak` finds for a model in `dtype`, without computing it."""
    (history,) = _predicted(model, [batch], dtype)
    return max(history)


def measured_peak(model: Coconut, batch: Batch) -> int:
    """Bytes at the peak of one forward and backward over `batch`, beyond weights and accumulated gradients."""
    return max(_live_bytes(model, batch))


def batch_of(sequence: TokenSequence, rows: int) -> Batch:
    """A micro-batch of `rows` times the same sequence."""
    return collate_training([sequence] * rows, list(range(rows)), pad=0)


def widest_sequence(examples: Dataset, curriculum: Curriculum, stage: int, tokens: Tokens) -> TokenSequence:
    """A sequence as long as any micro-batch of `stage` can become: longest prefix, most thoughts, longest tail.

    Only the lengths are real.
    """
    rows = examples.select_columns(ID_COLUMNS).to_list()
    sequences = [training_sequence(row, curriculum.layout(stage, len(row["steps_ids"])), tokens) for row in rows]
    prefix = max(each.first_thought for each in sequences)
    thoughts = max(each.n_thoughts for each in sequences)
    middle = max(each.first_target - each.first_thought - each.n_thoughts for each in sequences)
    targets = max(len(each.ids) - each.first_target for each in sequences)
    latent = [] if tokens.latent is None else [tokens.latent] * thoughts
    ids = [0] * prefix + latent + [0] * (middle + targets)
    return TokenSequence(ids, prefix, thoughts, len(ids) - targets)


def _predicted(model: Coconut, batches: Sequence[Batch], dtype: torch.dtype | None) -> list[list[int]]:
    """Live bytes after each operation of a forward and backward over each batch."""
    # What is made once and kept, such as the window's weights, has to be made of real numbers.
    with torch.no_grad():
        model(**to_device(_short_batch(model).inputs, next(model.parameters()).device))
    # What was made once is real.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        twins = {id(each): _twin(each, mode, dtype) for each in (*model.parameters(), *model.buffers())}
        # Of the weights only shapes are copied.
        fake = copy.deepcopy(model, dict(twins))
        return [_live_bytes(fake, _without_data(batch, mode)) for batch in batches]


def _short_batch(model: Coconut) -> Batch:
    thoughts = [] if model.latent_token_id is None else [model.latent_token_id]
    return batch_of(TokenSequence([0, *thoughts, 0], 1, len(thoughts), 1 + len(thoughts)), 1)


def _twin(tensor: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype | None) -> torch.Tensor:
    fake: torch.Tensor = mode.from_tensor(tensor).detach()
    if tensor.is_floating_point():
        fake = fake.to(dtype or tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _without_data(batch: Batch, mode: FakeTensorMode) -> Batch:
    return batch._replace(
        inputs={
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in batch.inputs.items()
        }
    )


def _live_bytes(model: Coconut, batch: Batch) -> list[int]:
    inputs = to_device(batch.inputs, next(model.parameters()).device)
    # A gradient that is complete leaves at once, as into a bucket: what it is added to is counted with the states.
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), LiveTensorMeter() as meter:
            model(**inputs).loss_sum.backward()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return meter.history


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
