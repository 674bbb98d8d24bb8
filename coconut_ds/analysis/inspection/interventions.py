"""How answers change when thoughts are replaced: by zero, by their mean, by those of another question.

Shapes: N questions, B of them in a batch, K thoughts of the question with the most, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coconut_ds.analysis.intervals import bootstrap, percentile_interval
from coconut_ds.inference.replies import Question, Reply
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.passes import Intervention
from coconut_ds.runs.terminal import progress

DRAWS = 10_000


@dataclass(frozen=True)
class Outcome:
    """Answers with one thought, or all of them, replaced, compared with the original answers; shares from 0 to 1.

    Over the questions that have the thought.
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
    """Different answers, right or wrong."""
    n_cut: int
    """Answers ended by the limit of new tokens."""


def replacing(replacements: torch.Tensor, thought: int | None = None) -> Intervention:
    """Feed `replacements` (B, K, D) instead of thought number `thought`, from 0, of each row; None: of all thoughts."""
    rows = torch.arange(len(replacements), device=replacements.device)

    def intervene(number: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        is_replaced = number >= 0 if thought is None else number == thought  # (B,)
        return torch.where(is_replaced[:, None], replacements[rows, number.clamp_min(0)], fed)

    return intervene


def stacked(fed: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, K, D) from the thoughts of each question, (thoughts, D); NaN for thoughts that a question does not have."""
    return torch.nn.utils.rnn.pad_sequence(list(fed), batch_first=True, padding_value=torch.nan)


def replacements(by: str, fed: torch.Tensor, seed: int) -> torch.Tensor:
    """(N, K, D), replacements of the thoughts `fed` (N, K, D).

    `zero`; `mean`, over all questions that have the thought; `other`: the same thought of another question, the next
    one that has it in an order drawn from `seed`. If only one question has a thought, it keeps it.
    """
    if by == "zero":
        return torch.zeros_like(fed)
    if by == "mean":
        return fed.nanmean(dim=0, keepdim=True).expand_as(fed)
    return fed.gather(0, donors(fed, seed)[:, :, None].expand_as(fed))


def donors(fed: torch.Tensor, seed: int) -> torch.Tensor:
    """(N, K), for each thought of `fed` (N, K, D) the question whose thought replaces it under `other`."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(fed))).to(fed.device)
    places = torch.arange(len(fed), device=fed.device)
    found = torch.empty(fed.shape[:2], dtype=torch.long, device=fed.device)
    for thought in range(fed.shape[1]):
        # Sorted, not picked by a mask: a shape that depends on data would synchronise with a GPU.
        lacks = fed[order, thought, 0].isnan()
        ordered = order[lacks.int().argsort(stable=True)]  # (N,), questions that have the thought first
        n_having = len(fed) - lacks.sum()
        following = torch.where(places < n_having, (places + 1) % n_having.clamp_min(1), places)
        found[ordered, thought] = ordered[following]
    return found


KINDS = ("zero", "mean", "other")


def intervene(
    trained: TrainedModel, replies: Sequence[Reply], fed: Sequence[torch.Tensor], new_tokens: int, rows: int, seed: int
) -> list[Outcome]:
    """Every kind of replacement of every thought, and of all of them; `rows` questions are answered at once.

    `replies` are those to the questions as they were, with the thoughts `fed` (thoughts of the question, D). A thought
    that only one question has is not replaced by the mean or by another, which would be itself.
    """
    thoughts = stacked(fed)
    places = [*range(thoughts.shape[1]), None]
    having = {place: [row for row, each in enumerate(fed) if len(each) > (place or 0)] for place in places}
    cases = [(by, place) for by in KINDS for place in places if by == "zero" or len(having[place]) > 1]
    outcomes = []
    for by, place in progress(cases, len(cases), "interventions"):
        before = [replies[row] for row in having[place]]
        instead = replacements(by, thoughts, seed)[having[place]]
        after = ask_again(trained, [each.question for each in before], instead, place, new_tokens, rows)
        outcomes.append(outcome(by, place, before, after))
    return outcomes


def ask_again(
    trained: TrainedModel,
    questions: Sequence[Question],
    instead: torch.Tensor,
    place: int | None,
    new_tokens: int,
    rows: int,
) -> list[Reply]:
    """Replies with `instead` (N, K, D) fed for the thought `place` of each question, from 0, or for all (None)."""
    found: list[Reply] = []
    for start in range(0, len(questions), rows):
        batch = slice(start, start + rows)
        found += trained.ask(questions[batch], new_tokens, intervene=replacing(instead[batch], place)).replies
    return found


def outcome(by: str, place: int | None, before: Sequence[Reply], after: Sequence[Reply]) -> Outcome:
    """How the replies `before` and `after` replacing the thought `place`, from 0, differ."""
    hits_before, hits_after = (np.array([each.correct for each in replies]) for replies in (before, after))
    return Outcome(
        by=by,
        thought=None if place is None else place + 1,
        n_replaced=len(after),
        accuracy=float(hits_after.mean()),
        change=float(hits_after.mean() - hits_before.mean()),
        interval=_interval_of_change(hits_before, hits_after),
        n_lost=int((hits_before & ~hits_after).sum()),
        n_gained=int((~hits_before & hits_after).sum()),
        n_changed=sum(first.given != second.given for first, second in zip(before, after)),
        n_cut=sum(each.cut for each in after),
    )


def _interval_of_change(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, float]:
    draws = bootstrap({"before": before[None], "after": after[None]}, DRAWS, seed=0)
    return percentile_interval(draws["after"] - draws["before"])
