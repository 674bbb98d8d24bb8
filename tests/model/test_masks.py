"""The mask of all passes: made once, in the form in which a GPU's attention takes it."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_coconut import RAGGED, prompts

from coconut_ds.model.masks import causal_mask, columns_of

PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("keys", [0, 7, 16])
def test_a_column_attends_to_real_ones_before_it_and_to_itself(keys):
    config = tiny.backbone("gpt2").config
    mask = causal_mask(PADDING, config, torch.float16, keys)
    width = max(5, keys)
    real = F.pad(PADDING.bool(), (0, width - 5))
    for row in range(2):
        for query in range(5):
            expected = [key == query or (key < query and bool(real[row, key])) for key in range(width)]
            assert (mask[row, 0, query] == 0).tolist() == expected
            assert mask[row, 0, query].isneginf().tolist() == [not each for each in expected]
    assert columns_of(mask, 2, 4, keys).shape == (2, 1, 2, max(4, keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_gets_it_added_to_scores_and_aligned_and_converts_nothing(family, dtype, monkeypatch):
    given: list[torch.Tensor] = []

    def note(*args, attn_mask=None, **options):
        given.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **options)

    plain = F.scaled_dot_product_attention
    model = tiny.coconut(family).to(dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    model(**tiny.batch_of(RAGGED).inputs).loss.backward()
    _, inputs = prompts([2, 2, 2, 2])
    with torch.no_grad():
        model.encode(inputs["input_ids"], inputs["attention_mask"])
    assert given
    for mask in given:
        assert mask.dtype == dtype
        assert mask.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
        assert mask.storage_offset() % 8 == 0
