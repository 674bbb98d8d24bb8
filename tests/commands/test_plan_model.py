"""`plan --model`: a configuration is enough, and the figures are those of a real model measured whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch

from coconut_ds import Coconut
from coconut_ds.commands import plan, plan_model
from coconut_ds.commands.plan_model import Lengths, _measured, _sequences
from coconut_ds.memory.activations import measure
from coconut_ds.memory.model_states import Elements
from coconut_ds.memory.shape_only import shape_of
from coconut_ds.model import fast
from coconut_ds.model.adapters import Lora, adapt

LENGTHS = Lengths(question=30, steps=12, answer=4, thoughts=3)
DEPTH = 5
LORA = Lora(4, 8)


def configuration(family: str, folder: Path) -> Path:
    """A config.json and nothing beside it, of three tokens fewer than the tiny models have."""
    config = tiny.backbone(family, n_layer=DEPTH).config
    config.vocab_size = tiny.VOCABULARY - 3
    config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder / "config.json"


def real(family: str, lora: Lora | None) -> Coconut:
    base = tiny.backbone(family, n_layer=DEPTH)
    last = tiny.VOCABULARY - 1
    if lora is not None:
        adapt(base, Lora(lora.r, lora.alpha, tokens=(last - 2, last - 1, last)))
    model = Coconut(base, latent_token_id=last, start_latent_id=last - 2, end_latent_id=last - 1, eos_token_id=1)
    fast.install(model)
    return model


@pytest.mark.parametrize(
    ("family", "lora", "recomputed"),
    [("gpt2", None, False), ("gpt2", LORA, True), ("llama", None, True), ("qwen3", LORA, False)],
)
def test_what_few_layers_give_is_what_all_of_them_take(family, lora, recomputed, tmp_path):
    name = str(configuration(family, tmp_path))
    model = real(family, lora)
    assert Elements.of(shape_of(name, lora)) == Elements.of(model)
    if recomputed:
        model.enable_activation_checkpointing()
    sequences = _sequences(LENGTHS, model.latent_token_id)
    planned = _measured(name, lora, recomputed, LENGTHS, DEPTH)
    for sequence, deeper in zip(sequences, planned, strict=True):
        whole = measure(model, sequence, torch.float16, for_card=True)
        for rows in (1, 4, 64):
            assert deeper.peak(rows) == pytest.approx(whole.peak(rows), rel=0.1)
            budget = whole.peak(rows)
            assert deeper.most_rows(deeper.peak(rows)) >= rows
            assert deeper.most_rows(budget) == pytest.approx(rows, rel=0.1, abs=1)


@pytest.fixture
def shallow(monkeypatch) -> list[str]:
    """Options that are measured fast, with fewer layers."""
    monkeypatch.setattr(plan_model, "_FEW", 1)
    monkeypatch.setattr(plan_model, "_MORE", 2)
    return ["--question", "30", "--steps", "8", "--thoughts", "1"]


def test_the_table_has_every_way_and_a_line_to_start_with(shallow, tmp_path, capsys):
    name = str(configuration("llama", tmp_path))
    assert plan.main(["--model", name, "--memory", "1.5", "--gpus", "2", "--rank", "4", *shallow]) == 0
    shown = capsys.readouterr().out
    row = r"^(all weights|LoRA, r 4) +(kept|recomputed) +ds_configs/(\w+)\.json +(\S+) +(\S+) +(\d+)$"
    rows = re.findall(row, shown, re.MULTILINE)
    assert len(rows) == 2 * 2 * 5
    assert len({row[:3] for row in rows}) == len(rows)
    assert "a question of 30 tokens, steps of 8, an answer of 12, 1 thoughts" in shown
    start = f"start: deepspeed --num_gpus 2 coconut_ds/train.py --run RUN.yaml model_id={name} "
    assert f"{start}deepspeed=ds_configs/zero1.json precision=auto batch_size_training=auto" in shown
    assert "lora" not in shown.splitlines()[-1], "all weights fit"


def test_where_nothing_fits_it_says_so(shallow, tmp_path, capsys):
    name = str(configuration("gpt2", tmp_path))
    assert plan.main(["--model", name, "--memory", "0.71", "--ranks", "1", *shallow]) == 0
    assert "Nothing fits; take a smaller model, shorter examples or larger cards." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none", "--memory", "11", "lr=1"], "lr=1: values are for --run; leave them out"),
        (["--model", "none", "--memory", "11", "--thoughts", "0"], "--thoughts 0: must be at least 1"),
        (["--run", "run.yaml", "--memory", "11", "--steps", "3"], "--steps is for --model; leave it out"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, capsys):
    assert plan.main(arguments) == 2
    assert message in capsys.readouterr().err
