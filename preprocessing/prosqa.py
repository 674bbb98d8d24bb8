"""ProsQA: generate it from its published construction, and describe a file of it.

    python preprocessing/prosqa.py generate --out data/prosqa --train 17886 --valid 300 --test 500
    python preprocessing/prosqa.py stats data/prosqa/prosqa_train.json

The graphs follow Algorithm 1 of the Coconut paper (arXiv 2412.06769, appendix A.2). The paper leaves three
things open; they are set here so that the statistics of the published validation set come out (`tests/test_prosqa.py`):

* 28 nodes are drawn, and those left with neither parent nor child are dropped (17 to 28 remain);
* the entity asked about is the one of the two roots whose deepest exclusive leaf lies farther away, and that leaf
  is the answer; graphs whose answer is nearer than 3 or farther than 6 steps are drawn again;
* a node drawn without parents can be chosen as a parent only by the rule that admits every node.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import exp, factorial
from pathlib import Path
from statistics import mean

PERSONS = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split()
CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus tumpus "
    "vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
).split()

FORMS = ("text", "symbolic", "edges")

MEAN_PARENTS = 1.5
_MOST_PARENTS = 12  # the Poisson tail beyond it has probability 1e-8
_POISSON_CDF = list(accumulate(exp(-MEAN_PARENTS) * MEAN_PARENTS**k / factorial(k) for k in range(_MOST_PARENTS + 1)))


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


def draw_edges(rng: random.Random, n_nodes: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Algorithm 1: edges (parent, child), and labels telling whether a node descends from node 0 (1) and 1 (2)."""
    labels = [1, 2]
    depth = [0, 0]
    by_label: list[list[int]] = [[], [0], [1], []]
    edges = []
    for node in range(2, n_nodes):
        n_parents = rng.choices(range(_MOST_PARENTS + 1), cum_weights=_POISSON_CDF)[0]
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


def draw_graph(rng: random.Random, n_nodes: int, min_steps: int, max_steps: int) -> Graph:
    """Draw graphs until one has a question whose answer is `min_steps` to `max_steps` edges away."""
    while True:
        edges, labels = draw_edges(rng, n_nodes)
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
    """Raise ValueError unless the answer is reachable, the other option is not, and the path is a shortest one."""
    paths = shortest_paths(list(graph.edges), graph.root)
    if graph.target not in paths:
        raise ValueError(f"the answer {graph.target} cannot be reached from {graph.root}: {graph}")
    if graph.neg_target in paths:
        raise ValueError(f"the wrong option {graph.neg_target} can be reached from {graph.root}: {graph}")
    hops = list(zip(graph.path, graph.path[1:]))
    if not set(hops) <= set(graph.edges) or len(graph.path) != len(paths[graph.target]):
        raise ValueError(f"{graph.path} is not a shortest path of {graph}")


def text_example(rng: random.Random, graph: Graph) -> dict:
    """Words as in the published files: parentless nodes are persons, the others concepts."""
    children = {child for _, child in graph.edges}
    persons = iter(rng.sample(PERSONS, len(PERSONS)))
    concepts = iter(rng.sample(CONCEPTS, len(CONCEPTS)))
    symbols = [next(concepts) if node in children else next(persons) for node in range(graph.n_nodes)]

    def fact(parent: int, child: int) -> str:
        subject = f"Every {symbols[parent]}" if parent in children else symbols[parent]
        return f"{subject} is a {symbols[child]}."

    facts = [fact(*edge) for edge in rng.sample(graph.edges, len(graph.edges))]
    first, second = rng.sample([graph.target, graph.neg_target], 2)
    root = symbols[graph.root]
    question = f"{' '.join(facts)} Is {root} a {symbols[first]} or {symbols[second]}?"
    steps = [fact(*edge) for edge in zip(graph.path, graph.path[1:])]
    return _record(graph, symbols, question, steps, f"{root} is a {symbols[graph.target]}.")


def symbolic_example(rng: random.Random, graph: Graph, n_symbols: int) -> dict:
    """The same task with one word a node: `a b |` is an edge, `? r x y` asks which of x and y is reached from r."""
    return _words_example(rng, graph, n_symbols, fact="{} {} |", step="{} {}")


def edge_example(rng: random.Random, graph: Graph, n_symbols: int) -> dict:
    """The same with one word an edge, `a>b`: a fact need not be put together from its parts before it is used."""
    return _words_example(rng, graph, n_symbols, fact="{}>{}", step="{}>{}")


def _words_example(rng: random.Random, graph: Graph, n_symbols: int, fact: str, step: str) -> dict:
    symbols = [f"n{number}" for number in rng.sample(range(n_symbols), graph.n_nodes)]

    def write(form: str, edge: tuple[int, int]) -> str:
        return form.format(*(symbols[node] for node in edge))

    facts = " ".join(write(fact, edge) for edge in rng.sample(graph.edges, len(graph.edges)))
    first, second = rng.sample([graph.target, graph.neg_target], 2)
    question = f"{facts} ? {symbols[graph.root]} {symbols[first]} {symbols[second]}"
    steps = [write(step, edge) for edge in zip(graph.path, graph.path[1:])]
    return _record(graph, symbols, question, steps, symbols[graph.target])


def _record(graph: Graph, symbols: list[str], question: str, steps: list[str], answer: str) -> dict:
    return {
        "question": question,
        "answer": answer,
        "steps": steps,
        "idx_to_symbol": symbols,
        "edges": [list(edge) for edge in graph.edges],
        "root": graph.root,
        "target": graph.target,
        "neg_target": graph.neg_target,
    }


def question_key(record: dict) -> tuple:
    """What is asked, whatever the order of the facts and of the options: equal keys are the same question."""
    symbols = record["idx_to_symbol"]
    facts = frozenset((symbols[parent], symbols[child]) for parent, child in record["edges"])
    return facts, symbols[record["root"]], frozenset((symbols[record["target"]], symbols[record["neg_target"]]))


def generate(
    count: int,
    seed: str,
    *,
    n_nodes: int = 28,
    min_steps: int = 3,
    max_steps: int = 6,
    form: str = "text",
    n_symbols: int | None = None,
    exclude: frozenset | set = frozenset(),
) -> Iterator[dict]:
    """Yield `count` checked examples; questions whose `question_key` is in `exclude` are left out."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        graph = draw_graph(rng, n_nodes, min_steps, max_steps)
        check_graph(graph)
        if form == "text" and not _enough_names(graph):
            continue
        record = text_example(rng, graph) if form == "text" else _WORD_FORMS[form](rng, graph, n_symbols or n_nodes)
        if exclude and question_key(record) in exclude:
            continue
        made += 1
        yield record


_WORD_FORMS = {"symbolic": symbolic_example, "edges": edge_example}


def _enough_names(graph: Graph) -> bool:
    n_concepts = len({child for _, child in graph.edges})
    return graph.n_nodes - n_concepts <= len(PERSONS) and n_concepts <= len(CONCEPTS)


def statistics(records: list[dict]) -> dict[str, float | dict[int, float]]:
    """Means over a file; histograms are shares of the examples. Question length is in words."""
    n_steps = Counter(len(record["steps"]) for record in records)
    return {
        "examples": len(records),
        "nodes": mean(len(record["idx_to_symbol"]) for record in records),
        "edges": mean(len(record["edges"]) for record in records),
        "steps": mean(len(record["steps"]) for record in records),
        "question_words": mean(len(record["question"].split()) for record in records),
        "parentless": mean(
            len(record["idx_to_symbol"]) - len({child for _, child in record["edges"]}) for record in records
        ),
        "steps_share": {steps: n_steps[steps] / len(records) for steps in sorted(n_steps)},
        "answer_named_first": mean(_answer_named_first(record) for record in records),
        "distinct_questions": len({question_key(record) for record in records}),
    }


def _answer_named_first(record: dict) -> bool:
    options = record["question"].rsplit("?", 1)[0 if record["question"].endswith("?") else 1].split()
    symbols = record["idx_to_symbol"]
    return options.index(symbols[record["target"]], -3) < options.index(symbols[record["neg_target"]], -3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write prosqa_{train,valid,test}.json")
    make.add_argument("--out", type=Path, required=True, help="folder to write to")
    make.add_argument("--train", type=int, default=17886, help="number of examples (published: 17886)")
    make.add_argument("--valid", type=int, default=300, help="number of examples (published: 300)")
    make.add_argument("--test", type=int, default=500, help="number of examples (published: 500)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--nodes", type=int, default=28, help="nodes drawn per graph, isolated ones are dropped")
    make.add_argument("--min-steps", type=int, default=3, help="edges between entity and answer, at least")
    make.add_argument("--max-steps", type=int, default=6, help="edges between entity and answer, at most")
    make.add_argument("--form", choices=FORMS, default="text", help="sentences, one word a node, or an edge")
    make.add_argument("--symbols", type=int, help="how many node names the word forms have (default: --nodes)")
    describe = commands.add_parser("stats", help="print the statistics of a file")
    describe.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "stats":
        return _print_statistics(options.file)
    problem = _problem_with(options)
    if problem:
        print(f"prosqa.py generate: {problem}", file=sys.stderr)
        return 2
    write_splits(options)
    return 0


def _problem_with(options: argparse.Namespace) -> str | None:
    if not 1 <= options.min_steps <= options.max_steps:
        return f"--min-steps {options.min_steps} --max-steps {options.max_steps}: needs 1 <= min <= max"
    if options.nodes < options.max_steps + 3:
        return (
            f"--nodes {options.nodes} is too few for paths of {options.max_steps} steps: two roots, the path and "
            f"another leaf need at least {options.max_steps + 3}"
        )
    if options.form != "text" and options.symbols is not None and options.symbols < options.nodes:
        return f"--symbols {options.symbols} is fewer than --nodes {options.nodes}: every node needs its own"
    return None


def write_splits(options: argparse.Namespace) -> None:
    """Write the three files. Test and validation questions come first; training never repeats one of them."""
    options.out.mkdir(parents=True, exist_ok=True)
    seen: set = set()
    for split, count in (("test", options.test), ("valid", options.valid), ("train", options.train)):
        records = list(
            generate(
                count,
                f"{options.seed}/{split}",
                n_nodes=options.nodes,
                min_steps=options.min_steps,
                max_steps=options.max_steps,
                form=options.form,
                n_symbols=options.symbols,
                exclude=seen,
            )
        )
        seen |= {question_key(record) for record in records}
        path = options.out / f"prosqa_{split}.json"
        path.write_text(json.dumps(records, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{path}: {count} examples")


def _print_statistics(path: Path) -> int:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        found = statistics(records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"prosqa.py stats: {path} is not a ProsQA file: {error!r}", file=sys.stderr)
        return 2
    for name, value in found.items():
        if isinstance(value, dict):
            text = "  ".join(f"{key}: {share:.1%}" for key, share in value.items())
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:>20}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
