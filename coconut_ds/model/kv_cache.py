"""Keys and values of all passes of a training forward, in one buffer per layer.

A cache that grows copies every key and value in every pass, and autograd keeps each copy until the backward. Here a
pass writes its columns behind those of the passes before it and gets a view of all of them; in the backward the
gradients of all passes are summed in one tensor per layer, and those a thought left as rows are added column by column.

Shapes: B rows, H key-value heads, P columns of earlier passes, N columns of the pass, T columns in all, d head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Columns = tuple[torch.Tensor, ...]
"""Keys and values of the columns so far, (B, H, P, d) each; empty before the first pass."""


@dataclass
class Gradient:
    """What the backward has collected so far for the keys, or the values, of a layer."""

    total: torch.Tensor | None = None
    """(B, H, T, d)"""
    left: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Products not yet worked out, as (B, H, G, P) and (B, H, G, d) with few rows G: first.mT @ second."""

    def add(self, gradient: torch.Tensor) -> None:
        """Add the gradient (B, H, P, d) of the first P columns."""
        if self.total is None:
            self.total = gradient.clone()
        else:
            self.total[:, :, : gradient.shape[-2]] += gradient

    def take(self, start: int, end: int) -> torch.Tensor | None:
        """The gradient (B, H, N, d) of the columns `start` to `end`, to be taken once, the first ones last."""
        own = None if self.total is None else self.total[:, :, start:end]
        if self.left:
            first = torch.cat([shares[..., start:end] for shares, _ in self.left], dim=2)
            product = first.mT @ torch.cat([vectors for _, vectors in self.left], dim=2)
            own = product if own is None else own.add_(product)
        if start == 0:
            self.total = None
            self.left.clear()
        return own


def collected(columns: torch.Tensor) -> Gradient | None:
    """Where the backward collects the gradient of keys or values that a `TrainingCache` returned; else None."""
    return getattr(columns.grad_fn, "collected", None)


class _Layer(DynamicLayer):
    def __init__(self, n_columns: int) -> None:
        super().__init__()
        self.n_columns = n_columns
        self.written: Columns = ()
        self.gradients = Gradient(), Gradient()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        earlier = self.written or (None, None)
        self.written = tuple(
            _Append.apply(before, new, self.n_columns, gradient)
            for before, new, gradient in zip(earlier, (key_states, value_states), self.gradients)
        )
        return self.written

    def get_seq_length(self) -> int:
        return self.written[0].shape[-2] if self.written else 0


class TrainingCache(Cache):
    """A KV cache for passes that cover `n_columns` columns together, each continuing where the one before it ended."""

    def __init__(self, n_columns: int) -> None:
        layer: Any = functools.partial(_Layer, n_columns)
        super().__init__(layer_class_to_replicate=layer)
        self._n_columns = n_columns

    def layer(self, index: int) -> _Layer:
        while len(self.layers) <= index:
            self.layers.append(_Layer(self._n_columns))
        layer: Any = self.layers[index]
        return layer

    def of_layer(self, index: int, earlier: Columns) -> TrainingCache:
        """A cache that continues after `earlier` in one layer, to write in it again what this one holds already."""
        view = TrainingCache(self._n_columns)
        view.layer(index).written = earlier
        view.layer(index).gradients = self.layer(index).gradients
        return view


class _Append(torch.autograd.Function):
    """(B, H, P, d) so far and (B, H, N, d) new columns -> (B, H, P + N, d), a view of the layer's buffer."""

    @staticmethod
    def forward(
        ctx: Any, earlier: torch.Tensor | None, new: torch.Tensor, n_columns: int, gradient: Gradient
    ) -> torch.Tensor:
        rows, heads, columns, size = new.shape
        if earlier is None:
            start, buffer = 0, new.new_empty(rows, heads, n_columns, size)
        else:
            # `.data`: to autograd a write would change what earlier passes saved, but their columns stay as they are.
            start = earlier.shape[-2]
            buffer = earlier.data.as_strided((rows, heads, n_columns, size), earlier.stride())
        end = start + columns
        ctx.columns, ctx.collected = (start, end), gradient
        ctx.set_materialize_grads(False)
        buffer[:, :, start:end] = new
        return buffer[:, :, :end]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if gradient is not None:
            ctx.collected.add(gradient)
        # `earlier` is given none: its own pass, whose turn comes later, takes it from what was collected.
        return None, ctx.collected.take(*ctx.columns), None, None
