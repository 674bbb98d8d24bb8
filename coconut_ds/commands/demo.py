"""Train a small Coconut from scratch, exchange its thoughts, and write a report.

    python -m coconut_ds demo [--control] [--ranks N] [--master-port N] [--verbose] [key=value ...]

It follows edges: a question states where each of eight nodes leads and a start, the answer is the node four edges away
(docs/datasets/HOPS.md). Step by step the visible edges are replaced by thoughts. At the end 200 questions are answered
with the thoughts of another one. It needs a checkout of coconut_ds, which has its run file (run_configs/demo.yaml) and
the generator of its data. The data goes to data/demo/ and the run to runs/demo/ of the working directory.

--control trains what has no thoughts in the same recipe: `no_cot` in runs/demo_no_cot/, which sees no step, and
`pause_as_thought` in runs/demo_pause_as_thought/, whose thoughts are replaced by a learned token.
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
_CONTROLS = ("no_cot", "pause_as_thought")
_EXCHANGED = 200


def main(arguments: list[str] | None = None, prog: str = f"{PROG} demo") -> int:
    """The exit status of the trainer, or of the report after it; 2 without a checkout."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("--control", action="store_true", help="train the controls, no_cot and pause_as_thought")
    add_launch_options(parser)
    add_overrides(parser)
    return run_command(_demo, parser, arguments)


def _demo(options: argparse.Namespace) -> int:
    run_file, generator = _CHECKOUT / "run_configs" / "demo.yaml", _CHECKOUT / "preprocessing" / "hops.py"
    if not (run_file.is_file() and generator.is_file()):
        raise InputError(
            "the demo needs run_configs/demo.yaml and preprocessing/hops.py, which the installed package does not "
            "have; start it in a checkout of coconut_ds, by ./launch.sh demo"
        )
    named = next((each for each in options.overrides if each.startswith("name=")), None)
    if options.control and named:
        raise InputError(f"{named}: --control names its two runs itself; choose another place with save_path=FOLDER")
    status = 0 if (_DATA / "hops_train.json").is_file() else _make_data(generator)
    runs = [_control(method) for method in _CONTROLS] if options.control else [["name=demo"]]
    for changes in runs:
        status = status or _train(as_seen_from_here(run_file), [*changes, *options.overrides], options)
    return status


def _control(method: str) -> list[str]:
    return [f"name=demo_{method}", f"method={method}", "latent_context=null", "latent_norm=none"]


def _make_data(generator: Path) -> int:
    command = [sys.executable, str(generator), "generate", "--out", str(_DATA)]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode


def _train(run_file: str, overrides: list[str], options: argparse.Namespace) -> int:
    """Train a run; exchange its thoughts if it has some, and write its report."""
    folder = load_run_config(run_file, overrides).run_folder
    with Launcher() as launcher:
        status = launcher.run(trainer_command(run_file, overrides, options, _MOST_RANKS))
    if status == 0 and not options.control:
        # Imports torch, which only this part of the command needs.
        from coconut_ds.commands.inspect_latents import inspect_by_stage

        try:
            inspect_by_stage(folder, limit=_EXCHANGED)
        except InputError as error:  # a demo cut short by overrides still has its report
            print(f"no thoughts exchanged: {error}")
    return status or report.main([str(folder)])
