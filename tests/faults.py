"""Kill a run again and again at random moments and show that it ends as if nothing had happened.

    python -m tests.faults --kills 20 --seed 0

A run of the published command on 2 ranks, in two stages, with dropout and checkpoints within epochs, is killed with
SIGKILL: one rank (its launcher then ends the other) or the whole job, inside a step, inside the writing of a
checkpoint, between its files and its manifest, while old ones are removed. It is started again each time, and each time
it is complete, its losses and weights are compared with those of a run that was left alone, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "preprocessing")]

import launching  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

_MOMENTS = (
    # Called once a step and a few times around each save, on every rank.
    ("faulthandler", "dump_traceback_later", 40),
    # Rank 0: every file of a checkpoint, its folders, `latest`; then the names.
    ("os", "fsync", 60),
    ("os", "replace", 12),
    # Rank 0: files of checkpoints that are removed.
    ("os", "unlink", 25),
    ("os", "rmdir", 10),
)


def run_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run of 4 epochs in 2 stages, 6 steps each, that saves every other step."""
    return {
        "name": name,
        "save_path": str(folder / "runs"),
        "coconut": True,
        "epochs_per_stage": 2,
        "max_latent_stage": 1,
        "uniform_prob": 0.3,
        "latent_context": {"weights": [0.6, 0.3, 0.1]},
        "model_id": "scratch",
        "model": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "dropout": 0.1},
        "train_path": str(folder / "data" / "prosqa_train.json"),
        "val_path": str(folder / "data" / "prosqa_valid.json"),
        "num_epochs": 4,
        "batch_size_training": 2,
        "gradient_accumulation_steps": 2,
        "lr": 1e-3,
        "lr_schedule": "linear",
        "max_grad_norm": 1.0,
        "reset_optimizer": "stage",
        "max_new_tokens": 4,
        "save_every_steps": 2,
        "keep_checkpoints": 2,
    } | changes


def faulty(run: dict[str, Any], folder: Path, fault: str, whole_job: bool = False) -> tuple[int, str]:
    """Exit status and output of a run in which `fault` happens (see `fault_site`).

    Once it has ended a rank, the other is killed as well if it is to end the `whole_job`, else sent SIGTERM.
    """
    command = ["coconut_ds/train.py", "--run", str(launching.write_run(run, folder))]
    done = launching.on_warm_ranks(2, command, 180, whole_job, FAULT=fault)
    return done.returncode, done.stdout


def outcome(folder: Path, name: str) -> tuple[list[tuple[int, float]], dict[str, torch.Tensor]]:
    """Every logged (step, loss), and the final weights."""
    run_folder = folder / "runs" / name
    losses = [(event["step"], event["loss"]) for event in launching.events(run_folder, "train_step")]
    return losses, load_file(run_folder / "checkpoints" / "epoch_0004" / "model" / "model.safetensors")


def assert_same(folder: Path, name: str, other: str) -> None:
    """Losses of every step and final weights of two runs, bit for bit."""
    (losses, weights), (expected, others) = outcome(folder, name), outcome(folder, other)
    assert len(losses) == len(expected)
    differing = [(mine, other) for mine, other in zip(losses, expected) if mine != other]
    assert not differing, f"{len(differing)} of {len(losses)} steps differ, the first of them {differing[0]}"
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def prepare(folder: Path, **changes: Any) -> None:
    """Data, and the run that is left alone."""
    tiny.write_symbolic(folder / "data", n_train=43, n_valid=5)
    launching.train(run_of(folder, "alone", **changes), folder / "alone", ranks=2)


def kill_again_and_again(folder: Path, kills: int, seed: int, **changes: Any) -> collections.Counter[str]:
    """Run to the end through `kills` deaths; where the checkpoints stood at each of them."""
    draw = random.Random(seed)
    run = run_of(folder, f"killed_{seed}", **changes)
    checkpoints = folder / "runs" / run["name"] / "checkpoints"
    places: collections.Counter[str] = collections.Counter()
    while sum(places.values()) < kills:
        module, function, most = draw.choice(_MOMENTS)
        rank = draw.randrange(2) if module == "faulthandler" else 0
        whole_job = draw.random() < 0.5
        fault = f"{rank} {module} {function} {draw.randint(1, most)} kill"
        status, output = faulty(run, folder / run["name"], fault, whole_job)
        if status == 0:
            # The moment never came: the run is complete, and starts afresh for the next one.
            assert_same(folder, run["name"], "alone")
            shutil.rmtree(folder / "runs" / run["name"])
            continue
        # A rank that lost another one may say so, once.
        assert output.count("Traceback") <= 1, output[-3000:]
        places[f"{'whole job' if whole_job else 'one rank'} {_place(checkpoints)}"] += 1
    launching.train(run, folder / run["name"], ranks=2)
    assert_same(folder, run["name"], "alone")
    return places


def _place(checkpoints: Path) -> str:
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    if any(name.endswith(".removed") for name in names):
        return "while an old checkpoint was removed"
    unfinished = [name for name in names if name.startswith("epoch") and name.endswith(".tmp")]
    if not unfinished:
        return "between checkpoints"
    return "after the manifest" if (checkpoints / unfinished[0] / "manifest.json").exists() else "before the manifest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deepspeed", default="ds_configs/zero2_offload.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), deepspeed=options.deepspeed)
        places = kill_again_and_again(Path(name), options.kills, options.seed, deepspeed=options.deepspeed)
    for place, count in sorted(places.items()):
        print(f"{count:>4} kills: {place}")
    print(f"{sum(places.values())} kills, losses of every step and final weights bit-identical to the run left alone")


if __name__ == "__main__":
    main()
