"""Train a small Coconut from scratch, print its accuracy per stage and write a report.

    python -m coconut_ds demo [--control] [--ranks N] [--master-port N] [--verbose] [key=value ...]

It needs a checkout of coconut_ds, which has its run file (run_configs/demo.yaml) and the generator of its data. The
data goes to data/demo/ and the run to runs/demo/ of the working directory. --control trains `no_cot` instead, which
sees neither steps nor thoughts, in runs/demo_control/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from coconut_ds.commands import report
from coconut_ds.commands.command_line import PROG, add_overrides, new_parser, run_command
from coconut_ds.commands.launcher import Launcher, add_launch_options, as_seen_from_here, trainer_command
from coconut_ds.config.run_file import load_run_config
from coconut_ds.errors import InputError

_CHECKOUT = Path(__file__).resolve().parents[2]
_MOST_RANKS = 2  # its 64 examples per step are two micro-batches of 32
_DATA = Path("data", "demo")


def main(arguments: list[str] | None = None, prog: str = f"{PROG} demo") -> int:
    """The exit status of the trainer, or of the report after it; 2 without a checkout."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("--control", action="store_true", help="train the control, no_cot")
    add_launch_options(parser)
    add_overrides(parser)
    return run_command(_demo, parser, arguments)


def _demo(options: argparse.Namespace) -> int:
    run_file, generator = _CHECKOUT / "run_configs" / "demo.yaml", _CHECKOUT / "preprocessing" / "prosqa.py"
    if not (run_file.is_file() and generator.is_file()):
        raise InputError(
            "the demo needs run_configs/demo.yaml and preprocessing/prosqa.py, which the installed package does not "
            "have; start it in a checkout of coconut_ds, by ./launch.sh demo"
        )
    control = ["name=demo_control", "method=no_cot", "latent_context=null"]
    overrides = [*(control if options.control else ["name=demo"]), *options.overrides]
    run = as_seen_from_here(run_file)
    folder = load_run_config(run, overrides).run_folder
    status = 0 if (_DATA / "prosqa_train.json").is_file() else _make_data(generator)
    if status == 0:
        with Launcher() as launcher:
            status = launcher.run(trainer_command(run, overrides, options, _MOST_RANKS))
    return status or report.main([str(folder)])


def _make_data(generator: Path) -> int:
    shape = "--form edges --nodes 7 --min-steps 2 --max-steps 2 --train 19200 --valid 500 --test 500"
    command = [sys.executable, str(generator), "generate", "--out", str(_DATA), *shape.split()]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode
