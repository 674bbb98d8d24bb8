"""Data files and datasets of the hub -> validated records.

.jsonl, .ndjson                     JSON lines, one record each
.csv, .tsv                          a header, then one record a line; every value is text as it stands there
.parquet                            by pyarrow
hub:OWNER/NAME[/CONFIG]:SPLIT       a dataset of the hub, by `datasets`
.json and other endings             one JSON list of records
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from coconut_ds import strict_json
from coconut_ds.config.data_paths import on_hub
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.answers import clean_answer
from coconut_ds.errors import InputError, did_you_mean, in_one_line

KEYS = ("question", "steps", "answer")
_REST = "\0rest"
_JSON_LINES, _CSV = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}

Record = dict[str, Any]
Split = Literal["train", "val", "test"]


class DataError(InputError):
    """A data file that cannot be used."""


@dataclass(frozen=True)
class Source:
    """A set as a run file names it."""

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Where each of `KEYS` stands, if elsewhere."""
    steps_separator: str | None = None
    """Between the steps of a chain that is one text."""
    size: int | None = None
    """At most so many records are taken: the same ones in every run, and of a smaller size a part of them."""

    @classmethod
    def of(cls, config: RunConfig, split: Split) -> Source:
        columns = config.columns.model_dump() if config.columns else {}
        path, size = str(getattr(config, f"{split}_path")), getattr(config, f"{split}_size")
        return cls(path, columns, config.steps_separator, size)


class DataSet(NamedTuple):
    """The records of a set that are used."""

    name: str
    """Path, and how many of its records these are, as messages have it."""
    records: list[Record]
    shortened: tuple[int, ...] = ()
    """Those that had empty steps, which are left out."""
    sha256: str | None = None
    """Of all records of a set that is no file; a file has its own."""


def is_record_file(path: str) -> bool:
    """Whether a name is that of a file of records by its ending, or of a dataset of the hub."""
    return on_hub(path) is not None or Path(path).suffix.lower() in (".json", ".parquet", *_JSON_LINES, *_CSV)


def read_records(path: str | Path, limit: int | None = None) -> list[Record]:
    """The first `limit` records of a file with the keys question, steps, answer; raises as `read_set` does."""
    return read_set(Source(str(path)), limit).records


def read_set(source: Source, limit: int | None = None) -> DataSet:
    """The records of a set, at most the first `limit`.

    Raises DataError naming the file, the index of the record (from 0) and the key.
    """
    found = _raw_records(source.path)
    if not isinstance(found, list) or not found:
        what = "an empty list" if found == [] else f"a JSON {type(found).__name__}"
        raise DataError(f"{source.path}: must hold a list of records with {', '.join(KEYS)}; found {what}")
    records: list[Record] = []
    for index, each in enumerate(found[: limit if source.size is None else None]):
        record = _with_columns(each, source)
        if problem := _problem_with(record, source.columns):
            raise DataError(f"{source.path}: record {index}: {problem}")
        records.append(record)
    name = source.path
    if source.size is not None and source.size < len(records):
        name = f"{source.path} ({source.size} of {len(records)} records)"
        records = [records[place] for place in _drawn(len(records), source.size)][:limit]
    shortened = tuple(index for index, each in enumerate(records) if not all(map(str.strip, each["steps"])))
    for index in shortened:
        records[index] = {**records[index], "steps": list(filter(str.strip, records[index]["steps"]))}
    return DataSet(name, records, shortened, None if on_hub(source.path) is None else _hash_of(found))


def _drawn(count: int, size: int) -> list[int]:
    # One order of all: runs with other seeds are compared on the same questions, and a larger subset has the smaller.
    return sorted(random.Random(0).sample(range(count), count)[:size])


def _hash_of(records: list[Record]) -> str:
    return hashlib.sha256(strict_json.dumps(records, default=str).encode()).hexdigest()


# Formats


def _raw_records(path: str) -> Any:
    if (name := on_hub(path)) is not None:
        return _of_hub(path, name)
    ending = Path(path).suffix.lower()
    if ending == ".parquet":
        return _parquet(path)
    with _opened(path) as file:
        if ending in _JSON_LINES:
            return list(_json_lines(path, file))
        if ending in _CSV:
            return list(_csv_records(path, file, _CSV[ending]))
        return _json_list(path, file)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise _not_there(path, error) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV: {error}") from None


def _not_there(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}; data/README.md says how to get or make the data")


def _json_list(path: str, file: TextIO) -> Any:
    try:
        return json.load(file)
    except json.JSONDecodeError as error:
        what = f"is not JSON: {error}" if error.doc.strip() else "is empty"
        lines = " (JSON lines, a record each, are read from a file named .jsonl)" if error.msg == "Extra data" else ""
        raise DataError(f"{path}: {what}; it must hold a JSON list of records{lines}") from None
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; lists in lists without end
        raise DataError(f"{path}: {error}; it must hold a JSON list of records") from None


def _json_lines(path: str, file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}; every line must hold a record") from None


def _csv_records(path: str, file: TextIO, delimiter: str) -> Iterator[Record]:
    rows = csv.DictReader(file, delimiter=delimiter, restkey=_REST)
    for index, row in enumerate(rows):
        if _REST in row:
            raise DataError(
                f"{path}: record {index}: has more cells than the header (line {rows.line_num}); put text with "
                f"{delimiter!r} in it in quotes"
            )
        yield row


def _parquet(path: str) -> list[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        with open(path, "rb") as file:
            return list(read_table(file).to_pylist())
    except ArrowException as error:
        raise DataError(f"{path}: is not Parquet: {in_one_line(error)}") from None
    except OSError as error:
        if error.errno is None:  # pyarrow's own, of a damaged page
            raise DataError(f"{path}: is damaged: {in_one_line(error)}") from None
        raise _not_there(path, error) from None


def _of_hub(path: str, name: str) -> list[Record]:
    from datasets import load_dataset

    dataset, _, split = name.partition(":")
    parts = dataset.split("/")
    if not split or len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{path}: a dataset of the hub is written hub:OWNER/NAME:SPLIT or hub:OWNER/NAME/CONFIG:SPLIT")
    try:
        return load_dataset("/".join(parts[:2]), *parts[2:], split=split).to_list()
    except Exception as error:  # no connection, no such dataset, no such split: the library's message says which
        raise DataError(
            f"{path}: the dataset cannot be loaded: {in_one_line(error)}; check name and split, log in with `hf auth "
            "login` if it is private, or save it as a file"
        ) from None


# Records


def _with_columns(record: Any, source: Source) -> Any:
    """With the keys of `KEYS`, and a chain in one text cut into steps."""
    if not isinstance(record, dict):
        return record
    moved = {key: record[column] for key, column in source.columns.items() if column in record}
    record = {**record, **moved}
    steps = record.get("steps")
    if source.steps_separator is not None and isinstance(steps, str):
        record["steps"] = [step.strip() for step in steps.split(source.steps_separator)]
    return record


def _problem_with(record: Any, columns: Mapping[str, str]) -> str | None:
    if not isinstance(record, dict):
        return f"must be an object with {', '.join(KEYS)}, found {type(record).__name__}"
    for key in KEYS:
        if key not in record or columns.get(key, key) not in record:
            column = columns.get(key, key)
            return f"key {column!r} is missing{did_you_mean(column, record)}"
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
        found = f"found {type(record['steps']).__name__} {record['steps']!r}"
        way_out = "; set steps_separator to what stands between them" * isinstance(record["steps"], str)
        return f"key 'steps' must be a list of texts, {found}{way_out}"
    for number, step in enumerate(record["steps"]):
        if not isinstance(step, str):
            return f"key 'steps': entry {number} must be text, found {type(step).__name__} {step!r}"
        if not _is_unicode(step):
            return f"key 'steps': entry {number} holds half of a surrogate pair, which is not text: {step!r}"
    return None


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, such as backslash-ud800: JSON can escape it, UTF-8 and tokenizers cannot take it."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
