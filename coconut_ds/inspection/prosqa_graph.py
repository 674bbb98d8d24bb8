"""The graph a ProsQA record asks about: distances from its root, and the texts that begin a step or name a node.

Three forms: sentences as published ("Every jompus is a zhorpus."), one word a node ("n3 n7"), one word an edge
("n3>n7"). No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
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
        """How steps are written, which the question tells."""
        if self.question.endswith("?"):
            return "text"
        return "edges" if ">" in self.question else "symbolic"

    @cached_property
    def distances(self) -> dict[int, int]:
        """Edges on a shortest path from the root, of every node that can be reached from it."""
        return _distances(self.root, self.edges)

    @cached_property
    def leads_to_target(self) -> frozenset[int]:
        """Nodes from which the target can be reached, itself included."""
        return frozenset(_distances(self.target, [(child, parent) for parent, child in self.edges]))

    def step_beginnings(self) -> list[tuple[int, str]]:
        """Node and text: a step that starts from the node begins with one of its texts.

        A word that is an edge cannot be begun only, so in that form there is a text for every pair of nodes.
        """
        names = list(enumerate(self.idx_to_symbol))
        if self.form == "edges":
            return [(node, f"{name}>{other}") for node, name in names for other in self.idx_to_symbol if other != name]
        if self.form == "symbolic":
            return names
        # Published files write nodes without parents as persons, all others as concepts.
        children = {child for _, child in self.edges}
        return [(node, f"Every {name}" if node in children else name) for node, name in names]

    def answers(self) -> tuple[str, list[tuple[int, str]]]:
        """What every answer begins with, and for each node that text with the node's name after it."""
        opening = f"### {self.idx_to_symbol[self.root]} is a" if self.form == "text" else "###"
        return opening, [(node, f"{opening} {name}") for node, name in enumerate(self.idx_to_symbol)]


def _distances(start: int, edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    found, waiting = {start: 0}, deque([start])
    while waiting:
        node = waiting.popleft()
        for parent, child in edges:
            if parent == node and child not in found:
                found[child] = found[node] + 1
                waiting.append(child)
    return found


def graph_of(record: Mapping[str, Any]) -> ProsqaGraph | str:
    """The graph of a record, or why it has none."""
    try:
        return ProsqaGraph.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        rule = first["msg"].removeprefix("Value error, ")
        return "has no key " + key if first["type"] == "missing" else f"{key}: {rule}".removeprefix(": ")
