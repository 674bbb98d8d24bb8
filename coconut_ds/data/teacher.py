"""What a teacher pass reads: question, visible steps and answer, beside the sequence with thoughts (CODI, 2502.21074).

Shapes: B rows, U columns of the teacher's batch, T of the batch with thoughts, N supervised tokens, R examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from coconut_ds.errors import InputError

IGNORED = -100


class Taught(NamedTuple):
    """The teacher's sequence of one example."""

    ids: list[int]
    first_target: int
    n_answer: int
    """Tokens from the first one of the answer itself to the end; with thoughts the sequence ends with the same ones."""


class Teacher(NamedTuple):
    """A batch for the teacher pass, and the columns that predict the first token of each answer."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    """(B, U) each."""
    supervised: torch.Tensor
    """(N,): entries row * U + column."""
    targets: torch.Tensor
    """(N,): the tokens there; -100 does not count."""
    before_answer: torch.Tensor
    """(R,): entries row * U + column."""
    student: torch.Tensor
    """(R,): the same of the batch with thoughts, row * T + column."""


def taught(row: dict[str, Any], answer_lead: Sequence[int], omits_last_step: bool) -> Taught:
    """The teacher's sequence of a tokenized example, all tokens after the question supervised.

    `answer_lead` are the tokens of the text before every answer; what an answer shares with them is not the answer's.
    `omits_last_step`, so that the teacher cannot copy the answer from it.
    """
    steps = row["steps_ids"][:-1] if omits_last_step else row["steps_ids"]
    chain = [token for step in steps for token in step]
    answer, shared = row["answer_ids"], 0
    # The last token, the end, is never shared.
    while shared < min(len(answer_lead), len(answer) - 1) and answer[shared] == answer_lead[shared]:
        shared += 1
    return Taught([*row["question_ids"], *chain, *answer], len(row["question_ids"]), len(answer) - shared)


def check_taught_lengths(
    path: str | Path, examples: Dataset, answer_lead: Sequence[int], omits_last_step: bool, n_positions: int
) -> None:
    """Raise InputError for the first example whose teacher's sequence does not fit the model's positions."""
    for index, row in enumerate(examples.select_columns(["question_ids", "steps_ids", "answer_ids"])):
        length = len(taught(row, answer_lead, omits_last_step).ids)
        if length > n_positions:
            raise InputError(
                f"{path}: record {index}: key 'question' and 'steps': the teacher of supervision.distill reads "
                f"{length} tokens, the model has {n_positions} positions; leave the record out or use a model with more"
            )


def collate_teacher(examples: Sequence[Taught], ends: Sequence[int], n_columns: int, pad: int) -> Teacher:
    """Of `examples`, whose rows with thoughts end before column `ends` of `n_columns`; right-padded.

    Without any there is one row without a supervised token, so that every rank runs the teacher in every forward.
    """
    rows = [each.ids for each in examples] or [[pad, pad]]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    supervised: list[int] = []
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    for row, each in enumerate(examples):
        supervised += range(row * width + each.first_target, row * width + len(each.ids))
    entries = torch.tensor(supervised, dtype=torch.long)
    before = [row * width + len(each.ids) - each.n_answer - 1 for row, each in enumerate(examples)]
    of_student = [row * n_columns + end - each.n_answer - 1 for row, (each, end) in enumerate(zip(examples, ends))]
    return Teacher(
        input_ids,
        attention_mask,
        (attention_mask.cumsum(dim=1) - 1).clamp_min(0),
        entries,
        input_ids.flatten()[entries],
        torch.tensor(before, dtype=torch.long),
        torch.tensor(of_student, dtype=torch.long),
    )


def grown_teacher(teacher: Teacher, n_columns: int, n_now: int, n_supervised: int) -> Teacher:
    """For a batch with thoughts padded from `n_columns` to `n_now`, with `n_supervised` entries.

    Added entries do not count.
    """
    missing = n_supervised - len(teacher.supervised)
    return teacher._replace(
        # Column 1 of the first row, which every batch has.
        supervised=torch.cat([teacher.supervised, torch.ones(missing, dtype=torch.long)]),
        targets=torch.cat([teacher.targets, torch.full((missing,), IGNORED)]),
        student=teacher.student + teacher.student // n_columns * (n_now - n_columns),
    )
