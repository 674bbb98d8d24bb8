"""Hidden states -> the next continuous thought. Pure tensor functions.

Shapes: B rows, J states in the window, D hidden size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class LatentContext:
    """How a thought is computed from earlier hidden states.

    The thought at column t is `sum_j w_j h[t-j] / sum_j w_j` over the last m = len(weights) states of the row,
    `weights[0]` belonging to the newest, h[t-1]. Plain Coconut (arXiv 2412.06769, section 3) is m = 1.

    `scope="sequence"`: the window extends over earlier thoughts to the first real column of the row.
    `scope="last_pass"`: it extends only over the columns since the row's previous thought, so that every thought but
    the first is one hidden state: the computation of coconut-contextual, whose window is (0.1, 0.3, 0.6).

    `learned`: the w_j are a softmax of m trained logits, initialised from `weights`.

    `projection`: the average then goes through a trained linear(D, projection), GELU, linear(projection, D), layer norm
    (CODI, arXiv 2502.21074, section 3).

    `norm` scales every thought last: `rms` to a root mean square of 1, `embedding` to the mean L2 norm of the token
    embeddings that precede the first thought of its row; `none` leaves it, as published.

    Raises ValueError for an empty window, a negative weight, a newest weight of 0, any weight of 0 to learn from, and a
    projection to less than 1.
    """

    weights: tuple[float, ...] = (1.0,)
    scope: Literal["sequence", "last_pass"] = "sequence"
    learned: bool = False
    norm: Literal["none", "rms", "embedding"] = "none"
    projection: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if not self.weights or self.weights[0] <= 0 or min(self.weights) < 0:
            raise ValueError(
                f"latent weights {self.weights}: needs at least one, the first (newest state) above 0, none negative"
            )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"latent weights {self.weights}: must be finite")
        if self.scope not in ("sequence", "last_pass"):
            raise ValueError(f"latent scope {self.scope!r}: must be 'sequence' or 'last_pass'")
        if self.norm not in ("none", "rms", "embedding"):
            raise ValueError(f"latent norm {self.norm!r}: must be 'none', 'rms' or 'embedding'")
        if self.learned and min(self.weights) == 0:
            raise ValueError(f"latent weights {self.weights}: learning starts from weights above 0")
        if self.projection is not None and self.projection < 1:
            raise ValueError(f"latent projection {self.projection}: must be at least 1, its inner size")

    @property
    def reach(self) -> int:
        """m, the number of states in the window."""
        return len(self.weights)


def states_in_reach(scope: str, column: int, first_real: torch.Tensor, follows_thought: torch.Tensor) -> torch.Tensor:
    """How many states before `column` the window may use in each row, shape (B,).

    `first_real` (B,) is each row's first column that is not padding, `follows_thought` (B,) tells whether the column
    before is itself a thought.
    """
    available = column - first_real
    if scope == "last_pass":
        available = torch.where(follows_thought, 1, available)
    return available


def window_shares(available: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The normalised weight of each state of the window, newest first: (B, m), rows summing to 1.

    available (B,) states in reach per row; weights (m,). A row without a state gets zeros.
    """
    counted = torch.arange(len(weights), device=available.device) < available[:, None]  # (B, m)
    shares = torch.where(counted, weights, 0.0)  # (B, m)
    return shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)


def next_thought(states: torch.Tensor, available: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted average of the newest states.

    states (B, J, D) newest first; available (B,) states in reach per row; weights (m,), m >= J; returns (B, D).
    A row without a state gets zeros. Half precision is averaged in fp32 and rounded once: shares rounded to bf16 do not
    sum to 1.
    """
    shares = window_shares(available, weights[: states.shape[1]])  # (B, J)
    wide = torch.promote_types(states.dtype, torch.float32)
    return torch.einsum("bj,bjd->bd", shares.to(wide), states.to(wide)).to(states.dtype)


class LatentWindow(nn.Module):
    """What is trained of the window: `logits` (m,), whose softmax are its weights, and the `projection`."""

    def __init__(self, context: LatentContext, size: int):
        """`size` is D."""
        super().__init__()
        self._weights, inner = context.weights, context.projection
        self.logits = nn.Parameter(torch.tensor([*map(math.log, context.weights)])) if context.learned else None
        self.projection: nn.Module | None = None
        if inner is not None:
            self.projection = nn.Sequential(
                nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size), nn.LayerNorm(size)
            )

    def forward(self, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (m,), newest first, and the hidden states of the prefix (B, T, D), unchanged.

        The passes use the returned states. Through them logits and projection get a gradient in every backward, zeros
        without a thought, and always at the same place in the order of gradients (`fast/__init__.py` says why).
        """
        if self.logits is None:
            weights = _constant(self._weights, prefix.device)
        else:
            logits, prefix = _Joined.apply(self.logits, prefix)
            weights = logits.float().softmax(dim=0)
        if self.projection is not None:
            _, prefix = _Joined.apply(self.projection(prefix[:, :1]), prefix)
        return weights, prefix

    def projected(self, thought: torch.Tensor) -> torch.Tensor:
        """`thought` (B, D), or its projection (B, D) if there is one."""
        return thought if self.projection is None else self.projection(thought)

    @torch.no_grad()
    def current(self) -> list[float]:
        """The weights, normalised to sum to 1."""
        weights = torch.tensor(self._weights) if self.logits is None else self.logits.float().softmax(dim=0)
        return (weights / weights.sum()).tolist()


class _Joined(torch.autograd.Function):
    """Identity of two tensors, whose gradients become ready together."""

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return first.view_as(first), second.view_as(second)

    @staticmethod
    def backward(ctx: Any, to_first: torch.Tensor, to_second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return to_first, to_second


@functools.cache
def _constant(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Copied to the device once: a copy per thought would synchronise the host with it each time.
    return torch.tensor(weights, device=device)


_EPSILON = 1e-12
"""Below any real mean square; keeps the gradient of a row without states finite."""


def scaled(thought: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    """`thought` (B, D) with the L2 norm `norm` (B, 1); unchanged if that is None."""
    if norm is None:
        return thought
    wide = thought.float()
    return (wide * (norm * (wide.square().sum(dim=1, keepdim=True) + _EPSILON).rsqrt())).to(thought.dtype)


@torch.no_grad()
def wanted_norm(
    context: LatentContext, embeds: torch.Tensor, attention_mask: torch.Tensor, is_thought: torch.Tensor
) -> torch.Tensor | None:
    """The L2 norm of each row's thoughts (B, 1), or None if thoughts keep theirs.

    embeds (B, T, D) of the tokens; attention_mask and is_thought (B, T). Only the real columns before the row's first
    thought count, so that neither padding nor what follows a thought can change it.
    """
    if context.norm == "none":
        return None
    rows, _, size = embeds.shape
    if context.norm == "rms":
        return torch.full((rows, 1), size**0.5, device=embeds.device)
    precedes = attention_mask.bool() & (is_thought.cumsum(dim=1) == 0)  # (B, T)
    norms = torch.linalg.vector_norm(embeds.float(), dim=2)  # (B, T)
    return ((norms * precedes).sum(dim=1) / precedes.sum(dim=1).clamp_min(1))[:, None]
