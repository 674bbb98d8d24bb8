"""Write a report of runs: one HTML file that needs no network, and its plots as PNGs.

    python -m coconut_ds report RUN [RUN ...] [--out FOLDER]

RUN is a run folder, finished, still training or interrupted. Several runs, at most seven, share the plots, one colour
each. The report is `report.html` in FOLDER, by default `RUN/report`; for several runs name FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from coconut_ds.analysis.report import named, write_report
from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.errors import InputError, demand_libraries
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.read_run import read_run


def main(arguments: list[str] | None = None, prog: str = f"{PROG} report") -> int:
    """0 if the report was written; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, save_path/name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write to (default: RUN/report)")
    return run_command(_report, parser, arguments)


def _report(options: argparse.Namespace) -> None:
    demand_libraries(["matplotlib"], extra="report")
    runs = named([read_run(folder) for folder in options.runs])
    page = write_report(runs, options.out or _default_folder(options.runs))
    for problem in (problem for run in runs.values() for problem in run.problems):
        print(f"left out: {problem}", file=sys.stderr)
    print(f"report: {page}")


def _default_folder(runs: Sequence[Path]) -> Path:
    if len(runs) > 1:
        raise InputError(f"{len(runs)} runs: name a folder for their report with --out FOLDER")
    return RunFolder(runs[0]).report
