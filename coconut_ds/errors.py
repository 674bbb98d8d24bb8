"""What a user can fix: `train.py` prints these without a traceback and exits with status 2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten


class InputError(ValueError):
    """A run, a data file or a model that cannot be used; the message names the value, the rule and the way out."""


def out_of_memory(when: str, error: Exception) -> InputError:
    """For torch's error `error` on a GPU: when it came, and what to lower."""
    return InputError(
        f"out of memory on the card, {when}: {str(error).splitlines()[0]} Lower batch_size_training, or "
        "eval_batch_size where it was evaluating, switch on activation_checkpointing, or take a deepspeed file that "
        "keeps less on the card; python -m coconut_ds.plan says what fits"
    )


def problem_list(source: str, problems: Sequence[str]) -> str:
    """One message for everything that is wrong with `source`, a line each."""
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{lines}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name that `name` is a misspelling of, or an empty string.

    Only spelling counts: a name that shares words with another one need not mean the same, and whoever follows a hint
    changes what it names.
    """
    typed = plain_spelling(name)
    near = [(_edits(typed, plain_spelling(each)), abs(len(name) - len(each)), each) for each in known]
    # As many as a person mistypes in a name of that length.
    limit = next(edits for length, edits in ((5, 1), (9, 2), (14, 3), (len(typed) + 1, 4)) if len(typed) < length)
    near = [each for each in near if each[0] <= limit]
    return f" (did you mean {min(near)[2]!r}?)" if near else ""


def plain_spelling(name: str) -> str:
    """Without case, underscores, hyphens and spaces, which are typed one way or the other."""
    return re.sub(r"[_\-\s]", "", name).lower()


def _edits(first: str, second: str) -> int:
    """Letters left out, added or swapped with their neighbour, and twice the letters replaced by others.

    A replaced letter counts twice, because names of different meaning often differ in a few (min and max, base and
    save). `difflib` knows no swaps, and its ratio takes shared words for closeness.
    """
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        older, before, row = before, row, [i]
        for j, right in enumerate(second, start=1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + 2 * (left != right))
            if i > 1 and j > 1 and left == second[j - 2] and first[i - 2] == right:
                least = min(least, older[j - 2] + 1)
            row.append(least)
    return row[-1]


class ModelError(InputError):
    """A model that cannot be loaded or cannot carry Coconut."""


def in_one_line(error: Exception, width: int = 300) -> str:
    """What an error of a library says, shortened; its class where it says nothing."""
    return shorten(str(error) or type(error).__name__, width)


def unwritable_save_path(folder: Path, error: OSError) -> InputError:
    """For a run folder that cannot be made or written to."""
    return InputError(f"save_path: {folder} cannot be made or written to: {error.strerror}; name a folder to write in")


def unwritable_output(path: Path, error: OSError) -> InputError:
    """For what a command was asked to write."""
    return InputError(f"{path} cannot be written: {error.strerror or error}; name another place")


def demand_libraries(names: Sequence[str], extra: str) -> None:
    """Raises InputError with the command that installs `extra` where a library of `names` is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} missing: pip install 'coconut_ds[{extra}]'")
