"""Hidden states -> the next continuous thought. Pure tensor functions.

Shapes: B rows, J states in the window, D hidden size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class LatentContext:
    """How a thought is made from earlier hidden states.

    The thought at column t is `sum_j w_j h[t-j] / sum_j w_j` over the last m = len(weights) states of the row,
    `weights[0]` belonging to the newest, h[t-1]. Plain Coconut (arXiv 2412.06769, section 3) is m = 1.

    `scope="sequence"` lets the window reach back over earlier thoughts to the first real column of the row.
    `scope="last_pass"` lets it reach only over the columns since the row's previous thought, so that every thought
    but the first is one hidden state: the computation of coconut-contextual, whose window is (0.1, 0.3, 0.6).

    Raises ValueError for an empty window, a negative weight, or a newest weight of 0.
    """

    weights: tuple[float, ...] = (1.0,)
    scope: Literal["sequence", "last_pass"] = "sequence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if not self.weights or self.weights[0] <= 0 or min(self.weights) < 0:
            raise ValueError(
                f"latent weights {self.weights}: needs at least one, the first (newest state) above 0, none negative"
            )
        if self.scope not in ("sequence", "last_pass"):
            raise ValueError(f"latent scope {self.scope!r}: must be 'sequence' or 'last_pass'")

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


def next_thought(states: torch.Tensor, available: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Weighted average of the newest states.

    states (B, J, D) newest first, J <= len(weights); available (B,) states that count per row; returns (B, D).
    A row without any state to average gets zeros.
    """
    n_states = states.shape[1]
    window = _window(weights, states.device)[:n_states]  # (J,)
    counted = torch.arange(n_states, device=states.device) < available[:, None]  # (B, J)
    shares = torch.where(counted, window, 0.0)  # (B, J)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    return torch.einsum("bj,bjd->bd", shares.to(states.dtype), states)


@functools.cache
def _window(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Copied to the device once: a copy per thought would make the host wait for it each time.
    return torch.tensor(weights, device=device)
