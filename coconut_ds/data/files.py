"""JSON data files -> validated records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coconut_ds.data.answers import clean_answer
from coconut_ds.errors import InputError, did_you_mean

KEYS = ("question", "steps", "answer")


class DataError(InputError):
    """A data file that cannot be used."""


def read_records(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read and validate a JSON list of records with the keys question, steps, answer.

    Raises DataError naming the file, the index of the record (from 0) and the key.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            records = json.load(file)
    except OSError as error:
        hint = "data/README.md says how to get or make the data"
        raise DataError(f"{path}: cannot be read: {error.strerror}; {hint}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        what = f"is not JSON: {error}" if error.doc.strip() else "is empty"
        raise DataError(f"{path}: {what}; it must hold a JSON list of records") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; lists in lists without end
        raise DataError(f"{path}: {error}; it must hold a JSON list of records") from None
    if not isinstance(records, list) or not records:
        found = "an empty list" if records == [] else f"a JSON {type(records).__name__}"
        raise DataError(f"{path}: must hold a list of records with {', '.join(KEYS)}; found {found}")
    records = records[:limit]
    for index, record in enumerate(records):
        problem = _problem_with(record)
        if problem:
            raise DataError(f"{path}: record {index}: {problem}")
    return records


def _problem_with(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"must be an object with {', '.join(KEYS)}, found {type(record).__name__}"
    for key in KEYS:
        if key not in record:
            return f"key {key!r} is missing{did_you_mean(key, record)}"
    for key in ("question", "answer"):
        if not isinstance(record[key], str):
            return f"key {key!r} must be text, found {type(record[key]).__name__} {record[key]!r}"
        if not record[key].strip():
            return f"key {key!r} is empty"
        if not _is_unicode(record[key]):
            return f"key {key!r} holds half of a surrogate pair, which is not text: {record[key]!r}"
    if not clean_answer(record["answer"]):
        return f"key 'answer' has only commas, which the comparison leaves out: {record['answer']!r}"
    if not isinstance(record["steps"], list):
        return f"key 'steps' must be a list of texts, found {type(record['steps']).__name__} {record['steps']!r}"
    for number, step in enumerate(record["steps"]):
        if not isinstance(step, str):
            return f"key 'steps': entry {number} must be text, found {type(step).__name__} {step!r}"
        if not _is_unicode(step):
            return f"key 'steps': entry {number} holds half of a surrogate pair, which is not text: {step!r}"
    return None


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, such as backslash-ud800: JSON can escape it, UTF-8 and tokenizers cannot take it."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
