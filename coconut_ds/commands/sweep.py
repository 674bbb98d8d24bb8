"""Train a list of runs one after another, except those that are finished.

    python -m coconut_ds sweep FILE [--list] [--ranks N] [--master-port N] [--verbose]

FILE has one run per line, `RUN.yaml key=value ...`; empty lines and text after a `#` are ignored. Before the first run
starts, all problems of all lines are reported together: wrong keys and values, missing data and DeepSpeed files,
finished runs that were trained with other settings than those of their line, and run folders that another process is
writing to. A run that fails does not stop the sweep (exit status 1 at its end). A signal stops the current run, which
saves, and no other run starts; the same command resumes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.commands.launcher import Launcher, add_launch_options, trainer_command
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.errors import InputError, problem_list
from coconut_ds.runs.changes import changed_contents, changed_keys
from coconut_ds.runs.lock import holder_text, run_folder_is_held
from coconut_ds.runs.metrics import read_metrics
from coconut_ds.runs.paths import RunFolder


def main(arguments: list[str] | None = None, prog: str = f"{PROG} sweep") -> int:
    """0 if every run is finished or the sweep was stopped, 1 if a run failed; else as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="only print the unfinished runs, quoted for a shell")
    add_launch_options(parser)
    return run_command(_sweep, parser, arguments)


def _sweep(options: argparse.Namespace) -> int:
    unfinished = []
    for words, config in read_sweep(options.file):
        if _is_finished(config):
            print(f"{config.run_folder} is finished", file=sys.stderr, flush=True)
        else:
            unfinished.append(words)
    if options.list:
        print("".join(f"{shlex.join(words)}\n" for words in unfinished), end="")
        return 0
    return _train_all(unfinished, options)


def _train_all(runs: Sequence[list[str]], options: argparse.Namespace) -> int:
    failed = 0
    with Launcher() as launcher:
        for run_file, *overrides in runs:
            if launcher.is_asked_to_stop:
                break
            if launcher.run(trainer_command(run_file, overrides, options)) != 0:
                print(f"failed: {shlex.join([run_file, *overrides])}", file=sys.stderr, flush=True)
                failed = 1
        if launcher.is_asked_to_stop:
            print("stopped as requested; the same command resumes")
    return failed


def read_sweep(path: Path) -> list[tuple[list[str], RunConfig]]:
    """The runs of a sweep file in order, each as the words of its line and its configuration.

    Raises InputError for a file without runs, runs that cannot be started, and two that share a run folder.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sweep file {path} cannot be read: {error}") from None
    runs: list[tuple[list[str], RunConfig]] = []
    problems: list[str] = []
    line_of: dict[Path, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            config = _checked(words)
        except ValueError as error:  # an InputError, or quotes without an end
            problems.append(f"line {number}: {error}")
            continue
        first = line_of.setdefault(config.run_folder, number)
        if first != number:
            problems.append(f"line {number}: writes to {config.run_folder}, as line {first} does; give it another name")
        runs.append((words, config))
    if not runs and not problems:
        problems.append("no run in it; write one line per run, such as `run_configs/demo.yaml name=a seed=1`")
    if problems:
        raise InputError(problem_list(f"sweep file {path}", problems))
    return runs


def _checked(words: list[str]) -> RunConfig:
    """The run of a line; raises InputError for problems that can be found without loading its model."""
    if not words[0].endswith((".yaml", ".yml")):
        raise InputError(f"{words[0]}: a run file ends in .yaml or .yml")
    config = load_run_config(words[0], words[1:])
    read_ds_json(config.deepspeed)
    missing = [path for path in (config.train_path, config.val_path) if path and not Path(path).is_file()]
    if missing:
        raise InputError(f"{', '.join(missing)}: not there; data/README.md says how to get or make the data")
    if _is_finished(config) and (keys := _differing_keys(config)):
        raise InputError(f"{config.run_folder} is finished and was trained with another {', '.join(keys)}; rename one")
    if not _is_finished(config) and run_folder_is_held(config.run_folder):
        lock = RunFolder(config.run_folder).lock
        raise InputError(f"{config.run_folder} is in use by {holder_text(lock)}, or rename one")
    return config


def _is_finished(config: RunConfig) -> bool:
    records = RunFolder(config.run_folder).metrics
    return records.is_file() and read_metrics(records).is_finished(config.num_epochs)


def _differing_keys(config: RunConfig) -> list[str]:
    """Keys whose value in the run folder differs from that in `config`, and data files whose content has changed.

    Keys that are resolved when a run starts and the number of epochs do not count.
    """
    folder = config.run_folder
    keys = [key for key in changed_keys(folder, config) if key not in ("activation_checkpointing", "num_epochs")]
    return [*keys, *(f"content of {key}" for key in changed_contents(folder, config))]
