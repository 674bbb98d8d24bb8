"""A question as tokens: the text and a newline, or as a user's message in the tokenizer's chat template.

What follows is the same in both: thoughts between their markers, steps, `### answer`, EOS. In a chat all of it is the
assistant's message.

    plain   [BOS] question \\n                                                        [start] t*k [end] ..
    chat    template, e.g. <|im_start|>user\\nquestion<|im_end|>\\n<|im_start|>assistant\\n   [start] t*k [end] ..
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from coconut_ds.data.markers import MARKERS
from coconut_ds.errors import InputError, in_one_line

PromptFormat = Literal["plain", "chat"]

_DATE = "26 Jul 2024"
"""What templates of Llama 3 write if they know no date: a prompt must be the same tomorrow."""


def question_ids(
    questions: Iterable[str], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat = "plain"
) -> list[list[int]]:
    """The ids of each question; raises InputError for a tokenizer without a chat template that can be used."""
    if prompt_format == "plain":
        # With the tokens that a tokenizer adds to every text, such as BOS.
        texts = [question + "\n" for question in questions]
        return list(tokenizer(texts)["input_ids"]) if texts else []
    texts = [_in_chat(question, tokenizer) for question in questions]
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def _in_chat(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise InputError("prompt_format: chat, and the tokenizer has no chat template; set it to plain")
    if "strftime_now" in tokenizer.chat_template and "date_string" not in tokenizer.chat_template:
        raise InputError("prompt_format: chat: the tokenizer's template writes today's date into prompts; set plain")
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "date_string": _DATE}
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": question}], **options))
    except Exception as error:  # templates are programs that raise what they like
        raise InputError(
            f"prompt_format: chat: the tokenizer's template fails: {in_one_line(error)}; set plain"
        ) from None


def role_token_in(question: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token whose text a question holds, which in a chat could end its message; None if there is none."""
    # Some tokenizers mark role tokens as special without a place in their map (Llama 3).
    added: Any = tokenizer.added_tokens_decoder.values()
    special = [*tokenizer.all_special_tokens, *(str(each) for each in added if each.special)]
    return next((name for name in (*special, *MARKERS) if name in question), None)
