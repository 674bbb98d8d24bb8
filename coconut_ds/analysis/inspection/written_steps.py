"""What is written from the thoughts of each step alone, as step supervision trains it (SIM-CoT, arXiv 2509.20317).

From the vectors t_1 .. t_c fed for a step, without question and other thoughts, each token is the most probable one:

    w_i = argmax_w p(w | t_1 .. t_c, w_1 .. w_{i-1})

up to the end of a step. The writer is the copied decoder that the checkpoint was trained with, else the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut_ds.analysis.inspection.averages import Average, averages
from coconut_ds.data.answers import text_of
from coconut_ds.data.records import row_of
from coconut_ds.data.step_targets import texts_of_groups
from coconut_ds.errors import InputError
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.backbone import n_positions
from coconut_ds.model.step_decoder import write_steps


@dataclass(frozen=True)
class WrittenStep:
    """What is written from the `group`-th thoughts of a question, from 1, and what they stand for."""

    group: int
    expected: str
    """The step; of the last group every step left; the answer if there is none."""
    written: str
    correct: bool
    """Whether all tokens are the same, the end included."""


def written_steps(
    trained: TrainedModel, records: Sequence[dict[str, Any]], fed: Sequence[torch.Tensor], batch_size: int
) -> list[list[WrittenStep]]:
    """For each record the steps written from its thoughts `fed` (K, D), `batch_size` groups at once.

    Raises InputError for a step that does not fit the model's positions.
    """
    per_step, end = trained.curriculum.thoughts_per_step, trained.tokenizer.eos_token_id
    expected = []
    for record, thoughts in zip(records, fed):
        layout = trained.layout(len(record["steps"]), len(thoughts))
        expected.append(texts_of_groups(row_of(record, trained.tokenizer), layout, end))
    texts = [text for groups in expected for text in groups]
    longest = max(map(len, texts), default=0)
    if per_step + longest - 1 > (positions := n_positions(trained.model.base_causallm)):
        raise InputError(
            f"--written-steps: {longest} tokens after {per_step} thoughts, and the model has {positions} positions; "
            "leave out the record, or --written-steps"
        )
    groups = [row[: len(mine) * per_step].unflatten(0, (-1, per_step)) for row, mine in zip(fed, expected) if mine]
    chunks = torch.cat(groups).split(batch_size) if groups else ()
    written = iter([tokens for chunk in chunks for tokens in write_steps(trained.model, chunk, longest).tolist()])
    return [
        [_compared(trained, number, text, next(written)) for number, text in enumerate(mine, start=1)]
        for mine in expected
    ]


def _compared(trained: TrainedModel, group: int, text: Sequence[int], written: list[int]) -> WrittenStep:
    end = trained.tokenizer.eos_token_id
    shown = written[: written.index(end)] if end in written else written
    # What was expected is shown as its tokens are read back, like what was written.
    expected, given = (text_of(list(each), trained.tokenizer).strip() for each in (text, shown))
    return WrittenStep(group, expected, given, correct=written[: len(text)] == list(text))


def average_written(steps: Sequence[Sequence[WrittenStep]]) -> list[dict[str, Any]]:
    """The share written right from each group of thoughts, over the questions that have it."""
    found: list[dict[str, Any]] = []
    for place in range(max(map(len, steps))):
        these = [each[place].correct for each in steps if place < len(each)]
        correct: Average = averages({"correct": these})["correct"]
        found.append({"group": place + 1, "n_questions": len(these), "correct": correct})
    return found
