"""Tokenized examples -> padded batches: first thoughts aligned, labels, positions, the thought span as ints."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from coconut_ds.config.methods import METHODS, Method
from coconut_ds.data.markers import END_LATENT, LATENT, START_LATENT, marker_ids
from coconut_ds.data.stages import Layout
from coconut_ds.data.step_targets import IGNORED, StepTargets, collate_step_targets, moved, texts_of_groups
from coconut_ds.data.teacher import Taught, Teacher, answered, collate_teacher, grown_teacher, taught
from coconut_ds.runtime import distributed


@dataclass(frozen=True)
class Tokens:
    """The token ids in a sequence besides those of the example's text."""

    pad: int
    start_latent: int | None = None
    end_latent: int | None = None
    latent: int | None = None
    """The three markers are None for methods that use none."""
    is_pause: bool = False
    """Whether `latent` is an ordinary token with a learned embedding, a pause."""
    fact_end: int | None = None
    """Ends a fact of a question, if facts are shuffled."""
    bos: int | None = None
    """Precedes a question under some tokenizers."""
    step_end: int | None = None
    """Ends a step that is written from its thoughts; None without step supervision."""
    answer_lead: tuple[int, ...] | None = None
    """The text before an answer, after which the states of a teacher are compared; None without distillation."""
    reads_steps: bool = False
    """Whether an example is also read with all its steps in sight, by a teacher or in a mixture."""
    omits_last_step: bool = False
    """Then without the last one."""
    answers_alone: bool = False
    """Whether the answer is also learned from the question alone."""

    @classmethod
    def of(cls, method: Method, tokenizer: PreTrainedTokenizerBase) -> Tokens:
        """Those of `method`; raises ModelError if it needs markers that the tokenizer does not have."""
        traits = METHODS[method]
        ids = {} if traits.thoughts == "none" else marker_ids(tokenizer)
        return cls(
            pad=tokenizer.pad_token_id,
            start_latent=ids[START_LATENT] if traits.has_markers else None,
            end_latent=ids[END_LATENT] if traits.has_markers else None,
            latent=ids.get(LATENT),
            is_pause=traits.thoughts == "pause",
            bos=tokenizer.bos_token_id,
        )

    @property
    def thought(self) -> int | None:
        """The token that stands for a continuous thought."""
        return None if self.is_pause else self.latent


@dataclass(frozen=True)
class TokenSequence:
    """One sequence before padding: its ids, the places of its thoughts, and the first supervised token."""

    ids: list[int]
    first_thought: int
    n_thoughts: int
    first_target: int
    written: tuple[tuple[int, ...], ...] = ()
    """What a decoder learns to write from each group of thoughts; empty without step supervision."""
    taught: Taught | None = None
    """What is read of the same example with all steps; None without distillation and mixture."""
    direct: Taught | None = None
    """Question and answer alone; None without a mixture."""
    early: tuple[int, int] = (0, 0)
    """The place of supervised tokens before the thoughts, of steps that stand there, and one past it."""


class Batch(NamedTuple):
    """The inputs of one forward, and facts about them that the loop needs without synchronising with the device."""

    inputs: dict[str, Any]
    """Of `Coconut.forward`: input_ids, attention_mask, labels, position_ids, each (B, T), thought_span as ints,
    supervised (N,), with step supervision `steps` and with distillation `teacher`."""
    n_targets: int
    """Supervised tokens, counted after the causal shift."""
    n_tokens: int
    """Cells of the batch that are not padding; a filler has none."""
    indices: list[int]
    """Position of each row's example in its data file; empty for a filler."""
    n_step_targets: int = 0
    """Tokens that are written from thoughts, with step supervision."""
    n_verbal_targets: int = 0
    """Tokens that are written with all steps in sight, by a teacher or in a mixture."""
    n_distilled: int = 0
    """Examples whose states are compared with the teacher's."""
    n_direct_targets: int = 0
    """Tokens that are written from the question alone, in a mixture."""

    @property
    def counts_of_losses(self) -> tuple[int, int, int, int, int]:
        """What each loss is a sum over, in the order of `training.step.LOSSES`."""
        verbal, direct = self.n_verbal_targets, self.n_direct_targets
        return self.n_targets, self.n_step_targets, verbal, self.n_distilled, direct


@dataclass(frozen=True)
class Size:
    """Determines how often a forward calls its layers: thought columns, and chunks of supervised tokens."""

    n_thoughts: int = 0
    n_targets: int = 0
    n_step_targets: int = 0
    n_verbal_targets: int = 0
    n_direct_targets: int = 0

    @classmethod
    def of(cls, batch: Batch) -> Size:
        span = batch.inputs["thought_span"]
        n_thoughts = span[1] - span[0] if span else 0
        others = (batch.n_step_targets, batch.n_verbal_targets, batch.n_direct_targets)
        return cls(n_thoughts, batch.n_targets, *others)

    def __or__(self, other: Size) -> Size:
        """The larger of both, in each respect."""
        return Size(*map(max, zip(astuple(self), astuple(other), strict=True)))


def grown(batch: Batch, size: Size, pad: int) -> Batch:
    """`batch` padded to the passes and supervised entries of `size`, which is not smaller; the loss is the same.

    Ordinary columns run as if they were thoughts, then padding; added entries carry no label.
    """
    inputs = dict(batch.inputs)
    columns = inputs["input_ids"].shape[1]
    first = inputs["thought_span"][0] if inputs["thought_span"] else max(1, columns - size.n_thoughts)
    if size.n_thoughts:
        inputs["thought_span"] = (first, first + size.n_thoughts)
    missing = max(0, first + size.n_thoughts - columns, 2 - columns)
    values = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED, "position_ids": 0}
    for name, value in values.items():
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, missing), value=value)
    rows = inputs["supervised"] // columns
    # Column 1 of the first row: it follows the first token of a question, or of a filler, and has no label there.
    added = torch.ones(size.n_targets - len(rows), dtype=torch.long)
    inputs["supervised"] = torch.cat([inputs["supervised"] + rows * missing, added])
    if "steps" in inputs:
        inputs["steps"] = moved(inputs["steps"], columns, columns + missing, size.n_step_targets)
    if "teacher" in inputs:
        counts = (size.n_verbal_targets, size.n_direct_targets)
        inputs["teacher"] = grown_teacher(inputs["teacher"], columns, columns + missing, *counts)
    return batch._replace(inputs=inputs)


def training_sequence(row: dict[str, Any], layout: Layout, tokens: Tokens) -> TokenSequence:
    """question [start] thoughts [end] remaining steps, answer; steps and answer are supervised.

    Under a reversed curriculum the remaining steps stand before the thoughts.
    """
    opening = prompt_sequence(row, layout, tokens)
    steps = [token for step in layout.after(row["steps_ids"]) for token in step]
    written = () if tokens.step_end is None else texts_of_groups(row, layout, tokens.step_end)
    teaching = taught(row, tokens.answer_lead, tokens.omits_last_step) if tokens.reads_steps else None
    direct = answered(row) if tokens.answers_alone else None
    ids = opening.ids + steps[layout.n_drop :] + row["answer_ids"]
    return replace(opening, ids=ids, written=written, taught=teaching, direct=direct)


def prompt_sequence(row: dict[str, Any], layout: Layout, tokens: Tokens) -> TokenSequence:
    """question, steps before the thoughts, [start] thoughts [end]; pauses count as ordinary tokens."""
    start = [] if tokens.start_latent is None else [tokens.start_latent]
    end = [] if tokens.end_latent is None else [tokens.end_latent]
    middle = [] if tokens.latent is None else [tokens.latent] * layout.n_thoughts
    steps = [token for step in layout.before(row.get("steps_ids", ())) for token in step]
    n_question = len(row["question_ids"])
    prefix = row["question_ids"] + steps + start
    ids = prefix + middle + end
    n_thoughts = 0 if tokens.is_pause else len(middle)
    return TokenSequence(ids, len(prefix), n_thoughts, len(ids), early=(n_question, n_question + len(steps)))


def shuffle_facts(ids: list[int], tokens: Tokens, draw: random.Random) -> list[int]:
    """A question with its facts shuffled: each ends with `fact_end`, and what follows the last one stays in place."""
    first = int(ids[0] == tokens.bos)
    ends = [place + 1 for place, token in enumerate(ids) if token == tokens.fact_end]
    facts = [ids[start:end] for start, end in zip([first, *ends], ends)]
    draw.shuffle(facts)
    return ids[:first] + [token for fact in facts for token in fact] + ids[ends[-1] if ends else first :]


def collate_training(
    sequences: Sequence[TokenSequence],
    indices: list[int],
    pad: int,
    writes_steps: bool = False,
    has_teacher: bool = False,
    answers_alone: bool = False,
) -> Batch:
    """Left-pad until all first thoughts stand in one column, right-pad the rest.

    Rows without thoughts get no left padding. Without any row the result is a filler, one unsupervised token, so that
    every rank runs the same number of micro-batches. `writes_steps` adds the targets of step supervision, `has_teacher`
    what is read with all steps, `answers_alone` what is read without any.
    """
    is_filler = not sequences
    sequences = sequences or [TokenSequence([pad], 0, 0, 1)]
    with_thoughts = [each for each in sequences if each.n_thoughts]
    column = max((each.first_thought for each in with_thoughts), default=0)
    offsets = [column - each.first_thought if each.n_thoughts else 0 for each in sequences]
    batch = _collate(sequences, offsets, indices, pad)
    n_columns = batch.inputs["input_ids"].shape[1]
    if writes_steps:
        firsts = [offset + each.first_thought for each, offset in zip(sequences, offsets)]
        counts = [each.n_thoughts for each in sequences]
        steps = collate_step_targets([each.written for each in sequences], firsts, counts, n_columns)
        batch = batch._replace(inputs=batch.inputs | {"steps": steps}, n_step_targets=len(steps.supervised))
    if has_teacher or answers_alone:
        ends = [offset + len(each.ids) for each, offset in zip(sequences, offsets)]
        direct = [each.direct for each in sequences if each.direct] if answers_alone else None
        teacher = collate_teacher([each.taught for each in sequences if each.taught], ends, n_columns, pad, direct)
        batch = batch._replace(
            inputs=batch.inputs | {"teacher": teacher},
            n_verbal_targets=len(teacher.targets),
            n_distilled=len(teacher.student),
            n_direct_targets=0 if teacher.direct is None else len(teacher.direct),
        )
    return batch._replace(n_tokens=0) if is_filler else batch


def collate_prompts(sequences: Sequence[TokenSequence], indices: list[int], pad: int) -> Batch:
    """Left-pad so that every prompt ends in the same column."""
    width = max(len(each.ids) for each in sequences)
    return _collate(sequences, [width - len(each.ids) for each in sequences], indices, pad)


def _collate(sequences: Sequence[TokenSequence], offsets: list[int], indices: list[int], pad: int) -> Batch:
    shape = (len(sequences), max(offset + len(each.ids) for each, offset in zip(sequences, offsets)))
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    attention_mask, position_ids = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    spans = []
    for row, (each, offset) in enumerate(zip(sequences, offsets)):
        end = offset + len(each.ids)
        input_ids[row, offset:end] = torch.tensor(each.ids)
        attention_mask[row, offset:end] = 1
        position_ids[row, offset:end] = torch.arange(len(each.ids))
        for first, last in (each.early, (each.first_target, len(each.ids))):
            labels[row, offset + first : offset + last] = input_ids[row, offset + first : offset + last]
        if each.n_thoughts:
            first = offset + each.first_thought
            spans.append((first, first + each.n_thoughts))
    supervised = supervised_entries(labels)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "position_ids": position_ids,
        "thought_span": (min(first for first, _ in spans), max(end for _, end in spans)) if spans else (),
        "supervised": supervised,
    }
    return Batch(inputs, len(supervised), sum(len(each.ids) for each in sequences), indices)


def supervised_entries(labels: torch.Tensor) -> torch.Tensor:
    """The entries row * T + column of labels (B, T) that count: (N,). Nothing precedes column 0 to predict it from."""
    counts = labels != IGNORED
    counts[:, 0] = False
    return counts.flatten().nonzero().flatten()


def to_device(inputs: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Tensors on `device`, or on this rank's; other values unchanged."""
    device = device or distributed.device()

    def moved_there(value: Any) -> Any:
        if isinstance(value, StepTargets | Teacher):
            return type(value)(*map(moved_there, value))
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    return {key: moved_there(value) for key, value in inputs.items()}
