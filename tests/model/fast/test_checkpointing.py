"""Activation checkpointing changes memory and nothing else."""

from __future__ import annotations

import copy
import logging

import pytest
import tiny
import torch
from test_coconut import ALIGNED, CONTEXTS, RAGGED, prompts

from coconut_ds.memory.meter import LiveTensorMeter
from coconut_ds.model import fast
from coconut_ds.model.fast import checkpointing
from coconut_ds.model.fast.checkpointing import on_host

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]


def loss_and_gradients(model, inputs):
    torch.manual_seed(7)  # of the dropout
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every_n_layers", [1, 2])
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED, [(9, 3, 0), (4, 0, 0)]], ids=["aligned", "ragged", "no thoughts"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_stay(family, every_n_layers, shapes, dropout):
    model = tiny.coconut(family, CONTEXTS["sequence"], dropout=dropout)
    inputs = tiny.batch_of(shapes).inputs
    loss, gradients = loss_and_gradients(model, inputs)
    model.enable_activation_checkpointing(every_n_layers)
    again, same = loss_and_gradients(model, inputs)
    assert again == loss
    for name, gradient in gradients.items():
        error = (same[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_passes_of_thoughts_are_not_recomputed_and_no_bit_changes(family, shapes, monkeypatch):
    model = tiny.coconut(family, CONTEXTS["learned"], dropout=0.1).train()
    inputs = tiny.batch_of(shapes).inputs
    forwards: list[int] = []
    checkpointing.decoder_layers(model.base_causallm)[1].mlp.register_forward_pre_hook(
        lambda _, given: forwards.append(given[0].shape[1])
    )
    found = {"kept": loss_and_gradients(model, inputs)}
    first, end = inputs["thought_span"]
    tail = inputs["input_ids"].shape[1] - end + 1  # with the last thought
    thoughts = [1] * (end - 1 - first)
    assert forwards == [first, *thoughts, tail]
    model.enable_activation_checkpointing()
    forwards.clear()
    found["now"] = loss_and_gradients(model, inputs)
    assert forwards == [first, *thoughts, tail, tail, first]
    model.disable_activation_checkpointing()
    monkeypatch.setattr(checkpointing, "SHORTEST_RECOMPUTED", 1)
    model.enable_activation_checkpointing()
    forwards.clear()
    found["all recomputed"] = loss_and_gradients(model, inputs)
    assert forwards == [first, *thoughts, tail, tail, *thoughts, first]
    for loss, gradients in found.values():
        assert loss == found["kept"][0]
        assert all(torch.equal(gradient, found["kept"][1][name]) for name, gradient in gradients.items())


@pytest.mark.parametrize(("dtype", "implementation"), [(torch.bfloat16, "sdpa"), (torch.float32, "eager")])
def test_where_attention_may_save_copies_of_all_keys_every_pass_is_recomputed(dtype, implementation):
    model = tiny.coconut("llama", CONTEXTS["sequence"], dropout=0.1, plain=True).to(dtype).train()
    model.base_causallm.set_attn_implementation(implementation)
    fast.install(model)
    model.enable_activation_checkpointing()
    forwards: list[int] = []
    checkpointing.decoder_layers(model.base_causallm)[0].mlp.register_forward_pre_hook(
        lambda _, given: forwards.append(given[0].shape[1])
    )
    loss_and_gradients(model, tiny.batch_of(RAGGED).inputs)
    assert forwards[: len(forwards) // 2] == forwards[: len(forwards) // 2 - 1 : -1]


def test_ranks_that_gather_weights_recompute_alike_whatever_their_tails():
    counts = []
    for tail in (1, 5):  # with the last thought; a rank with fewer thoughts may have no more (`batches.grown`)
        model = tiny.coconut("gpt2", CONTEXTS["sequence"]).train()
        for parameter in model.base_causallm.parameters():
            parameter.ds_id = 0
        model.enable_activation_checkpointing()
        forwards: list[int] = []
        checkpointing.decoder_layers(model.base_causallm)[0].mlp.register_forward_pre_hook(
            lambda _, given, seen=forwards: seen.append(given[0].shape[1])
        )
        ids = torch.tensor([[7, 8, 9, tiny.LATENT, tiny.LATENT, 5, 6, 7, 8]])[:, : 4 + tail]
        model(ids, labels=ids, thought_span=(3, 5)).loss.backward()
        counts.append(len(forwards))
    assert counts[0] == counts[1]


def test_dropout_is_drawn_so_the_comparison_above_covers_it():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"], dropout=0.3)
    inputs = tiny.batch_of(RAGGED).inputs
    losses = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.add(model(**inputs).loss.item())
    assert len(losses) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_and_evaluation_stay(family):
    model = tiny.coconut(family, CONTEXTS["sequence"]).eval()
    _, inputs = prompts([2, 2, 2, 2])
    batch = tiny.batch_of(RAGGED).inputs
    with torch.no_grad():
        expected = model.generate(inputs["input_ids"], inputs["attention_mask"], 8), model(**batch).loss
        model.enable_activation_checkpointing()
        found = model.generate(inputs["input_ids"], inputs["attention_mask"], 8), model(**batch).loss
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])


def test_a_layer_keeps_its_input_and_one_copy_of_keys_and_values():
    model = tiny.coconut("gpt2", None, n_layer=6)
    columns, width, layers = 64, 32, 6
    ids = torch.randint(5, tiny.VOCABULARY, (4, columns))
    ids[:, -4] = tiny.LATENT
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]

    def kept() -> int:
        """Bytes alive between forward and backward."""
        with LiveTensorMeter() as meter:
            output = model(ids, labels=labels)
            alive = meter.live
        output.loss.backward()
        return alive

    without = kept()
    model.enable_activation_checkpointing()
    per_layer = 4 * columns * width * 4 * 3
    # Embeddings, positions, mask, final norm and their like, once and not for every layer.
    once = 12 * 4 * columns * width * 4
    assert kept() < layers * per_layer + once < 0.5 * without


def test_switched_off_again():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    names = list(model.state_dict())
    model.disable_activation_checkpointing()
    model.enable_activation_checkpointing()
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="on already"):
        model.enable_activation_checkpointing()
    model.disable_activation_checkpointing()
    with LiveTensorMeter() as meter:
        loss = model(**tiny.batch_of(RAGGED).inputs).loss
    assert loss.isfinite()
    assert meter.peak > 0
    model.enable_activation_checkpointing(every_n_layers=2)


def test_a_copy_recomputes_its_own_layers():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    model.enable_activation_checkpointing()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loss, gradients = loss_and_gradients(twin, tiny.batch_of(RAGGED).inputs)
    fresh = tiny.coconut("gpt2", CONTEXTS["sequence"])
    expected, _ = loss_and_gradients(fresh, tiny.batch_of(RAGGED).inputs)
    assert loss == expected
    assert any(gradient.any() for gradient in gradients.values())


def test_the_models_own_checkpointing_is_refused():
    model = tiny.coconut("llama").train()
    model.base_causallm.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="drops the KV cache"):
        model(**tiny.batch_of(RAGGED).inputs)


def test_offload_says_that_it_does_nothing_on_a_cpu(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    loss, _ = loss_and_gradients(model, tiny.batch_of(RAGGED).inputs)
    with caplog.at_level(logging.WARNING):
        model.enable_activation_checkpointing(offload=True)
    assert "offload does nothing on a CPU" in caplog.text
    assert loss_and_gradients(model, tiny.batch_of(RAGGED).inputs)[0] == loss


def test_only_the_layer_input_goes_to_the_host():
    hidden, keys = (torch.rand(2, 3, requires_grad=True) for _ in range(2))
    with on_host(hidden), LiveTensorMeter() as meter:
        product = (hidden * keys).sum()
        # The copy of one of the two factors, and the sum; the other factor is no copy.
        assert meter.live == hidden.nbytes + product.nbytes
    product.backward()
    assert torch.equal(hidden.grad, keys)
    assert torch.equal(keys.grad, hidden)


def test_a_model_that_cannot_be_checkpointed_is_named():
    model = tiny.coconut("gpt2")
    model.base_causallm.transformer.h = torch.nn.ModuleList()
    model.disable_activation_checkpointing()
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no decoder layers that take past_key_values"):
        model.enable_activation_checkpointing()
    with pytest.raises(ValueError, match="every_n_layers 0"):
        tiny.coconut("gpt2").enable_activation_checkpointing(0)


def test_a_layer_that_writes_for_another_is_refused():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    model.enable_activation_checkpointing()
    model.base_causallm.transformer.h[1].attn.layer_idx = 0
    with pytest.raises(RuntimeError, match="decoder layer 1 wrote keys and values of another layer"):
        model(**tiny.batch_of(RAGGED).inputs)


def test_a_cache_of_another_kind_runs_without_recomputing():
    model = tiny.coconut("llama")
    ids = torch.randint(5, tiny.VOCABULARY, (2, 6))
    expected = model.base_causallm(input_ids=ids).logits
    model.enable_activation_checkpointing()
    torch.testing.assert_close(model.base_causallm(input_ids=ids).logits, expected, rtol=0, atol=0)
