"""The published method's own numbers: loss, logits, thoughts, every gradient, greedy continuations."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coconut_ds import Coconut, LatentContext
from coconut_ds.model import fast

METHODS = {
    "published": None,
    # The published code weights the window oldest first, (0.6, 0.3, 0.1).
    "last_pass_window": LatentContext(weights=(0.1, 0.3, 0.6), scope="last_pass"),
}
LAYOUTS, FAMILIES = ("aligned", "ragged"), ("gpt2", "llama")
SPEED = ("plain", "fast")
CASES = list(itertools.product(LAYOUTS, FAMILIES, METHODS, SPEED))


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    layout, family, method, speed = request.param
    folder = GOLDEN / layout / family
    facts = json.loads((folder / "reference.json").read_text())
    model = Coconut(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        latent_token_id=facts["latent_token_id"],
        start_latent_id=facts["start_latent_id"],
        end_latent_id=facts["end_latent_id"],
        eos_token_id=facts["eos_token_id"],
        latent_context=METHODS[method],
    )
    if speed == "fast":
        fast.install(model)
    tensors = load_file(folder / "reference.safetensors")
    expected = {key.removeprefix(f"{method}."): value for key, value in tensors.items() if key.startswith(method)}
    batch = {key: tensors[key] for key in ("input_ids", "attention_mask", "labels", "position_ids")}
    return model.eval(), batch, expected, facts[f"{method}.greedy"], facts["pad_token_id"]


def test_loss_and_every_gradient(case):
    model, batch, expected, _, _ = case
    output = model(**batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.base_causallm.named_parameters()}
    recorded = {key.removeprefix("grad."): value for key, value in expected.items() if key.startswith("grad.")}
    assert set(gradients) == set(recorded)
    for name, gradient in gradients.items():
        error = (gradient - recorded[name]).norm() / recorded[name].norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


def test_logits_and_thoughts_of_every_column(case):
    model, batch, expected, _, _ = case
    batch = {key: value for key, value in batch.items() if key != "labels"}
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], expected["logits"][real], atol=2e-5, rtol=1e-5)
    fed = model.encode(**batch).inputs_embeds
    torch.testing.assert_close(fed[real], expected["inputs_embeds"][real], atol=1e-5, rtol=1e-5)


def test_greedy_continuations_one_at_a_time_and_in_one_batch(case):
    model, _, _, greedy, pad = case
    n_tokens = max(len(each["continuation"]) for each in greedy)
    for each in greedy:
        tokens = model.generate(torch.tensor([each["prompt"]]), max_new_tokens=n_tokens)[0].tolist()
        assert _before_eos(tokens, model) == _before_eos(each["continuation"], model)
    width = max(len(each["prompt"]) for each in greedy)
    padding = [width - len(each["prompt"]) for each in greedy]
    ids = torch.tensor([[pad] * count + each["prompt"] for count, each in zip(padding, greedy)])
    mask = torch.tensor([[0] * count + [1] * (width - count) for count in padding])
    together = model.generate(ids, mask, max_new_tokens=n_tokens).tolist()
    for tokens, each in zip(together, greedy):
        assert _before_eos(tokens, model) == _before_eos(each["continuation"], model)


def _before_eos(tokens, model):
    return tokens[: tokens.index(model.eos_token_id)] if model.eos_token_id in tokens else tokens
