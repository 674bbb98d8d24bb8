"""Low-rank gradient factors, collected during a backward and multiplied once; formulas in `fast/__init__.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from coconut_ds.model.fast.planning import plans_for_card
from coconut_ds.model.internals import current_backward


@dataclass
class Factors:
    """Pairs of row tensors of one backward, whose products `first.mT @ second` add up to one gradient."""

    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _backward: int = -1

    def begin(self) -> None:
        """Discard factors of an earlier backward of the same graph, which was partial or failed."""
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
    """Whether to keep factors for a product with `rows`: in fp32 on a CPU, where it was measured to be faster.

    In half precision torch's kernels sum in fp32; on a GPU it was never measured (docs/PERFORMANCE.md).
    """
    is_measured = rows.device.type == "cpu" and rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_measured and not plans_for_card()
