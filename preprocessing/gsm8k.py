"""GSM8K-Aug: download it, convert its text format to the JSON the trainer reads, check it, print statistics.

    python preprocessing/gsm8k.py download --out data/gsm8k      (also: python preprocessing/gsm8k.py --download)
    python preprocessing/gsm8k.py convert train.txt valid.txt --out data/gsm8k
    python preprocessing/gsm8k.py check data/gsm8k/gsm_valid.json
    python preprocessing/gsm8k.py stats data/gsm8k/gsm_train.json

The text format (Internalize_CoT_Step_by_Step, MIT) has one example per line: `question||step step #### answer`. It is
split as in the published Coconut code, except for lines without steps: an empty list here, a list with one empty step
there. Steps are calculations, `<<2+3=5>>`. A line whose steps are numbers and signs (the digits of
Internalize_CoT's multiplication sets) is malformed; lines with other steps are converted, counted and reported.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from textwrap import shorten
from typing import Any, BinaryIO, TextIO

import gsm8k_check
from download import DownloadError, RemoteFile, fetch
from statistics_table import print_statistics
from tqdm import tqdm

_REVISION = "da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761"
_RAW = f"https://raw.githubusercontent.com/{_REVISION}/data/gsm8k"
_MEDIA = f"https://media.githubusercontent.com/media/{_REVISION}/data/gsm8k"  # where Git LFS keeps large files
PUBLISHED = (
    (
        RemoteFile(
            f"{_MEDIA}/train.txt",
            "train.txt",
            size=87_805_358,
            sha256="0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c",
        ),
        385_620,
    ),
    (
        RemoteFile(
            f"{_RAW}/valid.txt",
            "valid.txt",
            size=143_419,
            sha256="04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87",
        ),
        500,
    ),
    (RemoteFile(f"{_RAW}/test.txt", "test.txt"), 1_319),
)
"""The published files with their number of lines."""

LONGEST_LINE = 1 << 20
"""Bytes, so that memory does not grow with the file; the longest published line has under a thousand."""

_CALCULATION = re.compile(r"<<.*=.*>>")
_NUMBER_OR_SIGN = re.compile(r"[0-9.,]+|[-+*/%=()]+")

_NAMED_LINES = 20
_NAMED_RECORDS = 100


@dataclass
class Counts:
    """Counts over a file's lines: `lines` is the sum of `records`, `malformed` and `empty`."""

    lines: int = 0
    records: int = 0
    malformed: int = 0
    empty: int = 0
    repeated: int = 0
    uncalculated: int = field(default=0, compare=False)
    """Records with a step that is not a calculation."""
    first_uncalculated: int = field(default=0, compare=False)
    """Line number of the first one, from 1."""


class FileError(Exception):
    """A file that cannot be used; the message names it and the way out."""


def parse(line: str) -> dict[str, Any]:
    """Parse one line, without its line end, into a record. Raises ValueError with the reason if it is malformed."""
    if "\0" in line:
        raise ValueError("has a NUL character")
    if line.count("||") != 1:
        raise ValueError(f"has {line.count('||')} '||', must have one between question and steps")
    question, rest = line.split("||")
    if rest.count("####") != 1:
        raise ValueError(f"has {rest.count('####')} '####' after '||', must have one before the answer")
    steps, answer = rest.split("####")
    if not question.strip():
        raise ValueError("has an empty question")
    if not answer.strip():
        raise ValueError("has an empty answer")
    record = {"question": question, "steps": steps.split(), "answer": answer.strip()}
    if record["steps"] and all(map(_NUMBER_OR_SIGN.fullmatch, record["steps"])):
        raise ValueError(
            f"has {len(record['steps'])} steps that are numbers and signs, {shorten(steps, 30, placeholder=' ..')!r}, "
            "and none that is a calculation <<2+3=5>>: a set in another format"
        )
    return record


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, line ends included; a line beyond LONGEST_LINE is truncated."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE + 1)


def decode(line: bytes) -> str:
    """A line as text without its LF or CRLF. Raises ValueError if it is too long or not UTF-8."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"is longer than {LONGEST_LINE:,} bytes")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start}") from None


def examples(lines: Iterable[bytes], counts: Counts, complain: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield the records of lines, one at a time; empty and malformed lines are counted, malformed ones reported."""
    for number, line in enumerate(lines, start=1):
        counts.lines += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = decode(line)
            if not text.strip():
                counts.empty += 1
                continue
            record = parse(text)
        except ValueError as error:
            counts.malformed += 1
            if counts.malformed <= _NAMED_LINES:
                complain(f"line {number} {error}")
            continue
        counts.records += 1
        if not all(map(_CALCULATION.fullmatch, record["steps"])):
            counts.uncalculated += 1
            counts.first_uncalculated = counts.first_uncalculated or number
        yield record


def convert(source: Path, target: Path) -> Counts:
    """Write the examples of the text file `source` to `target` as one JSON list, one record per line.

    Repeated questions are kept and counted. Raises FileError, and writes nothing, if there is no example or a file
    cannot be read or written.
    """
    counts = Counts()
    seen: set[bytes] = set()  # hashes of 8 bytes per question, to save memory
    encode = json.JSONEncoder(separators=(",", ":")).encode
    try:
        with _lines_with_bar(source) as lines, _atomic_file(target) as output:
            for record in examples(lines, counts, lambda text: tqdm.write(f"{source}: {text}", file=sys.stderr)):
                question = hashlib.blake2b(record["question"].encode(), digest_size=8).digest()
                counts.repeated += question in seen
                seen.add(question)
                output.write(("[\n" if counts.records == 1 else ",\n") + encode(record))
            if not counts.records:
                raise FileError(
                    f"{source}: none of its {counts.lines:,} lines is an example 'question||steps #### answer'"
                )
            output.write("\n]\n")
    except OSError as error:
        raise FileError(f"{error.filename or target}: {error.strerror or error}") from None
    return counts


@contextmanager
def _lines_with_bar(path: Path) -> Iterator[Iterator[bytes]]:
    with (
        open(path, "rb") as file,
        tqdm(
            desc=path.name, total=path.stat().st_size, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
        ) as bar,
    ):

        def lines() -> Iterator[bytes]:
            for line in read_lines(file):
                yield line
                bar.update(len(line))

        yield lines()


@contextmanager
def _atomic_file(path: Path) -> Iterator[TextIO]:
    """Open a temporary file for writing, renamed to `path` on success and deleted after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def target_name(source: Path, name: str | None = None) -> str:
    """`gsm_NAME.json`; by default the name comes from a stem such as `valid` or `gsm8k_aug_valid`.

    Raises FileError for a stem or name that does not give one.
    """
    if name is None:
        split = re.search(r"(?:^|[^a-z])(train|valid|test)$", source.stem)
        if not split:
            raise FileError(f"{source}: its name does not end in train, valid or test; give it with --name")
        name = split[1]
    if not re.fullmatch(r"[\w-]+", name):
        raise FileError(f"--name {name!r}: must be letters, digits, _ and -")
    return f"gsm_{name}.json"


def convert_all(sources: list[Path], folder: Path, name: str | None = None, strict: bool = False) -> int:
    """Convert files and print a line for each. Returns the exit status: 1 for malformed lines if `strict`, else 0.

    Raises FileError for the first file that cannot be converted.
    """
    targets = [folder / target_name(source, name) for source in sources]
    for target, times in Counter(targets).items():
        if times > 1:
            raise FileError(f"{target} would be written {times} times; convert one file at a time, with --name")
    status = 0
    for source, target in zip(sources, targets):
        started = time.monotonic()
        counts = convert(source, target)
        if counts.malformed > _NAMED_LINES:
            print(f"{source}: {counts.malformed - _NAMED_LINES:,} more malformed lines", file=sys.stderr)
        print(
            f"{target}: {counts.records:,} examples of {counts.lines:,} lines ({counts.malformed:,} malformed, "
            f"{counts.empty:,} empty), {counts.repeated:,} questions repeated, {time.monotonic() - started:.1f} s"
        )
        if counts.uncalculated:
            print(
                f"{source}: {counts.uncalculated:,} of {counts.records:,} examples have steps that are not "
                f"calculations <<2+3=5>>, the first on line {counts.first_uncalculated}; steps are separated by "
                "spaces here, so a set in another format needs another converter",
                file=sys.stderr,
            )
        if strict and counts.malformed:
            status = 1
    return status


def download(folder: Path) -> int:
    """Download the published files into `folder` and convert them. Raises DownloadError or FileError."""
    try:
        paths = fetch([file for file, _ in PUBLISHED], folder)
    except OSError as error:
        raise FileError(f"{error.filename or folder}: {error.strerror or error}") from None
    for path, (_, n_lines) in zip(paths, PUBLISHED):
        with open(path, "rb") as file:
            found = sum(1 for _ in read_lines(file))
        if found != n_lines:
            raise FileError(f"{path}: {found:,} lines, expected {n_lines:,}; delete it and run this again")
    return convert_all(paths, folder)


def load(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list of records with question, steps and answer. Raises FileError for anything else."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: is not JSON: {error}; `gsm8k.py convert` makes it from the text form") from None
    if not isinstance(records, list) or not records:
        raise FileError(f"{path}: must hold a JSON list of records")
    for index, record in enumerate(records):
        if not _is_record(record):
            raise FileError(
                f"{path}: record {index} must have the texts question and answer, and steps, a list of texts"
            )
    return records


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("steps"), list):
        return False
    return all(isinstance(text, str) for text in (record.get("question"), record.get("answer"), *record["steps"]))


def statistics(records: list[dict[str, Any]]) -> dict[str, float | dict[int, float]]:
    """Means and shares over a file; question length in words, `steps_share` by number of steps."""
    n_steps = Counter(len(record["steps"]) for record in records)
    return {
        "examples": len(records),
        "steps": mean(len(record["steps"]) for record in records),
        "question_words": mean(len(record["question"].split()) for record in records),
        "whole_answers": mean(bool(re.fullmatch(r"-?[0-9][0-9,]*", record["answer"])) for record in records),
        "steps_share": {steps: n_steps[steps] / len(records) for steps in sorted(n_steps)},
    }


def _print_statistics(path: Path) -> int:
    print_statistics(statistics(load(path)))
    return 0


def _print_check(path: Path, name_all: bool) -> int:
    report = gsm8k_check.check(tqdm(load(path), desc=path.name, disable=None, dynamic_ncols=True))
    for line in gsm8k_check.lines(report, None if name_all else _NAMED_RECORDS):
        print(line)
    return 0 if report.holds else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("download", help="download the published files and convert them")
    get.add_argument("--out", type=Path, default=Path("data/gsm8k"), help="folder to write to (default: %(default)s)")
    make = commands.add_parser("convert", help="write gsm_{train,valid,test}.json from the text format")
    make.add_argument("files", type=Path, nargs="+", metavar="FILE")
    make.add_argument("--out", type=Path, required=True, help="folder to write to")
    make.add_argument("--name", help="write gsm_NAME.json (default: train, valid or test, from the file's name)")
    make.add_argument("--strict", action="store_true", help="exit status 1 when a line is malformed")
    prove = commands.add_parser("check", help="verify every step's arithmetic and the source of the answer")
    prove.add_argument("file", type=Path)
    prove.add_argument("--all", action="store_true", help=f"name every record (default: {_NAMED_RECORDS} of a kind)")
    describe = commands.add_parser("stats", help="print the statistics of a file")
    describe.add_argument("file", type=Path)
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(["download", *given[1:]] if given[:1] == ["--download"] else given)
    try:
        if options.command == "download":
            return download(options.out)
        if options.command == "convert":
            return convert_all(options.files, options.out, options.name, options.strict)
        if options.command == "check":
            return _print_check(options.file, options.all)
        return _print_statistics(options.file)
    except DownloadError as error:
        print(f"gsm8k.py download: {error}, or name it to `gsm8k.py convert`", file=sys.stderr)
    except FileError as error:
        print(f"gsm8k.py {options.command}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
