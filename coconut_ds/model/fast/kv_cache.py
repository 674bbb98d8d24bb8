"""Keys and values of all passes of a training forward, in one buffer per layer.

A growing cache copies all keys and values in every pass, and autograd keeps each copy until the backward. Here a pass
appends its columns to the buffer and gets a view of all columns so far. In the backward the gradients of all passes are
summed in place, and each pass takes those of its own columns when all later passes are done.

Shapes: B rows, H key-value heads, P columns of earlier passes, N columns of the pass, T columns in all, d head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from coconut_ds.model.fast.low_rank import Factors

Columns = tuple[torch.Tensor, ...]
"""Keys and values of the columns so far, (B, H, P, d) each; empty before the first pass."""


@dataclass
class Gradient(Factors):
    """The gradient of a layer's keys, or values, collected so far in a backward.

    The factors are (B, H, Q, P) and (B, H, Q, d), Q queries of a pass for each key-value head.
    """

    total: torch.Tensor | None = None
    """(B, H, T, d)"""

    def add(self, gradient: torch.Tensor) -> None:
        """Add the gradient (B, H, P, d) of the first P columns."""
        self.begin()
        if self.total is None:
            self.total = gradient.clone()
        else:
            self.total[:, :, : gradient.shape[-2]] += gradient

    def take(self, start: int, end: int) -> torch.Tensor | None:
        """The gradient (B, H, N, d) of the columns `start` to `end`, once; None when there is none."""
        self.begin()
        own = None if self.total is None else self.total[:, :, start:end]
        if self.rows:
            shares = torch.cat([first[..., start:end] for first, _ in self.rows], dim=2)
            product = shares.mT @ torch.cat([second for _, second in self.rows], dim=2)
            own = product if own is None else own.add_(product)
        return own

    def clear(self) -> None:
        super().clear()
        self.total = None


def collected(columns: torch.Tensor) -> Gradient | None:
    """The collected gradient of keys or values that a `TrainingCache` returned; None for other tensors."""
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
        """A cache that continues after `earlier` in one layer, to rewrite columns that this one holds already."""
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
            # `.data`: autograd would count a write as a change of earlier passes' columns, which stay as they are.
            start = earlier.shape[-2]
            buffer = earlier.data.as_strided((rows, heads, n_columns, size), earlier.stride())
        end = start + columns
        if end > n_columns:
            raise ValueError(f"{end} columns written to a TrainingCache made for {n_columns}; make it for all of them")
        ctx.columns, ctx.collected = (start, end), gradient
        ctx.set_materialize_grads(False)
        buffer[:, :, start:end] = new
        return buffer[:, :, :end]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if gradient is not None:
            ctx.collected.add(gradient)
        own = ctx.collected.take(*ctx.columns)
        if not ctx.needs_input_grad[0]:
            ctx.collected.clear()  # no earlier pass needs a gradient
        # None for `earlier`: the passes that wrote it run later and take their gradients from `collected`.
        return None, own, None, None
