"""Activation checkpointing of decoder layers that keeps the KV cache.

HF's own checkpointing drops the cache in training and with it every thought. Here a layer's keys and values so far are
inputs of the recomputed function, and those of the pass its outputs; recomputing writes the same columns of the layer's
buffer once more. Each layer keeps that buffer, and its input of every pass. A thought's pass of one column keeps all
activations: they are small, and the time of such a pass is that of launching its operations, which recomputing doubles.

Shapes: B rows, T columns of the pass, D hidden size, H key-value heads, d their size.
"""

from __future__ import annotations

import functools
import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut_ds.model.fast.kv_cache import TrainingCache
from coconut_ds.model.fast.low_rank import pays
from coconut_ds.model.fast.low_rank_attention import GATHERING_SDPA
from coconut_ds.model.fast.low_rank_linear import current_pass, within
from coconut_ds.model.fast.planning import plans_for_card
from coconut_ds.model.internals import attention_of
from coconut_ds.runtime import distributed

_LOG = logging.getLogger(__name__)
SHORTEST_RECOMPUTED = 2
"""Columns of the shortest pass after the prefix whose layers are recomputed."""
_CACHE_ARGUMENTS = ("past_key_values", "cache")
"""Names of a decoder layer's cache argument: up to transformers 5.23, and from 5.24 on."""


def checkpoint_layers(model: PreTrainedModel, every_n_layers: int = 1, offload: bool = False) -> None:
    """Recompute every `every_n_layers`-th decoder layer of `model` in the backward, the first one included.

    Raises ValueError for a model without decoder layers that take a cache, or checkpointed already.
    """
    if every_n_layers < 1:
        raise ValueError(f"every_n_layers {every_n_layers}: must be at least 1")
    layers = decoder_layers(model)
    if any("forward" in layer.__dict__ for layer in layers):
        raise ValueError("activation checkpointing is on already, or something else replaced the layers' forward")
    if offload and distributed.device().type != "cuda":
        _LOG.warning("activation checkpointing: offload does nothing on a CPU, layer inputs are in host memory already")
    # Another attention may save copies of all keys and values in every pass, as eager attention does.
    shortest = SHORTEST_RECOMPUTED if attention_of(model.config) == GATHERING_SDPA else 1
    for index in range(0, len(layers), every_n_layers):
        signature = inspect.signature(layers[index].forward)
        layers[index].forward = functools.partial(_checkpointed, layers[index], index, signature, offload, shortest)


def restore_layers(model: PreTrainedModel) -> None:
    """Undo `checkpoint_layers`; does nothing if it is off."""
    for layer in model.modules():
        if getattr(layer.__dict__.get("forward"), "func", None) is _checkpointed:
            del layer.forward


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order; raises ValueError if the model has none that accept a cache."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or any(_cache_argument(inspect.signature(type(layer).forward)) is None for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or ["none"]
        raise ValueError(
            f"activation checkpointing: {type(model).__name__} has no decoder layers that take {_CACHE_ARGUMENTS[0]} "
            f"(found {', '.join(kinds)}); switch it off for this model"
        )
    return layers


def _cache_argument(signature: inspect.Signature) -> str | None:
    return next((name for name in _CACHE_ARGUMENTS if name in signature.parameters), None)


def _checkpointed(
    layer: nn.Module,
    index: int,
    signature: inspect.Signature,
    offload: bool,
    shortest: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of a checkpointed layer: same arguments, same result."""
    forward = functools.partial(type(layer).forward, layer)
    call, name = signature.bind(*args, **kwargs), str(_cache_argument(signature))
    cache = call.arguments.pop(name, None)
    if not torch.is_grad_enabled() or not (cache is None or isinstance(cache, TrainingCache)):
        return forward(*args, **kwargs)
    (hidden, *rest), options, this = call.args, call.kwargs, current_pass()
    earlier = cache.layer(index).written if cache is not None else ()
    # ZeRO-3 gathers weights for a recomputation, which all ranks must do alike; a tail may have one column on one rank.
    is_whole = not any(hasattr(parameter, "ds_id") for parameter in layer.parameters())
    if earlier and hidden.shape[1] < shortest and is_whole and _attention_keeps_no_copies(hidden):
        return forward(*args, **kwargs)
    # `run` lives until its backward, so it must not hold the layer's input, or the keys and values of all layers.
    empty = cache.of_layer(index, ()) if cache is not None else None

    def run(hidden: torch.Tensor, *earlier: torch.Tensor) -> tuple[Any, ...]:
        """(layer input, keys and values so far) -> (layer output, keys and values with those of this pass)."""
        with within(this):
            if empty is None:
                return (forward(hidden, *rest, **options),)
            own = empty.of_layer(index, earlier)
            n_before = own.get_seq_length(index)
            output = forward(hidden, *rest, **options, **{name: own})
            if len(own.layers) != index + 1 or own.get_seq_length(index) != n_before + hidden.shape[1]:
                raise RuntimeError(
                    f"decoder layer {index} wrote keys and values of another layer, or not once for each column; "
                    "activation checkpointing needs one write to its own layer: switch it off for this model"
                )
            return (output, *own.layer(index).written)

    # Only the prefix is worth offloading; the passes after it have a column or a few.
    with on_host(hidden) if offload and hidden.is_cuda and not earlier else nullcontext():
        output, *written = checkpoint(run, hidden, *earlier, use_reentrant=False)
    if cache is not None:
        cache.layer(index).written = tuple(written)
    return output


def _attention_keeps_no_copies(hidden: torch.Tensor) -> bool:
    """Whether attention saves the keys and values so far as views of their buffer.

    With dropout in half precision torch's attention on a CPU saves them in fp32: for GPT-2 small two thirds of all.
    """
    return hidden.device.type != "cpu" or pays(hidden) or plans_for_card()


def on_host(hidden: torch.Tensor) -> AbstractContextManager[Any]:
    """Saved-tensor hooks with which autograd keeps `hidden` in (pinned) host memory; other tensors are not moved."""
    host: Any = save_on_cpu(pin_memory=True)

    def pack(tensor: torch.Tensor) -> Any:
        return host.pack_hook(tensor) if tensor.data_ptr() == hidden.data_ptr() else tensor

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else host.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)
