"""Train a list of runs one after another, except those that are finished.

    python -m coconut_ds sweep FILE [--list] [--ranks N] [--master-port N] [--verbose]

FILE has one run per line, `RUN.yaml key=value ...`; empty lines and text after a `#` are ignored. A line of `key=value`
alone holds for every run below it that does not say otherwise. `seeds=[0,1,2]` makes three runs of a line, `NAME_seed0`
and so on; the first seed of every line comes before the second of any. Before the
first run starts, all problems of all lines are reported together: wrong keys and values, missing data and DeepSpeed
files, and finished runs that were trained with other settings than those of their line. A run that fails does not stop
the sweep (exit status 1 at its end). A signal stops the current run, which saves, and no other run starts; the same
command resumes.

A run that another process is training is passed over. So sweeps of one FILE, each with its own --master-port, share
its runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Strict, TypeAdapter, ValidationError

from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.commands.launcher import Launcher, add_launch_options, trainer_command
from coconut_ds.config.data_paths import is_there
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config, override
from coconut_ds.errors import InputError, problem_list
from coconut_ds.runs.changes import changed_contents, changed_keys
from coconut_ds.runs.lock import holder_text, run_folder_is_held
from coconut_ds.runs.metrics import read_metrics
from coconut_ds.runs.paths import RunFolder

_Run = tuple[list[str], RunConfig]
_RUN_FILES = (".yaml", ".yml")
_SEEDS = TypeAdapter(list[Annotated[int, Strict()]])
_REFUSED = 2
"""Exit status of a trainer that was told by its input, or by the lock of the folder, not to start."""


def main(arguments: list[str] | None = None, prog: str = f"{PROG} sweep") -> int:
    """0 if every run is finished or the sweep was stopped, 1 if one is not; else as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="only print the runs still to do, quoted for a shell")
    add_launch_options(parser)
    return run_command(_sweep, parser, arguments)


def _sweep(options: argparse.Namespace) -> int:
    runs = read_sweep(options.file)
    if options.list:
        print("".join(f"{shlex.join(words)}\n" for words, config in runs if _is_open(config)), end="")
        return 0
    with Launcher() as launcher:
        failed = _train_all(runs, options, launcher)
        if launcher.is_asked_to_stop:
            print("stopped as requested; the same command resumes")
            return int(failed)
    return int(failed or not all(_is_finished(config) for _, config in runs))


def _train_all(runs: list[_Run], options: argparse.Namespace, launcher: Launcher) -> bool:
    """Train what is open, again and again as long as runs of other processes come to be; whether one failed."""
    failed = False
    while runs:
        passed_over = []
        for run in runs:
            (run_file, *overrides), config = run
            if launcher.is_asked_to_stop:
                return failed
            # Asked before each run, since another sweep may have taken it.
            if not _is_open(config):
                passed_over.append(run)
            elif status := launcher.run(trainer_command(run_file, overrides, options)):
                if status == _REFUSED and run_folder_is_held(config.run_folder):
                    passed_over.append(run)  # another sweep was faster by an instant
                else:
                    print(f"failed: {shlex.join([run_file, *overrides])}", file=sys.stderr, flush=True)
                    failed = True
        runs = [run for run in passed_over if not _is_finished(run[1]) and not run_folder_is_held(run[1].run_folder)]
    return failed


def _is_open(config: RunConfig) -> bool:
    """Whether a run is neither finished nor trained by another process; says so if it is not."""
    if _is_finished(config):
        what = "is finished"
    elif run_folder_is_held(config.run_folder):
        what = f"is in use by {holder_text(RunFolder(config.run_folder).lock)}; passed over until then"
    else:
        return True
    print(f"{config.run_folder} {what}", file=sys.stderr, flush=True)
    return False


def read_sweep(path: Path) -> list[_Run]:
    """The runs of a sweep file in order, each as its words, without `seeds=`, and its configuration.

    Raises InputError for a file without runs, runs that cannot be started, and two that share a run folder.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sweep file {path} cannot be read: {error}") from None
    runs: list[tuple[int, list[str], RunConfig]] = []  # the first is the place of its seed in the line
    problems: list[str] = []
    line_of: dict[Path, int] = {}
    shared: list[str] = []
    last_shared = 0
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if _is_shared(words):
                shared, last_shared = [*shared, *words], number
                continue
            last_shared = 0
            found = [(place, each, _checked(each)) for place, each in enumerate(_per_seed(words, shared))]
        except ValueError as error:  # an InputError, or quotes without an end
            problems.append(f"line {number}: {error}")
            continue
        for _, _, config in found:
            first = line_of.setdefault(config.run_folder, number)
            if first != number:
                folder = config.run_folder
                problems.append(f"line {number}: writes to {folder}, as line {first} does; give it another name")
        runs += found
    if last_shared:
        problems.append(f"line {last_shared}: names no run file, and no run is below it that it could hold for")
    elif not runs and not problems:
        problems.append("no run in it; write one line per run, such as `run_configs/demo.yaml name=a seed=1`")
    if problems:
        raise InputError(problem_list(f"sweep file {path}", problems))
    runs.sort(key=lambda run: run[0])
    return [(words, config) for _, words, config in runs]


def _is_shared(words: list[str]) -> bool:
    return all("=" in word for word in words) and not words[0].endswith(_RUN_FILES)


def _per_seed(words: list[str], shared: list[str]) -> list[list[str]]:
    """The words of each run of a line under `shared` ones: one run, or one per seed of `seeds=[..]`.

    Raises InputError for `seeds` that are not a list of different whole numbers, or together with `seed`.
    """
    run_file, *own = words
    # Seeds of the line replace those of lines above it.
    shared = [word for word in shared if not (_seeds_in(own) and _seeds_in([word]))]
    words = [*shared, *own]
    if not any(word.startswith("seeds=") for word in words):
        return [[run_file, *words]]
    *_, listed = given = _seeds_in(words)
    try:
        seeds = _SEEDS.validate_python(yaml.safe_load(listed.removeprefix("seeds=")))
    except (ValidationError, yaml.YAMLError):
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or len(given) > 1:
        raise InputError(f"{' '.join(given)}: must be one list of different whole numbers, such as seeds=[0,1,2]")
    words = [word for word in words if word not in given]
    name = load_run_config(run_file, words).name
    others = [word for word in words if not word.startswith("name=")]
    return [[run_file, override("name", f"{name}_seed{seed}"), f"seed={seed}", *others] for seed in seeds]


def _seeds_in(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith(("seed=", "seeds="))]


def _checked(words: list[str]) -> RunConfig:
    """The run of a line; raises InputError for problems that can be found without loading its model."""
    if not words[0].endswith(_RUN_FILES):
        raise InputError(f"{words[0]}: a run file ends in .yaml or .yml")
    config = load_run_config(words[0], words[1:])
    read_ds_json(config.deepspeed)
    missing = [path for path in (config.train_path, config.val_path) if path and not is_there(path)]
    if missing:
        raise InputError(f"{', '.join(missing)}: not there; data/README.md says how to get or make the data")
    if _is_finished(config) and (keys := _differing_keys(config)):
        raise InputError(f"{config.run_folder} is finished and was trained with another {', '.join(keys)}; rename one")
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
