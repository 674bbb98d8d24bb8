"""Reads, checks and writes record files: what the scripts of all tasks have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from statistics_table import print_statistics


def write_list(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as one JSON list, as the trainer reads it, and print their number; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path}: {len(records)} examples")


class UnusableError(ValueError):
    """A file or a request that cannot be used; the message says why."""


def read_list(path: Path, task: str) -> list[dict[str, Any]]:
    """The records of a file of `task`; raises UnusableError, naming the file, if it is no JSON list of records."""
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UnusableError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{path} is not a {task} file: {error}") from None
    if not isinstance(records, list) or not records:
        raise UnusableError(f"{path} is not a {task} file: it must hold a list of records")
    return records


def report_problems(path: Path, records: list[dict[str, Any]], problem_with: Callable[[Any], str | None]) -> int:
    """Print every problem and their number; returns the exit status, 1 if there are any."""
    problems = {index: problem for index, record in enumerate(records) if (problem := problem_with(record))}
    for index, problem in problems.items():
        print(f"{path}: record {index}: {problem}", file=sys.stderr)
    print(f"{path}: {len(records)} examples, {len(problems)} with a problem")
    return 1 if problems else 0


def run_command(script: str, parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
    """The exit status of the chosen command: its own, or 2 after an error that the request or a file caused."""
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except (UnusableError, OSError) as error:
        print(f"{script} {options.command}: {error}", file=sys.stderr)
        return 2


def add_readers(
    commands: Any,
    task: str,
    problem_with: Callable[[Any], str | None],
    statistics: Callable[[list[dict[str, Any]]], dict[str, Any]],
    check_help: str,
) -> None:
    """The commands `check FILE` and `stats FILE` of a task; the latter raises UnusableError for a wrong record."""

    def check(options: argparse.Namespace) -> int:
        return report_problems(options.file, read_list(options.file, task), problem_with)

    def stats(options: argparse.Namespace) -> int:
        records = read_list(options.file, task)
        demand_right(options.file, records, problem_with)
        print_statistics(statistics(records))
        return 0

    for name, run, text in (("check", check, check_help), ("stats", stats, "print the statistics of a file")):
        reader = commands.add_parser(name, help=text)
        reader.set_defaults(run=run)
        reader.add_argument("file", type=Path)


def demand_right(path: Path, records: list[dict[str, Any]], problem_with: Callable[[Any], str | None]) -> None:
    """Raise UnusableError for the first record with a problem."""
    for index, record in enumerate(records):
        if problem := problem_with(record):
            raise UnusableError(f"{path}: record {index}: {problem}; `check` names every such record")
