"""A missing hostfile stops a run: DeepSpeed's launcher only warns, and would train on this machine alone."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import psutil

from coconut_ds.engine.internals import LAUNCHER, RANK_STARTER, demand_launcher, launcher_options
from coconut_ds.errors import InputError

_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", LAUNCHER)


def demand_hostfile() -> None:
    """Raise InputError if the launcher was given a hostfile that does not exist, before anything is trained.

    Ranks do not get its name, so it is read from the command line of the launcher, their ancestor.
    """
    demand_launcher()
    if int(os.environ.get("CROSS_SIZE", 1)) > 1:
        return  # the launcher has read a hostfile
    try:
        command, folder = _launcher()
    except psutil.Error:  # the process has ended, or belongs to another user
        return
    if not command:
        return
    script, text = launcher_options(command)
    # Without the option it is /job/hostfile, which need not exist.
    is_named = any(word.startswith(("-H", "--host")) for word in command[: command.index(script)])
    if is_named and not (folder / text).is_file():
        raise InputError(
            f"hostfile {text}: {folder / text} is not there, and without it DeepSpeed would train on this machine "
            "alone; name the file with its lines `HOST slots=N`, or leave --hostfile out to train here"
        )


def _launcher() -> tuple[list[str], Path]:
    """The arguments given to `deepspeed` and the folder it was started in; no arguments under another launcher."""
    ancestors = psutil.Process().parents()
    for starter, runner in pairwise(ancestors):
        if RANK_STARTER in starter.cmdline():
            words = runner.cmdline()
            begin = next((place for place, word in enumerate(words) if _is_runner(word)), len(words))
            return words[begin + 1 :], Path(runner.cwd())
    return [], Path()


def _is_runner(word: str) -> bool:
    """Whether a word of a command line names DeepSpeed's command, its module, or the file of that module."""
    return Path(word).name in _RUNNERS or word.endswith("deepspeed/launcher/runner.py")
