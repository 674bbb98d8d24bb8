"""The one path from prompts to answers: decode a batch, read its answers, read its thoughts.

Evaluation, `ask` and `inspect` all take it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from transformers import PreTrainedTokenizerBase

from coconut_ds.data.answers import (
    AnswerMatch,
    before_eos,
    clean_answer,
    clean_chain,
    given_answer,
    given_chain,
    is_cut,
    matches,
    text_of,
)
from coconut_ds.data.batches import Batch, to_device
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.decoding import Decoded, decode
from coconut_ds.model.passes import Encoded
from coconut_ds.model.thought_readings import Readings, Thoughts, read_thoughts, top_tokens


@dataclass(frozen=True)
class Question:
    """A question, and what a record of a data file says about it."""

    text: str
    n_steps: int | None = None
    expected: str | None = None
    """The answer, in the form of `clean_answer`."""
    chain: str = ""
    """The steps, in the form of `clean_chain`."""
    index: int | None = None
    """Of its record, from 0, if messages name the question by it."""
    n_thoughts: int | None = None
    """Thoughts, or pauses, in its prompt; None: the number that the evaluation uses."""

    @classmethod
    def of(cls, record: Mapping[str, Any], index: int | None = None, n_thoughts: int | None = None) -> Question:
        steps = record["steps"]
        expected, chain = clean_answer(record["answer"]), clean_chain(steps)
        return cls(record["question"], len(steps), expected, chain, index, n_thoughts)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"question {quoted(self.text)}" if self.index is None else f"record {self.index}"


def quoted(text: str) -> str:
    """The beginning of a text, for messages."""
    return repr(shorten(text, 60, placeholder=" ..."))


@dataclass(frozen=True)
class Reply:
    """What the model generated for a question, and how it is read."""

    question: Question
    text: str
    """Everything before EOS, without special tokens."""
    given: str
    """The answer in it, in the form of `clean_answer`."""
    n_new_tokens: int
    """Before EOS."""
    cut: bool
    """Whether the limit of new tokens ended it, without an EOS."""
    match: AnswerMatch = "text"
    """How it is compared."""

    @classmethod
    def of(
        cls, question: Question, ids: list[int], tokenizer: PreTrainedTokenizerBase, match: AnswerMatch = "text"
    ) -> Reply:
        new = before_eos(ids, tokenizer)
        text = text_of(new, tokenizer)
        return cls(question, text, given_answer(text, question.expected), len(new), is_cut(ids, tokenizer), match)

    @property
    def correct(self) -> bool:
        return matches(self.given, self.question.expected, self.match)

    @property
    def chain_correct(self) -> bool:
        return given_chain(self.text, self.question.chain) == self.question.chain


@dataclass(frozen=True)
class Answered:
    """A batch of prompts after decoding."""

    model: Coconut
    inputs: dict[str, Any]
    """Those of the prompts, on the model's device."""
    decoded: Decoded
    replies: list[Reply]
    seconds: float
    """For the transfer to the device, decoding, and the transfer of the tokens back."""

    @property
    def encoded(self) -> Encoded:
        """Every column of the prompts but the last; a question and its thoughts stand before that."""
        assert self.decoded.encoded is not None
        return self.decoded.encoded

    def thoughts(self) -> Thoughts:
        return read_thoughts(self.model, self.encoded, self.inputs["input_ids"], self.inputs["attention_mask"])

    def readings(self, tokenizer: PreTrainedTokenizerBase) -> list[Readings]:
        """For each row the most probable tokens of its thoughts; empty for a row without thoughts."""
        if not self.inputs["thought_span"] or self.decoded.encoded is None:
            return [[] for _ in self.replies]
        return top_tokens(self.model, self.thoughts(), tokenizer)


def ask(
    model: Coconut,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Batch,
    new_tokens: int,
    match: AnswerMatch = "text",
    **options: Any,
) -> Answered:
    """Decode the prompts of `questions`, at most `new_tokens` each, read the answers, and compare them as `match` says.

    `options` are those of `decode`: an intervention, a streamer, sampling; greedy by default.
    """
    started = time.monotonic()
    inputs = to_device(prompts.inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    decoded = decode(model, ids, mask, new_tokens, inputs["thought_span"], **options)
    generated = decoded.tokens.tolist()
    seconds = time.monotonic() - started
    replies = [Reply.of(question, row, tokenizer, match) for question, row in zip(questions, generated)]
    return Answered(model, inputs, decoded, replies, seconds)
