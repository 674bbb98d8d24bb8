"""Low-rank weight gradients: factors of thoughts and a short tail, multiplied once with the prefix.

For a pass over few columns autograd computes the low-rank gradient of each weight, dW = X^T G, in full and adds it to
the previous one: for GPT-2 small, 340 MB written and a gigabyte moved per pass. Here these passes keep their inputs X
and output gradients G, B rows per column, for the prefix's backward. It runs after theirs, because every thought is
made from a state of the pass before it. Longer tails are left to autograd. `fast/__init__.py` has the formulas and the
order of gradients that this must keep.

Shapes: N rows of a pass (batch times columns), I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from coconut_ds.model.fast.few_rows import product
from coconut_ds.model.fast.low_rank import Factors, pays

SHORT = 16
"""Longest pass, in columns, whose factors are kept: 0.6 MB per column and row of the batch for GPT-2 small in fp32.
In columns, not rows, so that memory grows linearly with the micro-batch, as the planner expects."""


@dataclass(frozen=True)
class Pass:
    """One pass of a forward."""

    is_prefix: bool
    kept: dict[nn.Module, Factors]
    """Factors of all short passes of the forward, for each linear layer of the prefix: inputs (N, I) and output
    gradients (N, O)."""


_CURRENT: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextmanager
def within(this: Pass | None) -> Iterator[None]:
    """Set the current pass, or None, for the code inside."""
    token = _CURRENT.set(this)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_pass() -> Pass | None:
    """The current pass, to be restored by `within` when activations are recomputed."""
    return _CURRENT.get()


def passes_of_a_forward() -> Callable[[bool], AbstractContextManager[None]]:
    """Makes the context of each pass of one forward, given whether the pass is the prefix."""
    kept: dict[nn.Module, Factors] = {}
    return lambda is_prefix: within(Pass(is_prefix, kept))


def install(decoder: nn.Module) -> None:
    """Replace the forward of the linear layers inside `decoder` by one that depends on the current pass."""
    for module in decoder.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.forward = functools.partial(_forward, module)


def uninstall(decoder: nn.Module) -> None:
    """Undo `install`."""
    for module in decoder.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.__dict__.pop("forward", None)


def _forward(module: Any, rows: torch.Tensor) -> torch.Tensor:
    this = _CURRENT.get()
    weight: torch.Tensor = module.weight
    # Weights are (O, I); those of Conv1D are transposed.
    is_transposed = isinstance(module, Conv1D)
    if not torch.is_grad_enabled():
        return product(rows, weight if is_transposed else weight.T, module.bias)
    # ZeRO-3 gathers the weight for the call of its module only.
    is_whole = not hasattr(weight, "ds_id")
    if this is None or not (weight.requires_grad and is_whole and pays(rows)):
        return type(module).forward(module, rows)
    if this.is_prefix:
        factors = this.kept.setdefault(module, Factors())
        weight, bias = _Gathered.apply(weight, module.bias, is_transposed, factors)
        if is_transposed:
            return torch.addmm(bias, rows.flatten(0, -2), weight).unflatten(0, rows.shape[:-1])
        return F.linear(rows, weight, bias)
    if rows.shape[1] > SHORT or module not in this.kept:
        return type(module).forward(module, rows)
    return _Short.apply(rows, weight, module.bias, is_transposed, this.kept[module])


class _Short(torch.autograd.Function):
    """A linear layer that keeps the factors of its weight's gradient for the prefix."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        is_transposed: bool,
        factors: Factors,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.is_transposed, ctx.factors = is_transposed, factors
        return product(rows, weight if is_transposed else weight.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        ctx.factors.keep(rows.flatten(0, -2), gradient.flatten(0, -2))
        return product(gradient, weight.T if ctx.is_transposed else weight), None, None, None, None


class _Gathered(torch.autograd.Function):
    """Identity of weight and bias, whose backward adds the product of the factors that short passes kept."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool, factors: Factors
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.is_transposed, ctx.factors = is_transposed, factors
        return weight.view_as(weight), bias if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_weight: torch.Tensor, to_bias: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.factors.begin()
        if ctx.factors.rows:
            rows, gradient = (torch.cat(parts) for parts in zip(*ctx.factors.rows))
            ctx.factors.clear()
            first, second = (rows, gradient) if ctx.is_transposed else (gradient, rows)
            to_weight = to_weight.addmm_(first.T, second)
            if to_bias is not None:
                to_bias = to_bias + gradient.sum(dim=0)
        return to_weight, to_bias, None, None
