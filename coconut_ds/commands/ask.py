"""Ask a trained model.

    python -m coconut_ds ask CHECKPOINT [QUESTION] [--file FILE] [--sample] [--thoughts N] [--show-thoughts] [--json]

CHECKPOINT is a checkpoint of a run, an exported folder or a hub id. Without QUESTION and FILE questions are read from
the terminal, or from a pipe with one question per line. FILE is a data file (`.json`: its questions are asked, and each
answer is printed with the expected one), or text with one question per line; `-` is standard input.

The prompt is that of the evaluation: its number of thoughts is that of the stage of the weights, and for a record of a
data file depends on its number of steps, too. Answers are greedy unless `--sample` is given. If stdout is a terminal
they are printed while they are generated.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from coconut_ds import strict_json
from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.data.doubts import unread
from coconut_ds.data.files import is_record_file, read_records
from coconut_ds.data.plain_text import unknown_words
from coconut_ds.errors import InputError
from coconut_ds.inference.replies import Question, Reply
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.thought_readings import Readings
from coconut_ds.runs.terminal import quiet_libraries

_PROMPT = "> "
_LISTED = 10  # cut answers whose numbers are listed
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
    """0 if all questions were answered; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("question", nargs="?", metavar="QUESTION")
    parser.add_argument("--file", metavar="FILE", help="a data file, or text with one question per line; - is stdin")
    parser.add_argument("--thoughts", type=int, metavar="N", help="thoughts in the prompt (default: as evaluated)")
    parser.add_argument("--sample", action="store_true", help="draw the answer instead of taking the best tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="with --sample: above 0 (default: 1)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="with --sample: draw from the best tokens that sum to P"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="with --sample: repeats the same answers")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: as evaluated, or what the remaining positions allow"
    )
    parser.add_argument("--show-thoughts", action="store_true", help="print what the LM head reads in each thought")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else on stdout")
    parser.add_argument("--no-stream", action="store_true", help="print an answer when it is complete")
    return run_command(_ask, parser, arguments)


def _check(options: argparse.Namespace) -> None:
    """Raise InputError for options that contradict each other and for values out of range."""
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
    # Opened before the model is loaded, so that problems of a file are reported at once.
    questions = [] if is_loop else _questions(options)
    trained = _load(options)
    streams = sys.stdout.isatty() and not options.no_stream and not options.json
    page = Page(trained, options, streams, repeats_questions=options.question is None and not is_loop)
    if is_loop:
        _loop(page)
        return
    if isinstance(questions, list):
        for question in questions:
            page.room(question)
    if _is_data(options.file):
        for line in unread(options.file, read_records(options.file), trained.tokenizer):
            print(f"warning: {line}", file=sys.stderr)
    page.print_total(list(map(page.ask, questions)))


def _load(options: argparse.Namespace) -> TrainedModel:
    """The model, ready to draw; raises InputError for options about thoughts that it does not have."""
    trained = TrainedModel.load(options.checkpoint)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    tokens, method = trained.tokens, trained.curriculum.method
    if options.thoughts and tokens.latent is None:
        raise InputError(f"--thoughts {options.thoughts}: the model was trained by {method}, without thoughts")
    if options.show_thoughts and tokens.thought is None:
        raise InputError(f"--show-thoughts: the model was trained by {method}, which has no thoughts to read")
    return trained


def sampled(temperature: float = 1.0, top_p: float = 1.0) -> Mapping[str, Any]:
    """Options of `decode` that draw from all tokens, where the default of transformers keeps only the 50 best."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _questions(options: argparse.Namespace) -> Iterable[Question]:
    """A list; from standard input an iterator, so that a pipe is answered while it is written."""
    if options.question is not None:
        return [Question(options.question, n_thoughts=options.thoughts)]
    if options.file in (None, "-"):
        return _lines(sys.stdin, "standard input", options.thoughts)
    if _is_data(options.file):
        return [Question.of(record, n_thoughts=options.thoughts) for record in read_records(options.file)]
    try:
        with open(options.file, encoding="utf-8-sig") as file:
            questions = list(_lines(file, options.file, options.thoughts))
    except OSError as error:
        raise InputError(f"--file {options.file}: cannot be read: {error.strerror}; name a file of questions") from None
    if not questions:
        raise InputError(f"--file {options.file}: is empty; write one question per line")
    return questions


def _is_data(file: str | None) -> bool:
    return file is not None and is_record_file(file)


def _lines(file: Iterable[str], name: str, n_thoughts: int | None) -> Iterator[Question]:
    try:
        for line in file:
            if _JSON_STARTS.match(line):
                raise InputError(f"{name} holds JSON instead of lines of text: name a data file FILE.json with --file")
            if line.strip():
                yield Question(line.strip(), n_thoughts=n_thoughts)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not {error.encoding} text: {error.reason} at byte {error.start}") from None


@dataclass(frozen=True)
class Page:
    """Asks a model and prints its answers to stdout, everything else to stderr."""

    trained: TrainedModel
    options: argparse.Namespace
    streams: bool
    repeats_questions: bool

    @property
    def description(self) -> str:
        """The model and how it answers."""
        trained = self.trained
        stage = "" if trained.stage is None else f", stage {trained.stage}"
        n_thoughts = trained.thoughts_of(Question("", n_thoughts=self.options.thoughts))
        thoughts = "" if trained.tokens.latent is None else f", {n_thoughts} thoughts per question"
        return f"{trained.curriculum.method}{stage}{thoughts}, {'sampled' if self.options.sample else 'greedy'}"

    def room(self, question: Question) -> int:
        """Tokens its answer may have; raises InputError if it is empty, is not text, or does not fit the model."""
        if not question.text.strip():
            raise InputError("the question is empty; write one")
        try:
            question.text.encode()
        except UnicodeEncodeError:  # bytes of another encoding arrive as halves of surrogate pairs
            raise InputError(f"{question.name} is not UTF-8 text; encode it so") from None
        return self.trained.room([question], self.options.max_new_tokens)

    def ask(self, question: Question) -> Reply:
        """Answer a question and print the answer; raises InputError for what `room` refuses."""
        new_tokens, tokenizer, options = self.room(question), self.trained.tokenizer, self.options
        if words := ", ".join(map(repr, unknown_words(question.text, tokenizer))):
            stand_in = tokenizer.unk_token
            print(f"warning: the model does not know {words} and reads {stand_in} instead", file=sys.stderr)
        if self.repeats_questions and not options.json:
            print(f"{_PROMPT}{question.text}", flush=True)
        # It decodes as `Reply` does, so that a person sees what a script is given.
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if self.streams else None
        sampling = sampled(options.temperature or 1.0, options.top_p or 1.0) if options.sample else {}
        started = time.monotonic()
        answered = self.trained.ask([question], new_tokens, streamer=streamer, **sampling)
        (reply,), seconds = answered.replies, time.monotonic() - started
        thoughts = answered.readings(tokenizer)[0] if options.show_thoughts else None
        if options.json:
            n_thoughts = self.trained.thoughts_of(question)
            print(strict_json.dumps(_described(reply, n_thoughts, seconds, thoughts)), flush=True)
            return reply
        lines = [] if self.streams else [reply.text]
        print("".join(f"{line}\n" for line in [*lines, *_remarks(reply, thoughts)]), end="", flush=True)
        # If several questions are asked, cut answers are counted at the end.
        if reply.cut and not self.repeats_questions:
            print(f"warning: cut off after {_tokens(reply.n_new_tokens)}, before its end; {_ROOM}", file=sys.stderr)
        return reply

    def print_total(self, replies: Sequence[Reply]) -> None:
        """How many of the answers were right, if what was expected is known, and how many were cut."""
        known = [reply.correct for reply in replies if reply.question.expected is not None]
        if known:
            total = f"{sum(known)} of {len(known)} right ({sum(known) / len(known):.1%})"
            print(total, file=sys.stderr if self.options.json else sys.stdout)
        cut = [str(number) for number, reply in enumerate(replies, start=1) if reply.cut]
        if cut and (self.options.json or self.repeats_questions):
            numbers = ", ".join(cut[:_LISTED]) + (", ..." if len(cut) > _LISTED else "")
            counts = f"{len(cut)} of {len(replies)} answers were cut off before their end"
            print(f"warning: {counts} (question {numbers}); {_ROOM}", file=sys.stderr)


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _described(reply: Reply, n_thoughts: int, seconds: float, thoughts: Readings | None) -> dict[str, Any]:
    """What `--json` prints: `answer` is what the evaluation compares, `text` everything that was generated."""
    expected = reply.question.expected
    described = {
        "question": reply.question.text,
        "answer": reply.given,
        "text": reply.text,
        "n_thoughts": n_thoughts,
        "n_new_tokens": reply.n_new_tokens,
        "seconds": round(seconds, 4),
        "thoughts": thoughts,
        "expected": expected,
        "correct": None if expected is None else reply.correct,
        "cut": reply.cut,
    }
    return {name: value for name, value in described.items() if value is not None}


def _remarks(reply: Reply, thoughts: Readings | None) -> Iterator[str]:
    if thoughts == []:
        yield "  no thoughts in this prompt"
    for number, reading in enumerate(thoughts or [], start=1):
        yield f"  thought {number}: " + ", ".join(f"{token!r} {probability:.1%}" for token, probability in reading)
    if reply.question.expected is not None:
        yield f"  expected {reply.question.expected}: {'right' if reply.correct else 'wrong'}"


def _loop(page: Page) -> None:
    """Questions from a terminal until Ctrl-D. Ctrl-C abandons the current line or answer, not the loop."""
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  # gives `input` editing and a history
    print(f"{page.description}; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = _read_line(page)
            if line.strip():
                page.ask(Question(line.strip(), n_thoughts=page.options.thoughts))
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def _read_line(page: Page) -> str:
    if sys.stdout.isatty() and not page.options.json:
        return input(_PROMPT)
    # `input` writes its prompt to stdout, which is only for answers here.
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    return input()
