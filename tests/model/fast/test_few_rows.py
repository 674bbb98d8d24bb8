"""A product of few rows in blocks is the plain product, and only what was measured to pay runs in blocks."""

from __future__ import annotations

import pytest
import torch

from coconut_ds.model.fast import few_rows


@pytest.fixture
def batched(monkeypatch) -> list[int]:
    """The number of blocks of every batched product while the test runs."""
    blocks: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda left, right: blocks.append(len(left)) or bmm(left, right))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    return blocks


@pytest.mark.parametrize("is_view", [False, True], ids=["matrix", "transposed view"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("batch", "columns", "outputs", "blocks"),
    [(4, 1, 12, [3]), (2, 1, 12, [3]), (1, 1, 12, []), (4, 1, 11, []), (4, 2, 12, [])],
)
def test_blocks_give_the_plain_product(batched, is_view, has_bias, batch, columns, outputs, blocks):
    torch.manual_seed(0)
    rows = torch.randn(batch, columns, 7)
    matrix = torch.randn(outputs, 7).T if is_view else torch.randn(7, outputs)
    bias = torch.randn(outputs) if has_bias else None
    plain = rows @ matrix + (bias if has_bias else 0)
    torch.testing.assert_close(few_rows.product(rows, matrix, bias), plain)
    assert batched == blocks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_to_torch(batched, dtype):
    rows, matrix = torch.randn(4, 1, 6, dtype=dtype), torch.randn(6, 12, dtype=dtype)
    assert torch.equal(few_rows.product(rows, matrix), torch.nn.functional.linear(rows, matrix.T))
    assert batched == []
