"""A CPU that stands in for a card while memory is planned: what is kept is what a card's kernels would keep.

With dropout in attention (GPT-2 trains with 0.1) torch has no fused attention on a CPU and keeps several tensors of
shape (B, heads, T, T) per pass. A card's memory-efficient attention draws its masks inside the kernel and keeps none;
neither does a CPU's fused attention without dropout, so it is measured without. Low-rank factors are for a CPU only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FOR_CARD: ContextVar[bool] = ContextVar("plans_for_card", default=False)


@contextmanager
def planning_for_card() -> Iterator[None]:
    """Within it the speed layer runs as on a card, without attention's dropout; forward and backward run on a CPU."""
    before = _FOR_CARD.set(True)
    try:
        yield
    finally:
        _FOR_CARD.reset(before)


def plans_for_card() -> bool:
    return _FOR_CARD.get()
