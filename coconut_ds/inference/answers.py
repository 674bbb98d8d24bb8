"""A trained model answers one question at a time, in the prompts and with the reading of answers of the evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from textwrap import shorten
from typing import Any

from transformers import TextStreamer

from coconut_ds.data.answers import before_eos, clean_answer, given_answer, is_cut, text_of
from coconut_ds.data.batches import Batch
from coconut_ds.data.plain_text import unknown_words
from coconut_ds.errors import InputError
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.backbone import n_positions
from coconut_ds.model.decoding import Decoded, decode
from coconut_ds.model.thoughts import Readings, read_thoughts, top_tokens

_QUOTED = 60


@dataclass(frozen=True)
class Question:
    """A question, and what a record of a data file says of it."""

    text: str
    n_steps: int | None = None
    expected: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a question; `answer` is what the evaluation compares, `text` everything that was generated."""

    question: str
    answer: str
    text: str
    n_thoughts: int
    """Thoughts, or pauses, in the prompt."""
    n_new_tokens: int
    """Generated before the end of the answer."""
    seconds: float
    thoughts: Readings | None = None
    """For each thought the most probable tokens under the LM head, where they were asked for."""
    expected: str | None = None
    correct: bool | None = None
    cut: bool = False
    """Whether it was ended by the most tokens that it might have, without an EOS."""

    def as_dict(self) -> dict[str, Any]:
        """What is known, by name."""
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in known.items() if value is not None}


def sampled(temperature: float = 1.0, top_p: float = 1.0) -> Mapping[str, Any]:
    """How answers are drawn: from all tokens, where transformers by itself keeps to the 50 best."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


@dataclass(frozen=True)
class Answerer:
    """A model and how it is to answer. Raises InputError for thoughts of a model that has none."""

    trained: TrainedModel
    n_thoughts: int | None = None
    """In every prompt; None for as many as in the evaluation."""
    max_new_tokens: int | None = None
    """None for as many as in the run's evaluations, or fewer where the model has not that many positions left."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What `sampled` gives; greedy where it is empty."""
    reads_thoughts: bool = False

    def __post_init__(self) -> None:
        tokens, method = self.trained.tokens, self.trained.curriculum.method
        if self.n_thoughts and tokens.latent is None:
            raise InputError(f"--thoughts {self.n_thoughts}: the model was trained by {method}, without thoughts")
        if self.reads_thoughts and tokens.thought is None:
            raise InputError(f"--show-thoughts: the model was trained by {method}, which has no thoughts to read")

    @property
    def description(self) -> str:
        """The model and how it answers, for a person."""
        trained = self.trained
        stage = "" if trained.stage is None else f", stage {trained.stage}"
        thoughts = "" if trained.tokens.latent is None else f", {self._thoughts_of(Question(''))} thoughts a question"
        return f"{trained.curriculum.method}{stage}{thoughts}, {'sampled' if self.sampling else 'greedy'}"

    def answer(self, question: Question, streams: bool = False) -> Answer:
        """The answer; `streams` prints the text, and nothing else, to stdout while it is generated.

        Raises InputError for a question that `check` refuses.
        """
        started = time.monotonic()
        n_thoughts, batch, n_new = self._prompt(question)
        tokenizer = self.trained.tokenizer
        # It decodes as is done below, so that a person sees what a script is given.
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        inputs = batch.inputs
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        decoded = decode(
            self.trained.model, ids, mask, n_new, inputs["thought_span"], streamer=streamer, **self.sampling
        )
        generated = decoded.tokens[0].tolist()
        new = before_eos(generated, tokenizer)
        text = text_of(new, tokenizer)
        expected = None if question.expected is None else clean_answer(question.expected)
        given = given_answer(text, expected)
        return Answer(
            question=question.text,
            answer=given,
            text=text,
            n_thoughts=n_thoughts,
            n_new_tokens=len(new),
            seconds=round(time.monotonic() - started, 4),
            thoughts=self._readings(decoded, batch) if self.reads_thoughts else None,
            expected=expected,
            correct=None if expected is None else given == expected,
            cut=is_cut(generated, tokenizer),
        )

    def check(self, question: Question) -> None:
        """Raise InputError for a question that is empty, is no text, or does not fit the model's positions."""
        self._prompt(question)

    def unknown_words(self, question: Question) -> list[str]:
        """Words of the question that the tokenizer has no token for, each once, in order."""
        return unknown_words(question.text, self.trained.tokenizer)

    def _prompt(self, question: Question) -> tuple[int, Batch, int]:
        """Its thoughts, the prompt as a batch of one row, and the number of tokens that may follow."""
        _demand_text(question.text)
        n_thoughts = self._thoughts_of(question)
        batch = self.trained.prompts([question.text], [n_thoughts])
        length = batch.inputs["input_ids"].shape[1]
        positions = n_positions(self.trained.model.base_causallm)
        n_new = self.max_new_tokens or min(self.trained.usual_new_tokens, max(1, positions - length))
        if length + n_new > positions:
            raise InputError(
                f"question {_quoted(question.text)}: a prompt of {length} tokens ({n_thoughts} of them thoughts) and "
                f"{n_new} to generate need {length + n_new} positions, the model has {positions}; shorten the question "
                "or lower --thoughts or --max-new-tokens"
            )
        return n_thoughts, batch, n_new

    def _thoughts_of(self, question: Question) -> int:
        if self.trained.tokens.latent is None:
            return 0
        return self.trained.n_thoughts(question.n_steps) if self.n_thoughts is None else self.n_thoughts

    def _readings(self, decoded: Decoded, batch: Batch) -> Readings:
        if not batch.inputs["thought_span"] or decoded.encoded is None:
            return []
        model, ids = self.trained.model, batch.inputs["input_ids"]
        thoughts = read_thoughts(model, decoded.encoded, ids, batch.inputs["attention_mask"])
        return top_tokens(model, thoughts, self.trained.tokenizer)[0]


def _demand_text(text: str) -> None:
    if not text.strip():
        raise InputError("the question is empty; write one")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of another encoding arrive as halves of surrogate pairs
        raise InputError(f"question {_quoted(text)} is not UTF-8 text; encode it so") from None


def _quoted(text: str) -> str:
    return repr(shorten(text, _QUOTED, placeholder=" ..."))
