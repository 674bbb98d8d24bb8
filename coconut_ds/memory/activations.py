"""Activation memory of a micro-batch of any size, extrapolated from measurements with two and with three rows.

Live tensor bytes are counted (`memory.meter.LiveTensorMeter`), so no GPU is needed, on torch's fake tensors, which have
shapes but no data, so nothing is computed. Bytes are counted per operation: both runs execute the same operations in
the same order, and the live bytes after each one are linear in the number of rows. The peak for any number of rows is
the maximum over those lines, whichever operation it occurs at. One row cannot be used: copies of several rows can be
views of one. Logits stop growing where the supervised positions fill a chunk of the LM head (`model/loss.py`), so two
and three rows are measured with full chunks as well, for micro-batches that have more.

The tensors lie on a CPU. `for_card` plans for a GPU all the same: the kernels are then those that keep what a card's do
(`model/fast/planning.py`). Not counted in any case: what a kernel needs while it runs, such as the fp32 sums of
attention's backward in half precision (1.2 MiB a row of 382 columns of GPT-2 small), and cuBLAS's workspace.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from coconut_ds.data.batches import Batch, Tokens, TokenSequence, collate_training, to_device, training_sequence
from coconut_ds.data.loaders import ID_COLUMNS
from coconut_ds.data.stages import Curriculum
from coconut_ds.data.teacher import Taught
from coconut_ds.engine.internals import FakeTensorMode, tree_map_only
from coconut_ds.memory.meter import LiveTensorMeter
from coconut_ds.model.coconut import Coconut, CoconutOutput
from coconut_ds.model.fast.planning import planning_for_card
from coconut_ds.model.loss import CHUNK


@dataclass(frozen=True)
class ActivationCost:
    """Live bytes of a forward and backward after each operation, without weights and accumulated gradients."""

    two: torch.Tensor
    three: torch.Tensor
    """int64 (operations,), with two rows and with three."""
    chunked: ActivationCost | None = None
    """The same with two chunks of the LM head, which do not grow with the rows: for more than `chunked_from` rows."""
    chunked_from: int = 0

    def peak(self, rows: int) -> int:
        """Peak bytes of a micro-batch of `rows`; an upper bound if two and three rows took different operations."""
        if self.chunked is not None and rows > self.chunked_from:
            # Not below what the rows before need.
            return max(self.chunked.peak(rows), self.peak(self.chunked_from))
        if len(self.two) != len(self.three):
            return max(int(self.two.max()), int(self.three.max()) * rows // 3)
        return int((self.two + (rows - 2) * (self.three - self.two)).max())

    def most_rows(self, budget: int) -> int:
        """The largest micro-batch whose peak is within `budget` bytes; 0 if one row exceeds it."""
        return bisect_right(range(1, 2**20), budget, key=self.peak)


def measure(
    model: Coconut, sequence: TokenSequence, dtype: torch.dtype | None = None, for_card: bool = False
) -> ActivationCost:
    """The cost of micro-batches whose rows are all as long as `sequence`; `dtype` defaults to that of `model`."""
    batches = [batch_of(sequence, rows) for rows in (2, 3)]
    batches += [_filling_chunks(batch) for batch in batches]
    two, three, full_two, full_three = map(torch.tensor, _predicted(model, batches, dtype, for_card))
    taught = max(
        0 if each is None else len(each.ids) - each.first_target for each in (sequence.taught, sequence.direct)
    )
    first, last = sequence.early
    supervised = last - first + len(sequence.ids) - sequence.first_target
    targets = max(supervised, sum(map(len, sequence.written)), taught)
    return ActivationCost(
        two, three, ActivationCost(full_two, full_three), chunked_from=max(1, CHUNK // max(1, targets))
    )


def predicted_peak(model: Coconut, batch: Batch, dtype: torch.dtype | None = None, for_card: bool = False) -> int:
    """The result of `measured_peak` for a model in `dtype`, without running it."""
    (history,) = _predicted(model, [batch], dtype, for_card)
    return max(history)


def measured_peak(model: Coconut, batch: Batch) -> int:
    """Peak bytes of one forward and backward over `batch`, without weights and accumulated gradients."""
    return max(_live_bytes(model, batch.inputs))


def batch_of(sequence: TokenSequence, rows: int) -> Batch:
    """A micro-batch with `sequence` in each of its `rows`."""
    has = (bool(sequence.written), sequence.taught is not None, sequence.direct is not None)
    return collate_training([sequence] * rows, list(range(rows)), 0, *has)


def _filling_chunks(batch: Batch) -> Batch:
    """`batch` with two chunks of supervised positions, some of them several times."""

    def filled(entries: torch.Tensor) -> torch.Tensor:
        return entries.repeat(-(-2 * CHUNK // max(1, len(entries))))[: 2 * CHUNK]

    inputs = batch.inputs | {"supervised": filled(batch.inputs["supervised"])}
    if "steps" in inputs:
        inputs["steps"] = inputs["steps"]._replace(supervised=filled(inputs["steps"].supervised))
    if "teacher" in inputs:
        teacher = inputs["teacher"]
        both = {"supervised": filled(teacher.supervised), "targets": filled(teacher.targets)}
        if teacher.direct is not None:
            both |= {"direct": filled(teacher.direct), "direct_targets": filled(teacher.direct_targets)}
        inputs["teacher"] = teacher._replace(**both)
    return batch._replace(inputs=inputs)


def widest_sequence(examples: Dataset, curriculum: Curriculum, stage: int, tokens: Tokens) -> TokenSequence:
    """An upper bound for the sequences of `stage`: longest prefix, most thoughts, longest tail.

    Only its lengths are meaningful, its token ids are not.
    """
    rows = examples.select_columns(ID_COLUMNS).to_list()
    return _bound(
        [training_sequence(row, curriculum.layout(stage, len(row["steps_ids"])), tokens) for row in rows], tokens
    )


def widest_mixed_sequence(examples: Dataset, curriculum: Curriculum, tokens: Tokens) -> TokenSequence:
    """The same for a batch whose examples draw their stages from all that there are."""
    rows = examples.select_columns(ID_COLUMNS).to_list()
    layouts = [(row, layout) for row in rows for layout in curriculum.layouts(len(row["steps_ids"]))]
    return _bound([training_sequence(row, layout, tokens) for row, layout in layouts], tokens)


def _bound(sequences: Sequence[TokenSequence], tokens: Tokens) -> TokenSequence:
    prefix = max(each.first_thought for each in sequences)
    thoughts = max(each.n_thoughts for each in sequences)
    middle = max(each.first_target - each.first_thought - each.n_thoughts for each in sequences)
    targets = max(len(each.ids) - each.first_target for each in sequences)
    latent = [] if tokens.latent is None else [tokens.latent] * thoughts
    ids = [0] * prefix + latent + [0] * (middle + targets)
    # Not from the first token on, which nothing predicts.
    early = (1, 1 + max(last - first for first, last in (each.early for each in sequences)))
    texts = _widest_texts(sequences)
    teacher, direct = (_widest(each) for each in zip(*((each.taught, each.direct) for each in sequences)))
    return TokenSequence(ids, prefix, thoughts, len(ids) - targets, texts, teacher, direct, early)


def _widest_texts(sequences: Sequence[TokenSequence]) -> tuple[tuple[int, ...], ...]:
    """As many texts as any example has groups of thoughts, each as long as the longest; none if none is written."""
    texts = [text for each in sequences for text in each.written]
    longest = max(map(len, texts), default=0)
    return ((0,) * longest,) * max(len(each.written) for each in sequences)


def _widest(sequences: Sequence[Taught | None]) -> Taught | None:
    """As long as the longest, with as many targets as any; None if there is none."""
    examples = [each for each in sequences if each is not None]
    if not examples:
        return None
    length = max(len(each.ids) for each in examples)
    return Taught([0] * length, length - max(len(each.ids) - each.first_target for each in examples), 1)


def _predicted(model: Coconut, batches: Sequence[Batch], dtype: torch.dtype | None, for_card: bool) -> list[list[int]]:
    """Live bytes after each operation of a forward and backward over each batch."""
    # Values that are cached, such as the window's weights, must be created from real numbers before.
    thoughts = [] if model.latent_token_id is None else [model.latent_token_id]
    short = batch_of(TokenSequence([0, *thoughts, 0], 1, len(thoughts), 1 + len(thoughts)), 1)
    with torch.no_grad():
        model(**to_device(short.inputs, next(model.parameters()).device))
    # Cached values are the inputs that are not fake.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {id(each): _fake(each, mode, dtype) for each in (*model.parameters(), *model.buffers())}
        # With the fakes as memo, the copy has no weights of its own.
        fake = copy.deepcopy(model, dict(fakes))
        inputs = [tree_map_only(torch.Tensor, mode.from_tensor, batch.inputs) for batch in batches]
        with planning_for_card() if for_card else nullcontext():
            return [_live_bytes(fake, each) for each in inputs]


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype | None) -> torch.Tensor:
    """Parameters in `dtype`, buffers as they are: DeepSpeed casts parameters only."""
    fake: torch.Tensor = mode.from_tensor(tensor).detach()
    return nn.Parameter(fake.to(dtype), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _live_bytes(model: Coconut, inputs: dict[str, Any]) -> list[int]:
    inputs = to_device(inputs, next(model.parameters()).device)
    # A finished gradient is dropped at once, as if moved into a bucket: accumulated ones count as model states.
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    # Without GPUs to fork there is nothing to say about their number.
    devices: list[int] | None = [] if next(model.parameters()).device.type == "cpu" else None
    try:
        with in_training(model), torch.random.fork_rng(devices), LiveTensorMeter() as meter:
            total_loss(model(**inputs)).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return meter.history


def total_loss(output: CoconutOutput) -> torch.Tensor:
    """All losses of a forward, for a trial of its backward; 0-d."""
    assert output.loss_sum is not None, "the batch has labels"
    return torch.stack([each for each in output.sums_of_losses if each is not None]).sum()


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Within it every module is in training mode; then each has its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
