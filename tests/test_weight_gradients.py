"""Weight gradients gathered at the prefix are those autograd sums pass by pass."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_coconut import ALIGNED, CONTEXTS, RAGGED, batch_of

from coconut_ds.memory import LiveTensorMeter
from coconut_ds.model import weight_gradients


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_gathered_equals_summed(monkeypatch, family, checkpointed, shapes):
    model = tiny.coconut(family, CONTEXTS["sequence"])
    inputs = batch_of(shapes).inputs
    if checkpointed:
        model.enable_activation_checkpointing()
    left: list[int] = []
    backward = weight_gradients._Thought.backward

    def counted(ctx, gradient):
        left.append(len(gradient))
        return backward(ctx, gradient)

    monkeypatch.setattr(weight_gradients._Thought, "backward", staticmethod(counted))
    gathered = gradients(model, inputs)
    assert left, "no pass left anything to the prefix"
    for module in model.modules():
        if type(module) in (torch.nn.Linear, weight_gradients.Conv1D):
            module.__dict__.pop("forward", None)
    left.clear()
    summed = gradients(model, inputs)
    assert not left
    for name, gradient in summed.items():
        error = (gathered[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


def test_frozen_weights_are_left_alone():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    model.base_causallm.transformer.h[0].requires_grad_(False)
    expected = gradients(tiny.coconut("gpt2", CONTEXTS["sequence"]), batch_of(RAGGED).inputs)
    for name, gradient in gradients(model, batch_of(RAGGED).inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_a_second_forward_before_the_backward_keeps_its_own():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    first, second = batch_of(RAGGED).inputs, batch_of(ALIGNED).inputs
    apart = [gradients(model, inputs) for inputs in (first, second)]
    model.zero_grad()
    (model(**first).loss + model(**second).loss).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [1, 4], ids=["last thought alone", "with a tail"])
def test_thoughts_leave_no_gradients_of_the_weights_alive(tail):
    """When the backward comes to the prefix, at most the tail's weight gradients live, however many the thoughts."""
    model = tiny.coconut("gpt2", CONTEXTS["plain"], n_layer=6)
    weights = sum(p.nbytes for name, p in model.named_parameters() if ".mlp." in name or ".attn." in name)
    alive = []
    with LiveTensorMeter() as meter:
        ids = batch_of([(6, 3, 4)]).inputs["input_ids"]
        last = int((ids[0] == tiny.LATENT).nonzero()[-1])
        fed = model.encode(ids[:, : last + tail]).fed
        # The first thought's input: its gradient is there when every pass but the prefix is done.
        fed[1].register_hook(lambda gradient: alive.append(meter.live))
        before = meter.live
        fed[-1].sum().backward()
    assert len(alive) == 1
    assert alive[0] - before < weights * (0.25 if tail == 1 else 1.25)
