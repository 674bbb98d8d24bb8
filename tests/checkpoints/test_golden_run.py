"""A run folder made by an earlier commit: the code of today reads it, evaluates its checkpoints and resumes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import launching
import pytest

from coconut_ds import train
from coconut_ds.checkpoints.store import Checkpoints, read_stored
from coconut_ds.commands import ask, compare, report

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "run_08a585f"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
RUN = Path("runs", "golden")
# Bit for bit on the machine that made it; CPUs of another type round sums differently.
CLOSE = 1e-5


@pytest.fixture
def golden(tmp_path, monkeypatch) -> Path:
    """A copy, in the working directory; its run file names everything relative to that."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(kind: str, key: str, value: str) -> dict[str, float]:
    return {str(event[key]): event[value] for event in launching.events(RUN, kind)}


def test_its_checkpoints_are_intact(golden):
    newest = Checkpoints(RUN, keep=None).newest_intact()
    assert newest == RUN / "checkpoints" / "epoch_0002_step_00000008"
    stored = read_stored(newest)
    assert (stored.progress.epochs, stored.progress.steps_in_epoch, stored.progress.step) == (2, 2, 8)
    assert (stored.train_batch_size, stored.updates, stored.scheduled, stored.loss_scale) == (8, 8, 8, {})


def test_it_resumes_to_its_end_with_the_losses_of_the_commit_that_made_it(golden, capsys):
    before = (RUN / "metrics.jsonl").read_bytes()
    assert train.main(["--run", "run.yaml"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    # Neither settings nor data have changed, as far as the code of today can tell.
    assert "changed" not in shown
    assert (RUN / "metrics.jsonl").read_bytes().startswith(before)
    resumed = {step: loss for step, loss in losses("train_step", "step", "loss").items() if int(step) > 8}
    assert resumed == pytest.approx(EXPECTED["losses"], rel=CLOSE)
    evaluated = {epoch: loss for epoch, loss in losses("eval", "epoch", "valid_loss").items() if int(epoch) > 2}
    assert evaluated == pytest.approx(EXPECTED["valid_losses"], rel=CLOSE)
    (end,) = launching.events(RUN, "end")
    assert (end["epochs"], end["step"]) == (4, 12)


def predictions(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RUN.parent / name).read_text().splitlines()]


def test_a_checkpoint_is_evaluated_as_when_it_was_made(golden, capsys):
    newest = RUN / "checkpoints" / "epoch_0001"
    options = ["only_eval=true", f"load_model_path={newest}", "name=evaluated"]
    assert train.main(["--run", "run.yaml", *options]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (recorded,) = [event for event in launching.events(RUN, "eval") if event["epoch"] == 1]
    assert result["valid_loss"] == pytest.approx(recorded["valid_loss"], rel=CLOSE)
    before = predictions("golden/predictions/epoch_0001.jsonl")
    # What later versions write beside it is theirs.
    shared = [{key: row[key] for key in before[0]} for row in predictions("evaluated/predictions/eval_valid.jsonl")]
    assert shared == before


def test_a_checkpoint_answers(golden, capsys):
    question = json.loads((golden / "small" / "valid.json").read_text())[0]["question"]
    assert ask.main([str(RUN / "checkpoints" / "epoch_0002_step_00000008"), question, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["question"] == question


def test_report_and_compare_read_the_folder(golden, capsys):
    shutil.copytree(RUN, "runs/other")
    assert report.main([str(RUN), "--out", "report"]) == 0, capsys.readouterr().err
    assert (golden / "report" / "report.html").is_file()
    assert compare.main(["first=runs/golden", "second=runs/other", "--json", "compared.json"]) == 0
    assert "first" in (golden / "compared.json").read_text()
