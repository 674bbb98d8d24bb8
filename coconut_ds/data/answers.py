"""The form of a target, steps line by line and then `### answer`, and how answer and chain are read back from a text.

The published code reads what follows the last `#` as the answer and what precedes the first as the chain. So do these
functions wherever what is expected has no `#` of its own. Where it has one, that reading can never be right: there the
last line that begins with `###` divides the text. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "### "
# Some tokenizers put a space before what they tokenize apart.
_ANSWER_LINE = re.compile(r"^[^\S\n]*###", re.MULTILINE)


def step_line(step: str) -> str:
    """A step as it is written in a target."""
    return step + "\n"


def answer_line(answer: str) -> str:
    """An answer as it is written in a target, without the end of text."""
    return _ANSWER + answer


def target(steps: Sequence[str], answer: str) -> str:
    """What a model is trained to write when no step is replaced."""
    return "".join(map(step_line, steps)) + answer_line(answer)


def before_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Generated ids up to the first EOS."""
    eos = tokenizer.eos_token_id
    return ids[: ids.index(eos)] if eos in ids else ids


def is_cut(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `max_new_tokens` ended an answer: of that many generated ids, EOS after EOS, none is an EOS."""
    return tokenizer.eos_token_id not in ids


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of generated ids, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def clean_answer(text: str) -> str:
    """The form answers are compared in: without commas, and without spaces at the ends."""
    return text.replace(",", "").strip()


def clean_chain(steps: Sequence[str]) -> str:
    """The form chains are compared in: lines without spaces at their ends, and no empty ones around them."""
    return "\n".join(line.strip() for line in "\n".join(steps).strip().split("\n"))


def given_answer(text: str, expected: str | None = None) -> str:
    """The answer in generated text, in the form of `clean_answer`: what follows the last `#`.

    Where `expected` has a `#` it is what follows the `###` of the last line that begins so; where nothing is expected,
    what follows the last `###`. A text without these is read as published.
    """
    if expected is None:
        return clean_answer(text.rpartition("###" if "###" in text else "#")[2])
    divider = _last_answer_line(text) if "#" in expected else None
    return clean_answer(text[divider.end() :] if divider else text.rpartition("#")[2])


def given_chain(text: str, expected: str) -> str:
    """The chain of thought in generated text, in the form of `clean_chain`: what precedes the first `#`.

    Where `expected` has a `#` it is what precedes the last line that begins with `###`.
    """
    divider = _last_answer_line(text) if "#" in expected else None
    return clean_chain([text[: divider.start()] if divider else text.partition("#")[0]])


def _last_answer_line(text: str) -> re.Match[str] | None:
    return max(_ANSWER_LINE.finditer(text), key=re.Match.start, default=None)
