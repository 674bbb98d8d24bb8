"""Losses and gradients: the published ones, the naive twin's, half precision beside it, recomputed beside kept."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import naive
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coconut_ds import Coconut, LatentContext
from coconut_ds.data.batches import Batch, Tokens, collate_training, to_device, training_sequence
from coconut_ds.data.stages import Layout
from coconut_ds.model import fast
from coconut_ds.model.backbone import cast_parameters
from gpu_sections import ROOT, Row, begin, gradients, left_out, relative_error, tried

_GOLDEN = ROOT / "tests" / "golden"
_METHODS = {"published": None, "last_pass_window": LatentContext(weights=(0.1, 0.3, 0.6), scope="last_pass")}
# Shares that fp32, in which a window is kept, holds exactly.
_CONTEXTS = {
    "plain": LatentContext(),
    "window": LatentContext((0.5, 0.25, 0.25)),
    "embedding": LatentContext((0.5, 0.25, 0.25), "last_pass", learned=True, norm="embedding"),
}
_NEAR = {"gpt2": 1e-10, "llama": 1e-5}
"""In fp64; transformers takes Llama's norms and angles in fp32 all the same."""
_FAMILIES = ("gpt2", "llama")
_TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
# Question tokens, skipped steps and thoughts of each row.
_RAGGED = [(9, 2, 4), (12, 1, 2), (2, 1, 1), (7, 0, 0)]
_HALF_OVER_NAIVE = 1.5
_TREATMENTS: dict[str, dict[str, Any] | None] = {"kept": None, "recomputed": {}, "offloaded": {"offload": True}}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    device = begin(options)
    cases = itertools.product(("aligned", "ragged"), _FAMILIES, _METHODS, ("plain", "fast"))
    for layout, family, method, speed in cases:
        yield tried(f"golden: {layout} {family} {method} {speed}", _golden, device, layout, family, method, speed)
    for family, context in itertools.product(_FAMILIES, _CONTEXTS):
        yield tried(f"fast against naive in fp64: {family} {context}", _fp64, device, family, context)
    for family, dtype in itertools.product(_FAMILIES, (torch.float16, torch.bfloat16)):
        yield tried(f"half precision: {family} {dtype}", _half, device, family, dtype)
    for family in _FAMILIES:
        yield tried(f"kept and recomputed with dropout: {family}", _treated, device, family, "recomputed")
        name = f"kept and offloaded with dropout: {family}"
        # On a CPU layer inputs are in host memory already.
        yield tried(name, _treated, device, family, "offloaded") if device.type == "cuda" else left_out(name)


def _golden(device: torch.device, layout: str, family: str, method: str, speed: str) -> Row:
    folder = _GOLDEN / layout / family
    facts = json.loads((folder / "reference.json").read_text())
    ids = {key: facts[key] for key in ("latent_token_id", "start_latent_id", "end_latent_id", "eos_token_id")}
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = Coconut(base, **ids, latent_context=_METHODS[method]).to(device).eval()
    if speed == "fast":
        fast.install(model)
    tensors = load_file(folder / "reference.safetensors")
    batch = {key: tensors[key].to(device) for key in ("input_ids", "attention_mask", "labels", "position_ids")}
    loss = model(**batch).loss
    loss.backward()
    found = gradients(model.base_causallm)
    expected = {
        key.removeprefix(f"{method}.grad."): tensors[key] for key in tensors if key.startswith(f"{method}.grad.")
    }
    loss_error = abs(loss.item() - tensors[f"{method}.loss"].item())
    worst = max(relative_error(found[name], expected[name]) for name in expected)
    is_greedy = _is_greedy(model, facts[f"{method}.greedy"], device)
    ok = loss_error < 1e-5 and worst < 1e-4 and is_greedy and found.keys() == expected.keys()
    return {"ok": ok, "loss_error": loss_error, "gradient_error": worst, "greedy_equal": is_greedy}


def _is_greedy(model: Coconut, greedy: list[dict[str, list[int]]], device: torch.device) -> bool:
    """Whether every continuation is the recorded one up to its end of sequence."""
    n_tokens = max(len(each["continuation"]) for each in greedy)
    prompts = [torch.tensor([each["prompt"]], device=device) for each in greedy]
    given = [model.generate(prompt, max_new_tokens=n_tokens)[0].tolist() for prompt in prompts]
    end = int(model.eos_token_id or 0)
    return all(_up_to(mine, end) == _up_to(each["continuation"], end) for mine, each in zip(given, greedy, strict=True))


def _up_to(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _batch(shapes: list[tuple[int, int, int]] = _RAGGED) -> Batch:
    rows = [tiny.row(question, [3, 4, 5], 4, seed) for seed, (question, _, _) in enumerate(shapes)]
    layouts = [Layout(n_skip, n_thoughts) for _, n_skip, n_thoughts in shapes]
    sequences = [training_sequence(row, layout, _TOKENS) for row, layout in zip(rows, layouts, strict=True)]
    return collate_training(sequences, list(range(len(rows))), tiny.PAD)


def _fast(model: Coconut, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**inputs).loss_sum
    loss.backward()
    return loss.detach(), gradients(model)


def _naive(model: Coconut, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    # The twin makes tensors of its own, which belong beside the model.
    with torch.device(inputs["input_ids"].device):
        loss = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    loss.backward()
    return loss.detach(), gradients(model)


def _fp64(device: torch.device, family: str, context: str) -> Row:
    model = tiny.coconut(family, _CONTEXTS[context]).to(device).double()
    inputs = to_device(_batch().inputs, device)
    # The loss and the norm of a thought are taken in fp32, in which 1e-10 would not show.
    with mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.double()):
        (loss, found), (expected_loss, expected) = _fast(model, inputs), _naive(model, inputs)
    worst = max(relative_error(found[name], expected[name]) for name in expected)
    loss_error = relative_error(loss, expected_loss)
    return {"ok": max(loss_error, worst) < _NEAR[family], "loss_error": loss_error, "gradient_error": worst}


def _half(device: torch.device, family: str, dtype: torch.dtype) -> Row:
    """Distance of all gradients from fp64 on the same rounded weights: the passes' and the naive twin's."""
    model = tiny.coconut(family, _CONTEXTS["window"]).to(device)
    cast_parameters(model, dtype)
    inputs = to_device(_batch().inputs, device)
    _, exact = _naive(copy.deepcopy(model).double(), inputs)
    mine, twins = (relative_error(_flat(run(model, inputs)[1]), _flat(exact)) for run in (_fast, _naive))
    return {"ok": mine <= _HALF_OVER_NAIVE * twins, "error": mine, "naive_error": twins, "ratio": mine / twins}


def _flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values[name].double().flatten() for name in sorted(values)])


def _treated(device: torch.device, family: str, how: str) -> Row:
    """The same dropout of 0.1 from the same seed, activations kept and otherwise."""
    model = tiny.coconut(family, _CONTEXTS["window"], dropout=0.1).to(device).train()
    inputs = to_device(_batch().inputs, device)
    found = []
    for settings in (_TREATMENTS["kept"], _TREATMENTS[how]):
        if settings is not None:
            model.enable_activation_checkpointing(**settings)
        torch.manual_seed(1)
        found.append(_fast(model, inputs))
    (kept_loss, kept), (loss, others) = found
    worst = max(relative_error(others[name], kept[name]) for name in kept)
    return {"ok": bool(loss == kept_loss) and worst < 1e-6, "losses_equal": bool(loss == kept_loss), "error": worst}
