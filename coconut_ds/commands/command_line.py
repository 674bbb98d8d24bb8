"""Shared by all commands: the parser, and how a command ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from coconut_ds.errors import InputError

PROG = "python -m coconut_ds"
_INTERRUPTED = 130


def new_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that shows `description`, a module's docstring, with its line breaks; `prog` is how it was called."""
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
    Ctrl-C, and 1 if nobody reads stdout any more, as with `head`. Options may stand between positional arguments.
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
        # The rest of the buffer would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status or 0
