"""The graphs of ProsQA: Algorithm 1 of the Coconut paper (arXiv 2412.06769, appendix A.2) and the question asked.

The paper leaves three choices open; they are made here to reproduce the statistics of the published validation set
(`tests/preprocessing/test_prosqa.py`):

* 28 nodes are drawn, and those left with neither parent nor child are dropped (17 to 28 remain);
* the entity asked about is the one of the two roots whose deepest exclusive leaf lies farther away, and that leaf
  is the answer; graphs whose answer is nearer than 3 or farther than 6 steps are drawn again;
* a node drawn without parents can be chosen as a parent only by the rule that admits every node.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import exp, factorial

MEAN_PARENTS = 1.5
"""Of Algorithm 1, before the number of parents is limited by that of candidates."""
_MOST_PARENTS = 24  # the Poisson tail beyond it has probability 1e-8 for a mean of 6


@cache
def _poisson_cumulative(mean: float) -> list[float]:
    return list(accumulate(exp(-mean) * mean**k / factorial(k) for k in range(_MOST_PARENTS + 1)))


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph with the question asked about it; nodes are numbered in topological order.

    `root` is the entity of the question, `target` a leaf reachable from it, `neg_target` a leaf that is not,
    `path` one shortest path from `root` to `target`, both ends included.
    """

    n_nodes: int
    edges: tuple[tuple[int, int], ...]
    root: int
    target: int
    neg_target: int
    path: tuple[int, ...]

    @property
    def n_steps(self) -> int:
        return len(self.path) - 1


def draw_edges(
    rng: random.Random, n_nodes: int, mean_parents: float = MEAN_PARENTS
) -> tuple[list[tuple[int, int]], list[int]]:
    """Algorithm 1: edges (parent, child), and labels telling whether a node descends from node 0 (1) and 1 (2)."""
    labels = [1, 2]
    depth = [0, 0]
    by_label: list[list[int]] = [[], [0], [1], []]
    edges = []
    for node in range(2, n_nodes):
        n_parents = rng.choices(range(_MOST_PARENTS + 1), cum_weights=_poisson_cumulative(mean_parents))[0]
        side = rng.random()
        if side <= 0.35:
            candidates = by_label[0] + by_label[1]
        elif side <= 0.70:
            candidates = by_label[0] + by_label[2]
        else:
            candidates = list(range(node))
        parents = _choose_without_replacement(rng, candidates, n_parents, depth)
        label = 0
        for parent in parents:
            label |= labels[parent]
            edges.append((parent, node))
        labels.append(label)
        depth.append(1 + max((depth[parent] for parent in parents), default=-1))
        if parents:
            by_label[label].append(node)
    return edges, labels


def _choose_without_replacement(rng: random.Random, candidates: list[int], count: int, depth: list[int]) -> list[int]:
    pool = list(candidates)
    weights = [1.5 * depth[node] + 1 for node in pool]
    chosen = []
    for _ in range(min(count, len(pool))):
        index = rng.choices(range(len(pool)), weights)[0]
        chosen.append(pool.pop(index))
        weights.pop(index)
    return chosen


def shortest_paths(edges: list[tuple[int, int]], root: int) -> dict[int, tuple[int, ...]]:
    """One shortest path from `root` to every node it reaches, by breadth-first search."""
    children: dict[int, list[int]] = {}
    for parent, child in edges:
        children.setdefault(parent, []).append(child)
    paths: dict[int, tuple[int, ...]] = {root: (root,)}
    frontier = [root]
    for node in frontier:
        for child in children.get(node, ()):
            if child not in paths:
                paths[child] = (*paths[node], child)
                frontier.append(child)
    return paths


def draw_graph(
    rng: random.Random, n_nodes: int, min_steps: int, max_steps: int, mean_parents: float = MEAN_PARENTS
) -> Graph:
    """Draw graphs until one has a question whose answer is `min_steps` to `max_steps` edges away."""
    while True:
        edges, labels = draw_edges(rng, n_nodes, mean_parents)
        parents_of_some = {parent for parent, _ in edges}
        leaves = [node for node in range(2, n_nodes) if node not in parents_of_some]
        exclusive = [[leaf for leaf in leaves if labels[leaf] == 1 << side] for side in (0, 1)]
        if not exclusive[0] or not exclusive[1]:
            continue
        paths = [shortest_paths(edges, side) for side in (0, 1)]
        reach = [max(len(paths[side][leaf]) - 1 for leaf in exclusive[side]) for side in (0, 1)]
        root = 0 if reach[0] > reach[1] else 1
        if not min_steps <= reach[root] <= max_steps:
            continue
        target = rng.choice([leaf for leaf in exclusive[root] if len(paths[root][leaf]) - 1 == reach[root]])
        neg_target = rng.choice(exclusive[1 - root])
        return _drop_isolated(n_nodes, edges, root, target, neg_target, paths[root][target])


def _drop_isolated(n_nodes, edges, root, target, neg_target, path) -> Graph:
    linked = {node for edge in edges for node in edge}
    number = {old: new for new, old in enumerate(node for node in range(n_nodes) if node in linked)}
    return Graph(
        n_nodes=len(number),
        edges=tuple((number[parent], number[child]) for parent, child in edges),
        root=number[root],
        target=number[target],
        neg_target=number[neg_target],
        path=tuple(number[node] for node in path),
    )


def check_graph(graph: Graph) -> None:
    """Raise ValueError unless the answer is reachable, the other option is not, and the path is shortest."""
    paths = shortest_paths(list(graph.edges), graph.root)
    if graph.target not in paths:
        raise ValueError(f"the answer {graph.target} cannot be reached from {graph.root}: {graph}")
    if graph.neg_target in paths:
        raise ValueError(f"the wrong option {graph.neg_target} can be reached from {graph.root}: {graph}")
    hops = list(zip(graph.path, graph.path[1:]))
    if not set(hops) <= set(graph.edges) or len(graph.path) != len(paths[graph.target]):
        raise ValueError(f"{graph.path} is not a shortest path of {graph}")
