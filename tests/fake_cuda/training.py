"""A training forward and backward on fake CUDA, and an optimizer step's accumulation around it."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any
from unittest import mock

import tiny
import torch
from training.test_step import PlainEngine

from coconut_ds import Coconut, LatentContext
from coconut_ds.data.batches import Batch, TokenSequence, collate_training, to_device
from coconut_ds.data.teacher import Taught
from coconut_ds.model.distillation import Distillation
from coconut_ds.model.fast.low_rank import Factors
from coconut_ds.model.jacobi import Jacobi
from coconut_ds.runtime import distributed
from coconut_ds.training.step import accumulate_gradients, fetch
from fake_cuda.device import CUDA
from fake_cuda.tensors import FakeCuda, on_cuda

WINDOWS = {
    "one": LatentContext(),
    "three": LatentContext((0.6, 0.3, 0.1)),
    "learned": LatentContext((0.6, 0.3, 0.1), learned=True),
    "last_pass": LatentContext((0.1, 0.3, 0.6), scope="last_pass"),
    "embedding_norm": LatentContext((0.6, 0.3, 0.1), norm="embedding"),
}


def backward(family: str, dtype: str, recomputed: bool, window: str, thoughts: int, device: str) -> dict[str, Any]:
    """Facts about one forward and backward of a small model with dropout over two rows of different lengths."""
    model, order, threads = _model(family, window, recomputed), [], set()

    def note(_: torch.Tensor, name: str) -> None:
        order.append(name)
        threads.add(threading.current_thread() is threading.main_thread())

    with FakeCuda() as cuda, mock.patch.object(Factors, "keep", autospec=True, side_effect=Factors.keep) as keep:
        twin = _placed(model, dtype, device)
        inputs = to_device(_batch(thoughts).inputs, next(twin.parameters()).device)
        for name, parameter in twin.named_parameters():
            parameter.register_post_accumulate_grad_hook(functools.partial(note, name=name))
        cuda.waits.clear()
        twin(**inputs).loss_sum.backward()
    gradients = [parameter.grad for parameter in twin.parameters()]
    return {
        "devices": sorted({str(gradient.device) for gradient in gradients}),
        "dtypes": sorted({str(gradient.dtype) for gradient in gradients}),
        "waits": dict(cuda.waits),
        "order": order,
        "in_main_thread": sorted(threads),
        "factors_kept": keep.call_count,
    }


def optimizer_step(family: str, normalization: str, micro_batches: int, iterations: int) -> dict[str, Any]:
    """What the host waits for in the step's two halves, before DeepSpeed's update; `iterations` of Jacobi, or none."""
    model: Any = _model(family, "three", recomputed=True)
    model.solver = Jacobi(iterations) if iterations else None
    model.distillation = Distillation()
    batches = [_batch(thoughts, is_supervised=True) for thoughts in range(micro_batches)]
    with FakeCuda() as cuda, mock.patch.object(distributed, "device", return_value=CUDA):
        engine: Any = PlainEngine(_placed(model, "float16", "cuda"))
        cuda.waits.clear()
        pending = accumulate_gradients(engine, batches, normalization, (1.0, 1.0, 1.0, 1.0, 1.0))
        accumulating = dict(cuda.waits)
        cuda.waits.clear()
        metrics = fetch(pending, 1)
    n_targets = sum(batch.n_targets for batch in batches)
    return {"accumulating": accumulating, "fetching": dict(cuda.waits), "counted": metrics.n_targets == n_targets}


def _placed(model: Coconut, dtype: str, device: str) -> Coconut:
    """A copy of the model, with the window's constants, which are moved once in a process."""
    if device == "cpu":
        return copy.deepcopy(model).to(getattr(torch, dtype))
    twin: Coconut = on_cuda(model, getattr(torch, dtype))
    twin.latent_window(torch.zeros(1, 1, 1, device=CUDA))
    return twin


def _model(family: str, window: str, recomputed: bool) -> Coconut:
    model = _made(family, window)
    model.disable_activation_checkpointing()
    if recomputed:
        model.enable_activation_checkpointing()
    return model


@functools.cache
def _made(family: str, window: str) -> Coconut:
    return tiny.coconut(family, WINDOWS[window], dropout=0.1).train()


def _batch(thoughts: int, is_supervised: bool = False) -> Batch:
    def sequence(n_thoughts: int, prefix: int) -> TokenSequence:
        ids = [5] * prefix + [tiny.LATENT] * n_thoughts + [tiny.END, 6, 7, tiny.EOS]
        texts, taught = ((6, tiny.EOS),) * n_thoughts, Taught([5] * prefix + [8, 6, 7, tiny.EOS], prefix, 2)
        return TokenSequence(ids, prefix, n_thoughts, prefix + n_thoughts + 1, texts, taught, taught)

    sequences = [sequence(thoughts, 9), sequence(max(0, thoughts - 1), 7)]
    return collate_training(sequences, [0, 1], tiny.PAD, *(is_supervised,) * 3)


def check(what: str, **case: Any) -> dict[str, Any]:
    """Either of them, so that one process does for both."""
    return {"backward": backward, "step": optimizer_step}[what](**case)
