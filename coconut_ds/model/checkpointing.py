"""Activation checkpointing of decoder layers that keeps the KV cache.

HF's own checkpointing drops the cache in training and with it every thought. Here a layer's earlier keys and values go
into the recomputed region as inputs and its new ones come out as outputs; the cache is written outside it. What stays
alive per layer and pass is the layer's input and its new keys and values; joining them with the earlier ones happens
inside the region and is undone with it.

Shapes: B rows, T columns of the pass, D hidden size, H key-value heads, d their size.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut_ds.model.weight_gradients import current_pass, within

_LOG = logging.getLogger(__name__)
_CACHE_ARGUMENT = "past_key_values"

Piece = tuple[torch.Tensor, torch.Tensor]
"""Keys and values one pass wrote, (B, H, T, d) each."""


class _PieceLayer(DynamicLayer):
    """One layer's keys and values as the pieces the passes wrote, joined only for the time a layer needs them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.pieces: list[Piece] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Piece:
        self.pieces.append((key_states, value_states))
        return _join(self.pieces)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.pieces)


class PieceCache(Cache):
    """A KV cache for training with checkpointed layers; layers that are not checkpointed can use it as well."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_PieceLayer)

    def pieces(self, layer: int) -> list[Piece]:
        """What the passes so far wrote for a layer."""
        while len(self.layers) <= layer:
            self.layers.append(_PieceLayer())
        own: Any = self.layers[layer]
        return own.pieces


class _RegionCache(PieceCache):
    """The cache as one layer sees it inside a recomputed region: earlier pieces to read, one new piece to hand out."""

    def __init__(self, layer: int, earlier: list[Piece]) -> None:
        super().__init__()
        self._layer = layer
        self.pieces(layer).extend(earlier)
        self.written: list[Piece] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Piece:
        if layer_idx != self._layer or self.written:
            raise RuntimeError(
                f"decoder layer {self._layer} wrote keys and values for layer {layer_idx}, or twice; "
                "activation checkpointing needs one write to its own layer: switch it off for this model"
            )
        # Handed out on its own: a view would keep the whole projection alive.
        self.written.append((key_states.contiguous(), value_states.contiguous()))
        return _join([*self.pieces(self._layer), (key_states, value_states)])


def checkpoint_layers(model: PreTrainedModel, every_n_layers: int = 1, offload: bool = False) -> None:
    """Recompute every `every_n_layers`-th decoder layer of `model` in the backward, the first one included.

    Raises ValueError for a model without decoder layers that take `past_key_values`, or checkpointed already.
    """
    if every_n_layers < 1:
        raise ValueError(f"every_n_layers {every_n_layers}: must be at least 1")
    layers = decoder_layers(model)
    if any("forward" in layer.__dict__ for layer in layers):
        raise ValueError("activation checkpointing is on already, or something else replaced the layers' forward")
    if offload and not torch.cuda.is_available():
        _LOG.warning("activation checkpointing: offload does nothing on a CPU, layer inputs are in host memory already")
    for index in range(0, len(layers), every_n_layers):
        signature = inspect.signature(layers[index].forward)
        layers[index].forward = functools.partial(_checkpointed, layers[index], index, signature, offload)


def restore_layers(model: PreTrainedModel) -> None:
    """Undo `checkpoint_layers`."""
    for layer in decoder_layers(model):
        layer.__dict__.pop("forward", None)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order; raises ValueError where there are none that take `past_key_values`."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or any(_CACHE_ARGUMENT not in inspect.signature(type(layer).forward).parameters for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or ["none"]
        raise ValueError(
            f"activation checkpointing: {type(model).__name__} has no decoder layers that take {_CACHE_ARGUMENT} "
            f"(found {', '.join(kinds)}); switch it off for this model"
        )
    return layers


def _checkpointed(
    layer: nn.Module, index: int, signature: inspect.Signature, offload: bool, *args: Any, **kwargs: Any
) -> Any:
    """What a checkpointed layer runs in place of its forward; same arguments, same result."""
    forward = functools.partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    call = signature.bind(*args, **kwargs)
    cache = call.arguments.pop(_CACHE_ARGUMENT, None)
    hidden, *rest = call.args
    run = _region(forward, index, cache is not None, rest, call.kwargs)
    earlier = cache.pieces(index) if cache is not None else []
    flat = [tensor for piece in earlier for tensor in piece]
    # The prefix is what pays; the passes after it have a column or a few.
    with on_host(hidden) if offload and hidden.is_cuda and not earlier else nullcontext():
        output, *piece = checkpoint(run, hidden, *flat, use_reentrant=False)
    if cache is not None:
        cache.pieces(index).append(tuple(piece))
    return output


def _region(
    forward: Callable[..., Any], index: int, has_cache: bool, rest: list[Any], kwargs: dict[str, Any]
) -> Callable[..., tuple[Any, ...]]:
    """(layer input, earlier keys and values in turn) -> (layer output, new keys, new values)."""
    this = current_pass()

    def run(hidden: torch.Tensor, *flat: torch.Tensor) -> tuple[Any, ...]:
        with within(this):
            if not has_cache:
                return (forward(hidden, *rest, **kwargs),)
            view = _RegionCache(index, list(zip(flat[::2], flat[1::2])))
            output = forward(hidden, *rest, **kwargs, **{_CACHE_ARGUMENT: view})
            return (output, *view.written[0])

    return run


def on_host(hidden: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside it, autograd keeps `hidden` in host memory (pinned beside a GPU); everything else stays where it is."""
    host: Any = save_on_cpu(pin_memory=True)

    def pack(tensor: torch.Tensor) -> Any:
        return host.pack_hook(tensor) if tensor.data_ptr() == hidden.data_ptr() else tensor

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else host.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)


def _join(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    keys, values = zip(*pieces)
    return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)
