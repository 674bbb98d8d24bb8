"""Tables of the hops task: what follows each node, or each pair of nodes, and walks through them.

A state is the last node (order 1) or the last two (order 2). A table says which node follows every state. It is a
bijection: order 1 is a permutation of the nodes, order 2 has one permutation for every last node, so that a state has
one predecessor, every node follows equally many states, and no walk runs into a dead end or a funnel.

The states of a table form cycles. By default it is one single cycle through all of them, in which a walk comes back to
its start only after n (order 2: n^2) edges; of all bijections one in n (order 2: one in n^2) is such a cycle. A single
cycle of pairs is a de Bruijn sequence of order 2.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from typing import TypeVar

Node = TypeVar("Node")
"""A number, or a name."""
Table = Mapping[tuple[Node, ...], Node]
"""The node that follows each state: the last node, or the last two, the newest at the end."""

GRAPHS = ("cycle", "permutation")


def draw_table(rng: random.Random, n_nodes: int, order: int, graph: str) -> Table[int]:
    """A table drawn uniformly from all of its kind: single cycles, or all bijections (`permutation`)."""
    while True:
        table = _draw_bijection(rng, n_nodes, order)
        if graph == "permutation" or is_single_cycle(table):
            return table


def _draw_bijection(rng: random.Random, n_nodes: int, order: int) -> Table[int]:
    table: dict[tuple[int, ...], int] = {}
    for later in itertools.product(range(n_nodes), repeat=order - 1):
        for first, node in enumerate(rng.sample(range(n_nodes), n_nodes)):
            table[(first, *later)] = node
    return table


def follow(table: Table[Node], start: tuple[Node, ...], hops: int) -> list[tuple[Node, ...]]:
    """The states after 0, 1 .. `hops` edges; raises KeyError where the table has no next node."""
    states: list[tuple[Node, ...]] = [start]
    for _ in range(hops):
        states.append((*states[-1][1:], table[states[-1]]))
    return states


def is_single_cycle(table: Table[Node]) -> bool:
    """Whether a walk sees every state before it comes back to its start."""
    return len(set(follow(table, next(iter(table)), len(table) - 1))) == len(table)


def count_tables(n_nodes: int, order: int, graph: str) -> int:
    """How many tables there are over given nodes; de Bruijn sequences for single cycles of order 2."""
    bijections = math.factorial(n_nodes) ** n_nodes ** (order - 1)
    return bijections if graph == "permutation" else bijections // n_nodes**order
