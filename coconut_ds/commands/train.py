"""Train a run on every GPU of this machine, or on CPU ranks without one.

    python -m coconut_ds train --run RUN.yaml [--dry-run] [--ranks N] [--master-port N] [--verbose] [key=value ...]

Starts DeepSpeed's launcher on the trainer. Ctrl-C or SIGTERM stops the run after the current step, with a checkpoint;
the same command resumes it. A second signal kills it. The exit status is the trainer's: 0 complete or stopped as
requested, 2 if there is something to fix first, else 1.
"""

from __future__ import annotations

import argparse

from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.commands.launcher import Launcher, add_run_options, trainer_command
from coconut_ds.config.run_file import load_run_config


def main(arguments: list[str] | None = None, prog: str = f"{PROG} train") -> int:
    """The exit status of the trainer, or 2 for a run file or options that cannot be used."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("--run", required=True, help="run YAML, see run_configs/")
    add_run_options(parser)
    return run_command(_train, parser, arguments)


def _train(options: argparse.Namespace) -> int:
    load_run_config(options.run, options.overrides)  # in a second, before ranks are started
    with Launcher() as launcher:
        return launcher.run(trainer_command(options.run, options.overrides, options))
