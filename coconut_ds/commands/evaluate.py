"""Evaluate a checkpoint of a run with the settings it was trained with.

    python -m coconut_ds eval CHECKPOINT [--dry-run] [--ranks N] [--master-port N] [--verbose] [key=value ...]

CHECKPOINT is a folder in RUN_FOLDER/checkpoints/; RUN_FOLDER/run_config.yaml has the settings. `test_path=FILE`
evaluates on another set, `eval_thoughts=N` with another number of thoughts than trained. For other weights:
`train --run RUN.yaml only_eval=true load_model_path=...`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.commands.launcher import Launcher, add_run_options, trainer_command
from coconut_ds.config.run_file import load_run_config, override
from coconut_ds.errors import InputError
from coconut_ds.runs.paths import RunFolder


def main(arguments: list[str] | None = None, prog: str = f"{PROG} eval") -> int:
    """The exit status of the trainer, or 2 for a checkpoint or options that cannot be used."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    add_run_options(parser)
    return run_command(_evaluate, parser, arguments)


def _evaluate(options: argparse.Namespace) -> int:
    checkpoint: Path = options.checkpoint
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not a checkpoint folder; name one such as runs/demo/checkpoints/epoch_0008")
    run_file = RunFolder(checkpoint.parent.parent).run_config
    if not run_file.is_file():
        raise InputError(
            f"{checkpoint} has no {run_file} beside it; for other weights use {PROG} train --run RUN.yaml "
            "only_eval=true load_model_path=..."
        )
    overrides = ["only_eval=true", override("load_model_path", str(checkpoint)), "resume=0", *options.overrides]
    load_run_config(run_file, overrides)
    with Launcher() as launcher:
        return launcher.run(trainer_command(run_file, overrides, options))
