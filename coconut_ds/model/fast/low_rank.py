"""Low-rank gradient factors, collected during a backward and multiplied once.

The gradient that few rows give a matrix is a product of two thin matrices. The two factors of every short pass are kept
until the backward reaches the prefix (`fast/__init__.py` has the formulas).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from coconut_ds.model.internals import current_backward


@dataclass
class Factors:
    """Pairs of row tensors, of one backward, whose products `first.mT @ second` are parts of one gradient."""

    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _backward: int = -1

    def begin(self) -> None:
        """Forget what another backward of the same graph kept: one through a part of it, or one that failed."""
        current = current_backward()
        if current != self._backward:
            self.clear()
            self._backward = current

    def keep(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.begin()
        # Detached: a saved tensor holds the graph, which holds this.
        self.rows.append((first.detach(), second.detach()))

    def clear(self) -> None:
        self.rows.clear()


def pays(rows: torch.Tensor) -> bool:
    """Whether to keep factors for a product with `rows`: only where it was measured to pay (docs/PERFORMANCE.md).

    That is in fp32 on a CPU. In half precision torch's kernels sum in fp32; on a GPU nobody has measured it yet.
    """
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
