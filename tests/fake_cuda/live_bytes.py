"""Live bytes of a step of GPT-2 small under the attention of a GPU, on torch's fake tensors: nothing is computed."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from coconut_ds import Coconut, LatentContext
from coconut_ds.data.batches import TokenSequence, to_device
from coconut_ds.memory.activations import batch_of, measured_peak
from coconut_ds.model import fast
from fake_cuda.device import CUDA, EFFICIENT, PLAIN, choose_attention

GPT2_SMALL = {"vocab_size": 50260}


def peak(
    dtype: str,
    recomputed: bool,
    rows: int,
    prefix: int,
    thoughts: int,
    tail: int,
    model: dict[str, float] | None = None,
    fused: bool = True,
) -> int:
    """Peak bytes of forward and backward, without weights and gradients, as `memory.activations.measured_peak` counts.

    `dtype` is a name of torch's; the sequences have `prefix` + `thoughts` + `tail` columns, all but the first of the
    tail supervised. `model` holds values of GPT2Config, by default those of GPT-2 small with its dropout.
    Not `fused`: attention by plain operations, as a CPU with dropout takes it.
    """
    choose_attention(EFFICIENT if fused else PLAIN)
    config = GPT2Config(**(GPT2_SMALL if model is None else model))
    size = config.vocab_size
    # On meta: the weights are never needed.
    with torch.device("meta"):
        base = GPT2LMHeadModel(config)
        coconut = Coconut(
            base,
            latent_token_id=size - 1,
            start_latent_id=size - 3,
            end_latent_id=size - 2,
            eos_token_id=size - 4,
            latent_context=LatentContext((0.6, 0.3, 0.1)),
        )
        fast.install(coconut)
    if recomputed:
        coconut.enable_activation_checkpointing()
    ids = [5] * prefix + [size - 1] * thoughts + [5] * tail
    batch = batch_of(TokenSequence(ids, prefix, thoughts, prefix + thoughts + 1), rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = on_cuda(coconut, getattr(torch, dtype))
        return measured_peak(twin, batch._replace(inputs=to_device(batch.inputs, CUDA)))


def on_cuda(model: Coconut, dtype: torch.dtype) -> Coconut:
    """A copy on fake CUDA, its parameters in `dtype` and its buffers in their own, as DeepSpeed leaves them."""
    twins: dict[int, torch.Tensor] = {}
    for buffer in model.buffers():
        twins[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=CUDA))
    return copy.deepcopy(model, twins)
