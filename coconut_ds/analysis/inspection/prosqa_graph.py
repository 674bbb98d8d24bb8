"""The graph of a ProsQA record: distances from its root, and the texts that begin a step or name a node.

A record has a graph only if its question states the same edges, root and options.

Three forms: sentences as published ("Every jompus is a zhorpus."), one word per node ("n3 n7"), one word per edge
("n3>n7"). No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Form = Literal["text", "symbolic", "edges"]


class ProsqaGraph(BaseModel):
    """Nodes are numbered as in `idx_to_symbol`; edges are (parent, child)."""

    model_config = ConfigDict(frozen=True)

    question: str
    idx_to_symbol: tuple[Annotated[str, Field(min_length=1)], ...]
    edges: tuple[tuple[int, int], ...]
    root: int
    target: int
    neg_target: int

    @model_validator(mode="after")
    def _names_every_node(self) -> ProsqaGraph:
        numbers = {self.root, self.target, self.neg_target, *(node for edge in self.edges for node in edge)}
        unknown = sorted(numbers - set(range(len(self.idx_to_symbol))))
        if unknown:
            raise ValueError(f"names no node {unknown[0]} in idx_to_symbol")
        return self

    @property
    def form(self) -> Form:
        """How steps are written, as seen from the question."""
        if self.question.rstrip().endswith("?"):
            return "text"
        return "edges" if ">" in self.question else "symbolic"

    @cached_property
    def distances(self) -> dict[int, int]:
        """Length of a shortest path from the root, for every node that can be reached from it."""
        return distances([self.root], self.edges)

    @cached_property
    def leads_to_target(self) -> frozenset[int]:
        """Nodes from which the target can be reached, including the target."""
        return frozenset(distances([self.target], [(child, parent) for parent, child in self.edges]))

    def step_beginnings(self) -> list[tuple[int, str]]:
        """Pairs of node and text: a step that starts from the node begins with one of its texts.

        In the form with one word per edge a step is a whole word, so there is a text for every pair of nodes.
        """
        names = list(enumerate(self.idx_to_symbol))
        if self.form == "edges":
            return [(node, f"{name}>{other}") for node, name in names for other in self.idx_to_symbol if other != name]
        return names if self.form == "symbolic" else [(node, self._subject(node)) for node, _ in names]

    def _subject(self, node: int) -> str:
        """The subject of a sentence about a node: published files write nodes without parents as persons."""
        return f"Every {self.idx_to_symbol[node]}" if node in self.children else self.idx_to_symbol[node]

    @cached_property
    def children(self) -> frozenset[int]:
        """Nodes with a parent."""
        return frozenset(child for _, child in self.edges)

    def answers(self) -> tuple[str, list[tuple[int, str]]]:
        """The text that every answer begins with, and for each node the whole answer."""
        opening = f"### {self.idx_to_symbol[self.root]} is a" if self.form == "text" else "###"
        return opening, [(node, f"{opening} {name}") for node, name in enumerate(self.idx_to_symbol)]

    def masses(self, probabilities: Sequence[float], distance: int) -> dict[str, float]:
        """Probability of sets of nodes after `distance` steps; `reachable`, `unreachable` and `no_node` sum to 1.

        The root is reachable; `frontier` is at that distance exactly, `leading` with a path to the target as well;
        `distractor` is `neg_target`, the wrong option of the question.
        """
        reachable = sum(probabilities[node] for node in self.distances)
        nodes = sum(probabilities)
        frontier = [node for node, edges in self.distances.items() if edges == distance]
        return {
            "reachable": reachable,
            "frontier": sum(probabilities[node] for node in frontier),
            "leading": sum(probabilities[node] for node in frontier if node in self.leads_to_target),
            "target": probabilities[self.target],
            "distractor": probabilities[self.neg_target],
            "unreachable": nodes - reachable,
            "no_node": 1 - nodes,
        }

    def shown(self) -> dict[str, Any]:
        """The graph as it is written and drawn."""
        return {**self.model_dump(exclude={"question"}), "distances": self.distances}

    def difference_to_question(self) -> str | None:
        """Why the question is about another graph; None if it states these edges, this root and these options."""
        name = self.idx_to_symbol
        twice = next((each for each in name if name.count(each) > 1), None)
        if twice is not None:
            return f"idx_to_symbol: {twice!r} names two nodes"
        options = [(name[self.target], name[self.neg_target]), (name[self.neg_target], name[self.target])]
        endings = [_ENDINGS[self.form].format(name[self.root], *pair) for pair in options]
        question = " ".join(self.question.split())
        ending = next((each for each in endings if f" {question}".endswith(f" {each}")), None)
        if ending is None:
            return f"root, target, neg_target: the question does not end with {endings[0]!r} or {endings[1]!r}"
        written = _facts(self.form, question.removesuffix(ending).strip())
        edges = {self._fact(*edge) for edge in self.edges}
        if edges - written:
            return f"edges: {min(edges - written)!r} is not in the question"
        if written - edges:
            return f"edges: lack {min(written - edges)!r}, which is in the question"
        if self.target not in self.distances:
            return f"target: {name[self.target]!r} cannot be reached from the root {name[self.root]!r}"
        return None

    def _fact(self, parent: int, child: int) -> str:
        """An edge as the question writes it."""
        names = self.idx_to_symbol
        if self.form == "text":
            return f"{self._subject(parent)} is a {names[child]}."
        return f"{names[parent]}>{names[child]}" if self.form == "edges" else f"{names[parent]} {names[child]}"


_ENDINGS: dict[Form, str] = {"text": "Is {} a {} or {}?", "symbolic": "? {} {} {}", "edges": "? {} {} {}"}


def _facts(form: Form, text: str) -> set[str]:
    """The facts of a question without its ending, in any order."""
    if form == "edges":
        return set(text.split())
    if form == "symbolic":
        return {fact.strip() for fact in text.removesuffix("|").split("|")} - {""}
    return {f"{sentence}." for sentence in text.removesuffix(".").split(". ")} - {"."}


def distances(starts: Sequence[int], edges: Collection[Sequence[int]]) -> dict[int, int]:
    """Edges on a shortest path from one of `starts`, for every node that can be reached from them."""
    found, waiting = dict.fromkeys(starts, 0), deque(starts)
    while waiting:
        node = waiting.popleft()
        for parent, child in edges:
            if parent == node and child not in found:
                found[child] = found[node] + 1
                waiting.append(child)
    return found


def prosqa_graph_of(record: Mapping[str, Any]) -> ProsqaGraph | str:
    """The graph of a record, or why it has none: missing or wrong keys, or a question about another graph."""
    try:
        graph = ProsqaGraph.model_validate(record)
        return graph.difference_to_question() or _difference_to_answer(graph, record.get("answer")) or graph
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        rule = first["msg"].removeprefix("Value error, ")
        return "has no key " + key if first["type"] == "missing" else f"{key}: {rule}".removeprefix(": ")


def _difference_to_answer(graph: ProsqaGraph, answer: Any) -> str | None:
    target = graph.idx_to_symbol[graph.target]
    right = f"{graph.idx_to_symbol[graph.root]} is a {target}." if graph.form == "text" else target
    if answer is None or str(answer).strip() == right:
        return None
    return f"target: the answer is {answer!r}, the graph's {right!r}"
