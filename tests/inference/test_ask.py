"""A trained model that is asked: the answers of the evaluation, on a terminal, in a pipe, and for scripts."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import prosqa
import psutil
import pytest
import torch
from launching import ROOT, environment
from transformers import TextStreamer

from coconut_ds.checkpoints.weights import latent_settings
from coconut_ds.commands import ask
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.records import tokenize
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.inference.replies import Question
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.backbone import add_markers
from coconut_ds.model.folder import write_folder
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer

N_POSITIONS, NEW_TOKENS, STAGE = 96, 6, 4
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": N_POSITIONS, "dropout": 0.0}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """50 questions of unlike lengths, with 2 to 4 steps."""
    return list(prosqa.generate(50, "ask", n_nodes=10, min_steps=2, max_steps=4, form="symbolic"))


@pytest.fixture(scope="module")
def data_file(records, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def short_file(records, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.txt"
    path.write_text("".join(record["question"] + "\n" for record in records[:8]))
    return path


@pytest.fixture(scope="module")
def make_model(records, tmp_path_factory):
    """The `model/` folder of a checkpoint: random weights, large, so that answers differ."""

    def make(method: str = "coconut", pad_latent_to_max: bool = True, **stored) -> str:
        torch.manual_seed(0)
        texts = (text for record in records for text in (record["question"], *record["steps"], record["answer"]))
        backbone = scratch_backbone("llama", word_tokenizer(texts, N_POSITIONS), **SHAPE)
        if method != "cot":
            add_markers(backbone)
        for parameter in backbone.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        config = RunConfig(
            method=method,
            max_latent_stage=3,
            pad_latent_to_max=pad_latent_to_max,
            latent_context={"weights": [0.6, 0.3, 0.1]} if method == "coconut" else None,
            train_path="t",
            val_path="v",
        )
        folder = tmp_path_factory.mktemp("model")
        settings = {**latent_settings(config), "stage": 0 if method == "cot" else STAGE, **stored}
        write_folder(folder, backbone.model, backbone.tokenizer, settings)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def checkpoint(make_model) -> str:
    return make_model()


@pytest.fixture(autouse=True)
def _one_thread(_reproducible):
    """A model this small gains nothing from a second one, and loses much where cores are busy."""
    torch.set_num_threads(1)


def objects(capsys, *arguments: str) -> list[dict]:
    """What `--json` printed; each line has to be an object."""
    assert ask.main([*arguments, "--json", "--max-new-tokens", str(NEW_TOKENS)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def without_time(answers: list[dict]) -> list[dict]:
    return [{key: value for key, value in answer.items() if key != "seconds"} for answer in answers]


@pytest.mark.parametrize(
    "settings",
    [{"pad_latent_to_max": True}, {"pad_latent_to_max": False}, {"method": "cot"}, {"method": "pause_as_thought"}],
    ids=["as many thoughts", "thoughts by steps", "without thoughts", "pauses"],
)
def test_50_questions_get_the_answers_of_the_evaluator(make_model, records, data_file, capsys, settings):
    folder = make_model(**settings)
    trained = TrainedModel.load(folder)
    examples = tokenize(records, trained.tokenizer)
    evaluator = Evaluator(trained.model, examples, trained.curriculum, trained.tokens, trained.tokenizer, 8, NEW_TOKENS)
    _, predictions = evaluator.run(trained.stage)
    shows_thoughts = ["--show-thoughts"] if trained.tokens.thought is not None else []
    answers = objects(capsys, folder, "--file", str(data_file), *shows_thoughts)
    same = {"question": "question", "answer": "given", "text": "text", "n_new_tokens": "n_new_tokens"}
    same |= {"expected": "expected", "correct": "correct"}
    for own, theirs in same.items():
        assert [each[own] for each in answers] == [each[theirs] for each in predictions], own
    assert len({each["answer"] for each in answers}) > 10, "the answers have to differ for this to say something"
    if shows_thoughts:
        assert [each["n_thoughts"] for each in answers] == [each["n_thoughts"] for each in predictions]
        tokens = [[[word for word, _ in thought] for thought in each["thoughts"]] for each in answers]
        assert tokens == [[[word for word, _ in thought] for thought in each["thoughts"]] for each in predictions]
    assert len({each["n_thoughts"] for each in answers}) == (1 if settings.get("pad_latent_to_max", True) else 2)


def test_the_number_of_thoughts_can_be_given_and_matters(checkpoint, short_file, capsys):
    none, two = (objects(capsys, checkpoint, "--file", str(short_file), "--thoughts", count) for count in "02")
    assert {each["n_thoughts"] for each in none} == {0}
    assert {each["n_thoughts"] for each in two} == {2}
    assert [each["text"] for each in none] != [each["text"] for each in two]


def test_one_question_has_as_many_thoughts_as_the_longest(make_model, records, capsys):
    (answer,) = objects(capsys, make_model(pad_latent_to_max=False), records[0]["question"])
    assert answer["n_thoughts"] == 3
    assert not {"expected", "correct", "thoughts"} & set(answer)


def test_a_seed_repeats_sampled_answers_and_another_does_not(checkpoint, short_file, capsys):
    def draw(*options: str) -> list[dict]:
        return without_time(objects(capsys, checkpoint, "--file", str(short_file), "--sample", *options))

    assert draw("--seed", "1") == draw("--seed", "1")
    assert draw("--seed", "1") != draw("--seed", "2")
    greedy = without_time(objects(capsys, checkpoint, "--file", str(short_file)))
    assert draw("--seed", "1") != greedy
    assert draw("--seed", "1", "--temperature", "3") != draw("--seed", "1")
    assert draw("--seed", "1", "--top-p", "0.001") == greedy


def test_answers_are_drawn_from_more_than_the_50_best_tokens(checkpoint):
    trained = TrainedModel.load(checkpoint)
    vocabulary = torch.nn.Linear(SHAPE["n_embd"], 400, bias=False)
    torch.nn.init.normal_(vocabulary.weight, std=0.001)
    trained.model.base_causallm.set_output_embeddings(vocabulary)
    ids = torch.full((200, 2), 5)
    assert len(trained.model.generate(ids, max_new_tokens=1, **ask.sampled()).unique()) > 50


def test_streamed_text_is_the_text_that_is_printed_at_once(checkpoint, short_file, capsys, monkeypatch):
    def printed(*options: str) -> str:
        assert ask.main([checkpoint, "--file", str(short_file), "--max-new-tokens", "40", *options]) == 0
        return capsys.readouterr().out

    at_once = printed()
    streamers = []

    def counted(*arguments, **options) -> TextStreamer:
        streamers.append(TextStreamer(*arguments, **options))
        return streamers[-1]

    monkeypatch.setattr(ask, "TextStreamer", counted)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert printed() == at_once
    assert len(streamers) == 8
    assert printed("--no-stream") == at_once
    assert len(streamers) == 8


def test_a_data_file_ends_with_the_share_of_right_answers(checkpoint, records, short_file, tmp_path, capsys):
    given = [answer["answer"] for answer in objects(capsys, checkpoint, "--file", str(short_file))]
    known = [{**record, "answer": answer} for record, answer in zip(records, given) if answer][:4]
    known[0]["answer"] = "no node"
    path = tmp_path / "known.json"
    path.write_text(json.dumps(known))
    assert ask.main([checkpoint, "--file", str(path), "--max-new-tokens", str(NEW_TOKENS)]) == 0
    output = capsys.readouterr().out
    assert output.endswith("3 of 4 right (75.0%)\n")
    assert "  expected no node: wrong\n" in output
    assert output.count(": right\n") == 3


def test_answers_of_a_data_file_that_cannot_be_read_back_are_counted(checkpoint, records, tmp_path, capsys):
    path = tmp_path / "known.json"
    path.write_text(json.dumps([records[0], {**records[1], "answer": "no node"}, {**records[2], "answer": "C#"}]))
    assert ask.main([checkpoint, "--file", str(path), "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        f"warning: {path}: 2 of 3 answers cannot be read back from their own tokens, so that nothing a model writes is "
        "right (first: record 1: 'no node' is read as ''); write them in words and signs the tokenizer keeps, without "
        "a line that begins with ###"
    )
    path.write_text(json.dumps(records[:2]))
    assert ask.main([checkpoint, "--file", str(path), "--max-new-tokens", "2"]) == 0
    assert "read back" not in capsys.readouterr().err


def test_a_text_file_is_asked_line_by_line(checkpoint, records, tmp_path, capsys):
    first, second = (record["question"] for record in records[:2])
    path = tmp_path / "questions.txt"
    path.write_text(f"{first}\n\n  {second}\r\n")
    assert [each["question"] for each in objects(capsys, checkpoint, "--file", str(path))] == [first, second]
    assert ask.main([checkpoint, "--file", str(path), "--show-thoughts", "--max-new-tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[5]] == [f"> {first}", f"> {second}"]
    assert [line[:12] for line in lines[2:5]] == ["  thought 1:", "  thought 2:", "  thought 3:"]
    assert ask.main([checkpoint, first, "--show-thoughts", "--thoughts", "0", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.endswith("\n  no thoughts in this prompt\n")


@pytest.mark.parametrize("file", [[], ["--file", "-"]], ids=["no file", "-"])
def test_a_pipe_is_answered_line_by_line(checkpoint, records, capsys, monkeypatch, file):
    questions = [record["question"] for record in records[:3]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    assert [each["question"] for each in objects(capsys, checkpoint, *file)] == questions


def test_unknown_words_are_named_in_one_line_beside_the_answer(checkpoint, records, capsys):
    assert ask.main([checkpoint, records[0]["question"] + " perhaps, maybe perhaps", "--json"]) == 0
    captured = capsys.readouterr()
    (warning,) = captured.err.splitlines()
    assert warning == "warning: the model does not know 'perhaps', ',', 'maybe' and reads <|unknown|> instead"
    json.loads(captured.out)


def test_new_tokens_are_as_many_as_positions_are_left_unless_said_otherwise(checkpoint, records):
    words = records[0]["question"].split()
    trained = TrainedModel.load(checkpoint)
    n_words = N_POSITIONS - 3 - 2 - 1 - 5  # less thoughts, markers, newline, and five tokens for the answer
    question = Question(" ".join((words * 50)[:n_words]))
    endless = {"suppress_tokens": [trained.tokenizer.eos_token_id]}
    assert trained.ask([question], trained.room([question]), **endless).replies[0].n_new_tokens == 5


REFUSED = {
    "two sources": (["q", "--file", "f"], "a question and --file: give one of them"),
    "temperature": (["q", "--temperature", "0.7"], "--temperature: greedy answers do not depend on it; add --sample"),
    "top-p": (["q", "--top-p", "0.9"], "--top-p: greedy answers do not depend on it; add --sample"),
    "seed": (["q", "--seed", "1"], "--seed: greedy answers do not depend on it; add --sample"),
    "no temperature": (["q", "--sample", "--temperature", "0"], "--temperature 0.0: must be from 0.001 to 1000.0"),
    "all and more": (["q", "--sample", "--top-p", "1.5"], "--top-p 1.5: must be from 0.001 to 1.0"),
    "fewer than none": (["q", "--thoughts", "-1"], "--thoughts -1: must be from 0 to 10000"),
    "no tokens": (["q", "--max-new-tokens", "0"], "--max-new-tokens 0: must be from 1 to"),
    "no file": (["--file", "nowhere.txt"], "--file nowhere.txt: cannot be read: No such file or directory"),
    "no data file": (["--file", "nowhere.json"], "nowhere.json: cannot be read: No such file or directory"),
    "empty file": (["--file", os.devnull], "--file /dev/null: is empty; write one question per line"),
    "no question": ([" "], "the question is empty; write one"),
    "no text": (["caf\udce9"], "is not UTF-8 text; encode it so"),
    "a marker": (
        ["A <|latent|> A"],
        "question 'A <|latent|> A' holds '<|latent|>', a token that sequences are built with",
    ),
    "an end": (["A<|endoftext|>"], "question 'A<|endoftext|>' holds '<|endoftext|>', a token that sequences are built"),
    "a start": (["<|start-latent|>A"], "holds '<|start-latent|>', a token that sequences are built with; write it"),
    "padding": (["A <|pad|>"], "holds '<|pad|>', a token that sequences are built with; write it otherwise"),
    "too long": (
        ["A" + " A" * 91],
        "a prompt of 98 tokens (3 of them thoughts) and 1 to generate need 99 positions, the",
    ),
    "too many": (
        ["A", "--max-new-tokens", "90"],
        "a prompt of 7 tokens (3 of them thoughts) and 90 to generate need 97",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_said_in_one_line(checkpoint, capsys, arguments, message):
    assert ask.main([checkpoint, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = captured.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("first_line", ["[", '[{"question": "q"}]', '{"question": "q"}', "{"])
def test_json_in_a_pipe_is_not_taken_for_questions(checkpoint, capsys, monkeypatch, first_line):
    monkeypatch.setattr(sys, "stdin", io.StringIO(first_line + "\n"))
    assert ask.main([checkpoint]) == 2
    assert "standard input holds JSON instead of lines of text: name a data file FILE.json" in capsys.readouterr().err


def test_a_question_too_long_is_refused_before_the_first_of_its_file_is_answered(checkpoint, tmp_path, capsys):
    path = tmp_path / "questions.txt"
    path.write_text("A\n" + "B " * 200)
    assert ask.main([checkpoint, "--file", str(path)]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("cot", ["--thoughts", "2"], "--thoughts 2: the model was trained by cot, without thoughts"),
        ("cot", ["--show-thoughts"], "--show-thoughts: the model was trained by cot, which has no thoughts to read"),
        ("pause", ["--show-thoughts"], "--show-thoughts: the model was trained by pause, which has no thoughts to"),
    ],
)
def test_thoughts_of_a_model_without_them_are_refused(make_model, capsys, method, option, message):
    assert ask.main([make_model(method), "q", *option]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_does_not_say_its_stage_is_asked_with_a_given_number_of_thoughts(make_model, capsys):
    folder = make_model(stage=None)
    assert ask.main([folder, "A"]) == 2
    assert "names no stage" in capsys.readouterr().err
    assert objects(capsys, folder, "A", "--thoughts", "1")[0]["n_thoughts"] == 1


def test_a_question_may_follow_the_options(checkpoint, capsys):
    assert ask.main([checkpoint, "--max-new-tokens", "1", "A"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def command(checkpoint: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "coconut_ds.ask", checkpoint, "--max-new-tokens", "3", *arguments]


def test_the_command_prints_answers_and_nothing_of_the_libraries(checkpoint, records):
    """Through a real pipe whose reader leaves after the first answer."""
    questions = "".join(record["question"] + "\n" for record in records)
    with subprocess.Popen(
        command(checkpoint),
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdin.write(questions)
        process.stdin.close()
        assert process.stdout.readline() == f"> {records[0]['question']}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


class Terminal:
    """The command on a pseudo-terminal, and a person who types when it asks."""

    def __init__(self, arguments: list[str], time_limit_s: float = 120):
        self.shown, self._read_up_to = "", 0
        self._deadline = time.monotonic() + time_limit_s
        self._end, terminal = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment(OMP_NUM_THREADS="1", TERM="dumb"),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, text: str) -> str:
        """What was shown since the last call, up to and with `text`."""
        while (place := self.shown.find(text, self._read_up_to)) < 0:
            ready, _, _ = select.select([self._end], [], [], max(0.0, self._deadline - time.monotonic()))
            assert ready, f"no {text!r} in time; shown: {self.shown!r}"
            # Bracketed paste is switched on and off by escapes that no person sees.
            self.shown += re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "", os.read(self._end, 65536).decode()).replace("\r\n", "\n")
        start, self._read_up_to = self._read_up_to, place + len(text)
        return self.shown[start : self._read_up_to]

    def interrupt(self) -> None:
        """Ctrl-C, once the command waits for what is typed: readline misses a signal on its way back to waiting."""
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < self._deadline, "it never waits"
            time.sleep(0.01)
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_ends_an_answer_and_not_the_loop(checkpoint, capsys, monkeypatch):
    (expected,) = objects(capsys, checkpoint, "second")
    asked, answered = [], TrainedModel.ask

    def answer_or_stop(self, questions, *arguments, **options):
        asked.append(questions[0].text)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return answered(self, questions, *arguments, **options)

    monkeypatch.setattr(TrainedModel, "ask", answer_or_stop)
    monkeypatch.setattr(sys, "stdin", Typed("first\nsecond\n"))
    assert ask.main([checkpoint, "--max-new-tokens", str(NEW_TOKENS)]) == 0
    assert asked == ["first", "second"]
    assert capsys.readouterr().out == f"{expected['text']}\n"


def test_ctrl_c_ends_the_answers_to_a_file(checkpoint, short_file, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainedModel, "ask", stop)
    assert ask.main([checkpoint, "--file", str(short_file)]) == 130


def test_a_person_asks_from_a_terminal(checkpoint, records, capsys):
    question = records[0]["question"]
    (expected,) = objects(capsys, checkpoint, question)
    terminal = Terminal([*command(checkpoint), "--max-new-tokens", str(NEW_TOKENS)])
    try:
        assert terminal.wait_for("> ") == "coconut, stage 4, 3 thoughts per question, greedy; Ctrl-D ends\n> "
        terminal.type(f"{question}\n")
        assert expected["cut"], "by random weights"
        warning = f"warning: cut off after {NEW_TOKENS} tokens, before its end; --max-new-tokens N allows more"
        warning += ", as far as the model has positions"
        assert terminal.wait_for("\n> ") == f"{question}\n{expected['text']}\n{warning}\n> "
        terminal.type("\n")
        assert terminal.wait_for("> ") == "\n> "
        terminal.type("A " * 100 + "\n")
        assert "error: question 'A A A" in terminal.wait_for("\n> ")
        terminal.type("half a question")
        terminal.wait_for("half a question")
        terminal.interrupt()
        assert terminal.wait_for("> ").endswith("\n> ")
        terminal.type("\x1b[A\x1b[A\n")  # the question again, two lines up in the history
        assert f"{expected['text']}\n{warning}\n> " in terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
