"""Ask a trained model.

    python -m coconut_ds ask CHECKPOINT [QUESTION] [--file FILE] [--sample] [--thoughts N] [--show-thoughts] [--json]

CHECKPOINT is a checkpoint of a run, an exported folder or a hub id. Without QUESTION and FILE questions are read from
the terminal, or one a line from a pipe. FILE is a data file (`.json`: its questions are asked, and its answers stand
beside those given), or text with one question a line; `-` is standard input.

The prompt is that of the evaluation: as many thoughts as in the stage of the weights, for a record of a data file also
by its number of steps. Answers are greedy unless `--sample` is given, and are printed while they are generated where
stdout is a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from coconut_ds import strict_json
from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.data.doubts import unread
from coconut_ds.data.records import read_records
from coconut_ds.errors import InputError
from coconut_ds.inference.answers import Answer, Answerer, Question, sampled
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.runs.terminal import quiet_libraries

_PROMPT = "> "
_LISTED = 10  # cut answers that are named by their number
_JSON_STARTS = re.compile(r'\s*(\[\s*(\{|$)|\{\s*("|$))')

_ROOM = "--max-new-tokens N allows more, as far as the model has positions"

_RANGES = {
    "temperature": (0.001, 1000.0),
    "top_p": (0.001, 1.0),
    "seed": (0, 2**63 - 1),
    "thoughts": (0, 10_000),
    "max_new_tokens": (1, 1_000_000),
}


def main(arguments: list[str] | None = None, prog: str = f"{PROG} ask") -> int:
    """0 when all questions were answered; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("question", nargs="?", metavar="QUESTION")
    parser.add_argument("--file", metavar="FILE", help="a data file, or text with one question a line; - is stdin")
    parser.add_argument("--thoughts", type=int, metavar="N", help="thoughts in the prompt (default: as evaluated)")
    parser.add_argument("--sample", action="store_true", help="draw the answer instead of taking the best tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="with --sample: above 0 (default: 1)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="with --sample: draw from the best tokens that sum to P"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="with --sample: the same answers again")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: as evaluated, or what the remaining positions allow"
    )
    parser.add_argument("--show-thoughts", action="store_true", help="what the LM head reads in each thought")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else on stdout")
    parser.add_argument("--no-stream", action="store_true", help="print an answer when it is complete")
    return run_command(_ask, parser, arguments)


def _check(options: argparse.Namespace) -> None:
    """Raise InputError for options that say nothing together, and for values out of range."""
    if options.question is not None and options.file is not None:
        raise InputError("a question and --file: give one of them")
    for name in ("temperature", "top_p", "seed"):
        if getattr(options, name) is not None and not options.sample:
            raise InputError(f"{_spelled(name)}: greedy answers do not depend on it; add --sample")
    for name, (lowest, highest) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not lowest <= value <= highest:
            raise InputError(f"{_spelled(name)} {value}: must be from {lowest} to {highest}")


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _ask(options: argparse.Namespace) -> None:
    quiet_libraries()
    _check(options)
    is_loop = options.question is None and options.file is None and sys.stdin.isatty()
    # Opened before the model is loaded: what is wrong with a file is said at once.
    questions = [] if is_loop else _questions(options)
    answerer = _answerer(options)
    streams = sys.stdout.isatty() and not options.no_stream and not options.json
    page = Page(answerer, options.json, streams, repeats_questions=options.question is None and not is_loop)
    if is_loop:
        _loop(page)
        return
    if isinstance(questions, list):
        for question in questions:
            answerer.check(question)
    if _is_data(options.file):
        for line in unread(options.file, read_records(options.file), answerer.trained.tokenizer):
            print(f"warning: {line}", file=sys.stderr)
    page.print_total([(answer.correct, answer.cut) for answer in map(page.ask, questions)])


def _questions(options: argparse.Namespace) -> Iterable[Question]:
    """A list, or from standard input one after another, so that a pipe is answered while it is written."""
    if options.question is not None:
        return [Question(options.question)]
    if options.file in (None, "-"):
        return _lines(sys.stdin, "standard input")
    if _is_data(options.file):
        records = read_records(options.file)
        return [Question(each["question"], len(each["steps"]), each["answer"]) for each in records]
    try:
        with open(options.file, encoding="utf-8-sig") as file:
            questions = list(_lines(file, options.file))
    except OSError as error:
        raise InputError(f"--file {options.file}: cannot be read: {error.strerror}; name a file of questions") from None
    if not questions:
        raise InputError(f"--file {options.file}: is empty; write one question a line")
    return questions


def _is_data(file: str | None) -> bool:
    return file is not None and Path(file).suffix == ".json"


def _lines(file: Iterable[str], name: str) -> Iterator[Question]:
    try:
        for line in file:
            if _JSON_STARTS.match(line):
                raise InputError(f"{name} holds JSON and no lines of text: name a data file FILE.json with --file")
            if line.strip():
                yield Question(line.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not {error.encoding} text: {error.reason} at byte {error.start}") from None


def _answerer(options: argparse.Namespace) -> Answerer:
    sampling = sampled(options.temperature or 1.0, options.top_p or 1.0) if options.sample else {}
    trained = TrainedModel.load(options.checkpoint)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    return Answerer(trained, options.thoughts, options.max_new_tokens, sampling, options.show_thoughts)


@dataclass(frozen=True)
class Page:
    """Where answers are printed: stdout. Whatever is no answer goes to stderr."""

    answerer: Answerer
    as_json: bool
    streams: bool
    repeats_questions: bool

    def ask(self, question: Question) -> Answer:
        """Answer a question and print what came of it; raises InputError for one that does not fit the model."""
        self.answerer.check(question)
        unknown = self.answerer.unknown_words(question)
        if unknown:
            words, stand_in = ", ".join(map(repr, unknown)), self.answerer.trained.tokenizer.unk_token
            print(f"warning: the model knows no {words} and reads {stand_in} in place of it", file=sys.stderr)
        if self.as_json:
            answer = self.answerer.answer(question)
            print(strict_json.dumps(answer.as_dict()), flush=True)
            return answer
        if self.repeats_questions:
            print(f"{_PROMPT}{question.text}", flush=True)
        answer = self.answerer.answer(question, self.streams)
        lines = [] if self.streams else [answer.text]
        print("".join(f"{line}\n" for line in [*lines, *_remarks(answer)]), end="", flush=True)
        # Of several they are counted at the end.
        if answer.cut and not self.repeats_questions:
            print(f"warning: cut off after {_tokens(answer.n_new_tokens)}, before its end; {_ROOM}", file=sys.stderr)
        return answer

    def print_total(self, answers: Sequence[tuple[bool | None, bool]]) -> None:
        """How many of the answers were right, where what was expected is known, and how many were cut."""
        known = [correct for correct, _ in answers if correct is not None]
        if known:
            total = f"{sum(known)} of {len(known)} right ({sum(known) / len(known):.1%})"
            print(total, file=sys.stderr if self.as_json else sys.stdout)
        cut = [str(number) for number, (_, is_cut) in enumerate(answers, start=1) if is_cut]
        if cut and (self.as_json or self.repeats_questions):
            numbers = ", ".join(cut[:_LISTED]) + (", ..." if len(cut) > _LISTED else "")
            counts = f"{len(cut)} of {len(answers)} answers were cut off before their end"
            print(f"warning: {counts} (question {numbers}); {_ROOM}", file=sys.stderr)


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _remarks(answer: Answer) -> Iterator[str]:
    if answer.thoughts == []:
        yield "  no thoughts in this prompt"
    for number, reading in enumerate(answer.thoughts or [], start=1):
        yield f"  thought {number}: " + ", ".join(f"{token!r} {probability:.1%}" for token, probability in reading)
    if answer.correct is not None:
        yield f"  expected {answer.expected}: {'right' if answer.correct else 'wrong'}"


def _loop(page: Page) -> None:
    """Questions from a terminal until Ctrl-D. Ctrl-C leaves the line or the answer under way, not the loop."""
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  # gives `input` editing and a history
    print(f"{page.answerer.description}; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = _read_line(page)
            if line.strip():
                page.ask(Question(line.strip()))
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def _read_line(page: Page) -> str:
    if sys.stdout.isatty() and not page.as_json:
        return input(_PROMPT)
    # `input` writes its prompt to stdout, which is for answers alone here.
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    return input()
