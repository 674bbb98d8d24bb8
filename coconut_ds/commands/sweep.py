"""A list of runs: which of them are not finished. `./launch.sh sweep FILE` trains those one after another.

    python -m coconut_ds.sweep FILE

FILE has a run a line, `RUN.yaml key=value ...`, as one would give it to launch.sh; empty lines and what follows a `#`
do not count. Before the first run starts, everything is reported that is wrong with the keys and values of any of them,
data and DeepSpeed files that are not there, finished runs that were trained otherwise than their line says, and run
folders that another process is writing to.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from coconut_ds.config.deepspeed_file import read_ds_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.errors import InputError, problem_list
from coconut_ds.runs.changes import changed_contents, changed_keys
from coconut_ds.runs.events import read_metrics
from coconut_ds.runs.folder import RunFolder
from coconut_ds.runs.lock import holder_text, run_folder_is_held


def main(arguments: list[str] | None = None) -> int:
    """0 with the unfinished runs printed, a line each, quoted for a shell; 2 when the user has to act."""
    parser = argparse.ArgumentParser(
        prog="python -m coconut_ds.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    try:
        runs = read_sweep(parser.parse_args(arguments).file)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for words, config in runs:
        if _is_finished(config):
            print(f"{config.run_folder} is finished", file=sys.stderr)
        else:
            print(shlex.join(words))
    return 0


def read_sweep(path: Path) -> list[tuple[list[str], RunConfig]]:
    """The runs of a sweep file in order, each as its words and its configuration.

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
        problems.append("no run in it; write a line `run_configs/demo.yaml name=a seed=1` for each")
    if problems:
        raise InputError(problem_list(f"sweep file {path}", problems))
    return runs


def _checked(words: list[str]) -> RunConfig:
    """The run of a line; raises InputError for what is wrong with it and can be seen without its model."""
    if not words[0].endswith((".yaml", ".yml")):
        raise InputError(f"{words[0]}: a run file ends in .yaml or .yml")
    config = load_run_config(words[0], words[1:])
    read_ds_json(config.deepspeed)
    missing = [path for path in (config.train_path, config.val_path) if path and not Path(path).is_file()]
    if missing:
        raise InputError(f"{', '.join(missing)}: not there; data/README.md says how to get or make the data")
    if _is_finished(config) and (keys := _trained_otherwise(config)):
        raise InputError(f"{config.run_folder} is finished and was trained with another {', '.join(keys)}; rename one")
    if not _is_finished(config) and run_folder_is_held(config.run_folder):
        lock = RunFolder(config.run_folder).lock
        raise InputError(f"{config.run_folder} is in use by {holder_text(lock)}, or rename one")
    return config


def _is_finished(config: RunConfig) -> bool:
    records = RunFolder(config.run_folder).metrics
    return records.is_file() and read_metrics(records).is_finished(config.num_epochs)


def _trained_otherwise(config: RunConfig) -> list[str]:
    """Keys whose value in the run folder is not that of `config`, and data files whose content is another now.

    What is resolved when a run starts does not count, nor that it was trained for more epochs.
    """
    folder = config.run_folder
    keys = [key for key in changed_keys(folder, config) if key not in ("activation_checkpointing", "num_epochs")]
    return [*keys, *(f"content of {key}" for key in changed_contents(folder, config))]
