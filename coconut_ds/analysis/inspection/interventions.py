"""What becomes of the answers when thoughts are replaced: by zero, by their mean, by those of another question.

Shapes: N questions, B of them in a batch, K thoughts of the question with the most, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coconut_ds.analysis.inspection.readings import Question, answer
from coconut_ds.analysis.intervals import bootstrap, percentile_interval
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.passes import Intervention
from coconut_ds.runs.terminal import progress

DRAWS = 10_000


@dataclass(frozen=True)
class Outcome:
    """Answers with one thought replaced, or all of them, beside those without; shares from 0 to 1.

    Everything is over the questions that have the thought.
    """

    by: str
    thought: int | None
    """From 1; None for all of them."""
    n_replaced: int
    """How many questions have the thought."""
    accuracy: float
    change: float
    interval: tuple[float, float]
    """95%, of the change: bootstrap over questions, each with both of its answers."""
    n_lost: int
    """Right before and wrong after."""
    n_gained: int
    n_changed: int
    """Other answers than before, right or wrong."""
    n_cut: int
    """Answers that were ended by the most tokens that they might have."""


def replacing(replacements: torch.Tensor, thought: int | None = None) -> Intervention:
    """Feed `replacements` (B, K, D) in place of the `thought`-th thoughts, from 0, of each row; None: of all."""
    rows = torch.arange(len(replacements), device=replacements.device)

    def intervene(number: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        is_replaced = number >= 0 if thought is None else number == thought  # (B,)
        return torch.where(is_replaced[:, None], replacements[rows, number.clamp_min(0)], fed)

    return intervene


def stacked(fed: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, K, D) from the thoughts of each question, (its thoughts, D); NaN where a question has no such thought."""
    return torch.nn.utils.rnn.pad_sequence(list(fed), batch_first=True, padding_value=torch.nan)


def replacements(by: str, fed: torch.Tensor, seed: int) -> torch.Tensor:
    """(N, K, D), what stands in for the thoughts `fed` (N, K, D).

    `zero`; `mean`, of all questions that have the thought; `other`: the thought of the same number of another question,
    in an order drawn from `seed` the next one that has it. A question that alone has a thought keeps it.
    """
    if by == "zero":
        return torch.zeros_like(fed)
    if by == "mean":
        return fed.nanmean(dim=0, keepdim=True).expand_as(fed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(fed)))
    others = fed.clone()
    for thought in range(fed.shape[1]):
        having = order[~fed[order, thought, 0].isnan()]
        others[having, thought] = fed[having.roll(-1), thought]
    return others


KINDS = ("zero", "mean", "other")


def intervene(
    trained: TrainedModel,
    questions: Sequence[Question],
    fed: Sequence[torch.Tensor],
    given: Sequence[str],
    *,
    new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[Outcome]:
    """Every kind of replacement of every thought, and of all of them.

    `fed` are the thoughts of each question as they were (its thoughts, D), `given` the answers. Of a thought that one
    question alone has there is no mean and no other to put in its place.
    """
    thoughts = stacked(fed)
    places = [*range(thoughts.shape[1]), None]
    having = {
        place: [row for row, question in enumerate(questions) if question.n_thoughts > (place or 0)] for place in places
    }
    cases = [(by, place) for by in KINDS for place in places if by == "zero" or len(having[place]) > 1]
    outcomes = []
    for by, place in progress(cases, len(cases), "interventions"):
        instead = replacements(by, thoughts, seed)
        rows = having[place]
        these = [questions[row] for row in rows]
        after: list[str] = []
        n_cut = 0
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            answered = answer(trained, these[batch], new_tokens, replacing(instead[rows[batch]], place))
            after += answered.given
            n_cut += sum(answered.cut)
        expected, before = [each.expected for each in these], [given[row] for row in rows]
        outcomes.append(outcome(by, place, expected, before, after, n_cut))
    return outcomes


def outcome(
    by: str,
    place: int | None,
    expected: Sequence[str],
    given: Sequence[str],
    after: Sequence[str],
    n_cut: int = 0,
) -> Outcome:
    """What replacing the thought `place`, from 0, did to the answers `given`, which came out as `after`."""
    before_hits = np.array([text == right for text, right in zip(given, expected)])
    after_hits = np.array([text == right for text, right in zip(after, expected)])
    return Outcome(
        by=by,
        thought=None if place is None else place + 1,
        n_replaced=len(after),
        accuracy=float(after_hits.mean()),
        change=float(after_hits.mean() - before_hits.mean()),
        interval=_interval_of_change(before_hits, after_hits),
        n_lost=int((before_hits & ~after_hits).sum()),
        n_gained=int((~before_hits & after_hits).sum()),
        n_changed=sum(first != second for first, second in zip(given, after)),
        n_cut=n_cut,
    )


def _interval_of_change(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, float]:
    draws = bootstrap({"before": before[None], "after": after[None]}, DRAWS, seed=0)
    return percentile_interval(draws["after"] - draws["before"])
