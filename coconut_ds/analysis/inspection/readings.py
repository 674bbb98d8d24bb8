"""Questions answered by a trained model, and what is read in each of their thoughts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut_ds.data.answers import before_eos, clean_answer, given_answer, is_cut, text_of
from coconut_ds.data.batches import Batch
from coconut_ds.errors import InputError
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.backbone import n_positions
from coconut_ds.model.decoding import Decoded, decode
from coconut_ds.model.passes import Encoded, Intervention
from coconut_ds.model.thoughts import Thoughts, read_thoughts, vocabulary_reading


@dataclass(frozen=True)
class Question:
    """A record of a data file and how many thoughts its prompt gets."""

    index: int
    record: dict[str, Any]
    n_thoughts: int

    @property
    def expected(self) -> str:
        return clean_answer(self.record["answer"])


@dataclass(frozen=True)
class ThoughtReading:
    """What is read in one thought."""

    norm: float
    """L2 norm of what was fed in its place."""
    entropy_bits: float
    """Of the LM head's distribution over the vocabulary."""
    top: list[tuple[str, float]]
    """The most probable tokens of that distribution."""
    window: list[tuple[str, float]]
    """The earlier states, newest first: the token or thought each stands at, and its share, 0 where its weight is."""


@dataclass(frozen=True)
class QuestionReading:
    """A question, the answer given, and its thoughts."""

    index: int
    question: str
    expected: str
    given: str
    correct: bool
    n_new_tokens: int
    """Generated before the end of the answer."""
    cut: bool
    """Whether it was ended by the most tokens that it might have, without an EOS."""
    embedding_norms: dict[str, float]
    """Mean, min and max L2 norm of the token embeddings of the question, without markers."""
    thoughts: list[ThoughtReading]


def questions_of(
    trained: TrainedModel, records: Sequence[tuple[int, dict[str, Any]]], n_thoughts: int | None = None
) -> list[Question]:
    """The records, by index, with `n_thoughts` each, or as many as in the evaluation of the weights' stage.

    Raises InputError for a model, or a stage, without thoughts.
    """
    if trained.tokens.thought is None:
        method = trained.curriculum.method
        raise InputError(f"the model was trained by {method}, which has no thoughts to inspect; name one of coconut")
    found = []
    for index, record in records:
        count = trained.n_thoughts(len(record["steps"])) if n_thoughts is None else n_thoughts
        found.append(Question(index, record, count))
    if not any(question.n_thoughts for question in found):
        raise InputError(f"no thoughts in stage {trained.stage}; name a later checkpoint, or give --thoughts N")
    return found


def room_for_answers(trained: TrainedModel, questions: Sequence[Question], new_tokens: int | None) -> int:
    """How many tokens an answer may have: `new_tokens`, or as many as usual, or what the model has positions left for.

    Raises InputError for the first question that does not fit.
    """
    positions = n_positions(trained.model.base_causallm)
    lengths = [trained.prompts([each.record["question"]], [each.n_thoughts]).n_tokens for each in questions]
    room = new_tokens or max(1, min(trained.usual_new_tokens, positions - max(lengths)))
    for question, length in zip(questions, lengths):
        if length + room > positions:
            raise InputError(
                f"record {question.index}: a prompt of {length} tokens ({question.n_thoughts} of them thoughts) and "
                f"{room} new ones need {length + room} positions, the model has {positions}; lower --max-new-tokens or "
                "--thoughts, or leave the record out"
            )
    return room


@dataclass(frozen=True)
class Answered:
    """A batch of questions after decoding: the prompts, what was run, and the answers given."""

    prompts: Batch
    decoded: Decoded
    given: list[str]
    n_new_tokens: list[int]
    """Generated before the end of each answer."""
    cut: list[bool]
    """Which answers were ended by `new_tokens`, without an EOS."""


def answer(
    trained: TrainedModel, questions: Sequence[Question], new_tokens: int, intervene: Intervention | None = None
) -> Answered:
    """Greedy answers, as the evaluation reads them."""
    prompts = trained.prompts([each.record["question"] for each in questions], [each.n_thoughts for each in questions])
    inputs = prompts.inputs
    decoded = decode(
        trained.model,
        inputs["input_ids"],
        inputs["attention_mask"],
        new_tokens,
        inputs["thought_span"],
        intervene=intervene,
    )
    tokenizer = trained.tokenizer
    generated = decoded.tokens.tolist()
    answers = [before_eos(row, tokenizer) for row in generated]
    texts = [text_of(ids, tokenizer) for ids in answers]
    given = [given_answer(text, question.expected) for text, question in zip(texts, questions)]
    cut = [is_cut(row, tokenizer) for row in generated]
    return Answered(prompts, decoded, given, [len(ids) for ids in answers], cut)


def thoughts_of(trained: TrainedModel, answered: Answered) -> Thoughts:
    """The thoughts of an answered batch."""
    inputs = answered.prompts.inputs
    return read_thoughts(trained.model, _encoded(answered), inputs["input_ids"], inputs["attention_mask"])


def _encoded(answered: Answered) -> Encoded:
    # A question and a thought are in front of the last column.
    assert answered.decoded.encoded is not None
    return answered.decoded.encoded


@torch.no_grad()
def read(
    trained: TrainedModel, questions: Sequence[Question], answered: Answered, thoughts: Thoughts, top_k: int
) -> list[QuestionReading]:
    """The readings of an answered batch, with the `top_k` most probable tokens of each thought."""
    embedding_norms = _encoded(answered).inputs_embeds.norm(dim=-1)  # (B, T - 1)
    is_question = _is_question(trained, answered.prompts)[:, :-1]  # (B, T - 1)
    by_row: list[list[ThoughtReading]] = [[] for _ in questions]
    # Thought by thought: the probabilities of all of them would take K times the memory.
    for number, averages in enumerate(thoughts.averages.unbind(dim=1)):
        probabilities = vocabulary_reading(trained.model, averages)  # (B, V)
        entropies = torch.special.entr(probabilities).sum(dim=1) / math.log(2)
        values, tokens = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        norms = thoughts.fed[:, number].norm(dim=-1)
        for row, question in enumerate(questions):
            if number < question.n_thoughts:
                texts = [_text(trained, token) for token in tokens[row].tolist()]
                top = list(zip(texts, values[row].tolist()))
                window = _window(trained, answered.prompts, row, number, thoughts.shares[row, number].tolist())
                by_row[row].append(ThoughtReading(norms[row].item(), entropies[row].item(), top, window))
    return [
        QuestionReading(
            index=question.index,
            question=question.record["question"],
            expected=question.expected,
            given=given,
            correct=given == question.expected,
            n_new_tokens=answered.n_new_tokens[row],
            cut=answered.cut[row],
            embedding_norms=_spread(embedding_norms[row][is_question[row]]),
            thoughts=by_row[row],
        )
        for row, (question, given) in enumerate(zip(questions, answered.given))
    ]


def _is_question(trained: TrainedModel, prompts: Batch) -> torch.Tensor:
    """(B, T), True at the tokens of the question."""
    ids, tokens = prompts.inputs["input_ids"], trained.tokens
    markers = [each for each in (tokens.start_latent, tokens.latent, tokens.end_latent) if each is not None]
    return prompts.inputs["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(markers, device=ids.device))


def _window(
    trained: TrainedModel, prompts: Batch, row: int, number: int, shares: Sequence[float]
) -> list[tuple[str, float]]:
    ids: list[int] = prompts.inputs["input_ids"][row].tolist()
    thought = trained.tokens.thought
    column = [place for place, token in enumerate(ids) if token == thought][number]
    # Zeros at the end may be states that the row does not have.
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
