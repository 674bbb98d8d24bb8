"""LoRA end to end: training, resume, evaluation, a second run from the adapters, export, error messages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from coconut_ds import Coconut, train
from coconut_ds.commands import export
from coconut_ds.model.adapters import is_adapted

LORA = {"r": 2, "alpha": 4}
FILES = ("model/adapter_model.safetensors", "step_decoder.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a base model in `base/`, and a run on adapters of it in `runs/whole`."""
    folder = tmp_path_factory.mktemp("lora")
    given = tiny.run(folder) | {"save_path": str(folder / "runs"), "num_epochs": 1, "lr": 0.01}
    (folder / "run.yaml").write_text(yaml.safe_dump(given))
    assert run(folder, name="base", coconut=False, method="cot") == 0
    assert export.main([str(last(folder, "base")), str(folder / "base")]) == 0
    assert adapted(folder, name="whole") == 0
    return folder


def run(folder: Path, **values: Any) -> int:
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return train.main(["--run", str(folder / "run.yaml"), *words])


def adapted(folder: Path, **values: Any) -> int:
    """Plain Coconut in four epochs, stage by stage, with steps written by a copied decoder."""
    given = {"load_model_path": str(folder / "base"), "lora": LORA, "num_epochs": 4, "latent_norm": "embedding"}
    return run(folder, **given | {"supervision": {"steps": {"decoder": "copy"}}} | values)


def last(folder: Path, name: str) -> Path:
    return sorted((folder / "runs" / name / "checkpoints").glob("epoch_*"))[-1]


def hashes(checkpoint: Path) -> list[str]:
    return [hashlib.sha256((checkpoint / file).read_bytes()).hexdigest() for file in FILES]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(folder):
    assert adapted(folder, name="parts", num_epochs=2) == 0
    assert adapted(folder, name="parts") == 0
    assert hashes(last(folder, "parts")) == hashes(last(folder, "whole"))


def test_a_checkpoint_holds_the_adapters_alone(folder):
    checkpoint = last(folder, "whole")
    assert not (checkpoint / "model" / "model.safetensors").exists()
    sizes = {file: len(load_file(checkpoint / file)) for file in FILES}
    # A and B of the four layers of GPT-2's block, and the rows; the same of the copied decoder.
    assert sizes[FILES[0]] == sizes[FILES[1]] == 2 * 4 + 1
    assert sizes[FILES[2]] == sizes[FILES[3]] == sizes[FILES[0]] + sizes[FILES[1]]
    config = json.loads((checkpoint / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["trainable_token_indices"])) == (2, 4, 3)
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert "LoRA adapters of 0.00 M parameters" in (checkpoint / "model" / "README.md").read_text()


def test_an_evaluation_gives_what_the_run_gave(folder):
    values = {"name": "whole", "only_eval": True, "load_model_path": str(last(folder, "whole")), "supervision": None}
    assert run(folder, lora=None, latent_norm="embedding", num_epochs=4, **values) == 0
    predictions = folder / "runs" / "whole" / "predictions"
    assert (predictions / "eval_prosqa_valid.jsonl").read_text() == (predictions / "epoch_0004.jsonl").read_text()


@torch.no_grad()
def test_merged_it_is_a_plain_model_that_says_the_same(folder):
    assert export.main([str(last(folder, "whole")), str(folder / "merged")]) == 0
    with_adapters, merged = (Coconut.from_pretrained(name) for name in (last(folder, "whole"), folder / "merged"))
    assert is_adapted(with_adapters.base_causallm)
    assert not is_adapted(merged.base_causallm)
    ids = torch.tensor([[6, 7, 8, with_adapters.start_latent_id, with_adapters.latent_token_id, 9, 10]])
    one, other = with_adapters(ids).logits, merged(ids).logits
    assert torch.allclose(one, other, atol=1e-5)
    start = Coconut.from_pretrained(last(folder, "whole"))
    for parameter in start.base_causallm.parameters():
        if parameter.requires_grad:
            parameter.zero_()
    assert not torch.allclose(one, start(ids).logits, atol=1e-3), "the adapters say something"


def test_a_run_goes_on_with_the_adapters_of_another(folder):
    assert adapted(folder, name="next", load_model_path=str(last(folder, "whole")), num_epochs=5, resume=4) == 0
    config = json.loads((last(folder, "next") / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": None}, "holds LoRA adapters, and this run trains all weights; set lora, or merge them first: python"),
        ({"lora": {"r": 3, "alpha": 4}}, "lora.r: 3 here, 2 there, in the adapters of"),
        ({"lora": {"r": 2, "alpha": 64}}, "lora.alpha: 64 here, 4 there"),
        ({"lora": LORA | {"dropout": 0.5}}, "lora.dropout: 0.5 here, 0.0 there"),
        ({"lora": LORA | {"trainable_tokens": False}}, "lora.trainable_tokens: False here, True there"),
        ({"lora": LORA | {"targets": ["c_fc"]}}, "lora.targets: ['c_fc'] here, and transformer.h.0"),
        ({"lora": {"targets": ["lm_head"]}, "load_model_path": "base"}, "lora.targets: lm_head is the LM head; name"),
        (
            {"lora": {"targets": ["wte"]}, "load_model_path": "base"},
            "transformer.wte is Embedding; name linear layers",
        ),
        ({"lora": {"targets": ["none"]}, "load_model_path": "base"}, "lora.targets: Target modules {'none'} not found"),
        ({"load_model_path": None}, "lora: model_id scratch has random weights, which adapters would freeze"),
        ({"load_model_path": "weights.pt"}, "weights.pt is a file; write a folder from it with python -m coconut_ds"),
    ],
)
def test_what_does_not_fit_is_refused(folder, capsys, values, message):
    path = values.get("load_model_path", str(last(folder, "whole")))
    if path == "weights.pt":
        torch.save(load_file(folder / "base" / "model.safetensors"), folder / path)
        values = {"model_id": str(folder / "base"), "model": None}
    where = folder / path if path in ("base", "weights.pt") else path
    given = {"name": "refused", "load_model_path": None if where is None else str(where)}
    assert adapted(folder, **values | given) == 2
    assert message in capsys.readouterr().err


def test_another_base_model_is_refused(folder, capsys):
    weights = folder / "base" / "model.safetensors"
    own = load_file(weights)
    changed = {name: value * 1.01 for name, value in own.items()}
    save_file(changed, weights, {"format": "pt"})
    try:
        assert adapted(folder, name="refused", load_model_path=str(last(folder, "whole")), resume=3) == 2
    finally:
        save_file(own, weights, {"format": "pt"})
    error = capsys.readouterr().err
    assert f"holds adapters of another {folder / 'base'}: its weights have the fingerprint" in error
    assert "to another place and name the base model in its adapter_config.json" in error
