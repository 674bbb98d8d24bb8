"""Thoughts computed all at once, T times over, instead of one after another (PCCoT, arXiv 2506.18582, section 3).

The sequential method computes thought x_i = f(prefix, x_1 .. x_{i-1}) for i = 1 .. k in one backbone pass each.
Here the first pass runs over the prefix and k embeddings of `<|latent|>`. Each of the T passes after it, a Jacobi
iteration, runs over all k thoughts, computed from the states of the previous pass; the last one includes the tail.
After t iterations the first t thoughts equal those of the sequential method, so T = k gives the same result in k + 1
passes; a smaller T gives a different result in fewer.

All passes append to one KV cache, where the thoughts of a pass see the prefix and each other, but not those of another.

Shapes: B rows, T columns, D hidden size; k thought columns of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from transformers import Cache, DynamicCache

Fed = Callable[[torch.Tensor], torch.Tensor]
"""States (B, end, D) of the columns up to the last thought -> what is fed at the k thought columns, (B, k, D)."""


class Run(Protocol):
    def __call__(self, embeds: torch.Tensor, start: int, cache: Cache | None, unseen: int = 0) -> torch.Tensor:
        """A pass over embeddings (B, columns, D) from the column `start` on: their states.

        Behind the columns before `start` the cache holds `unseen` ones that are not attended to.
        """


@dataclass(frozen=True)
class Jacobi:
    """T iterations over all thoughts; gradients go back through all of them, or through the last one.

    Raises ValueError for fewer than one iteration.
    """

    iterations: int
    gradient: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations {self.iterations}: must be at least 1")
        if self.gradient not in ("all", "last"):
            raise ValueError(f"gradient {self.gradient!r}: must be 'all' or 'last'")


@dataclass(frozen=True)
class JacobiPasses:
    """The passes over a batch, as (embeddings fed, states) pairs of neighbouring columns, (B, columns, D) each.

    `span` is (first thought column, one past the last), `embeds` (B, T, D) are those of the tokens. More iterations
    than there are thoughts would change nothing.
    """

    solver: Jacobi
    span: tuple[int, int]
    embeds: torch.Tensor
    fed: Fed
    run: Run
    new_cache: Callable[[int], Cache]
    """Makes an empty cache for a number of columns, in which gradients may flow."""

    def in_training(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """With gradients through all iterations, or through the last one."""
        first, end = self.span
        columns = self.embeds.shape[1]
        if self.solver.gradient == "last":
            earlier = self._scratch()[:, first:]
            cache = self.new_cache(columns)
            prefix, unseen = self.run(self.embeds[:, :first], 0, cache), 0
            states = torch.cat([prefix, earlier], dim=1)
        else:
            unseen = self._n_iterations * (end - first)
            cache = self.new_cache(columns + unseen)
            states = self._iterated(cache)
        inputs = torch.cat([self.fed(states), self.embeds[:, end:]], dim=1)
        passed = (self.embeds[:, :first], states[:, :first])
        return [passed, (inputs, self.run(inputs, first, cache, unseen))]

    def into(self, cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Without gradients, in a cache that holds every column once afterwards."""
        first, end = self.span
        inputs = torch.cat([self.embeds[:, :first], self.fed(self._scratch()), self.embeds[:, end:]], dim=1)
        return [(inputs, self.run(inputs, 0, cache))]

    @property
    def _n_iterations(self) -> int:
        return min(self.solver.iterations, self.span[1] - self.span[0])

    @torch.no_grad()
    def _scratch(self) -> torch.Tensor:
        return self._iterated(DynamicCache())

    def _iterated(self, cache: Cache) -> torch.Tensor:
        """States (B, end, D) of prefix and thoughts after all iterations but the last."""
        first, end = self.span
        states = self.run(self.embeds[:, :end], 0, cache)
        for number in range(1, self._n_iterations):
            thoughts = self.run(self.fed(states), first, cache, number * (end - first))
            states = torch.cat([states[:, :first], thoughts], dim=1)
        return states


def mask_of_iteration(mask: torch.Tensor, first: int, last: int, unseen: int) -> torch.Tensor:
    """The part of a mask (B, 1, T, T) for a pass over the columns `first` to `last` whose cache holds `unseen` more.

    They lie behind the prefix: (B, 1, last - first, first + unseen + last - first).
    """
    rows = mask[:, :, first:last]
    hidden = rows.new_full((*rows.shape[:3], unseen), -torch.inf)
    return torch.cat([rows[..., :first], hidden, rows[..., first:last]], dim=-1)
