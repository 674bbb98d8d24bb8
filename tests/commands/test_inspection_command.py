"""The command on a small checkpoint folder: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import prosqa
import pytest
from test_inspection import EDGES, trained_on

from coconut_ds import Coconut, LatentContext
from coconut_ds.analysis.plots.thoughts import draw_averages, layered
from coconut_ds.commands.inspect_latents import main
from coconut_ds.data.records import tokenize
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.scratch import word_tokenizer
from coconut_ds.model.step_decoder import PREFIX, copy_of, write_decoder

SETTINGS = {"method": "coconut", "c_thought": 1, "max_latent_stage": 2, "pad_latent_to_max": True, "stage": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prosqa.json"
    shape = {"n_nodes": 5, "min_steps": 1, "max_steps": 2, "form": "edges"}
    file.write_text(json.dumps(list(prosqa.generate(6, "0", **shape))))
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), data)


def write_checkpoint(folder: Path, data: Path, **changes) -> Path:
    texts = [text for record in json.loads(data.read_text()) for text in (record["question"], record["answer"])]
    tokenizer = word_tokenizer(texts, n_positions=96)
    model = trained_on(tokenizer, LatentContext((0.6, 0.3, 0.1))).model
    model.training_settings = {**SETTINGS, **changes}
    model.save_pretrained(folder, tokenizer)
    return folder


def size_of(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def run(checkpoint: Path, data: Path, *arguments: str) -> int:
    return main([str(checkpoint), "--data", str(data), "--max-new-tokens", "5", *arguments])


def test_one_question_is_shown_written_and_drawn(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert (
        run(checkpoint, data, "--index", "2", "--top-k", "3", "--json", str(out), "--png", str(tmp_path / "a.png")) == 0
    )
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    record = json.loads(data.read_text())[2]
    assert found["question"] == record["question"]
    assert found["expected"] == record["answer"]
    assert [len(each["top"]) for each in found["thoughts"]] == [3, 3]
    assert [each["n_thoughts"] for each in found["next_steps"]] == [0, 1, 2]
    for after in found["next_steps"]:
        parts = after["step_masses"]
        assert parts["reachable"] + parts["unreachable"] + parts["no_node"] == pytest.approx(1)
    assert f"thought 2: norm {found['thoughts'][1]['norm']:.3g}" in shown
    assert "window:  thought 1 60.0%, <|start-latent|> 30.0%" in shown
    assert "Next step after k steps' worth of thoughts" in shown
    width, height = size_of(tmp_path / "a.png")
    assert width > height > 300


def test_a_whole_file_is_averaged_and_its_thoughts_replaced(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = ("--all", "--limit", "5", "--intervene", "--batch-size", "2", "--json", str(out))
    assert run(checkpoint, data, *arguments, "--png", str(tmp_path / "a.png")) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["n_questions"] == 5
    assert [each["n_questions"] for each in found["thoughts"]] == [5, 5]
    assert [each["mean"] for each in found["thoughts"][0]["window"]] == pytest.approx([0.6, 0.3, 0.1])
    assert [(each["by"], each["thought"]) for each in found["interventions"]][:3] == [
        ("zero", 1),
        ("zero", 2),
        ("zero", None),
    ]
    assert "all, another question's" in shown
    assert size_of(tmp_path / "a.png")[0] > 1000


def test_averages_are_means_over_the_single_questions(checkpoint, data, tmp_path):
    whole, one = tmp_path / "whole.json", tmp_path / "one.json"
    assert run(checkpoint, data, "--all", "--batch-size", "4", "--json", str(whole)) == 0
    norms, frontiers = [], []
    for index in range(6):
        assert run(checkpoint, data, "--index", str(index), "--json", str(one)) == 0
        found = json.loads(one.read_text())
        norms.append(found["thoughts"][1]["norm"])
        frontiers.append(found["next_steps"][1]["step_masses"]["frontier"])
    averaged = json.loads(whole.read_text())
    assert averaged["thoughts"][1]["norm"]["mean"] == pytest.approx(sum(norms) / 6, rel=1e-5)
    frontier = averaged["next_steps"][1]["step_masses"]["frontier"]
    assert frontier["mean"] == pytest.approx(sum(frontiers) / 6, rel=1e-4)
    assert frontier["low"] < frontier["mean"] < frontier["high"]


def test_answers_are_those_of_the_evaluation(checkpoint, data, tmp_path):
    trained = TrainedModel.load(str(checkpoint))
    records = json.loads(data.read_text())
    examples = tokenize(records, trained.tokenizer)
    parts = (trained.model, examples, trained.curriculum, trained.tokens, trained.tokenizer)
    _, predictions = Evaluator(*parts, batch_size=4, max_new_tokens=5).run(stage=3)
    for index in range(3):
        assert run(checkpoint, data, "--index", str(index), "--json", str(tmp_path / "one.json")) == 0
        assert json.loads((tmp_path / "one.json").read_text())["given"] == predictions[index]["given"]


def test_records_with_fewer_thoughts_than_others_are_averaged_over_those_that_have_them(data, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model", data, pad_latent_to_max=False)
    assert run(folder, data, "--all", "--intervene", "--json", str(tmp_path / "found.json")) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    n_long = sum(len(record["steps"]) == 2 for record in json.loads(data.read_text()))
    assert 0 < n_long < 6
    assert [each["n_questions"] for each in found["thoughts"]] == [6, n_long]
    assert [each["n_questions"] for each in found["next_steps"]] == [6, 6, n_long]
    tables = capsys.readouterr().out.split("\n\n")
    rows = {table.split()[0]: [line.split()[:2] for line in table.splitlines()] for table in tables[2:5]}
    for title, lines in rows.items():
        counted = [line for line in lines if line[0] in "k012"]
        assert counted == [["k", "questions"], ["0", "6"], ["1", "6"], ["2", f"{n_long}"]], title
    labels = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in draw_averages(found).axes]
    by_thought, by_k = ["1\nn=6", f"2\nn={n_long}"], ["0\nn=6", "1\nn=6", f"2\nn={n_long}"]
    assert labels == [by_thought] * 3 + [by_k] * 2 + [[*by_thought, "all\nn=6"]]


def test_without_a_graph_one_line_says_why(checkpoint, tmp_path, capsys):
    file = tmp_path / "plain.json"
    file.write_text(json.dumps([{key: EDGES[key] for key in ("question", "steps", "answer")}] * 2))
    for which in (("--index", "0"), ("--all",)):
        assert run(checkpoint, file, *which, "--png", str(tmp_path / f"{which[0]}.png")) == 0
        consequence = "; so no picture was drawn" if which[0] == "--index" else ""
        assert f"there is no graph: record 0 has no key idx_to_symbol{consequence}.\n" in capsys.readouterr().out
    assert not (tmp_path / "--index.png").exists()
    assert size_of(tmp_path / "--all.png")[0] > 1000


def test_a_graph_that_is_not_the_questions_gives_no_tables_and_is_counted(checkpoint, data, tmp_path, capsys):
    records = json.loads(data.read_text())
    for index in (2, 4):
        records[index]["edges"] = [edge[::-1] for edge in records[index]["edges"]]
    file = tmp_path / "reversed.json"
    file.write_text(json.dumps(records))
    assert run(checkpoint, file, "--all") == 0
    output = capsys.readouterr().out
    assert "because there is no graph: record 2 edges: '" in output
    assert "is not in the question (2 of 6 records have none).\n" in output
    assert "Next step after" not in output


def test_answers_that_cannot_be_read_back_are_named_and_markers_in_questions_refused(
    checkpoint, data, tmp_path, capsys
):
    records = json.loads(data.read_text())
    file = tmp_path / "other.json"
    file.write_text(json.dumps([records[0], {**records[1], "answer": "nowhere"}]))
    assert run(checkpoint, file, "--index", "1") == 0
    said = capsys.readouterr().err
    assert "1 of 1 answers cannot be read back from their own tokens" in said
    assert "(first: record 1: 'nowhere' is read as '')" in said
    assert run(checkpoint, data, "--index", "1") == 0
    assert "answers" not in capsys.readouterr().err
    file.write_text(json.dumps([records[0], {**records[1], "question": "a <|latent|>"}]))
    assert run(checkpoint, file, "--all") == 2
    assert (
        "question 'a <|latent|>' holds '<|latent|>', a token that sequences are built with" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--index", "6"), "--index 6: "),
        (("--index", "-1"), "has records 0 to 5"),
        (("--index", "0", "--intervene"), "--intervene is for a whole file; add --all"),
        (("--all", "--limit", "0"), "--limit 0: must be at least 1"),
        (("--all", "--limit", "1", "--intervene"), "two questions or more"),
        (("--all", "--seed", "-1"), "--seed -1: must be at least 0"),
        (("--index", "0", "--json", "nodir/a.json"), "--json nodir/a.json: there is no folder nodir"),
        (("--index", "0", "--png", "nodir/a.png"), "--png nodir/a.png: there is no folder nodir"),
        (("--index", "0", "--json", "/"), "--json /: is a folder"),
        (("--by-stage", "--written-steps"), "--written-steps is not for --by-stage"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_the_model_is_loaded(data, capsys, arguments, message):
    assert run(Path("no_checkpoint"), data, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_prompt_too_long_is_named(checkpoint, data, capsys):
    assert run(checkpoint, data, "--index", "0", "--max-new-tokens", "95") == 2
    assert capsys.readouterr().err.startswith("error: record 0: a prompt of")


def test_the_tables_are_printed_also_where_a_file_cannot_be_written(checkpoint, data, capsys):
    assert run(checkpoint, data, "--index", "0", "--json", "/dev/full") == 2
    captured = capsys.readouterr()
    assert "Next step after k steps' worth of thoughts" in captured.out
    assert captured.err == "error: /dev/full cannot be written: No space left on device\n"


def test_a_reader_that_leaves_ends_the_command_quietly_with_its_files_written(checkpoint, data, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(checkpoint, data, "--index", "0", "--json", str(tmp_path / "found.json")) == 1
    assert json.loads((tmp_path / "found.json").read_text())["index"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "cot"}, "was trained by cot, which has no thoughts to inspect"),
        ({"method": "pause_as_thought"}, "was trained by pause_as_thought, which has no thoughts"),
        ({"stage": 0}, "no thoughts in stage 0"),
    ],
)
def test_a_model_without_thoughts_is_refused(data, tmp_path, capsys, changes, message):
    assert run(write_checkpoint(tmp_path / "model", data, **changes), data, "--index", "0") == 2
    assert message in capsys.readouterr().err


def test_a_stage_without_thoughts_can_be_given_some(data, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model", data, stage=0)
    assert run(folder, data, "--index", "0", "--thoughts", "1") == 0
    assert "thought 1: norm" in capsys.readouterr().out


def test_steps_are_written_by_the_model_or_by_the_decoder_that_the_checkpoint_has(data, tmp_path, capsys):
    folder, out = write_checkpoint(tmp_path / "model", data), tmp_path / "found.json"
    assert run(folder, data, "--index", "2", "--written-steps", "--json", str(out)) == 0
    record, found = json.loads(data.read_text())[2], json.loads(out.read_text())
    last = "\n".join(record["steps"][1:]) or record["answer"]
    assert [each["expected"].removeprefix("### ") for each in found["written_steps"]] == [record["steps"][0], last]
    assert "Written by the model from the thoughts of each step alone\n" in capsys.readouterr().out
    model = Coconut.from_pretrained(str(folder))
    weights = {f"{PREFIX}{name}": value for name, value in copy_of(model.base_causallm).named_parameters()}
    write_decoder({name: value.detach().clone().fill_(0.01) for name, value in weights.items()}, folder)
    assert run(folder, data, "--all", "--written-steps", "--json", str(out)) == 0
    assert [each["n_questions"] for each in json.loads(out.read_text())["written_steps"]] == [6, 6]
    assert (
        "Written by the copied decoder from the thoughts of each step alone: share that is" in capsys.readouterr().out
    )


def test_a_graph_is_laid_out_by_distance_and_unreachable_nodes_stand_beside_it():
    edges = [[0, 1], [0, 2], [1, 3], [4, 5], [5, 3], [6, 4]]
    names = [f"n{node}" for node in range(7)]
    places = layered({"idx_to_symbol": names, "edges": edges, "distances": {"0": 0, "1": 1, "2": 1, "3": 2}})
    assert [places[node][1] for node in range(7)] == [0, 1, 1, 2, 1, 2, 0]
    assert len(set(places.values())) == 7
    assert max(places[node][0] for node in (0, 1, 2, 3)) < min(places[node][0] for node in (4, 5, 6))
