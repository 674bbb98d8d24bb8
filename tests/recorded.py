"""Run folders as a run leaves them, written by hand: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

STEPS_PER_EPOCH = 4


def write_run(
    folder: Path, name: str = "a", epochs: int = 3, n_questions: int = 6, finished: bool = True, **config: Any
) -> Path:
    """A run of `epochs` epochs, a stage each, whose accuracy grows from one to the next; its folder."""
    run = folder / name
    (run / "predictions").mkdir(parents=True)
    values = {
        "name": name,
        "save_path": str(folder),
        "method": "coconut",
        "num_epochs": max(epochs, 1),
        "max_latent_stage": 2,
    }
    values |= {"train_path": "train.json", "val_path": "valid.json", **config}
    (run / "run_config.yaml").write_text(yaml.safe_dump(values))
    (run / "environment.json").write_text(json.dumps({"python": "3.11.7", "packages": {"torch": "2.13.0"}, "gpus": []}))
    write_events(
        run, [*training(epochs), *([{"event": "end", "epochs": epochs, "step": 4 * epochs}] if finished else [])]
    )
    if epochs:
        rows = [prediction(index, correct=index % 3 != 0) for index in range(n_questions)]
        write_predictions(run, f"epoch_{epochs:04d}", rows)
    return run


def training(epochs: int) -> list[dict[str, Any]]:
    """The events of whole epochs, 4 steps each."""
    events: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        done = STEPS_PER_EPOCH * (epoch - 1)
        events.append(
            {"event": "stage", "epoch": epoch, "stage": epoch - 1, "step": done, "n_thoughts": min(epoch - 1, 2)}
            | {"switch_time_s": 0.01, "optimizer_reset": False}
        )
        events += [train_step(epoch, done + place) for place in range(1, STEPS_PER_EPOCH + 1)]
        events.append(evaluation(epoch))
        step = epoch * STEPS_PER_EPOCH
        events.append({"event": "checkpoint", "epoch": epoch, "step": step, "path": "there", "seconds": 0.5})
    return events


def train_step(epoch: int, step: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "train_step",
        "epoch": epoch,
        "stage": epoch - 1,
        "step": step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "step_time_s": 0.5,
        "peak_memory_gib": 1.5,
        "loss": 4.0 / step,
        "n_targets": 32,
        "n_tokens": 100,
        "padding_share": 0.25,
        **changes,
    }


def evaluation(epoch: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "eval",
        "epoch": epoch,
        "stage": epoch - 1,
        "step": STEPS_PER_EPOCH * epoch,
        "valid_loss": 1.0 / epoch,
        "accuracy": 1 - 0.5 / epoch,
        "cot_match": 0.0,
        "n_correct": 90,
        "n_total": 100,
        "mean_new_tokens": 4.0,
        "examples_per_s": 50.0,
        "accuracy_by_steps": {"2": 0.9, "3": 0.7},
        **changes,
    }


def prediction(index: int, correct: bool, **changes: Any) -> dict[str, Any]:
    thoughts = [[["n3>n7", 0.91], ["n1>n2", 0.05], ["n2>n4", 0.01]], [["n7>n5", 0.62], ["n3", 0.2], ["n4", 0.1]]]
    return {
        "index": index,
        "question": f"question {index}: is it n{index} or n{index + 1}?",
        "expected": f"n{index}",
        "given": f"n{index}" if correct else f"n{index + 1}",
        "correct": correct,
        "cot_correct": False,
        "text": f"### n{index}",
        "n_steps": 2 + index % 2,
        "n_thoughts": 2,
        "n_new_tokens": 3,
        "thoughts": thoughts,
        **changes,
    }


def write_events(run: Path, events: list[dict[str, Any]]) -> Path:
    path = run / "metrics.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def write_predictions(run: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = run / "predictions" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
