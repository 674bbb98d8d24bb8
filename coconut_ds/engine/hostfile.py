"""A hostfile that is not there: DeepSpeed's launcher only warns, and trains on this machine alone."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import psutil

from coconut_ds.engine import internals
from coconut_ds.errors import InputError

_STARTS_RANKS = "deepspeed.launcher.launch"
_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")


def demand_hostfile() -> None:
    """Raise InputError if the launcher was given a hostfile that does not exist, before anything is trained.

    Ranks are not told of it, so it is looked for in the command line of the launcher, their ancestor.
    """
    if int(os.environ.get("CROSS_SIZE", 1)) > 1:
        return  # the launcher has read one
    try:
        command, folder = _launcher()
    except psutil.Error:  # gone, or of another user
        return
    if not command:
        return
    given = internals.named("deepspeed", "deepspeed.launcher.runner", "parse_args")(command)
    options = command[: command.index(given.user_script)]
    # Without the option it is /job/hostfile, which need not be there.
    is_named = any(word.startswith(("-H", "--host")) for word in options)
    text = given.hostfile
    if is_named and not (folder / text).is_file():
        raise InputError(
            f"hostfile {text}: {folder / text} is not there, and without it DeepSpeed would train on this machine "
            "alone; name the file with its lines `HOST slots=N`, or leave --hostfile out to train here"
        )


def _launcher() -> tuple[list[str], Path]:
    """The arguments given to `deepspeed` and the folder it was started in; no arguments without that launcher."""
    ancestors = psutil.Process().parents()
    for starter, runner in pairwise(ancestors):
        if _STARTS_RANKS in starter.cmdline():
            words = runner.cmdline()
            begin = next((place for place, word in enumerate(words) if _is_runner(word)), len(words))
            return words[begin + 1 :], Path(runner.cwd())
    return [], Path()


def _is_runner(word: str) -> bool:
    """Whether a word of a command line is DeepSpeed's command, its module, or the file of that module."""
    return Path(word).name in _RUNNERS or word.endswith("deepspeed/launcher/runner.py")
