"""Products of few rows that a backward puts off, to work them out together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Deferred:
    """Pairs of row tensors, of one backward, whose products `first.mT @ second` are parts of one gradient."""

    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _backward: int = -1

    def begin(self) -> None:
        """Forget what another backward of the same graph left: one through a part of it, or one that broke off."""
        # torch's own checkpointing tells backwards apart like this; there is no public name for it.
        current = torch._C._current_graph_task_id()
        if current != self._backward:
            self.clear()
            self._backward = current

    def leave(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.begin()
        # Detached: a saved tensor holds the graph, which holds this.
        self.rows.append((first.detach(), second.detach()))

    def clear(self) -> None:
        self.rows.clear()
