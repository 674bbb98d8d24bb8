"""Answers that `max_new_tokens` ended, without an EOS: counted by every command, and named with the limit."""

from __future__ import annotations

import json
from pathlib import Path

import launching
import prosqa
import pytest
import recorded
import tiny
import torch
from test_compare import prediction as compared
from test_compare import write_answers
from test_compare import write_run as write_compared
from test_pretrained import SETTINGS
from test_report_page import embedded, page_of
from test_summary import config as closing_config
from test_summary import evaluation as closing_evaluation

from coconut_ds.analysis import report_tables
from coconut_ds.checkpoints.weights import latent_settings
from coconut_ds.commands import ask, compare, inspect_latents
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.answers import is_cut
from coconut_ds.data.records import tokenize
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.backbone import add_markers
from coconut_ds.model.card import model_card
from coconut_ds.model.folder import write_folder
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer
from coconut_ds.runs.metrics import read_metrics
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.predictions import cut_answers, read_predictions
from coconut_ds.runs.read_run import read_run
from coconut_ds.training.summary import closing, lengths_text

WARNING = "answers reached max_new_tokens ({}) before their end and are compared as cut off there; raise max_new_tokens"
LONG = 24
SHAPE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 96, "dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prosqa.json"
    path.write_text(json.dumps(list(prosqa.generate(20, "0", n_nodes=5, min_steps=2, max_steps=2, form="edges"))))
    return path


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> str:
    """Random weights with which some answers end soon, some late and some never."""
    torch.manual_seed(2)
    texts = (text for record in json.loads(data.read_text()) for text in (record["question"], record["answer"]))
    backbone = scratch_backbone("llama", word_tokenizer(texts, 96), **SHAPE)
    add_markers(backbone)
    for parameter in backbone.model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight[backbone.tokenizer.eos_token_id] *= 2
    settings = RunConfig(method="coconut", max_latent_stage=2, pad_latent_to_max=True, train_path="t", val_path="v")
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder, backbone.model, backbone.tokenizer, {**latent_settings(settings), "stage": 2})
    return str(folder)


def evaluated(checkpoint: str, data: Path, limit: int, batch_size: int = 8):
    trained = TrainedModel.load(checkpoint)
    examples = tokenize(json.loads(data.read_text()), trained.tokenizer)
    parts = (trained.model, examples, trained.curriculum, trained.tokens, trained.tokenizer)
    return Evaluator(*parts, batch_size, limit).run(stage=2)


@pytest.fixture(scope="module")
def lengths(checkpoint, data) -> list[int]:
    """Tokens before the EOS of each answer; LONG where none came."""
    return [row["n_new_tokens"] for row in evaluated(checkpoint, data, LONG)[1]]


def test_an_eos_as_the_last_token_allowed_is_an_end():
    tokenizer = word_tokenizer(["a b"], 8)
    eos, word = tokenizer.eos_token_id, tokenizer("a")["input_ids"][0]
    assert is_cut([word, word, word], tokenizer)
    assert not is_cut([word, word, eos], tokenizer)
    assert not is_cut([eos, eos, eos], tokenizer)


@pytest.mark.parametrize("batch_size", [1, 8, 20], ids="{} at once".format)
def test_an_answer_is_cut_where_its_end_comes_after_the_limit(checkpoint, data, lengths, batch_size):
    assert len({min(length, 6) for length in lengths}) > 3, "answers of several lengths"
    for limit in (1, 2, 3, 5, LONG):
        evaluation, predictions = evaluated(checkpoint, data, limit, batch_size)
        assert [row["cut"] for row in predictions] == [length >= limit for length in lengths]
        assert all(row["n_new_tokens"] == limit for row in predictions if row["cut"])
        assert evaluation.n_cut == sum(length >= limit for length in lengths)
        assert evaluation.mean_thoughts == 2
        generated = sum(min(length, limit) for length in lengths) / len(lengths)
        assert evaluation.mean_new_tokens == pytest.approx(2 + generated), "the contract: thoughts and generated"


_ON_RANKS = """
import json
from coconut_ds.runtime import distributed
from coconut_ds.data.records import tokenize
from coconut_ds.engine.build import start_process_group
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.inference.trained_model import TrainedModel

start_process_group()
trained = TrainedModel.load(checkpoint)
examples = tokenize(json.load(open(data)), trained.tokenizer)
parts = (trained.model, examples, trained.curriculum, trained.tokens, trained.tokenizer)
outcome = Evaluator(*parts, 3, 3).run(stage=2)
result = outcome and [outcome[0].n_cut, [row["cut"] for row in outcome[1]]]
"""


@pytest.mark.ranks
def test_every_rank_s_answers_are_counted_once(checkpoint, data, lengths):
    cut = [length >= 3 for length in lengths[:19]]
    odd = data.with_name("odd.json")
    odd.write_text(json.dumps(json.loads(data.read_text())[:19]))
    assert launching.on_ranks(2, _ON_RANKS, checkpoint=checkpoint, data=str(odd)) == [[sum(cut), cut], None]


@pytest.mark.parametrize("more", [[], ["--sample", "--seed", "1"]], ids=["greedy", "sampled"])
def test_ask_says_which_answers_are_cut(checkpoint, data, capsys, more):
    def asked(limit: int) -> tuple[list[dict], str]:
        # Sampled answers depend on the batch's numbers alone, one question at a time.
        arguments = [checkpoint, "--file", str(data), "--json", "--max-new-tokens", str(limit), *more]
        assert ask.main(arguments) == 0
        captured = capsys.readouterr()
        return [json.loads(line) for line in captured.out.splitlines()], captured.err

    answers, said = asked(2)
    cut = [number for number, answer in enumerate(answers, start=1) if answer["cut"]]
    assert 0 < len(cut) < len(answers)
    assert all((answer["n_new_tokens"] == 2) == answer["cut"] for answer in answers)
    named = ", ".join(map(str, cut[:10])) + ", ..." * (len(cut) > 10)
    assert f"warning: {len(cut)} of 20 answers were cut off before their end (question {named}); --max-new-t" in said


def test_ask_warns_of_a_single_answer_and_leaves_stdout_to_the_answer(checkpoint, data, lengths, capsys):
    records = json.loads(data.read_text())
    by_length = {length: record["question"] for length, record in zip(lengths, records)}
    assert ask.main([checkpoint, by_length[LONG], "--max-new-tokens", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert captured.err.startswith("warning: cut off after 1 token, before its end; --max-new-tokens N allows more")
    short = min(by_length)
    assert ask.main([checkpoint, by_length[short], "--max-new-tokens", str(short + 1)]) == 0
    assert capsys.readouterr().err == ""


def test_inspect_counts_them_with_thoughts_replaced_and_without(checkpoint, data, lengths, tmp_path, capsys):
    arguments = [checkpoint, "--data", str(data), "--json", str(tmp_path / "found.json")]
    assert inspect_latents.main([*arguments, "--all", "--intervene", "--max-new-tokens", "3"]) == 0
    found, shown = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    n_cut = sum(length >= 3 for length in lengths)
    assert (found["n_cut"], found["max_new_tokens"]) == (n_cut, 3)
    warning = WARNING.replace("max_new_tokens", "--max-new-tokens").format(3)
    assert f"warning: {n_cut} of 20 {warning}" in shown
    assert "cut off\n" in shown
    replaced = [each["n_cut"] for each in found["interventions"]]
    assert all(0 <= each <= 20 for each in replaced)
    assert any(replaced)
    index = lengths.index(LONG)
    assert inspect_latents.main([*arguments, "--index", str(index), "--max-new-tokens", "3"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["cut"]
    assert "cut off after 3 tokens)" in capsys.readouterr().out


def evaluate(checkpoint: str, data: Path, folder: Path, limit: int) -> list[str]:
    """What an evaluation of its own prints."""
    run = {"only_eval": True, "method": "coconut", "load_model_path": checkpoint, "save_path": str(folder)}
    run |= {"train_path": str(data), "val_path": str(data), "max_latent_stage": 2, "pad_latent_to_max": True}
    return _printed(run | {"max_new_tokens": limit}, folder)


def _printed(run: dict, folder: Path) -> list[str]:
    done = launching.without_launcher(["coconut_ds/train.py", "--run", str(launching.write_run(run, folder))])
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_an_evaluation_warns_and_its_line_and_json_have_the_count(checkpoint, data, lengths, tmp_path):
    n_cut = sum(length >= 2 for length in lengths)
    line, warning, written, found = evaluate(checkpoint, data, tmp_path, 2)[-4:]
    found = json.loads(found)
    assert (found["n_cut"], found["mean_thoughts"]) == (n_cut, 2)
    generated = found["mean_new_tokens"] - 2
    lengths_said = f"{found['mean_new_tokens']:.1f} tokens per answer (2.0 thoughts + {generated:.1f} generated)"
    assert f"{lengths_said}, {n_cut} cut by max_new_tokens 2, " in line
    assert warning.startswith(f"warning: {n_cut} of 20 {WARNING.format(2)}")
    assert written.startswith("predictions: ")
    rows = [json.loads(row) for row in (tmp_path / "run" / "predictions" / "eval_prosqa.jsonl").open()]
    assert [row["cut"] for row in rows] == [length >= 2 for length in lengths]


def test_an_evaluation_without_cut_answers_says_nothing_of_them(checkpoint, data, lengths, tmp_path):
    records = json.loads(data.read_text())
    ending = [record for record, length in zip(records, lengths) if length < LONG]
    (tmp_path / "ending.json").write_text(json.dumps(ending))
    shown = evaluate(checkpoint, tmp_path / "ending.json", tmp_path, LONG)
    assert json.loads(shown[-1])["n_cut"] == 0
    assert not [line for line in shown if "warning" in line or " cut " in line]


def test_a_run_warns_once_and_at_its_end(tmp_path):
    run = tiny.run(tmp_path) | {"save_path": str(tmp_path), "num_epochs": 2, "max_new_tokens": 1, "debug": True}
    lines = _printed(run | {"deepspeed": "ds_configs/zero0.json"}, tmp_path)
    evaluations = launching.events(tmp_path / "run", "eval")
    assert [event["n_cut"] for event in evaluations] == [4, 4]
    assert [event["mean_thoughts"] for event in evaluations] == [0, 1]
    first, warning, second = (line for line in lines if line.startswith(("epoch ", "warning")))
    assert first.endswith(("1.0 tokens per answer, 4 cut by max_new_tokens 1", "best so far"))
    assert warning.startswith("warning: 4 of 4 " + WARNING.format(1))
    assert "2.0 tokens per answer (1.0 thoughts + 1.0 generated), 4 cut by max_new_tokens 1" in second
    assert [line for line in lines if line.startswith("  warning   4 of 4 " + WARNING.format(1))]
    table = [line.split() for line in lines if line.endswith("   4")]
    assert [row[-3:] for row in table] == [["1.0", "0.0", "4"], ["2.0", "1.0", "4"]]


def test_what_is_not_cut_is_said_as_before():
    assert lengths_text(4.0, 0.0, 0, 128) == "4.0 tokens per answer"
    assert lengths_text(9.0, 6.0, 0, 128) == "9.0 tokens per answer (6.0 thoughts + 3.0 generated)"
    with_cut = lengths_text(9.0, 6.0, 3, 3)
    assert with_cut == "9.0 tokens per answer (6.0 thoughts + 3.0 generated), 3 cut by max_new_tokens 3"


def test_the_table_of_an_older_run_has_dashes(tmp_path):
    line = closing(closing_config(tmp_path), RunFolder(tmp_path), [closing_evaluation(1, 0, 90)]).splitlines()[1]
    assert line.split() == ["0", "1-1", "90.0%", "90.0%", "4.0", "-", "-"]


def test_a_report_warns_and_shows_which(tmp_path):
    folder = recorded.write_run(tmp_path, n_questions=0, max_new_tokens=3)
    events = recorded.training(3)
    events[-2] |= {"n_cut": 40, "mean_thoughts": 1.0}
    recorded.write_events(folder, events)
    rows = [recorded.prediction(index, False, cut=index < 2) for index in range(5)]
    recorded.write_predictions(folder, "epoch_0003", rows)
    recorded.write_predictions(folder, "eval_test", [row | {"n_new_tokens": 7} for row in rows])
    run = read_run(folder)
    assert report_tables.warnings({"a": run}) == [
        f"a: epoch 3: 40 of 100 {WARNING.format(3)}, unless the model is not trained enough yet to end its answers.",
        f"a: eval_test: 2 of 5 {WARNING.format(7)}, unless the model is not trained enough yet to end its answers.",
    ]
    assert [row.cut for row in report_tables.stage_rows(run)] == [report_tables.NOTHING, report_tables.NOTHING, "40"]
    assert report_tables.other_sets(run) == [("eval_test", "0.0%", "5", "2")]
    page = page_of(folder)
    assert "<h2>Warnings</h2>" in page
    assert [row["cut"] for row in embedded(page)["rows"]] == [True, True, False, False, False] * 2


def test_older_records_load_without_the_keys(tmp_path):
    folder = recorded.write_run(tmp_path)
    recorded.write_predictions(folder, "eval_test", [recorded.prediction(0, True)])
    run = read_run(folder)
    assert run.problems == ()
    assert (run.last.n_cut, run.last.mean_thoughts, run.predictions["eval_test"][0].cut) == (None, None, None)
    assert report_tables.warnings({"a": run}) == []
    assert report_tables.other_sets(run) == [("eval_test", "100.0%", "1", report_tables.NOTHING)]
    assert "<h2>Warnings</h2>" not in page_of(folder)
    assert read_metrics(folder / "metrics.jsonl").n_damaged == 0
    assert cut_answers(read_predictions(folder / "predictions" / "eval_test.jsonl")) is None


def test_compare_has_a_column_and_a_note(tmp_path, capsys):
    new, old = write_compared(tmp_path, "new", 0, "xx.."), write_compared(tmp_path, "old", 0, "xx..")
    rows = [compared(index, index < 2, n_new_tokens=4, cut=index > 0) for index in range(4)]
    write_answers(tmp_path / "new", "epoch_0002", rows)
    assert compare.main([new, old, "--json", str(tmp_path / "out.json")]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    table = shown.split("\n\n")[1].splitlines()
    assert [line.split()[-1] for line in table] == ["cut", "3", "3", "-", "-"]
    assert f"- Warning, new: 3 of 4 {WARNING.format(4)}" in shown
    assert [(group["n_cut"], group["runs"][0]["n_cut"]) for group in found["groups"]] == [(3, 3), (None, None)]
    assert compare.main([old]) == 0
    assert "cut" not in capsys.readouterr().out


def test_the_model_card_says_it():
    results = SETTINGS["results"] | {"n_cut": 3}
    assert "thoughts included; 3 answers were cut by max_new_tokens (4)." in model_card(
        SETTINGS | {"results": results, "max_new_tokens": 4}, "a model"
    )
    assert "thoughts included.\n" in model_card(SETTINGS, "a model")
