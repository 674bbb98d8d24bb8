"""What an auxiliary decoder learns to write from the thoughts of each step (SIM-CoT, arXiv 2509.20317, section 3).

Shapes: R groups of thoughts of the batch, c thoughts each, L tokens of the longest text, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from coconut_ds.data.stages import Curriculum, Layout
from coconut_ds.errors import InputError

IGNORED = -100


class StepTargets(NamedTuple):
    """Where the thoughts of each group are fed, and the text that is written from them."""

    thoughts: torch.Tensor
    """(R, c): entries row * columns + column of the batch's cells."""
    tokens: torch.Tensor
    """(R, L): the text and its end, then -100."""
    supervised: torch.Tensor
    """(N,): entries group * L + place of `tokens` that count."""


def texts_of_groups(row: dict[str, Any], layout: Layout, end: int) -> tuple[tuple[int, ...], ...]:
    """The tokens to be written from each group of thoughts of an example, `end` after each.

    A group has the step it stands for. The last one has all replaced steps from there on; a group beyond the last step
    has the answer, as in the code of SIM-CoT.
    """
    n_groups = layout.n_thoughts // layout.per_step
    steps = layout.replaced(row["steps_ids"])
    texts = []
    for group in range(n_groups):
        own = steps[group:] if group == n_groups - 1 else steps[group : group + 1]
        # The answer's tokens have their end.
        texts.append((*(token for step in own for token in step), end) if own else tuple(row["answer_ids"]))
    return tuple(texts)


def check_written_lengths(
    path: str | Path, examples: Dataset, curriculum: Curriculum, end: int, n_positions: int
) -> None:
    """Raise InputError for the first example of which a text does not fit the decoder's positions, in any stage."""
    for index, row in enumerate(examples.select_columns(["steps_ids", "answer_ids"])):
        for layout in curriculum.layouts(len(row["steps_ids"])):
            for text in texts_of_groups(row, layout, end):
                if layout.per_step + len(text) - 1 > n_positions:
                    raise InputError(
                        f"{path}: record {index}: key 'steps': {len(text)} tokens are to be written from the last "
                        f"{layout.per_step} thoughts, and the model has {n_positions} positions; raise "
                        "max_latent_stage, leave the record out, or use a model with more"
                    )


def collate_step_targets(
    texts: Sequence[Sequence[Sequence[int]]], firsts: Sequence[int], n_thoughts: Sequence[int], n_columns: int
) -> StepTargets:
    """Of rows whose groups have `texts`, whose `n_thoughts` stand from column `firsts` on, of `n_columns` in the batch.

    Without any group there is one without a supervised token, so that every rank runs the decoder in every forward.
    """
    places, written = [], []
    for row, (groups, first, count) in enumerate(zip(texts, firsts, n_thoughts)):
        for group, text in enumerate(groups):
            per_step = count // len(groups)
            start = row * n_columns + first + group * per_step
            places.append(range(start, start + per_step))
            written.append(text)
    if not written:
        return StepTargets(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORED), torch.zeros(0).long())
    tokens = torch.full((len(written), max(map(len, written))), IGNORED)
    for group, text in enumerate(written):
        tokens[group, : len(text)] = torch.tensor(text)
    supervised = (tokens != IGNORED).flatten().nonzero().flatten()
    return StepTargets(torch.tensor([list(place) for place in places]), tokens, supervised)


def moved(targets: StepTargets, n_columns: int, n_now: int, n_supervised: int) -> StepTargets:
    """For a batch padded from `n_columns` to `n_now`, with `n_supervised` entries; added ones do not count."""
    rows = targets.thoughts // n_columns
    # A column of its own without a label, at the end of every text.
    tokens = torch.nn.functional.pad(targets.tokens, (0, 1), value=IGNORED)
    length = targets.tokens.shape[1]
    supervised = targets.supervised + targets.supervised // length
    added = torch.full((n_supervised - len(supervised),), length, dtype=torch.long)
    return StepTargets(targets.thoughts + rows * (n_now - n_columns), tokens, torch.cat([supervised, added]))
