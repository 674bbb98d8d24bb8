"""The loss in chunks is the loss, and never has more than a chunk of logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coconut_ds.model import loss


@pytest.mark.parametrize("count", [0, 1, 8, 9, 30])
def test_chunks_give_the_sum_and_its_gradients(monkeypatch, count):
    monkeypatch.setattr(loss, "CHUNK", 8)
    embedding = nn.Embedding(20, 6)
    head = nn.Linear(6, 20, bias=False)
    head.weight = embedding.weight
    targets = torch.randint(20, (count,))
    sizes = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))

    def gradients(value: torch.Tensor) -> torch.Tensor:
        embedding.weight.grad = None
        # Scaled, as fp16 and the share of a window do.
        (1000 * value).backward()
        return embedding.weight.grad

    states = embedding(targets.flip(0) % 7)
    found = loss.summed_cross_entropy(head, states, targets)
    chunked = gradients(found)
    assert max(sizes) <= 8
    expected = F.cross_entropy(embedding(targets.flip(0) % 7) @ embedding.weight.T, targets, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(chunked, gradients(expected), rtol=1e-5, atol=1e-4)


def test_the_softmax_is_in_fp32():
    head = nn.Linear(4, 50, bias=False).bfloat16()
    states = 20 * torch.randn(6, 4, dtype=torch.bfloat16)
    targets = torch.randint(50, (6,))
    value = loss.summed_cross_entropy(head, states, targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(F.cross_entropy(head(states).float(), targets, reduction="sum").item())
