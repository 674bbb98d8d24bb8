"""Shared by all commands: the parser, the exit status, and output files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coconut_ds import strict_json
from coconut_ds.errors import InputError

PROG = "python -m coconut_ds"
_INTERRUPTED = 130


def new_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that shows `description`, a module's docstring, with its line breaks; `prog` is the command as typed."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the YAML")


def run_command(
    command: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, arguments: list[str] | None
) -> int:
    """Parse `arguments` (None: those of the process), call `command` with them and return the exit status.

    The status is what `command` returns (None: 0), 2 after an InputError, whose message goes to stderr, 130 after
    Ctrl-C, and 1 if the reader of stdout is gone, as with `head`. Options may stand between positional arguments.
    """
    options = parser.parse_intermixed_args(arguments)
    try:
        status = command(options)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Otherwise the rest of the buffer fails again when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status or 0


def write_json(path: Path, value: Any) -> None:
    write_output(path, lambda path: path.write_text(strict_json.dumps(value, indent=2) + "\n", "utf-8"))


def write_output(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with `path`; an OSError becomes an InputError."""
    try:
        write(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
