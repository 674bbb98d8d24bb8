"""Whole training runs of the published code, repeated through the trainer's own entry on 1 and 2 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import launching
import pytest

RUNS = (
    "coconut_keep",
    "coconut_reset_stage",
    "coconut_reset_epoch",
    "last_pass_window_reset_stage",
    "cot",
    "no_cot",
    "no_thoughts",
    "two_thoughts_unpadded",
)


def run_of(recipe: Path, name: str, config: dict, ranks: int, checkpointed: bool, folder: Path) -> dict:
    run = {key: value for key, value in config.items() if key != "reset"}
    run["reset_optimizer"] = False if config["reset"] == "never" else config["reset"]
    if name.startswith("last_pass_window"):
        run["latent_context"] = {"weights": [0.1, 0.3, 0.6], "scope": "last_pass"}
    return run | {
        "name": name,
        "save_path": str(folder),
        "model_id": str(recipe / "model"),
        "train_path": str(recipe / "train.json"),
        "val_path": str(recipe / "valid.json"),
        "batch_size_training": 8 // ranks,
        "activation_checkpointing": {"enabled": checkpointed},
        "max_new_tokens": 2,
        "debug": True,  # writes no checkpoints, which these runs do not need
    }


@pytest.mark.shared
@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "checkpointed"), [(1, True), (2, False)], ids=["1 recomputed", "2"])
@pytest.mark.parametrize("name", RUNS)
def test_published_run(shared, tmp_path, name, ranks, checkpointed):
    recipe = shared / "reference" / "recipe"
    published = json.loads((recipe / "losses.json").read_text())
    assert set(published) == set(RUNS)
    launching.train(run_of(recipe, name, published[name]["config"], ranks, checkpointed, tmp_path), tmp_path, ranks)
    steps = launching.events(tmp_path / name, "train_step")
    evaluations = launching.events(tmp_path / name, "eval")
    expected = published[name]["epochs"]
    assert [event["epoch"] for event in steps] == [epoch["epoch"] for epoch in expected]
    for step, evaluation, epoch in zip(steps, evaluations, expected, strict=True):
        assert step["stage"] == evaluation["stage"] == epoch["stage"]
        assert step["loss"] == pytest.approx(epoch["train_loss"], abs=1e-4), epoch
        assert evaluation["valid_loss"] == pytest.approx(epoch["valid_loss"], abs=1e-4), epoch
