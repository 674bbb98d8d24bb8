"""Look at the thoughts of a trained model.

    python -m coconut_ds inspect CHECKPOINT --data FILE --index I [--top-k 5] [--json OUT] [--png OUT]
    python -m coconut_ds inspect CHECKPOINT --data FILE --all [--intervene] [--json OUT] [--png OUT]

CHECKPOINT is a checkpoint of a run, an exported folder or a hub id; FILE a data file. Prompts are those of the
evaluation: as many thoughts as in the stage of the weights.

thought      The tokens the LM head finds most probable in it, the entropy of that distribution, the L2 norm of what was
             fed beside the norms of the question's token embeddings, and the share each earlier state has in it.
next step    Of ProsQA questions, which carry their graph: the model is stopped after k thoughts, and the probability
             that its next step starts from a node is read (arXiv 2412.06769, section 5), and of its answer the node it
             names; analysis/inspection/next_steps.py has the formulas. The picture is the graph. Where a record's
             keys (edges, root, target ..) and its question differ, there is no graph and one line says why.
--all        The same averaged over the questions of the file, with 95% intervals: bootstrap over questions.
--intervene  Every thought by itself, and all of them, replaced by zero, by the mean thought of the file, and by another
             question's, and what that does to the answers. Thoughts that come later are made from what was fed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from coconut_ds import strict_json
from coconut_ds.analysis.inspection.averages import average_next_steps, average_readings, describe
from coconut_ds.analysis.inspection.interventions import intervene
from coconut_ds.analysis.inspection.next_steps import NextStep, next_steps
from coconut_ds.analysis.inspection.prosqa_graph import ProsqaGraph, graph_of
from coconut_ds.analysis.inspection.readings import (
    Question,
    QuestionReading,
    answer,
    questions_of,
    read,
    room_for_answers,
    thoughts_of,
)
from coconut_ds.analysis.inspection.tables import file_tables, question_tables
from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.data.doubts import unread
from coconut_ds.data.records import read_records
from coconut_ds.errors import InputError, demand_libraries
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.runs.terminal import progress, quiet_libraries


def main(arguments: list[str] | None = None, prog: str = f"{PROG} inspect") -> int:
    """0 when everything is shown and written; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--data", metavar="FILE", required=True, help="JSON list of records")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--index", type=int, metavar="I", help="one record, from 0")
    which.add_argument("--all", action="store_true", help="averages over the file")
    parser.add_argument("--limit", type=int, metavar="N", help="with --all: the first N records")
    parser.add_argument("--intervene", action="store_true", help="with --all: replace thoughts")
    parser.add_argument("--seed", type=int, default=0, help="of which question's thoughts replace which (default: 0)")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens of a thought (default: 5)")
    parser.add_argument("--thoughts", type=int, metavar="N", help="thoughts of every question (default: as evaluated)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: as evaluated, or what the remaining positions allow"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows at once (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, shares from 0 to 1")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the graph, with --all the averages")
    return run_command(_inspect, parser, arguments)


def _inspect(options: argparse.Namespace) -> None:
    quiet_libraries()
    _check(options)
    found = inspect(options)
    try:
        print(file_tables(found) if options.all else question_tables(found, bool(options.png)), flush=True)
    finally:  # files are written even if nobody reads the tables
        _write_files(options, found)


_LOWEST = {"limit": 1, "top_k": 1, "thoughts": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}


def _check(options: argparse.Namespace) -> None:
    for name in ("limit", "intervene"):
        if getattr(options, name) and not options.all:
            raise InputError(f"--{name} is for a whole file; add --all")
    for name, lowest in _LOWEST.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
    for name in ("json", "png"):
        path = getattr(options, name)
        # Of pathlib's own is_dir a folder that may not be looked into makes an error.
        if path and not os.path.isdir(path.parent):
            raise InputError(f"--{name} {path}: there is no folder {path.parent}; make it, or name another")
        if path and os.path.isdir(path):
            raise InputError(f"--{name} {path}: is a folder; name a file in it")
    if options.png:
        demand_libraries(["matplotlib"], extra="report")


def _write_files(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if options.json:
        _write(options.json, lambda path: path.write_text(strict_json.dumps(found, indent=2) + "\n", "utf-8"))
    if options.png and (options.all or not found["why_no_graph"]):
        from coconut_ds.analysis.plots.canvas import save
        from coconut_ds.analysis.plots.thoughts import draw_averages, draw_graphs

        draw = draw_averages if options.all else draw_graphs
        _write(options.png, lambda path: save(draw(found), path))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def inspect(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, drawn and written as JSON."""
    records = list(enumerate(read_records(options.data, options.limit)))
    if not options.all:
        if not 0 <= options.index < len(records):
            raise InputError(f"--index {options.index}: {options.data} has records 0 to {len(records) - 1}")
        records = records[options.index : options.index + 1]
    if options.intervene and len(records) < 2:
        raise InputError("--intervene: needs two questions or more, to put thoughts of one in place of another's")
    trained = TrainedModel.load(options.checkpoint)
    questions = questions_of(trained, records, options.thoughts)
    room = room_for_answers(trained, questions, options.max_new_tokens)
    for line in unread(options.data, [record for _, record in records], trained.tokenizer, records[0][0]):
        print(f"warning: {line}", file=sys.stderr)
    graphs, why_no_graph = _graphs(questions)
    readings, fed = _readings(trained, questions, options, room)
    steps = _next_steps(trained, graphs, questions, options.batch_size)
    found = {"checkpoint": options.checkpoint, "data": options.data, "why_no_graph": why_no_graph}
    found["max_new_tokens"] = room
    if not options.all:
        found |= asdict(readings[0])
        if graphs:
            found |= _described_graph(graphs[0], steps[0])
        return found
    found |= average_readings(readings)
    if graphs:
        found["next_steps"] = average_next_steps(graphs, steps)
    if options.intervene:
        given = [each.given for each in readings]
        sizes = {"new_tokens": room, "batch_size": options.batch_size}
        found["interventions"] = [
            asdict(each) for each in intervene(trained, questions, fed, given, **sizes, seed=options.seed)
        ]
    return found


def _graphs(questions: Sequence[Question]) -> tuple[list[ProsqaGraph], str | None]:
    """The graphs of all questions; none of them, with the first reason, where a question has none."""
    found = [graph_of(question.record) for question in questions]
    graphs = [each for each in found if not isinstance(each, str)]
    if len(graphs) == len(found):
        return graphs, None
    first = next(f"record {question.index} {each}" for question, each in zip(questions, found) if isinstance(each, str))
    count = f" ({len(found) - len(graphs)} of {len(found)} records have none)" if graphs else ""
    return [], f"{first}{count}"


def _readings(
    trained: TrainedModel, questions: Sequence[Question], options: argparse.Namespace, room: int
) -> tuple[list[QuestionReading], list[torch.Tensor]]:
    """What is read in the thoughts of each question, and what was fed in their places, (thoughts, D) each."""
    readings: list[QuestionReading] = []
    fed: list[torch.Tensor] = []
    starts = range(0, len(questions), options.batch_size)
    for start in progress(starts, len(starts), "thoughts"):
        some = questions[start : start + options.batch_size]
        answered = answer(trained, some, room)
        thoughts = thoughts_of(trained, answered)
        readings += read(trained, some, answered, thoughts, options.top_k)
        fed += [row[: each.n_thoughts] for row, each in zip(thoughts.fed, some)]
    return readings, fed


def _next_steps(
    trained: TrainedModel, graphs: Sequence[ProsqaGraph], questions: Sequence[Question], batch_size: int
) -> list[list[NextStep]]:
    found: list[list[NextStep]] = []
    starts = range(0, len(graphs), batch_size)
    for start in progress(starts, len(starts), "next steps"):
        these = slice(start, start + batch_size)
        found += next_steps(trained, graphs[these], [each.n_thoughts for each in questions[these]], batch_size)
    return found


def _described_graph(graph: ProsqaGraph, steps: Sequence[NextStep]) -> dict[str, Any]:
    shown = graph.model_dump(exclude={"question"})
    return {"graph": {**shown, "distances": graph.distances}, "next_steps": [describe(graph, each) for each in steps]}
