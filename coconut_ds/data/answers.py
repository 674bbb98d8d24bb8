"""The format of a target (a line per step, then `### answer`), and parsing answer and chain from generated text.

As in the published code the answer is the text after the last `#`, and the chain the text before the first. If the
expected answer or chain has a `#` itself, that would never match: then the last line that begins with `###` divides
the text. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnswerMatch = Literal["text", "number"]

_ANSWER = "### "
_NUMBER = re.compile(r"([+-]?)\s*[$€£¥]?\s*(\d+\.?\d*|\.\d+)\s*[$€£¥]?")
# Some tokenizers put a space before the answer line, which is tokenized separately.
_ANSWER_LINE = re.compile(r"^[^\S\n]*###", re.MULTILINE)


def step_line(step: str) -> str:
    """The line of a step in a target."""
    return step + "\n"


def answer_line(answer: str) -> str:
    """The line of an answer in a target, without the EOS."""
    return _ANSWER + answer


def target(steps: Sequence[str], answer: str) -> str:
    """The text a model is trained to write when no step is replaced."""
    return "".join(map(step_line, steps)) + answer_line(answer)


def before_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Generated ids up to the first EOS."""
    eos = tokenizer.eos_token_id
    return ids[: ids.index(eos)] if eos in ids else ids


def is_cut(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `max_new_tokens` truncated an answer: its generated ids, EOS-padded to that number, hold no EOS."""
    return tokenizer.eos_token_id not in ids


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of generated ids, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def clean_answer(text: str) -> str:
    """The normal form in which answers are compared: without commas, and without spaces at the ends."""
    return text.replace(",", "").strip()


def matches(given: str, expected: str | None, how: AnswerMatch) -> bool:
    """Whether an answer is right; both in the form of `clean_answer`.

    `text`: the same text. `number`: also the same number, so that 5, 5.0 and $5 are all right for each other; what is
    no number on both sides is compared as text.
    """
    if given == expected or expected is None or how == "text":
        return given == expected
    one, other = _number(given), _number(expected)
    return one is not None and one == other


def _number(text: str) -> Decimal | None:
    found = _NUMBER.fullmatch(text)
    return Decimal("".join(found.groups())) if found else None


def clean_chain(steps: Sequence[str]) -> str:
    """The normal form in which chains are compared: lines stripped, without empty lines around them."""
    return "\n".join(line.strip() for line in "\n".join(steps).strip().split("\n"))


def given_answer(text: str, expected: str | None = None) -> str:
    """The answer in generated text, in the form of `clean_answer`: the text after the last `#`.

    If `expected` has a `#`, the text after the `###` of the last line that begins with it; if `expected` is None, the
    text after the last `###`. A text without these is parsed by its last `#`.
    """
    if expected is None:
        return clean_answer(text.rpartition("###" if "###" in text else "#")[2])
    divider = _last_answer_line(text) if "#" in expected else None
    return clean_answer(text[divider.end() :] if divider else text.rpartition("#")[2])


def given_chain(text: str, expected: str) -> str:
    """The chain of thought in generated text, in the form of `clean_chain`: the text before the first `#`.

    If `expected` has a `#`, the text before the last line that begins with `###`.
    """
    divider = _last_answer_line(text) if "#" in expected else None
    return clean_chain([text[: divider.start()] if divider else text.partition("#")[0]])


def _last_answer_line(text: str) -> re.Match[str] | None:
    return max(_ANSWER_LINE.finditer(text), key=re.Match.start, default=None)
