"""One buffer of keys and values per layer: values and gradients of a cache that grows, at the memory of one copy."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_coconut import CONTEXTS, RAGGED
from transformers import DynamicCache

from coconut_ds.memory.meter import LiveTensorMeter
from coconut_ds.model.fast import checkpointing
from coconut_ds.model.fast.kv_cache import TrainingCache

PASSES = (5, 1, 1, 3)


def attended(cache, parts):
    """Sum over passes of something every key and value so far takes part in, as attention does."""
    total = torch.zeros(())
    for number, (keys, values) in enumerate(parts, start=1):
        keys, values = cache.update(keys, values, 0)
        total = total + number * (keys.sin() * values.cos()).sum()
    return total


def test_values_and_gradients_are_those_of_a_cache_that_grows():
    torch.manual_seed(0)
    parts = [(torch.rand(2, 3, n, 4, requires_grad=True), torch.rand(2, 3, n, 4, requires_grad=True)) for n in PASSES]
    leaves = [tensor for part in parts for tensor in part]
    expected = attended(DynamicCache(), parts)
    found = attended(TrainingCache(sum(PASSES)), parts)
    assert torch.equal(found, expected)
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))
    for gradient, summed in pairs:
        torch.testing.assert_close(gradient, summed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_second_backward_gives_the_same_gradients(checkpointed):
    model = tiny.coconut("llama", CONTEXTS["sequence"], dropout=0.3)
    if checkpointed:
        model.enable_activation_checkpointing()
    loss = model(**tiny.batch_of(RAGGED).inputs).loss
    weights = list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    for again, gradient in zip(torch.autograd.grad(loss, weights), first):
        assert torch.equal(again, gradient)


def kept(n_thoughts: int, checkpointed: bool) -> int:
    """Bytes alive between forward and backward, with 60 columns in any case."""
    model = tiny.coconut("gpt2", None, n_layer=2)
    if checkpointed:
        model.enable_activation_checkpointing()
    ids = torch.randint(5, tiny.VOCABULARY, (8, 60))
    ids[:, 50 : 50 + n_thoughts] = tiny.LATENT
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    with LiveTensorMeter() as meter:
        output = model(ids, labels=labels)
        alive = meter.live
    output.loss.backward()
    return alive


ONE_COPY = 2 * 8 * 50 * 32 * 4
"""Keys and values of one layer, for one thought."""


@pytest.mark.parametrize("checkpointed", [False, True])
def test_thoughts_do_not_copy_the_keys_and_values_of_the_prefix(checkpointed, monkeypatch):
    monkeypatch.setattr(checkpointing, "SHORTEST_RECOMPUTED", 1)
    assert kept(6, checkpointed) - kept(1, checkpointed) < ONE_COPY


def test_thoughts_that_are_not_recomputed_keep_their_own_activations_only():
    of_a_column = kept(1, checkpointed=False) / 60
    assert kept(6, checkpointed=True) - kept(1, checkpointed=True) < 5 * of_a_column < ONE_COPY * 5


def test_more_columns_than_it_was_made_for_are_refused():
    cache = TrainingCache(3)
    cache.update(torch.rand(1, 1, 3, 2), torch.rand(1, 1, 3, 2), 0)
    with pytest.raises(ValueError, match="4 columns written to a TrainingCache made for 3"):
        cache.update(torch.rand(1, 1, 1, 2), torch.rand(1, 1, 1, 2), 0)
