"""A small hops model learns to follow edges with thoughts, cannot without its own, and pause tokens do not do it."""

from __future__ import annotations

from pathlib import Path

import hops
import launching
import pytest

from coconut_ds.analysis.plots.walks import walk_heat
from coconut_ds.commands import inspect_latents, report
from coconut_ds.runs.read_run import read_run

# Two trainings of most of a minute each, each a rank alone: not part of the quick tests, and to be begun early.
pytestmark = pytest.mark.ranks

DATA = "--nodes 6 --symbols 7 --hops 2 --train 2560 --valid 50 --test 100"


def run_of(folder: Path, method: str) -> dict:
    thoughts = {"latent_context": {"weights": [0.6, 0.3, 0.1]}, "latent_norm": "embedding"}
    return {
        "name": method,
        "save_path": str(folder),
        "method": method,
        **(thoughts if method == "coconut" else {}),
        "c_thought": 2,
        "epochs_per_stage": 3,
        "max_latent_stage": 2,
        "pad_latent_to_max": True,
        "uniform_prob": 0.1,
        "model_id": "scratch",
        "model": {"architecture": "llama", "n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 48},
        "train_path": str(folder / "hops_train.json"),
        "val_path": str(folder / "hops_valid.json"),
        "test_path": str(folder / "hops_test.json"),
        "num_epochs": 12,
        "batch_size_training": 32,
        "lr": 1e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 50,
        "adam_betas": [0.9, 0.98],
        "max_grad_norm": 1.0,
        "deepspeed": "ds_configs/zero0.json",
        "eval_batch_size": 100,
        "max_new_tokens": 12,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and a run of each method in the same recipe."""
    folder = tmp_path_factory.mktemp("hops")
    assert hops.main(["generate", "--out", str(folder), *DATA.split()]) == 0
    for method in ("coconut", "pause_as_thought"):
        run_file = launching.write_run(run_of(folder, method), folder / f"{method}_file")
        done = launching.without_launcher(["coconut_ds/train.py", "--run", str(run_file)], threads=1)
        assert done.returncode == 0, done.stdout[-4000:]
    return folder


def test_thoughts_are_needed(folder, capsys):
    inspect_latents.inspect_by_stage(folder / "coconut")
    shown = capsys.readouterr().out
    use = read_run(folder / "coconut").thought_use
    assert use is not None
    assert [each.n_thoughts for each in use.stages] == [0, 2, 4]
    last = use.stages[-1]
    assert last.own.share == 1.0
    assert last.exchanged is not None
    assert last.exchanged.share < 0.5
    assert last.followed is not None
    assert last.followed.share > 0.9, "the answer is in the thoughts"
    assert use.sentence in shown
    # After the thoughts of j steps it is at the node after j edges.
    shares, kinds = walk_heat(use.file["next_steps"])
    assert kinds == ["step", "step", "answer"]
    assert all(shares[j][j] > 0.9 for j in range(3)), shares


def test_pause_tokens_in_the_same_recipe_do_not_do_it(folder):
    evaluations = read_run(folder / "pause_as_thought").metrics.evaluations
    assert max(each.accuracy for each in evaluations if each.stage >= 2) < 0.7


def test_the_report_shows_what_the_exchange_did(folder):
    inspect_latents.inspect_by_stage(folder / "coconut", limit=50)
    assert report.main([str(folder / "coconut")]) == 0
    page = (folder / "coconut" / "report" / "report.html").read_text()
    assert "Accuracy with own and with exchanged thoughts" in page
    for name in ("exchange", "question", "walk"):
        assert (folder / "coconut" / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
