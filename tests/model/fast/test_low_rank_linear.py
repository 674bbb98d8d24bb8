"""Weight gradients gathered at the prefix are those autograd sums pass by pass."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch
from test_coconut import ALIGNED, CONTEXTS, RAGGED

from coconut_ds.memory.meter import LiveTensorMeter
from coconut_ds.model.fast import low_rank_linear


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("short", [1, 32], ids=["the tail goes the usual way", "the tail leaves rows"])
def test_gathered_equals_summed(monkeypatch, family, checkpointed, shapes, short):
    monkeypatch.setattr(low_rank_linear, "SHORT", short)
    model = tiny.coconut(family, CONTEXTS["sequence"])
    inputs = tiny.batch_of(shapes).inputs
    if checkpointed:
        model.enable_activation_checkpointing()
    left: list[int] = []
    backward = low_rank_linear._Short.backward

    def counted(ctx, gradient):
        left.append(len(gradient))
        return backward(ctx, gradient)

    monkeypatch.setattr(low_rank_linear._Short, "backward", staticmethod(counted))
    gathered = gradients(model, inputs)
    assert left, "no pass left anything to the prefix"
    leave_all_to_torch(model)
    left.clear()
    summed = gradients(model, inputs)
    assert not left
    for name, gradient in summed.items():
        error = (gathered[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


def test_frozen_weights_are_left_alone():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    model.base_causallm.transformer.h[0].requires_grad_(False)
    expected = gradients(tiny.coconut("gpt2", CONTEXTS["sequence"]), tiny.batch_of(RAGGED).inputs)
    for name, gradient in gradients(model, tiny.batch_of(RAGGED).inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def leave_all_to_torch(model):
    """Plain layers and torch's attention; nothing is put off."""
    for module in model.modules():
        if type(module) in (torch.nn.Linear, low_rank_linear.Conv1D):
            module.__dict__.pop("forward", None)
    model.base_causallm.set_attn_implementation("sdpa")


def bottom_frozen(model):
    backbone = model.base_causallm.base_model
    backbone.get_input_embeddings().requires_grad_(False)
    for part in (getattr(backbone, "wpe", None), getattr(backbone, "h", getattr(backbone, "layers", None))[0]):
        if part is not None:
            part.requires_grad_(False)


def only_queries_and_values_train(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "v_proj" in name or "c_attn" in name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("freeze", [bottom_frozen, only_queries_and_values_train])
def test_a_model_frozen_in_part_trains_the_rest_twice_and_leaves_nothing_behind(family, checkpointed, freeze):
    shapes = [(9, 1, 3), (2, 2, 1)]
    model, plain = (tiny.coconut(family, CONTEXTS["sequence"]) for _ in range(2))
    leave_all_to_torch(plain)
    for each in (model, plain):
        freeze(each)
    expected = gradients(plain, tiny.batch_of(shapes).inputs)
    if checkpointed:
        model.enable_activation_checkpointing()
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with LiveTensorMeter() as meter:
        for _ in range(2):
            loss = model(**tiny.batch_of(shapes).inputs).loss
            for retain in (True, False):
                found = torch.autograd.grad(loss, list(weights.values()), retain_graph=retain)
                for name, gradient in zip(weights, found):
                    torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
            del loss, found, gradient
            alive = meter.live
            gc.collect()
            # Python's own garbage, if any, may go; tensors held by the graph would stay.
            assert meter.live <= alive
    assert meter.live < 1000


def test_a_backward_through_a_part_of_the_graph_leaves_nothing_for_the_next():
    model = tiny.coconut("llama", CONTEXTS["sequence"])
    inputs = tiny.batch_of(RAGGED).inputs
    expected = gradients(model, inputs)
    spans = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids", "thought_span")}
    encoded = model.encode(**spans)
    (encoded.hidden.sum()).backward(retain_graph=True)
    model.zero_grad()
    labels, supervised = inputs["labels"], inputs["supervised"]
    logits = model.lm_head(encoded.hidden).flatten(0, 1).index_select(0, supervised - 1)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten().index_select(0, supervised))
    torch.autograd.grad(loss, encoded.fed[1], retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_under_autocast_the_gradients_are_near_those_in_fp32():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    inputs = tiny.batch_of(RAGGED).inputs
    expected = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert error < 0.3, f"{name}: relative error {error:.2f}"


def test_a_layer_that_only_thoughts_run_is_trained():
    model = tiny.coconut("llama", CONTEXTS["sequence"])
    extra = torch.nn.Linear(32, 32)
    model.base_causallm.model.layers[0].extra = extra
    low_rank_linear.install(extra)

    def add(module, args, output):
        return output + extra(output) if output.shape[1] == 1 else output

    model.base_causallm.model.layers[0].register_forward_hook(add)
    model(**tiny.batch_of(RAGGED).inputs).loss.backward()
    assert extra.weight.grad.any()
    assert extra.bias.grad.any()


def test_a_second_forward_before_the_backward_keeps_its_own():
    model = tiny.coconut("gpt2", CONTEXTS["sequence"])
    first, second = tiny.batch_of(RAGGED).inputs, tiny.batch_of(ALIGNED).inputs
    apart = [gradients(model, inputs) for inputs in (first, second)]
    model.zero_grad()
    (model(**first).loss + model(**second).loss).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [1, 4], ids=["last thought alone", "with a tail"])
def test_short_passes_leave_no_gradients_of_the_weights_alive(tail):
    """When the backward comes to the prefix, rows of the passes after it live, and no gradient of their weights."""
    model = tiny.coconut("gpt2", CONTEXTS["plain"], n_layer=6)
    weights = sum(p.nbytes for name, p in model.named_parameters() if ".mlp." in name or ".attn." in name)
    alive = []
    with LiveTensorMeter() as meter:
        ids = tiny.batch_of([(6, 3, 4)]).inputs["input_ids"]
        last = int((ids[0] == tiny.LATENT).nonzero()[-1])
        fed = model.encode(ids[:, : last + tail]).fed
        # The first thought's input: its gradient is there when every pass but the prefix is done.
        fed[1].register_hook(lambda gradient: alive.append(meter.live))
        before = meter.live
        fed[-1].sum().backward()
    assert len(alive) == 1
    assert alive[0] - before < weights * (0.25 if tail == 1 else 0.5)
