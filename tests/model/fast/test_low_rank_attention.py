"""Attention of a short pass gives what torch's gives, and hands what it cannot do to torch's."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from test_coconut import CONTEXTS, RAGGED
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from coconut_ds.model.fast import low_rank_attention
from coconut_ds.model.fast.kv_cache import TrainingCache

ROWS, HEADS, GROUP, COLUMNS, SIZE = 3, 2, 2, 7, 8
PASSES = (3, 1, 3)


@pytest.fixture
def asked(monkeypatch):
    """The columns of every query that is left to torch."""
    asked = []

    def counted(*args, **options):
        asked.append(args[1].shape[2])
        return sdpa_attention_forward(*args, **options)

    monkeypatch.setattr(low_rank_attention, "sdpa_attention_forward", counted)
    return asked


def attended(attention, cache, mask, **options):
    """Attention of three passes, and the gradients of all that went in."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = GROUP
    leaves, outputs = [], []
    for columns, end in zip(PASSES, itertools.accumulate(PASSES)):
        heads = (HEADS * GROUP, HEADS, HEADS)
        parts = [torch.randn(ROWS, each, columns, SIZE, generator=generator).requires_grad_() for each in heads]
        leaves += parts
        keys, values = cache.update(parts[1], parts[2], 0)
        seen = mask[..., end - columns : end, :end]
        outputs.append(attention(module, parts[0], keys, values, seen, is_causal=False, **options)[0])
    total = sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs)
    return [output.detach() for output in outputs], torch.autograd.grad(total, leaves)


def masks():
    visible = torch.ones(COLUMNS, COLUMNS).tril().bool()[None, None].repeat(ROWS, 1, 1, 1)
    visible[1, :, 3:, :2] = False
    by_head = visible.repeat(1, HEADS * GROUP, 1, 1)
    by_head[:, 1, 4:, 3] = False
    floats = torch.where(visible, 0.0, float("-inf"))
    return {"one for all heads": visible, "one a head": by_head, "floats": floats}


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_values_and_gradients_are_those_of_torch(asked, kind, scaling):
    mask = masks()[kind]
    found = attended(low_rank_attention._attention, TrainingCache(COLUMNS), mask, scaling=scaling)
    expected = attended(sdpa_attention_forward, DynamicCache(), mask, scaling=scaling)
    for ours, torchs in zip((*found[0], *found[1]), (*expected[0], *expected[1])):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
    assert asked == (list(PASSES) if kind == "one a head" else [PASSES[0]])


def test_a_tail_whose_rows_would_take_more_than_their_product_is_left_to_torch(asked):
    cache = TrainingCache(20)
    for columns in (11, SIZE // GROUP, SIZE // GROUP + 1):
        parts = [torch.randn(1, heads, columns, SIZE, requires_grad=True) for heads in (GROUP, 1, 1)]
        keys, values = cache.update(parts[1], parts[2], 0)
        mask = torch.ones(1, 1, columns, keys.shape[2], dtype=torch.bool)
        module = torch.nn.Module()
        module.num_key_value_groups = GROUP
        low_rank_attention._attention(module, parts[0], keys, values, mask)
    assert asked == [11, SIZE // GROUP + 1]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_padding_that_sees_nothing_makes_no_nan(family):
    """One row still thinks when the other is padded further than a sliding window reaches."""
    model = tiny.coconut(family, CONTEXTS["sequence"])
    model(**tiny.batch_of([(9, 2, 40), (4, 0, 1)]).inputs).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_half_precision_is_left_to_torch(asked):
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    asked.clear()  # what the self-check had asked for
    model(**tiny.batch_of(RAGGED).inputs)
    assert 1 not in asked
    model.bfloat16()(**tiny.batch_of(RAGGED).inputs)
    assert 1 in asked


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    keys, values = TrainingCache(4).update(
        torch.randn(1, 1, 4, SIZE, requires_grad=True), torch.randn(1, 1, 4, SIZE, requires_grad=True), 0
    )
    query = torch.randn(1, 1, 1, SIZE)

    def mixed(dropout: float) -> torch.Tensor:
        return low_rank_attention._attention(torch.nn.Module(), query, keys, values, None, dropout=dropout)[0].detach()

    drawn = torch.stack([mixed(0.3) for _ in range(4000)])
    assert drawn.std(dim=0).min() > 0.05
    torch.testing.assert_close(drawn.mean(dim=0), mixed(0.0), rtol=0, atol=0.05)


def test_a_saved_model_asks_for_the_attention_of_transformers(tmp_path):
    model = tiny.coconut("llama")
    assert model.base_causallm.config._attn_implementation == low_rank_attention.GATHERING_SDPA
    model.base_causallm.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_model_with_another_attention_keeps_it():
    backbone = tiny.backbone("llama")
    backbone.set_attn_implementation("eager")
    torch.manual_seed(0)
    model = tiny.coconut("llama", CONTEXTS["sequence"])
    expected = model(**tiny.batch_of(RAGGED).inputs).loss
    backbone.load_state_dict(model.base_causallm.state_dict())
    model.base_causallm = backbone
    low_rank_attention.install(backbone)
    assert backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**tiny.batch_of(RAGGED).inputs).loss, expected, rtol=1e-6, atol=0)
