"""Checks that a tokenizer keeps text as text: no reserved (special) tokens in it, and which words are unknown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from coconut_ds.data.answers import answer_line, step_line
from coconut_ds.data.files import DataError
from coconut_ds.data.markers import MARKERS
from coconut_ds.data.prompts import PromptFormat, role_token_in

_COLUMNS = {"question": "question_ids", "steps": "steps_ids", "answer": "answer_ids"}


def reserved_in(text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, key: str = "question") -> str | None:
    """A reserved token (EOS, BOS, padding, markers) that `text`, tokenized as `ids`, holds; None if there is none.

    Tokens that the tokenizer adds by itself do not count, nor those of its chat template in a question.
    """
    added = tokenizer("\n")["input_ids"]
    for token, name in _reserved(tokenizer, key).items():
        # An unknown word may be the same token.
        if list(ids).count(token) > added.count(token) and (token != tokenizer.unk_token_id or name in text):
            return name
    return None


def _reserved(tokenizer: PreTrainedTokenizerBase, key: str) -> dict[int, str]:
    """Reserved tokens, id -> text: those the tokenizer has and the text of a key must not hold."""
    chat = str(getattr(tokenizer, "chat_template", None) or "") if key == "question" else ""
    special = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token]
    found: dict[int, str] = {}
    for name in (*(each for each in special if each is not None and each not in chat), *MARKERS):
        token: Any = tokenizer.convert_tokens_to_ids(name)
        # For a token that does not exist the id is None, or that of unknown words.
        if token is not None and (token != tokenizer.unk_token_id or name == tokenizer.unk_token):
            found[token] = str(name)
    return found


def demand_plain_text(
    path: str, examples: Dataset, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat = "plain"
) -> None:
    """Check a set as `tokenize` makes it.

    Raises DataError for the first record that holds a reserved token, or whose question or answer leaves no token.
    """
    for key in _COLUMNS:
        if key == "question" and prompt_format == "chat":
            _demand_no_role_tokens(path, examples, tokenizer)
            continue
        for row in rows_with(list(_reserved(tokenizer, key)), key, examples, tokenizer):
            name = _name_in(key, examples[row][key], tokenizer)
            if name is not None:
                raise DataError(
                    f"{path}: record {row}: key {key!r} holds {name!r}, a token that sequences are built with; write "
                    "it otherwise or leave the record out"
                )
    for key in ("question", "answer"):
        empty = _row_without_text(key, examples, tokenizer)
        if empty is not None:
            raise DataError(
                f"{path}: record {empty}: key {key!r}: the tokenizer makes nothing of {examples[empty][key]!r}; use "
                "another model or leave the record out"
            )


def _demand_no_role_tokens(path: str, examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    for row, question in enumerate(examples["question"]):
        if (name := role_token_in(question, tokenizer)) is not None:
            raise DataError(
                f"{path}: record {row}: key 'question' holds {name!r}, a token that chats are built with; write it "
                "otherwise or leave the record out"
            )


def _name_in(key: str, value: str | list[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    texts = [value] if isinstance(value, str) else list(map(step_line, value))
    if key == "answer":
        texts = list(map(answer_line, texts))
    names = (reserved_in(text, tokenizer(text)["input_ids"], tokenizer, key) for text in texts)
    return next((name for name in names if name is not None), None)


def rows_with(wanted: Sequence[int], key: str, examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Rows in which the text of a key has one of the tokens `wanted`, not counting those added to every text."""
    added = {"question": tokenizer("\n")["input_ids"], "steps": [], "answer": [tokenizer.eos_token_id]}[key]
    found: list[int] = []
    for first, n_rows, rows, tokens in _chunks(examples, _COLUMNS[key]):
        has = np.zeros(n_rows, dtype=bool)
        if np.isin(tokens, wanted).any():
            for token in wanted:
                has |= np.bincount(rows[tokens == token], minlength=n_rows) > added.count(token)
        found += (has.nonzero()[0] + first).tolist()
    return found


def _row_without_text(key: str, examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first row with no tokens but those around a text."""
    frame = answer_line("") if key == "answer" else "\n"
    end = [tokenizer.eos_token_id] if key == "answer" else []
    frames = tokenizer([frame, frame.strip(" ")], add_special_tokens=key == "question")["input_ids"]
    # An unknown space looks like an unknown word, which is accepted with a warning.
    empty = [[*tokens, *end] for tokens in frames if tokenizer.unk_token_id not in tokens]
    around = [token for tokens in empty for token in tokens]
    for first, n_rows, rows, tokens in _chunks(examples, _COLUMNS[key]):
        others = np.bincount(rows[~np.isin(tokens, around)], minlength=n_rows)
        # An answer may be a # itself.
        for row in (others == 0).nonzero()[0].tolist():
            if tokens[rows == row].tolist() in empty:
                return first + int(row)
    return None


def _chunks(examples: Dataset, column: str) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """For each chunk of a column: its first row, its number of rows, and for all tokens (N,) row in chunk and token."""
    first = 0
    for chunk in examples.select_columns(column).with_format("arrow")[:][column].chunks:
        n_rows, rows = len(chunk), np.arange(len(chunk))
        while pyarrow.types.is_nested(chunk.type):
            rows = rows[pyarrow.compute.list_parent_indices(chunk).to_numpy()]
            chunk = chunk.flatten()
        yield first, n_rows, rows, chunk.to_numpy(zero_copy_only=False)
        first += n_rows


def unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of a text without a token of the tokenizer, each once, in order."""
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    encoded = tokenizer(text, return_offsets_mapping=True)
    places = zip(encoded["input_ids"], encoded["offset_mapping"])
    words = (text[start:end].strip() for token, (start, end) in places if token == tokenizer.unk_token_id)
    # A BOS that is the same token stands for no word.
    return [word for word in dict.fromkeys(words) if word]
