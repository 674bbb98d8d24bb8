"""What a user can put right: `train.py` prints these without a traceback and exits with status 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten


class InputError(ValueError):
    """A run, a data file or a model that cannot be used; the message names the value, the rule and the way out."""


def problem_list(source: str, problems: Sequence[str]) -> str:
    """One message for everything that is wrong with `source`, a line each."""
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{lines}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest known name, or an empty string."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class ModelError(InputError):
    """A model that cannot be loaded or cannot carry Coconut."""


def in_one_line(error: Exception, width: int = 200) -> str:
    """What an error of a library says, shortened; its class where it says nothing."""
    return shorten(str(error) or type(error).__name__, width)


def unwritable_save_path(folder: Path, error: OSError) -> InputError:
    """For a run folder that cannot be made or written to."""
    return InputError(f"save_path: {folder} cannot be made or written to: {error.strerror}; name a folder to write in")


def unwritable_output(path: Path, error: OSError) -> InputError:
    """For what a command was asked to write."""
    return InputError(f"{path} cannot be written: {error.strerror or error}; name another place")
