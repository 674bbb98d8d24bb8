"""The published command on real ranks: two stages, killed after the first, started again, same run; then evaluation."""

from __future__ import annotations

import json
import time
from pathlib import Path

import launching
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.ranks

N_VALID = 7
"""Does not divide by two ranks."""


def run_of(folder: Path, name: str, **changes) -> dict:
    return {
        "name": name,
        "save_path": str(folder / "runs"),
        "coconut": True,
        "epochs_per_stage": 2,
        "max_latent_stage": 1,
        "pad_latent_to_max": True,
        "latent_context": {"weights": [0.6, 0.3, 0.1]},
        "model_id": "scratch",
        # Dropout, so that a resumed run has to bring its random numbers back.
        "model": {"architecture": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "dropout": 0.1},
        "train_path": str(folder / "data" / "prosqa_train.json"),
        "val_path": str(folder / "data" / "prosqa_valid.json"),
        "num_epochs": 4,
        "batch_size_training": 4,
        "gradient_accumulation_steps": 2,
        "lr": 1e-3,
        "lr_schedule": "linear",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "reset_optimizer": "stage",
        "uniform_prob": 0.2,
        "max_new_tokens": 8,
        "eval_batch_size": 3,
        "wandb": "offline",
    } | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and a run of two stages without interruption."""
    folder = tmp_path_factory.mktemp("end_to_end")
    tiny.write_symbolic(folder / "data", n_train=43, n_valid=N_VALID)
    launching.train(run_of(folder, "unbroken"), folder, ranks=2)
    return folder


def losses(run_folder: Path) -> list[tuple[int, int, float]]:
    return [(e["epoch"], e["step"], e["loss"]) for e in launching.events(run_folder, "train_step")]


def test_killed_after_the_first_stage_and_started_again_it_is_the_same_run(folder):
    run = run_of(folder, "broken")
    run_folder = folder / "runs" / "broken"
    process = launching.start(launching.train_command(launching.write_run(run, folder / "broken"), 2))
    try:
        wait_for_step(run_folder, process, epoch=3)
    finally:
        launching.end(process)
        process.communicate()
    complete = sorted(path.name for path in (run_folder / "checkpoints").glob("epoch_????"))
    assert complete == ["epoch_0001", "epoch_0002"]
    output = launching.train(run, folder / "broken", ranks=2)
    assert f"resuming from {run_folder / 'checkpoints' / 'epoch_0002'}" in output
    assert losses(run_folder) == losses(folder / "runs" / "unbroken")
    for kind in ("stage", "eval"):
        mine, other = (launching.events(folder / "runs" / name, kind) for name in ("broken", "unbroken"))
        assert [e["epoch"] for e in mine] == [e["epoch"] for e in other]
    figures = [[(e["valid_loss"], e["accuracy"]) for e in launching.events(folder / "runs" / n, "eval")] for n in NAMES]
    assert figures[0] == figures[1]


NAMES = ("broken", "unbroken")


def wait_for_step(run_folder: Path, process, epoch: int) -> None:
    """Until the run has taken a step in `epoch`."""
    metrics = run_folder / "metrics.jsonl"
    give_up = time.monotonic() + launching.TIME_LIMIT_S
    while not (metrics.exists() and f'"train_step", "epoch": {epoch}' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_the_run_folder_keeps_its_contract(folder):
    run_folder = folder / "runs" / "unbroken"
    steps = launching.events(run_folder, "train_step")
    assert [event["step"] for event in steps] == list(range(1, 13)), "three steps an epoch, the last one smaller"
    expected = {"epoch", "stage", "step", "loss", "lr", "grad_norm", "n_targets", "n_tokens", "padding_share"}
    expected |= {"step_time_s", "peak_memory_gib"}
    assert set(steps[0]) - {"event"} == expected
    assert all(event["grad_norm"] > 0 and event["peak_memory_gib"] > 0 for event in steps)
    assert all(event["n_tokens"] > event["n_targets"] > 0 for event in steps)
    # Warmup over two steps, then linear to the end of the stage; the reset starts it again.
    rates = [round(event["lr"] / 1e-3, 4) for event in steps]
    assert rates == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25] * 2
    stages = launching.events(run_folder, "stage")
    assert [(e["epoch"], e["stage"], e["n_thoughts"], e["optimizer_reset"]) for e in stages] == [
        (1, 0, 0, False),
        (3, 1, 1, True),
    ]
    assert all(event["switch_time_s"] < 1 for event in stages)
    evaluations = launching.events(run_folder, "eval")
    assert [event["n_total"] for event in evaluations] == [N_VALID] * 4
    contract = "epoch stage valid_loss accuracy cot_match n_correct n_total mean_new_tokens examples_per_s"
    assert set(contract.split()) <= set(evaluations[0])
    checkpoints = launching.events(run_folder, "checkpoint")
    assert [(e["epoch"], e["step"]) for e in checkpoints] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    predictions = [json.loads(line) for line in (run_folder / "predictions" / "epoch_0004.jsonl").open()]
    assert [row["index"] for row in predictions] == list(range(N_VALID))
    for name in ("run_config.yaml", "ds_config.json", "environment.json"):
        assert (run_folder / name).is_file()
    assert json.loads((run_folder / "ds_config.json").read_text())["train_batch_size"] == 16
    assert list((run_folder / "wandb").glob("offline-run-*/*.wandb"))


def test_the_exported_model_is_plain_transformers(folder):
    exported = folder / "runs" / "unbroken" / "checkpoints" / "epoch_0004" / "model"
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    settings = json.loads((exported / "coconut.json").read_text())
    assert settings["method"] == "coconut"
    assert settings["stage"] == 1
    assert settings["latent_context"] == {"weights": [0.6, 0.3, 0.1], "scope": "sequence", "learned": False}
    assert all(value.dtype == torch.float32 for value in load_file(exported / "model.safetensors").values())


def test_evaluating_the_checkpoint_gives_the_run_s_own_figures(folder):
    run_folder = folder / "runs" / "unbroken"
    last = launching.events(run_folder, "eval")[-1]
    run = yaml.safe_load((run_folder / "run_config.yaml").read_text())
    checkpoint = run_folder / "checkpoints" / "epoch_0004"
    overrides = ["only_eval=true", f"load_model_path={checkpoint}", "eval_batch_size=2"]
    output = launching.train(run, folder / "evaluated", 1, *overrides)
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"path"')))
    assert found["stage"] == 1
    assert found["valid_loss"] == pytest.approx(last["valid_loss"], abs=1e-5)
    assert found["n_correct"] == last["n_correct"]
    assert found["n_total"] == N_VALID
    texts = [
        [json.loads(line)["text"] for line in (run_folder / "predictions" / f"{name}.jsonl").open()]
        for name in ("eval_prosqa_valid", "epoch_0004")
    ]
    assert texts[0] == texts[1]
    refused = launching.train(run, folder / "evaluated", 1, *overrides, "c_thought=2", expect=2)
    assert "c_thought: trained with 1, the run says 2" in refused


def test_save_only_improve_and_keep_checkpoints_in_bf16(folder):
    changes = {"save_only_improve": True, "keep_checkpoints": 1, "precision": "bf16", "wandb": "disabled"}
    launching.train(run_of(folder, "best", **changes), folder / "best", 1)
    run_folder = folder / "runs" / "best"
    best, saved = -1.0, []
    for event in launching.events(run_folder, "eval"):
        if event["accuracy"] > best:
            best = event["accuracy"]
            saved.append(event["epoch"])
    assert [event["epoch"] for event in launching.events(run_folder, "checkpoint")] == saved
    kept = [path.name for path in (run_folder / "checkpoints").glob("epoch_*")]
    assert kept == [f"epoch_{saved[-1]:04d}"]
    weights = load_file(run_folder / "checkpoints" / kept[0] / "model" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    rounded = [torch.equal(value, value.bfloat16().float()) for value in weights.values()]
    assert not all(rounded), "the fp32 master weights are exported, not the bf16 copies"


def test_no_cot_from_published_weights_in_debug_mode(folder):
    """`.pt` state dicts as the published code saves them: `load_model_path` of a run with another method."""
    run_folder = folder / "runs" / "unbroken"
    exported = run_folder / "checkpoints" / "epoch_0004" / "model"
    state = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    torch.save({f"base_causallm.{key}": value for key, value in state.items()}, folder / "published.pt")
    run = run_of(folder, "from_pt", model_id=str(exported), model=None, load_model_path=str(folder / "published.pt"))
    run |= {"coconut": False, "method": "no_cot", "latent_context": None, "debug": True, "num_epochs": 1}
    launching.train(run, folder / "from_pt", 1)
    assert not (folder / "runs" / "from_pt" / "checkpoints").exists()
    assert [e["stage"] for e in launching.events(folder / "runs" / "from_pt", "eval")] == [0]
