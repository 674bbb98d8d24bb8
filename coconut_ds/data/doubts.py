"""Warnings about a data set that can be used: unreadable answers, unknown words, empty steps, duplicates.

Each finding is one line with a count, the first record (from 0) and what to do; of a clean set there is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from coconut_ds.data.answers import before_eos, clean_answer, clean_chain, given_answer, given_chain, target, text_of
from coconut_ds.data.files import DataSet, Record
from coconut_ds.data.plain_text import rows_with, unknown_words
from coconut_ds.data.records import target_ids

Finding = tuple[list[str], str, str]
"""Descriptions of the records concerned, which may be none; the problem, to follow their count; the advice."""

_QUOTED = 60
_MOST_WORDS = 3
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def doubts(data: DataSet, examples: Dataset, tokenizer: PreTrainedTokenizerBase, is_evaluated: bool) -> list[str]:
    """The findings in the records of a set, of which `examples` are the tokens.

    Answers of an evaluated set are read back from their tokens, those of a training set from their text.
    """
    records = data.records
    written: Iterable[tuple[int, str]]
    if is_evaluated:
        rows = examples.select_columns(["steps_ids", "answer_ids"])
        texts = (_text([*chain.from_iterable(row["steps_ids"]), *row["answer_ids"]], tokenizer) for row in rows)
        written = enumerate(texts)
    else:
        # A text without another # can always be read back.
        targets = enumerate(target(each["steps"], each["answer"]) for each in records)
        written = ((index, text) for index, text in targets if text.count("#") > len("###"))
    findings = [
        *_unread(records, written),
        *_unknown(records, examples, tokenizer),
        *_empty_steps(data.shortened),
        *_repeated(records),
        *(_apart_by_commas(records) if is_evaluated else ()),
    ]
    return _lines(data.name, records, findings)


def unread(path: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, first: int = 0) -> list[str]:
    """Answers and chains that evaluation could not read in their own tokens; `first` is the index of the first record.

    For commands that take a file without training on it.
    """
    texts = (_text(target_ids(each, tokenizer), tokenizer) for each in records)
    return _lines(path, records, _unread(records, enumerate(texts), first))


def shared_questions(data: DataSet, other: DataSet) -> list[str]:
    """Questions of an evaluated set that are in the training set, too."""
    known = {each["question"] for each in other.records}
    found = [f"record {index}" for index, each in enumerate(data.records) if each["question"] in known]
    advice = "leave them out of one, or the accuracy says nothing about new questions"
    return _lines(data.name, data.records, [(found, f"questions stand in {other.name}, too", advice)])


def long_chains(data: DataSet, max_latent_stage: int) -> list[str]:
    """Of a set whose chains mostly have more than twice the steps that a curriculum replaces one after another."""
    lengths = [len(each["steps"]) for each in data.records]
    found = [f"record {index}: {length}" for index, length in enumerate(lengths) if length > 2 * max_latent_stage]
    if not max_latent_stage or 2 * len(found) <= len(lengths):
        return []
    what = f"records have more than twice as many steps as max_latent_stage, {max_latent_stage}"
    advice = "their other steps all go at once in the last stage; raise it, or cut chains into fewer steps"
    return _lines(data.name, data.records, [(found, what, advice)])


def _lines(path: str, records: Sequence[Record], findings: Iterable[Finding]) -> list[str]:
    return [
        f"{path}: {len(found)} of {len(records)} {what} (first: {found[0]}); {advice}"
        for found, what, advice in findings
        if found
    ]


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return text_of(before_eos(ids, tokenizer), tokenizer)


def _unread(records: Sequence[Record], written: Iterable[tuple[int, str]], first: int = 0) -> Iterator[Finding]:
    """`written`: the place of a record, and the text a model writes that gives exactly its steps and answer."""
    answers, chains = [], []
    for place, text in written:
        record, index = records[place], first + place
        expected, steps = clean_answer(record["answer"]), clean_chain(record["steps"])
        if (given := given_answer(text, expected)) != expected:
            answers.append(f"record {index}: {_quoted(expected)} is read as {_quoted(given)}")
        if (given := given_chain(text, steps)) != steps:
            chains.append(f"record {index}: {_quoted(steps)} is read as {_quoted(given)}")
    yield (
        answers,
        "answers cannot be read back from their own tokens, so that nothing a model writes is right",
        "write them in words and signs the tokenizer keeps, without a line that begins with ###",
    )
    yield (
        chains,
        "chains of steps cannot be read back from their own tokens and do not count as a chain match",
        "write them in words and signs the tokenizer keeps; the accuracy does not depend on it",
    )


def _unknown(records: Sequence[Record], examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    if tokenizer.unk_token_id is None:
        return
    keys = ("question", "steps", "answer")
    rows = sorted({row for key in keys for row in rows_with([tokenizer.unk_token_id], key, examples, tokenizer)})
    found = [f"record {row}" for row in rows]
    if rows:
        record = records[rows[0]]
        texts = [record["question"], *record["steps"], record["answer"]]
        words = list(dict.fromkeys(word for text in texts for word in unknown_words(text, tokenizer)))[:_MOST_WORDS]
        found[0] += f": {', '.join(map(repr, words))}" if words else ""
    yield (
        found,
        f"records have words without a token, read as {tokenizer.unk_token}",
        "train a tokenizer on data that has them, or use a model that knows them",
    )


def _empty_steps(shortened: Sequence[int]) -> Iterator[Finding]:
    yield (
        [f"record {index}" for index in shortened],
        "records have steps that are empty or only spaces",
        "they are left out, and nothing is trained on them",
    )


def _repeated(records: Sequence[Record]) -> Iterator[Finding]:
    first_of: dict[str, int] = {}
    repeated, contradicting = [], []
    for index, record in enumerate(records):
        first = first_of.setdefault(record["question"], index)
        if first == index:
            continue
        other = records[first]
        if clean_answer(record["answer"]) != clean_answer(other["answer"]):
            contradicting.append(f"record {index} and record {first}")
        elif record["steps"] == other["steps"]:
            repeated.append(f"record {index} is record {first}")
    yield repeated, "records repeat another one", "leave them out"
    what = "records have the question of another one and another answer"
    yield contradicting, what, "at most one of them can be right"


def _apart_by_commas(records: Sequence[Record]) -> Iterator[Finding]:
    """Commas between thousands are no difference."""
    first_of: dict[str, tuple[int, str]] = {}
    found = []
    for index, record in enumerate(records):
        answer = _THOUSANDS.sub("", record["answer"].strip())
        first, other = first_of.setdefault(clean_answer(answer), (index, answer))
        if answer != other:
            found.append(f"record {index}: {_quoted(record['answer'])} and record {first}: {_quoted(other)}")
    what = "answers differ from another one by commas alone, which the comparison leaves out"
    yield found, what, "write them so that they differ without commas"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else f"{text[:_QUOTED]} ..")
