"""Runs where torch sees a GPU: the precision they take there, and the CPU for those who ask for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import launching
import pytest
import stand_ins
import tiny
import torch

from coconut_ds import train
from coconut_ds.commands import ask

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def run_file(tmp_path) -> str:
    zero2 = str(ROOT / "ds_configs" / "zero2.json")
    run = tiny.run(tmp_path) | {"save_path": str(tmp_path / "runs"), "deepspeed": zero2}
    return str(launching.write_run(run, tmp_path))


@pytest.fixture
def card(monkeypatch):
    """Torch sees one card of this capability."""

    def see(capability: tuple[int, int]) -> None:
        monkeypatch.delenv("DS_ACCELERATOR")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)

    return see


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_auto_takes_the_half_precision_of_the_card(run_file, capsys, card, capability, taken):
    card(capability)
    assert train.main(["--run", run_file, "--dry-run", "precision=auto"]) == 0
    resolved = json.loads(capsys.readouterr().out.split("# deepspeed\n")[1])
    assert [name for name in ("fp16", "bf16") if resolved[name]["enabled"]] == [taken]


def test_bf16_is_refused_on_turing(run_file, capsys, card):
    card((7, 5))
    assert train.main(["--run", run_file, "bf16=true"]) == 2
    said = "error: precision: bf16, but this device has none (needs capability 8.0); use fp16 or fp32\n"
    assert capsys.readouterr().err == said


def test_with_ds_accelerator_cpu_a_run_trains_on_the_cpu_beside_a_gpu(run_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.main(["--run", run_file, "num_epochs=1", "batch_size_training=auto", "train_batch_size=8"]) == 0
    steps = launching.events(tmp_path / "runs" / "run", "train_step")
    assert steps
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "epoch_0001"
    assert train.main(["--run", run_file, "only_eval=true", f"load_model_path={checkpoint}", "name=eval"]) == 0


def test_nothing_falls_back_to_the_cpu_where_torch_cannot_use_the_gpu(run_file, tmp_path, capsys, monkeypatch):
    stand_ins.put_nvidia_smi(tmp_path / "bin", "GTX 1080 Ti", query="GTX 1080 Ti, 535.183.01, 6.1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(["--run", run_file]) == 2
    assert capsys.readouterr().err.startswith("error: GTX 1080 Ti (compute capability 6.1, driver 535.183.01): torch ")
    folder = tmp_path / "model"
    tiny.coconut("gpt2").save_pretrained(folder)
    assert ask.main([str(folder), "a question"]) == 2
    assert "error: GTX 1080 Ti (compute capability 6.1, driver 535.183.01): torch " in capsys.readouterr().err
