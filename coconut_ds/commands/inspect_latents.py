"""Inspect the thoughts of a trained model.

    python -m coconut_ds inspect CHECKPOINT --data FILE --index I [--top-k 5] [--written-steps] [--json OUT] [--png OUT]
    python -m coconut_ds inspect CHECKPOINT --data FILE --all [--intervene] [--written-steps] [--json OUT] [--png OUT]
    python -m coconut_ds inspect RUN --by-stage [--data FILE] [--limit N]

CHECKPOINT is a checkpoint of a run, an exported folder or a hub id; FILE a data file. Prompts are those of the
evaluation, with the number of thoughts of the stage of the weights.

thought      The most probable tokens under the LM head, the entropy of that distribution, the L2 norm of the vector fed
             in, next to the norms of the question's token embeddings, and the share of each earlier state in it.
next step    For ProsQA questions, which carry their graph, and for hops questions: the model is stopped after k
             thoughts, and the probability is read that its next step starts from each node (arXiv 2412.06769, section
             5), and that its answer names each node; analysis/inspection/next_steps.py has the formulas. The plot is
             the graph. If a record's keys (edges, root, target ..) or steps and its question differ, there is no
             graph, and one line says why.
--all        Averages over the questions of the file, with 95% intervals: bootstrap over questions.
--intervene  How the answers change if a thought, or all of them, is replaced by zero, by the mean thought of the file,
             or by that of another question. Later thoughts are computed from the replacement.
--written-steps
             What is written from the thoughts of each step alone, without the question, always the most probable token,
             as step supervision trains it (arXiv 2509.20317), and whether it is the step. By the decoder of its own
             that a checkpoint has, else by the model itself; without step supervision this is a control.
--by-stage   For a run folder RUN: accuracy at the end of every stage, with own thoughts and with those of another
             question. FILE is the run's test set by default, else its validation set. It is written to
             RUN/thoughts.json, which the report of the run shows.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from coconut_ds.analysis.inspection.by_stage import thought_use
from coconut_ds.analysis.inspection.findings import Inspection, Records
from coconut_ds.analysis.inspection.tables import file_tables, question_tables, stage_table
from coconut_ds.commands.command_line import PROG, new_parser, run_command, write_json, write_output
from coconut_ds.data.doubts import unread
from coconut_ds.data.files import Source, read_records, read_set
from coconut_ds.errors import InputError, demand_libraries
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.read_run import read_run
from coconut_ds.runs.terminal import quiet_libraries


def main(arguments: list[str] | None = None, prog: str = f"{PROG} inspect") -> int:
    """0 if everything was printed and written; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--data", metavar="FILE", help="JSON list of records")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--index", type=int, metavar="I", help="one record, from 0")
    which.add_argument("--all", action="store_true", help="averages over the file")
    which.add_argument("--by-stage", action="store_true", help="whether the answers of a run depend on its thoughts")
    parser.add_argument("--limit", type=int, metavar="N", help="with --all or --by-stage: the first N records")
    parser.add_argument("--intervene", action="store_true", help="with --all: replace thoughts")
    parser.add_argument("--written-steps", action="store_true", help="write each step from its thoughts alone")
    parser.add_argument(
        "--seed", type=int, default=0, help="with --intervene or --by-stage: pairs questions (default: 0)"
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens listed per thought (default: 5)")
    parser.add_argument("--thoughts", type=int, metavar="N", help="thoughts per question (default: as evaluated)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: as evaluated, or what the remaining positions allow"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions per batch (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, shares from 0 to 1")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the graph, with --all the averages")
    return run_command(_inspect, parser, arguments)


def _inspect(options: argparse.Namespace) -> None:
    quiet_libraries()
    _check(options)
    if options.by_stage:
        return inspect_by_stage(Path(options.checkpoint), options.data, options.limit, options.batch_size, options.seed)
    records = _records(options)
    trained = TrainedModel.load(options.checkpoint, with_step_decoder=options.written_steps)
    sizes = {"batch_size": options.batch_size, "top_k": options.top_k}
    inspection = Inspection.of(trained, records, options.thoughts, options.max_new_tokens, **sizes)
    for line in unread(options.data, [record for _, record in records], trained.tokenizer, records[0][0]):
        print(f"warning: {line}", file=sys.stderr)
    writes = options.written_steps
    seed = options.seed if options.intervene else None
    found = inspection.of_file(seed, writes) if options.all else inspection.of_question(writes)
    found = {"checkpoint": options.checkpoint, "data": options.data, **found}
    try:
        print(file_tables(found) if options.all else question_tables(found, bool(options.png)), flush=True)
    finally:  # files are written even if the reader of stdout is gone
        _write_files(options, found)


def inspect_by_stage(
    folder: Path, data: str | None = None, limit: int | None = None, batch_size: int = 16, seed: int = 0
) -> None:
    """Write `thoughts.json` of a run folder and print what it says; `data` is the run's test set by default."""
    quiet_libraries()
    run = read_run(folder)
    if not (data or run.config.test_path or run.config.val_path):
        raise InputError(f"{folder} names no test set and no validation set; name a file with --data")
    source = Source(data) if data else Source.of(run.config, "test" if run.config.test_path else "val")
    records = list(enumerate(read_set(source, limit).records))
    if len(records) < 2:
        raise InputError(f"{source.path}: needs two questions or more, to give one the thoughts of another")
    found = thought_use(run, source.path, records, batch_size, seed)
    write_json(RunFolder(folder).thought_use, found.model_dump())
    print(stage_table(found), flush=True)


_LOWEST = {"limit": 1, "top_k": 1, "thoughts": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}


_NOT_BY_STAGE = ("thoughts", "max_new_tokens", "json", "png")


def _check(options: argparse.Namespace) -> None:
    if options.limit and not (options.all or options.by_stage):
        raise InputError("--limit is for a whole file; add --all")
    if options.intervene and not options.all:
        raise InputError("--intervene is for a whole file; add --all")
    if options.written_steps and options.by_stage:
        raise InputError("--written-steps is not for --by-stage; leave it out")
    if options.by_stage and (other := [name for name in _NOT_BY_STAGE if getattr(options, name) is not None]):
        raise InputError(f"--{other[0].replace('_', '-')} is not for --by-stage; leave it out")
    if not (options.by_stage or options.data):
        raise InputError("--data is missing; name a JSON list of records")
    for name, lowest in _LOWEST.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
    for name in ("json", "png"):
        path = getattr(options, name)
        # pathlib's is_dir raises for a folder without read permission.
        if path and not os.path.isdir(path.parent):
            raise InputError(f"--{name} {path}: there is no folder {path.parent}; make it, or name another")
        if path and os.path.isdir(path):
            raise InputError(f"--{name} {path}: is a folder; name a file in it")
    if options.png:
        demand_libraries(["matplotlib"], extra="report")


def _records(options: argparse.Namespace) -> Records:
    records = list(enumerate(read_records(options.data, options.limit)))
    if not options.all:
        if not 0 <= options.index < len(records):
            raise InputError(f"--index {options.index}: {options.data} has records 0 to {len(records) - 1}")
        return [records[options.index]]
    if options.intervene and len(records) < 2:
        raise InputError("--intervene: needs two questions or more, to replace the thoughts of one by those of another")
    return records


def _write_files(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if options.json:
        write_json(options.json, found)
    if options.png and (options.all or not found["why_no_graph"]):
        from coconut_ds.analysis.plots.canvas import save
        from coconut_ds.analysis.plots.thoughts import draw_averages, draw_question

        draw = draw_averages if options.all else draw_question
        write_output(options.png, lambda path: save(draw(found), path))
