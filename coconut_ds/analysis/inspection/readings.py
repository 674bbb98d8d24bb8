"""Readings of each thought of questions that a trained model has answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coconut_ds.inference.replies import Answered
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.thought_readings import Thoughts, vocabulary_reading


@dataclass(frozen=True)
class ThoughtReading:
    """The readings of one thought."""

    norm: float
    """L2 norm of the vector fed in its column."""
    entropy_bits: float
    """Of the LM head's distribution over the vocabulary."""
    top: list[tuple[str, float]]
    """The most probable tokens of that distribution."""
    window: list[tuple[str, float]]
    """The earlier states, newest first: the token or thought in the column of each, and its share."""


@dataclass(frozen=True)
class QuestionReading:
    """A question, the answer given, and its thoughts."""

    index: int | None
    question: str
    expected: str | None
    given: str
    correct: bool
    n_new_tokens: int
    """Generated before EOS."""
    cut: bool
    """Whether the limit of new tokens ended it, without an EOS."""
    embedding_norms: dict[str, float]
    """Mean, min and max L2 norm of the token embeddings of the question, without markers."""
    thoughts: list[ThoughtReading]


@torch.no_grad()
def read(trained: TrainedModel, answered: Answered, thoughts: Thoughts, top_k: int) -> list[QuestionReading]:
    """The readings of an answered batch, with the `top_k` most probable tokens of each thought."""
    embedding_norms = answered.encoded.inputs_embeds.norm(dim=-1)  # (B, T - 1)
    is_question = _is_question(trained, answered)[:, :-1]  # (B, T - 1)
    # Whole tensors are transferred: each element would synchronise with a GPU.
    counts, shares, ids = (each.tolist() for each in (thoughts.counts, thoughts.shares, answered.inputs["input_ids"]))
    by_row: list[list[ThoughtReading]] = [[] for _ in counts]
    # Thought by thought: the probabilities of all of them would take K times the memory.
    for number, averages in enumerate(thoughts.averages.unbind(dim=1)):
        probabilities = vocabulary_reading(trained.model, averages)  # (B, V)
        entropies = (torch.special.entr(probabilities).sum(dim=1) / math.log(2)).tolist()
        values, tokens = (each.tolist() for each in probabilities.topk(min(top_k, probabilities.shape[1]), dim=1))
        norms = thoughts.fed[:, number].norm(dim=-1).tolist()
        for row, count in enumerate(counts):
            if number < count:
                texts = [_text(trained, token) for token in tokens[row]]
                top = list(zip(texts, values[row]))
                window = _window(trained, ids[row], number, shares[row][number])
                by_row[row].append(ThoughtReading(norms[row], entropies[row], top, window))
    return [
        QuestionReading(
            index=reply.question.index,
            question=reply.question.text,
            expected=reply.question.expected,
            given=reply.given,
            correct=reply.correct,
            n_new_tokens=reply.n_new_tokens,
            cut=reply.cut,
            embedding_norms=_spread(embedding_norms[row][is_question[row]]),
            thoughts=by_row[row],
        )
        for row, reply in enumerate(answered.replies)
    ]


def _is_question(trained: TrainedModel, answered: Answered) -> torch.Tensor:
    """(B, T), True at the tokens of the question."""
    ids, tokens = answered.inputs["input_ids"], trained.tokens
    markers = [each for each in (tokens.start_latent, tokens.latent, tokens.end_latent) if each is not None]
    return answered.inputs["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(markers, device=ids.device))


def _window(trained: TrainedModel, ids: Sequence[int], number: int, shares: Sequence[float]) -> list[tuple[str, float]]:
    thought = trained.tokens.thought
    column = [place for place, token in enumerate(ids) if token == thought][number]
    # Zeros at the end may stand for states that the row does not have.
    reach = max((back for back, share in enumerate(shares, start=1) if share > 0), default=0)
    window = []
    for back, share in enumerate(shares[:reach], start=1):
        before = ids[column - back]
        window.append((f"thought {number + 1 - back}" if before == thought else _text(trained, before), share))
    return window


def _text(trained: TrainedModel, token: int) -> str:
    return str(trained.tokenizer.decode([token]))


def _spread(norms: torch.Tensor) -> dict[str, float]:
    return {"mean": norms.mean().item(), "min": norms.min().item(), "max": norms.max().item()}
