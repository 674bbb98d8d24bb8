"""What is read without thoughts beside the sequence with them: all steps (CODI, arXiv 2502.21074), or the answer alone.

Shapes: B rows, U columns of this batch, T of the batch with thoughts, N and M supervised tokens, R examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from coconut_ds.data.step_targets import IGNORED
from coconut_ds.errors import InputError


class Taught(NamedTuple):
    """One sequence without thoughts."""

    ids: list[int]
    first_target: int
    n_answer: int
    """Tokens from the first one of the answer itself to the end; with thoughts the sequence ends with the same ones.

    0 if the state before them is not compared.
    """


class Teacher(NamedTuple):
    """A batch for one pass: rows with all steps, then rows with the answer alone."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    """(B, U) each."""
    supervised: torch.Tensor
    """(N,): entries row * U + column of the first ones."""
    targets: torch.Tensor
    """(N,): the tokens there; -100 does not count."""
    before_answer: torch.Tensor
    """(R,): entries row * U + column that predict the first token of each answer."""
    student: torch.Tensor
    """(R,): the same of the batch with thoughts, row * T + column."""
    direct: torch.Tensor | None = None
    direct_targets: torch.Tensor | None = None
    """(M,): as `supervised` and `targets`, of the rows with the answer alone; None without them."""


def taught(row: dict[str, Any], answer_lead: Sequence[int] | None, omits_last_step: bool) -> Taught:
    """Question, steps and answer of a tokenized example, all tokens after the question supervised.

    `answer_lead` are the tokens of the text before every answer; what an answer shares with them is not the answer's.
    None compares no states. `omits_last_step`, so that a teacher cannot copy the answer from it.
    """
    steps = row["steps_ids"][:-1] if omits_last_step else row["steps_ids"]
    chain = [token for step in steps for token in step]
    answer, n_answer = row["answer_ids"], 0
    if answer_lead is not None:
        # The last token, the end, is never shared.
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(answer[:-1], answer_lead))
        n_answer = len(answer) - len(list(shared))
    return Taught([*row["question_ids"], *chain, *answer], len(row["question_ids"]), n_answer)


def answered(row: dict[str, Any]) -> Taught:
    """Question and answer alone."""
    return Taught([*row["question_ids"], *row["answer_ids"]], len(row["question_ids"]), len(row["answer_ids"]))


def check_taught_lengths(path: str | Path, examples: Dataset, omits_last_step: bool, n_positions: int) -> None:
    """Raise InputError for the first example that does not fit the model's positions with all its steps."""
    for index, row in enumerate(examples.select_columns(["question_ids", "steps_ids", "answer_ids"])):
        length = len(taught(row, None, omits_last_step).ids)
        if length > n_positions:
            raise InputError(
                f"{path}: record {index}: key 'question' and 'steps': {length} tokens with all steps, as supervision "
                f"reads them, the model has {n_positions} positions; leave the record out or use a model with more"
            )


def collate_teacher(
    examples: Sequence[Taught],
    ends: Sequence[int],
    n_columns: int,
    pad: int,
    direct: Sequence[Taught] | None = None,
) -> Teacher:
    """Of `examples`, whose rows with thoughts end before column `ends` of `n_columns`, and `direct` ones; right-padded.

    Without any there is one row without a supervised token, so that every rank runs this pass in every forward.
    """
    rows = [each.ids for each in (*examples, *(direct or ()))] or [[pad, pad]]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1

    def targets(of: Sequence[Taught], first_row: int) -> torch.Tensor:
        starts = range(first_row * width, (first_row + len(of)) * width, width)
        places = [range(start + each.first_target, start + len(each.ids)) for start, each in zip(starts, of)]
        return torch.tensor([entry for place in places for entry in place], dtype=torch.long)

    entries = targets(examples, 0)
    alone = None if direct is None else targets(direct, len(examples))
    compared = [(row, each, end) for row, (each, end) in enumerate(zip(examples, ends)) if each.n_answer]
    before = [row * width + len(each.ids) - each.n_answer - 1 for row, each, _ in compared]
    of_student = [row * n_columns + end - each.n_answer - 1 for row, each, end in compared]
    return Teacher(
        input_ids,
        attention_mask,
        (attention_mask.cumsum(dim=1) - 1).clamp_min(0),
        entries,
        input_ids.flatten()[entries],
        torch.tensor(before, dtype=torch.long),
        torch.tensor(of_student, dtype=torch.long),
        alone,
        None if alone is None else input_ids.flatten()[alone],
    )


def grown_teacher(teacher: Teacher, n_columns: int, n_now: int, n_supervised: int, n_direct: int) -> Teacher:
    """For a batch with thoughts padded from `n_columns` to `n_now`, with as many entries of both kinds as named.

    Added entries do not count.
    """

    def longer(entries: torch.Tensor, count: int, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(entries, (0, count - len(entries)), value=value)

    grown = teacher._replace(
        # Column 1 of the first row, which every batch has.
        supervised=longer(teacher.supervised, n_supervised, 1),
        targets=longer(teacher.targets, n_supervised, IGNORED),
        student=teacher.student + teacher.student // n_columns * (n_now - n_columns),
    )
    if teacher.direct is None or teacher.direct_targets is None:
        return grown
    targets = longer(teacher.direct_targets, n_direct, IGNORED)
    return grown._replace(direct=longer(teacher.direct, n_direct, 1), direct_targets=targets)
