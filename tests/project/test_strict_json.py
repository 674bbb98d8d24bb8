"""Every line of JSON that is written is JSON: null where a float is not finite, in every writer; readers take it."""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launching
import numpy as np
import prosqa
import pytest
import recorded
import tiny
import torch
from test_compare import write_run as write_compared
from test_inspection_command import write_checkpoint
from test_pretrained import SETTINGS, words, write_run_folder
from test_report_page import page_of

from coconut_ds import strict_json, train
from coconut_ds.analysis import intervals
from coconut_ds.analysis.inspection import readings
from coconut_ds.analysis.plots.canvas import LIGHT, png
from coconut_ds.analysis.plots.training import pictures
from coconut_ds.analysis.report_tables import head
from coconut_ds.checkpoints.store import Progress, Stored, _write_progress
from coconut_ds.commands import ask, compare, inspect_latents
from coconut_ds.commands.export import export
from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.run_config import RunConfig
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.model import thought_readings
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.folder import stored_settings
from coconut_ds.model.thought_readings import vocabulary_reading
from coconut_ds.runs.metrics import read_metrics
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.predictions import read_predictions
from coconut_ds.runs.read_run import read_run
from coconut_ds.runs.tracker import Tracker, write_predictions
from coconut_ds.training.session import _record_start

ROOT = Path(__file__).resolve().parents[2]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def strictly(text: str) -> Any:
    """The value of a JSON text; NaN and Infinity, which Python would read, are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [*NOT_FINITE, np.float64("nan")], ids=repr)
def test_a_float_that_is_not_finite_is_null_wherever_it_stands(value):
    nested = {"a": value, "b": [1.5, value, (value, {"c": value})], "d": "NaN", "e": None, "f": 10**400, "g": True}
    expected = {"a": None, "b": [1.5, None, [None, {"c": None}]], "d": "NaN", "e": None, "f": 10**400, "g": True}
    assert strictly(strict_json.dumps(nested)) == expected
    assert strictly(strict_json.dumps(nested, indent=2)) == expected
    assert strictly(strict_json.dumps(value)) is None
    assert list(strictly(strict_json.dumps({value: 1}))) == [str(float(value))]


def test_what_is_finite_is_written_as_ever():
    value = {"b": [0.1, -0.0, 1e308, 5e-324, 7, "ä\n\ud800"], "a": {"1": ()}}
    for options in ({}, {"indent": 2}, {"ensure_ascii": False, "sort_keys": True}):
        assert strict_json.dumps(value, **options) == json.dumps(value, **options)
    with pytest.raises(TypeError):
        strict_json.dumps({"a": {1, 2}})


def writers_of_json(path: Path) -> list[int]:
    """Lines that write JSON by another way than `strict_json`."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            lines += [node.lineno for alias in node.names if alias.name in ("dump", "dumps", "JSONEncoder")]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json":
            lines += [node.lineno] * (node.attr in ("dump", "dumps", "JSONEncoder"))
        if isinstance(node, ast.Attribute) and node.attr in ("model_dump_json", "to_json"):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("folder", ["coconut_ds", "benchmarks"])
def test_nothing_else_writes_json(folder):
    owner = ROOT / "coconut_ds" / "strict_json.py"
    found = {path.name: lines for path in (ROOT / folder).rglob("*.py") if (lines := writers_of_json(path))}
    assert found.pop(owner.name, None) == (writers_of_json(owner) if folder == "coconut_ds" else None)
    assert found == {}


@pytest.mark.parametrize("value", NOT_FINITE)
def test_metrics(tmp_path, value):
    tracker = Tracker(RunConfig(save_path=str(tmp_path), name="run"), is_main=True)
    tracker.log(**recorded.train_step(1, 1, grad_norm=value, lr=value))
    tracker.log(**recorded.evaluation(1, valid_loss=value, latent_weights=[value, 0.5]))
    tracker.close()
    step, evaluation = map(strictly, tracker.path.read_text().splitlines())
    assert (step["grad_norm"], step["lr"], step["loss"]) == (None, None, 4.0)
    assert (evaluation["valid_loss"], evaluation["latent_weights"]) == (None, [None, 0.5])
    found = read_metrics(tracker.path)
    assert found.n_damaged == 0
    assert math.isnan(found.evaluations[0].valid_loss)
    assert math.isnan(found.evaluations[0].latent_weights[0])


@pytest.mark.parametrize("value", NOT_FINITE)
def test_predictions(tmp_path, value):
    write_predictions(
        RunFolder(tmp_path / "run"), "epoch_0001", [recorded.prediction(0, True, thoughts=[[["a", value], ["b", 0.5]]])]
    )
    path = tmp_path / "run" / "predictions" / "epoch_0001.jsonl"
    assert strictly(path.read_text())["thoughts"] == [[["a", None], ["b", 0.5]]]
    ((first, second),) = read_predictions(path)[0].thoughts
    assert (first[0], math.isnan(first[1]), second) == ("a", True, ("b", 0.5))


@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_descriptions_of_a_run_and_of_a_checkpoint(tmp_path, value):
    data = tmp_path / "data.json"
    data.write_text("[]")
    config = RunConfig(save_path=str(tmp_path), name="run", train_path=str(data), val_path=str(data))
    run = SimpleNamespace(config=config, ds_config={"gradient_clipping": value}, sizes=BatchSizes(1, 1, 1))
    _record_start(
        run, RunFolder(config.run_folder), SimpleNamespace(train_set=[], valid_set=[], hashes=(None, None)), None
    )
    assert strictly((tmp_path / "run" / "ds_config.json").read_text()) == {"gradient_clipping": None}
    assert strictly((tmp_path / "run" / "environment.json").read_text())["packages"]
    _write_progress(tmp_path, Stored(Progress(best_accuracy=value), 8, 0, 0, 0, {"cur_scale": value}))
    assert strictly((tmp_path / "progress.json").read_text())["loss_scale"] == {"cur_scale": None}


@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_settings_of_a_model_and_what_is_made_of_them(tmp_path, value):
    results = SETTINGS["results"] | {"valid_loss": value}
    write_run_folder(tmp_path / "model", words(), results=results)
    assert strictly((tmp_path / "model" / "coconut.json").read_text())["results"]["valid_loss"] is None
    assert "loss not finite, 5.0 tokens an answer" in (tmp_path / "model" / "README.md").read_text()
    export(str(tmp_path / "model"), tmp_path / "exported", "unused")
    assert "loss not finite, 5.0 tokens an answer" in (tmp_path / "exported" / "README.md").read_text()
    assert strictly((tmp_path / "exported" / "coconut.json").read_text())["results"]["valid_loss"] is None
    # As it was written before.
    (tmp_path / "model" / "coconut.json").write_text(json.dumps(SETTINGS | {"results": results}))
    assert stored_settings(str(tmp_path / "model"))["results"].keys() == results.keys()


@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_json_of_compare(tmp_path, monkeypatch, capsys, value):
    monkeypatch.setattr(intervals, "wilson", lambda correct, total: (value, 1.0))
    folder = write_compared(tmp_path, "a_seed0", 0, "xx..")
    assert compare.main([folder, "--json", str(tmp_path / "out.json")]) == 0
    capsys.readouterr()
    assert strictly((tmp_path / "out.json").read_text())["groups"][0]["runs"][0]["interval"] == [None, 1.0]


@pytest.mark.parametrize("value", [None, *NOT_FINITE])
def test_a_report_takes_records_that_are_not_finite_and_leaves_gaps(tmp_path, value):
    """null as it is written now, and NaN and Infinity as they were written before."""
    folder = recorded.write_run(tmp_path)
    recorded.write_predictions(folder, "epoch_0003", [recorded.prediction(0, False, thoughts=[[["a", value]]])])
    events = [*recorded.training(3), {"event": "end", "epochs": 3, "step": 12}]
    events[2] |= {"loss": value, "grad_norm": value}
    events[-3] |= {"valid_loss": value, "latent_weights": [value, 1.0]}
    recorded.write_events(folder, events)
    run = read_run(folder)
    assert run.problems == ()
    assert head("a", run).valid_loss in ("nan", "inf", "-inf")
    picture = next(each for each in pictures({"a": run}) if each.name == "loss")
    assert png(picture.draw(LIGHT)).startswith(b"\x89PNG")
    first = next(line for line in picture.draw(LIGHT).axes[0].lines if list(line.get_xdata()) == [1, 2, 3, 4])
    assert [math.isfinite(y) for y in first.get_ydata()] == [True, False, True, True]
    (row,) = strictly(re.search(r'id="data">(.*?)</script>', page_of(folder), re.DOTALL)[1])["rows"]
    assert row["thoughts"] == [[["a", None]]]


@pytest.fixture
def overflown(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A model whose head and loss overflow, and questions for it."""

    def of_overflow(model: Coconut, states: torch.Tensor) -> torch.Tensor:
        return vocabulary_reading(model, states) * math.nan

    for module in (thought_readings, readings):
        monkeypatch.setattr(module, "vocabulary_reading", of_overflow)
    monkeypatch.setattr(Evaluator, "loss", lambda evaluator, stage: math.inf)
    data = tmp_path / "prosqa.json"
    data.write_text(json.dumps(list(prosqa.generate(3, "0", n_nodes=5, min_steps=2, max_steps=2, form="edges"))))
    return write_checkpoint(tmp_path / "model", data), data


def test_the_lines_of_ask(overflown, capsys):
    folder, data = overflown
    assert ask.main([str(folder), "--file", str(data), "--json", "--show-thoughts", "--max-new-tokens", "3"]) == 0
    answers = [strictly(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["thoughts"][0][0][1] for answer in answers] == [None] * 3


@pytest.mark.parametrize("which", [["--index", "1"], ["--all", "--intervene"]], ids=["one", "all"])
def test_the_json_of_inspect(overflown, tmp_path, capsys, which):
    folder, data = overflown
    arguments = [str(folder), "--data", str(data), "--max-new-tokens", "3", "--json", str(tmp_path / "out.json")]
    assert inspect_latents.main([*arguments, *which]) == 0
    entropy = strictly((tmp_path / "out.json").read_text())["thoughts"][0]["entropy_bits"]
    assert (entropy["mean"] if "--all" in which else entropy) is None


@pytest.mark.usefixtures("in_process")
def test_the_line_of_an_evaluation(overflown, tmp_path, capsys):
    folder, data = overflown
    run = {
        "only_eval": True,
        "method": "coconut",
        "load_model_path": str(folder),
        "val_path": str(data),
        "save_path": str(tmp_path),
    }
    run |= {"max_latent_stage": 2, "pad_latent_to_max": True, "max_new_tokens": 3, "precision": "fp32"}
    run |= {"latent_context": {"weights": [0.6, 0.3, 0.1]}, "train_path": str(data)}
    status = train.main(["--run", str(launching.write_run(run, tmp_path))])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert strictly(captured.out.splitlines()[-1])["valid_loss"] is None
    rows = (tmp_path / "run" / "predictions" / "eval_prosqa.jsonl").read_text().splitlines()
    assert [strictly(row)["thoughts"][0][0][1] for row in rows] == [None] * 3


@pytest.mark.usefixtures("in_process")
def test_the_configurations_of_a_dry_run(tmp_path, capsys):
    settings = json.loads((ROOT / "ds_configs" / "zero0.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(settings | {"prescale_gradients": math.inf}))
    run = tiny.run(tmp_path) | {"deepspeed": str(tmp_path / "ds.json"), "save_path": str(tmp_path)}
    assert train.main(["--run", str(launching.write_run(run, tmp_path)), "--dry-run"]) == 0
    assert strictly(capsys.readouterr().out.split("# deepspeed\n")[1])["prescale_gradients"] is None


@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_line_of_a_benchmark(monkeypatch, capsys, value):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import workload

    workload.finish(argparse.Namespace(tokenizer="there"), ratio=value, rows=[{"seconds": value}])
    found = strictly(capsys.readouterr().out)
    assert (found["ratio"], found["rows"]) == (None, [{"seconds": None}])
