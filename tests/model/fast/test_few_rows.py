"""A product of few rows in blocks is the plain product."""

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
@pytest.mark.parametrize(("columns", "outputs", "blocks"), [(1, 12, [3]), (1, 11, []), (2, 12, [])])
def test_blocks_give_the_plain_product(batched, is_view, has_bias, columns, outputs, blocks):
    torch.manual_seed(0)
    rows = torch.randn(4, columns, 7)
    matrix = torch.randn(outputs, 7).T if is_view else torch.randn(7, outputs)
    bias = torch.randn(outputs) if has_bias else None
    plain = rows @ matrix + (bias if has_bias else 0)
    torch.testing.assert_close(few_rows.product(rows, matrix, bias), plain)
    assert batched == blocks
