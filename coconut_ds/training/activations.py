"""Memory of one forward and backward as a function of the micro-batch: measured on two rows and on three, then scaled.

What is counted is live tensor bytes (`memory.LiveTensorMeter`), so it works without a GPU. Every operation is counted
apart: the two runs do the same operations in the same order, each operation's live bytes grow linearly with the rows,
and the peak for any number of rows is the largest of those lines, also where it moves to another operation. One row
would not do: some copies of more rows are views there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset

from coconut_ds.curriculum.collator import Batch, Tokens, TokenSequence, collate_training, training_sequence
from coconut_ds.curriculum.loaders import ID_COLUMNS
from coconut_ds.curriculum.stages import Curriculum
from coconut_ds.memory import LiveTensorMeter
from coconut_ds.model.coconut import Coconut
from coconut_ds.training.evaluator import to_device


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


def measure(model: Coconut, sequence: TokenSequence) -> ActivationCost:
    """The cost of micro-batches whose rows are all as long as `sequence`, on the device of `model`."""
    # What is made once and kept, such as the window's weights, must not count as an operation of the first run alone.
    with torch.no_grad():
        model(**to_device(batch_of(sequence, 1).inputs, next(model.parameters()).device))
    histories = [torch.tensor(_live_bytes(model, batch_of(sequence, rows))) for rows in (2, 3)]
    return ActivationCost(*histories)


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
