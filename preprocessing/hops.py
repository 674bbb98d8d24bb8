"""Hops: follow k edges of a table, a task whose thoughts are needed (docs/datasets/HOPS.md).

    python preprocessing/hops.py generate --out data/hops
    python preprocessing/hops.py ood --out data/hops --hops 5 6
    python preprocessing/hops.py check data/hops/hops_train.json
    python preprocessing/hops.py stats data/hops/hops_train.json

A question states a table, its facts in random order, and a start: "n4>n7 n6>n5 n5>n2 .. ? n1". The steps are the facts
that a walk of k edges uses, the answer is the node at which it ends. No table is in two splits. The tables are drawn in
`hops_tables.py`.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from hops_tables import GRAPHS, count_tables, draw_table, follow, is_single_cycle
from json_lists import UnusableError, add_readers, demand_right, read_list, run_command, write_list

FORMS = ("edges", "symbolic")
SPLITS = ("test", "valid", "train")
Names = tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """What all questions of a file have in common."""

    n_nodes: int = 8
    hops: tuple[int, ...] = (4,)
    """Numbers of edges to follow, one of which is drawn for each question; if there are several, it is stated."""
    order: int = 1
    """How many of the last nodes say which node is next."""
    graph: str = "cycle"
    form: str = "edges"
    start: str = "last"
    """Whether the start stands before the facts (`first`) or after them."""
    n_symbols: int = 8
    """Names to choose from for every question."""

    @property
    def n_tables(self) -> int:
        """Different tables of this shape."""
        return math.comb(self.n_symbols, self.n_nodes) * count_tables(self.n_nodes, self.order, self.graph)


def make_example(rng: random.Random, shape: Shape) -> dict[str, Any]:
    """One question with its steps and answer."""
    symbols = [f"n{number}" for number in rng.sample(range(shape.n_symbols), shape.n_nodes)]
    table = draw_table(rng, shape.n_nodes, shape.order, shape.graph)
    named = {tuple(symbols[node] for node in state): symbols[node] for state, node in table.items()}
    start, hops = rng.choice(list(named)), rng.choice(shape.hops)
    asked = " ".join([*start, *([str(hops)] if len(shape.hops) > 1 else [])])
    end = " |" if shape.form == "symbolic" else ""
    facts = " ".join(write_fact(state, named[state], shape.form) + end for state in rng.sample(list(named), len(named)))
    states = follow(named, start, hops)
    return {
        "question": f"{asked} ? {facts}" if shape.start == "first" else f"{facts} ? {asked}",
        **walked(states, shape.form),
    }


def walked(states: list[Names], form: str) -> dict[str, Any]:
    """Steps and answer of a walk."""
    steps = [write_fact(state, following[-1], form) for state, following in pairwise(states)]
    return {"steps": steps, "answer": states[-1][-1]}


def write_fact(state: Names, node: str, form: str) -> str:
    """`n4>n7`, of order 2 `n1-n4>n7`: one word; in the symbolic form one word a node, `n4 n7`."""
    return " ".join([*state, node]) if form == "symbolic" else f"{'-'.join(state)}>{node}"


@dataclass(frozen=True)
class Question:
    """A question as it can be read from its text."""

    table: dict[Names, str]
    start: Names
    hops: int | None
    """The number of edges to follow, if the question states it."""
    form: str

    @classmethod
    def read(cls, text: str) -> Question:
        """Raises ValueError, which says what is wrong, for any other text."""
        before, mark, after = text.partition(" ? ")
        if not mark:
            raise ValueError("has no '?' between facts and start")
        facts, asked = (before, after) if _has_facts(before) else (after, before)
        form = "symbolic" if "|" in facts else "edges"
        words = [_words_of(fact) for fact in (facts.split() if form == "edges" else facts.rstrip(" |").split("|"))]
        order = len(words[0]) - 1
        if order < 1 or any(len(each) != order + 1 for each in words):
            raise ValueError("has facts of different lengths, or of one word")
        table = {tuple(state): node for *state, node in words}
        if len(table) < len(words):
            raise ValueError("has two facts about the same state")
        start, stated = tuple(asked.split()[:order]), asked.split()[order:]
        if start not in table or len(stated) > 1 or not all(each.isdecimal() for each in stated):
            raise ValueError(f"asks {asked!r}: needs a start that has a fact, and at most a number of edges")
        return cls(table, start, int(stated[0]) if stated else None, form)

    def walk(self, hops: int) -> list[Names]:
        """The states after 0, 1 .. `hops` edges; raises ValueError if the walk runs out of facts."""
        try:
            return follow(self.table, self.start, hops)
        except KeyError as error:
            raise ValueError(f"has no fact about {error.args[0]}, to which the walk leads") from None

    @property
    def key(self) -> frozenset:
        """Equal for equal tables, in whatever order their facts stand."""
        return frozenset(self.table.items())


def _has_facts(text: str) -> bool:
    return ">" in text or "|" in text


def _words_of(fact: str) -> list[str]:
    return fact.replace(">", " ").replace("-", " ").split()


def problem_with(record: Any) -> str | None:
    """Why the steps or the answer of a record do not follow from its question; None if they do."""
    try:
        question, steps = Question.read(record["question"]), record["steps"]
        states = question.walk(len(steps))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return f"is not a record of this task: {type(error).__name__}: {error}"
    except ValueError as error:
        return f"the question {error}"
    right = walked(states, question.form)
    if not steps or steps != right["steps"]:
        return f"the steps are {steps}, the walk's {right['steps']}"
    if question.hops not in (None, len(steps)):
        return f"the question asks for {question.hops} edges, the steps are {len(steps)}"
    if record["answer"] != right["answer"]:
        return f"the answer is {record['answer']!r}, the walk ends at {right['answer']!r}"
    return None


def generate(
    count: int, seed: str, shape: Shape, exclude: frozenset[frozenset] | set[frozenset] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Yield `count` checked questions, all different, none about a table whose `Question.key` is in `exclude`."""
    rng = random.Random(seed)
    asked: set[tuple] = set()
    while len(asked) < count:
        record = make_example(rng, shape)
        if problem := problem_with(record):
            raise AssertionError(f"{record}: {problem}")
        question = Question.read(record["question"])
        this = question.key, question.start, len(record["steps"])
        if this not in asked and question.key not in exclude:
            asked.add(this)
            yield record


def statistics(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over a file; histograms are shares of the examples.

    `stopping_after` is the accuracy of an answer that follows j edges and stops there, `guessing_after` that of one
    that follows j edges and guesses among the nodes it has not seen.
    """
    questions = [Question.read(record["question"]) for record in records]
    hops = [len(record["steps"]) for record in records]
    walks = [[state[-1] for state in question.walk(most)] for question, most in zip(questions, hops)]
    nodes = [len(set(question.table.values())) for question in questions]
    fewest = min(hops)
    return {
        "examples": len(records),
        "distinct_tables": len({question.key for question in questions}),
        "nodes": mean(nodes),
        "facts": mean(len(question.table) for question in questions),
        "question_words": mean(len(record["question"].split()) for record in records),
        "hops_share": {each: count / len(records) for each, count in sorted(Counter(hops).items())},
        "single_cycle": mean(is_single_cycle(question.table) for question in questions),
        "stopping_after": {j: mean(walk[j] == walk[-1] for walk in walks) for j in range(fewest)},
        "guessing_after": {j: mean(_guess(walk, n, j) for walk, n in zip(walks, nodes)) for j in range(fewest)},
    }


def _guess(walk: list[str], n_nodes: int, followed: int) -> float:
    seen = set(walk[: followed + 1])
    return 0.0 if walk[-1] in seen or len(seen) == n_nodes else 1 / (n_nodes - len(seen))


def main(arguments: list[str] | None = None) -> int:
    return run_command("hops.py", _parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write hops_{train,valid,test}.json")
    make.set_defaults(run=_generate)
    for split, count in (("train", 19200), ("valid", 500), ("test", 500)):
        make.add_argument(f"--{split}", type=int, default=count, help=f"number of examples (default: {count})")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--nodes", type=int, default=8, help="nodes of a table (default: 8)")
    make.add_argument("--symbols", type=int, metavar="N", help="names to choose from (default: one a node)")
    make.add_argument("--order", type=int, choices=(1, 2), default=1, help="last nodes that decide the next one")
    make.add_argument("--graph", choices=GRAPHS, default="cycle", help="one cycle, or any permutation")
    make.add_argument("--form", choices=FORMS, default="edges", help="one word per edge, or per node")
    make.add_argument("--start", choices=("last", "first"), default="last", help="after the facts, or before")
    other = commands.add_parser("ood", help="write hops_ood_K.json: the test questions with walks of K edges")
    other.set_defaults(run=_write_longer_walks)
    for command, hops in ((make, [4]), (other, [5, 6])):
        usual = " ".join(map(str, hops))
        command.add_argument("--out", type=Path, required=True, help="folder to write to")
        command.add_argument(
            "--hops", type=int, nargs="+", default=hops, metavar="K", help=f"edges to follow (default: {usual})"
        )
    check = "walk through every question of a file; exit status 1 if an answer is wrong"
    add_readers(commands, "hops", problem_with, statistics, check)
    return parser


def _shape(options: argparse.Namespace, hops: list[int]) -> Shape:
    if min(hops) < 1:
        raise UnusableError(f"--hops {min(hops)}: needs at least 1 edge to follow")
    if options.nodes < 3:
        raise UnusableError(f"--nodes {options.nodes}: needs at least 3, or the next node needs no table")
    if options.symbols is not None and options.symbols < options.nodes:
        raise UnusableError(f"--symbols {options.symbols} is fewer than the {options.nodes} nodes: each needs a name")
    kinds = {"order": options.order, "graph": options.graph, "form": options.form, "start": options.start}
    return Shape(options.nodes, tuple(sorted(set(hops))), **kinds, n_symbols=options.symbols or options.nodes)


def _generate(options: argparse.Namespace) -> int:
    """Write the three files. Test and validation tables come first; training never repeats one of them."""
    shape = _shape(options, options.hops)
    counts = {split: getattr(options, split) for split in SPLITS}
    held_out = counts["test"] + counts["valid"]
    starts = shape.n_nodes**shape.order * len(shape.hops)
    # Drawn at random until they are new: nearly all of what there is would take long, and all of it no end.
    if held_out > shape.n_tables / 2 or counts["train"] > 0.7 * (shape.n_tables - held_out) * starts:
        raise UnusableError(
            f"{sum(counts.values())} examples: there are only {shape.n_tables} different tables with {starts} "
            f"questions each; ask for fewer examples, or for more names than nodes (--symbols {2 * shape.n_nodes})"
        )
    seen: set[frozenset] = set()
    for split in SPLITS:
        records = list(generate(counts[split], f"{options.seed}/{split}", shape, exclude=seen))
        seen |= {Question.read(record["question"]).key for record in records}
        write_list(options.out / f"hops_{split}.json", records)
    return 0


def _write_longer_walks(options: argparse.Namespace) -> int:
    """Write one set for every number of edges: the questions of the test set, whose tables no other split has."""
    path = options.out / "hops_test.json"
    records = read_list(path, "hops")
    demand_right(path, records, problem_with)
    for hops in options.hops:
        if hops < 1:
            raise UnusableError(f"--hops {hops}: needs at least 1 edge to follow")
        write_list(options.out / f"hops_ood_{hops}.json", [longer_walk(record, hops) for record in records])
    return 0


def longer_walk(record: dict[str, Any], hops: int) -> dict[str, Any]:
    """The same question about a walk of `hops` edges."""
    question = Question.read(record["question"])
    states = question.walk(hops)
    text = record["question"]
    if question.hops is not None:
        asked = f"{' '.join(question.start)} {question.hops}"
        text = text.replace(asked, f"{' '.join(question.start)} {hops}")
    return {"question": text, **walked(states, question.form)}


if __name__ == "__main__":
    sys.exit(main())
