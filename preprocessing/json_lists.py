"""Reads, checks and writes record files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_list(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as one JSON list, as the trainer reads it, and print their number; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path}: {len(records)} examples")


def read_list(path: Path, task: str) -> list[dict[str, Any]]:
    """The records of a file of `task`; raises ValueError, naming the file, if it is no JSON list of records."""
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a {task} file: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} is not a {task} file: it must hold a list of records")
    return records


def report_problems(path: Path, records: list[dict[str, Any]], problem_with: Callable[[Any], str | None]) -> int:
    """Print every problem and their number; returns the exit status, 1 if there are any."""
    problems = {index: problem for index, record in enumerate(records) if (problem := problem_with(record))}
    for index, problem in problems.items():
        print(f"{path}: record {index}: {problem}", file=sys.stderr)
    print(f"{path}: {len(records)} examples, {len(problems)} with a problem")
    return 1 if problems else 0


def add_readers(commands: Any, check: Callable[..., int], check_help: str, statistics: Callable[..., int]) -> None:
    """The commands `check FILE` and `stats FILE`."""
    for name, run, text in (("check", check, check_help), ("stats", statistics, "print the statistics of a file")):
        reader = commands.add_parser(name, help=text)
        reader.set_defaults(run=run)
        reader.add_argument("file", type=Path)
