"""The walk of a hops record (docs/datasets/HOPS.md): the node after each edge, read from question and steps.

Two forms, as the generator writes them: one word per edge ("n4>n7", of order 2 "n1-n4>n7") or one word per node
("n4 n7"). No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal

Names = tuple[str, ...]


@dataclass(frozen=True)
class HopsWalk:
    """Nodes are numbered as in `idx_to_symbol`."""

    question: str
    idx_to_symbol: Names
    facts: tuple[tuple[int, ...], ...]
    """Nodes of each fact of the question: those that decide, and the one that follows."""
    walk: tuple[int, ...]
    """The node after 0, 1 .. k edges."""
    form: Literal["edges", "symbolic"]

    @property
    def order(self) -> int:
        """How many of the last nodes say which node is next."""
        return len(self.facts[0]) - 1

    def step_beginnings(self) -> list[tuple[int, str]]:
        """Pairs of node and text: a step after which the node was reached last begins with one of its texts."""
        names, earlier = list(enumerate(self.idx_to_symbol)), product(self.idx_to_symbol, repeat=self.order - 1)
        states = [(node, (*before, name)) for before in earlier for node, name in names]
        if self.form == "symbolic":
            return [(node, " ".join(state)) for node, state in states]
        return [(node, f"{'-'.join(state)}>{other}") for node, state in states for other in self.idx_to_symbol]

    def answers(self) -> tuple[str, list[tuple[int, str]]]:
        """The text that every answer begins with, and for each node the whole answer."""
        return "###", [(node, f"### {name}") for node, name in enumerate(self.idx_to_symbol)]

    def masses(self, probabilities: Sequence[float], distance: int) -> dict[str, float]:
        """Probability of the node after 0, 1 .. k edges, and of no node; one node has two places in a short cycle.

        `distance` is not used: the columns of the table are the distances.
        """
        found = {f"after_{edges}": probabilities[node] for edges, node in enumerate(self.walk)}
        return found | {"no_node": 1 - sum(probabilities)}

    def shown(self) -> dict[str, Any]:
        """The graph as it is written and drawn; of order 2, where edges depend on two nodes, only those of the walk."""
        edges = self.facts if self.order == 1 else tuple(pairwise(self.walk))
        return {"idx_to_symbol": self.idx_to_symbol, "edges": edges, "walk": self.walk}


def is_hops_question(question: str) -> bool:
    """Whether a question asks for a walk: facts, a '?', and a start with at most one word after it, a number."""
    stated, asked = _facts_and_start(question)
    order = len(_words(stated.split()[0] if ">" in stated else stated.split("|")[0])) - 1 if stated else 0
    return 0 < order <= len(asked.split()) <= order + 1


def hops_walk_of(record: Mapping[str, Any]) -> HopsWalk | str:
    """The walk of a record, or why it has none."""
    question, steps = str(record.get("question", "")), record.get("steps") or []
    if not is_hops_question(question) or not steps:
        return "has no walk: needs a question with one '?' between facts and start, and steps"
    stated, asked = _facts_and_start(question)
    form: Literal["edges", "symbolic"] = "edges" if ">" in question else "symbolic"
    facts = [_words(fact) for fact in (stated.split() if form == "edges" else stated.rstrip(" |").split("|"))]
    walked = [_words(step) for step in steps]
    if {len(each) for each in (*facts, *walked)} != {len(facts[0])} or len(facts[0]) < 2:
        return "has no walk: facts and steps do not all have as many nodes"
    unknown = next((step for step, words in zip(steps, walked) if words not in facts), None)
    if unknown is not None:
        return f"steps: {unknown!r} is not in the question"
    start = tuple(asked.split()[: len(facts[0]) - 1])
    for before, after in pairwise([(*start,), *walked]):
        if before[1 - len(facts[0]) :] != after[:-1]:
            return f"steps: {' '.join(after)!r} does not follow {' '.join(before)!r}"
    if str(record.get("answer", "")).strip() != walked[-1][-1]:
        return f"answer: {record.get('answer')!r} is not {walked[-1][-1]!r}, where the steps end"
    names = tuple(dict.fromkeys(word for fact in facts for word in fact))
    numbers = {name: number for number, name in enumerate(names)}
    walk = (numbers[walked[0][-2]], *(numbers[words[-1]] for words in walked))
    return HopsWalk(question, names, tuple(tuple(numbers[word] for word in fact) for fact in facts), walk, form)


def _facts_and_start(question: str) -> tuple[str, str]:
    """The parts of a question on both sides of its '?', the facts first; empty texts if it has no such parts."""
    before, mark, after = question.partition(" ? ")
    stated, asked = (before, after) if _is_facts(before) else (after, before)
    return (stated, asked) if mark and " ? " not in after and _is_facts(stated) else ("", "")


def _is_facts(text: str) -> bool:
    return ">" in text or "|" in text


def _words(fact: str) -> Names:
    return tuple(fact.replace(">", " ").replace("-", " ").split())
