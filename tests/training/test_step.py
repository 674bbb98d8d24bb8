"""Metrics of a step, and losses that are not numbers."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from coconut_ds.data.batches import Batch, Tokens, collate_training, training_sequence
from coconut_ds.data.stages import Layout
from coconut_ds.training.step import (
    LossScaleError,
    NonFiniteLossError,
    Pending,
    accumulate_gradients,
    fetch,
    update,
)

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)


def step(loss: float, step_loss: float = 0.0, n_step_targets: int = 0) -> Pending:
    totals = torch.tensor([7, 1, n_step_targets, int(n_step_targets > 0), 0, 0, 2, 1, 0, 0, 30, 40])
    return Pending(torch.tensor([loss, step_loss, 0.0, 0.5, 0.0]), totals, [10, 12])


def test_metrics():
    metrics = fetch(step(2.5), 8)
    without = {"loss": 2.5, "n_targets": 7, "n_tokens": 30, "padding_share": 0.25}
    assert metrics.as_dict() == without | {"distance": 0.5}
    assert fetch(step(2.5, 1.5, 3), 8).as_dict() == metrics.as_dict() | {"step_loss": 1.5}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["sequence", "steps"])
def test_a_loss_that_is_not_finite_names_step_and_examples(loss, place):
    with pytest.raises(NonFiniteLossError) as error:
        fetch(step(loss) if place == "sequence" else step(1.0, loss, 3), 9)
    assert f"loss {loss} at optimizer step 9, nothing was updated" in str(error.value)
    assert "rank 0 had training examples [10, 12]" in str(error.value)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.", LossScaleError),
        ("something else", RuntimeError),
    ],
)
def test_fp16_that_has_no_smaller_loss_scale_says_what_to_do(message, kind):
    def fails() -> None:
        raise RuntimeError(message)

    with pytest.raises(kind) as error:
        update(SimpleNamespace(step=fails, global_steps=7))
    if kind is LossScaleError:
        assert "after 7 optimizer steps; lower lr, set warmup_steps or max_grad_norm" in str(error.value)


class HostReads(TorchFunctionMode):
    """Counts the calls that bring values of tensors to the host, by name. On a GPU each is a transfer and a wait."""

    NAMES = frozenset(("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero"))

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """Counts the reads of single values that torch's own code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class PlainEngine:
    """What a step needs of an engine, without DeepSpeed, whose own transfers depend on the strategy."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = model

    def __call__(self, **inputs):
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.is_boundary = is_boundary

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()


@pytest.mark.parametrize("normalization", ["token", "micro_batch"])
def test_a_step_reads_from_the_device_once(normalization):
    model = tiny.coconut().train()
    batches = [batch_of(n_thoughts=3), batch_of(n_thoughts=2)]
    with HostReads() as host, ScalarReads() as scalars:
        pending = accumulate_gradients(PlainEngine(model), batches, normalization)
        assert not host.counts
        assert scalars.count == 0
        fetch(pending, 1)
    assert host.counts == {"tolist": 1}
    assert scalars.count == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def batch_of(n_thoughts: int) -> Batch:
    rows = [tiny.row(4 + index, [3, 2, 4], 3, index) for index in range(2)]
    sequences = [training_sequence(row, Layout(1, n_thoughts), TOKENS) for row in rows]
    return collate_training(sequences, [0, 1], tiny.PAD)
