"""ProsQA: generate it by its published construction, download the published files, check a file, print statistics.

    python preprocessing/prosqa.py generate --out data/prosqa --train 17886 --valid 300 --test 500
    python preprocessing/prosqa.py ood --out data/prosqa
    python preprocessing/prosqa.py download --out data/prosqa_published      (also: prosqa.py --download)
    python preprocessing/prosqa.py check data/prosqa/prosqa_train.json
    python preprocessing/prosqa.py stats data/prosqa/prosqa_train.json

The graphs, and the choices that the paper leaves open, are in `prosqa_graphs.py`.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from json_lists import UnusableError, add_readers, read_list, report_problems, write_list
from prosqa_graphs import MEAN_PARENTS, Graph, check_graph, draw_graph, shortest_paths

PERSONS = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split()
CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus tumpus "
    "vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
).split()

FORMS = ("text", "symbolic", "edges")


def text_example(rng: random.Random, graph: Graph) -> dict:
    """Text as in the published files: parentless nodes are persons, the others concepts."""
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
    """The same task with one word per node: `a b |` is an edge, `? r x y` asks which of x and y r reaches."""
    return _words_example(rng, graph, n_symbols, fact="{} {} |", step="{} {}")


def edge_example(rng: random.Random, graph: Graph, n_symbols: int) -> dict:
    """The same with one word per edge, `a>b`: a fact is one token and need not be composed of its parts first."""
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
    """A key that is equal for equal questions, regardless of the order of facts and options."""
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
    mean_parents: float = MEAN_PARENTS,
    form: str = "text",
    n_symbols: int | None = None,
    exclude: frozenset | set = frozenset(),
) -> Iterator[dict]:
    """Yield `count` checked examples, skipping questions whose `question_key` is in `exclude`."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        graph = draw_graph(rng, n_nodes, min_steps, max_steps, mean_parents)
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


_FACTS = {
    "text": re.compile(r"(?:Every )?(\w+) is a (\w+)\."),
    "symbolic": re.compile(r"(\w+) (\w+) \|"),
    "edges": re.compile(r"(\w+)>(\w+)"),
}
_STEPS = _FACTS | {"symbolic": re.compile(r"(\w+) (\w+)")}


def form_of(record: dict[str, Any]) -> str:
    """The form of a question, one of `FORMS`."""
    if record["question"].endswith("?"):
        return "text"
    return "edges" if ">" in record["question"] else "symbolic"


def problem_with(record: Any) -> str | None:
    """Why the answer of a record does not follow from its steps, or its steps from its graph; None if it is valid.

    The steps must be a walk in `edges` from `root` to `target`, and the text must match the graph.
    """
    try:
        form, symbols = form_of(record), record["idx_to_symbol"]
        edges = {(symbols[parent], symbols[child]) for parent, child in record["edges"]}
        root, target, other = (symbols[record[key]] for key in ("root", "target", "neg_target"))
        answer = f"{root} is a {target}." if form == "text" else target
        written = set(_FACTS[form].findall(record["question"]))
        hops = [_STEPS[form].fullmatch(step) for step in record["steps"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return f"is not a ProsQA record: {type(error).__name__}: {error}"
    if written != edges:
        return f"question and edges differ in {sorted(written ^ edges)[:3]}"
    if not hops or None in hops:
        return f"steps {record['steps']!r} are not edges"
    walk = [hop.groups() for hop in hops if hop]
    if not set(walk) <= edges:
        return f"steps {sorted(set(walk) - edges)} are not in the graph"
    ends = [root, *(child for _, child in walk)]
    if [parent for parent, _ in walk] != ends[:-1] or ends[-1] != target:
        return f"the steps do not lead from {root} to {target}: {' -> '.join(ends)}"
    if record["answer"] != answer:
        return f"the answer is {record['answer']!r}, the graph's {answer!r}"
    if record["neg_target"] in shortest_paths(record["edges"], record["root"]):
        return f"the wrong option {other} can be reached from {root} as well"
    return None


def statistics(records: list[dict]) -> dict[str, float | dict[int, float]]:
    """Means over a file; histograms are shares of the examples, question length is in words."""
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
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(["download", *given[1:]] if given[:1] == ["--download"] else given)
    try:
        return options.run(options)
    except UnusableError as error:
        print(f"prosqa.py {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write prosqa_{train,valid,test}.json")
    make.set_defaults(run=_generate)
    make.add_argument("--train", type=int, default=17886, help="number of examples (published: 17886)")
    make.add_argument("--valid", type=int, default=300, help="number of examples (published: 300)")
    make.add_argument("--test", type=int, default=500, help="number of examples (published: 500)")
    make.add_argument("--nodes", type=int, default=28, help="nodes drawn per graph; isolated ones are dropped")
    make.add_argument("--min-steps", type=int, default=3, help="minimum number of edges between entity and answer")
    make.add_argument("--max-steps", type=int, default=6, help="maximum number of edges between entity and answer")
    make.add_argument("--mean-parents", type=float, default=MEAN_PARENTS, help="edges into a node (published: 1.5)")
    other = commands.add_parser("ood", help=f"write out-of-distribution test sets: {', '.join(OUT_OF_DISTRIBUTION)}")
    other.set_defaults(run=_generate_out_of_distribution)
    other.add_argument("--count", type=int, default=500, help="examples per set")
    for command in (make, other):
        command.add_argument("--out", type=Path, required=True, help="folder to write to")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--form", choices=FORMS, default="text", help="sentences, one word per node, or per edge")
        command.add_argument("--symbols", type=int, help="number of node names for word forms (default: that of nodes)")
    get = commands.add_parser("download", help="download the published files")
    get.set_defaults(run=_download)
    get.add_argument("--out", type=Path, default=Path("data/prosqa_published"), help="folder to write to")
    check = "verify that the steps of every example are a path in its graph"
    add_readers(commands, "ProsQA", problem_with, statistics, check)
    return parser


def _problem_with(options: argparse.Namespace) -> str | None:
    if not 1 <= options.min_steps <= options.max_steps:
        return f"--min-steps {options.min_steps} --max-steps {options.max_steps}: needs 1 <= min <= max"
    if options.nodes < options.max_steps + 3:
        return (
            f"--nodes {options.nodes} is too few for paths of {options.max_steps} steps: two roots, the path and "
            f"another leaf need at least {options.max_steps + 3}"
        )
    if not 0 < options.mean_parents <= 6:
        return f"--mean-parents {options.mean_parents}: needs a number above 0 and up to 6"
    return _problem_with_symbols(options, options.nodes)


def _problem_with_symbols(options: argparse.Namespace, n_nodes: int) -> str | None:
    if options.form != "text" and options.symbols is not None and options.symbols < n_nodes:
        return f"--symbols {options.symbols} is fewer than the {n_nodes} nodes: every node needs its own"
    return None


def _generate(options: argparse.Namespace) -> int:
    """Write the three files. Test and validation questions come first; training never repeats one of them."""
    if problem := _problem_with(options):
        raise UnusableError(problem)
    shape = {
        "n_nodes": options.nodes,
        "min_steps": options.min_steps,
        "max_steps": options.max_steps,
        "mean_parents": options.mean_parents,
        "form": options.form,
        "n_symbols": options.symbols,
    }
    seen: set = set()
    for split, count in (("test", options.test), ("valid", options.valid), ("train", options.train)):
        records = list(generate(count, f"{options.seed}/{split}", **shape, exclude=seen))
        seen |= {question_key(record) for record in records}
        write_list(options.out / f"prosqa_{split}.json", records)
    return 0


OUT_OF_DISTRIBUTION: dict[str, dict[str, Any]] = {
    "longer": {"n_nodes": 40, "min_steps": 7, "max_steps": 9},
    "denser": {"n_nodes": 28, "mean_parents": 2.5},
}
"""The settings that differ from the training distribution: more steps per path, or more edges per node."""


def _generate_out_of_distribution(options: argparse.Namespace) -> int:
    """Write prosqa_ood_{longer,denser}.json, without questions of the other sets in the folder."""
    seen: set = set()
    for split in ("train", "valid", "test"):
        path = options.out / f"prosqa_{split}.json"
        if path.is_file():
            seen |= {question_key(record) for record in read_list(path, "ProsQA")}
    for name, shape in OUT_OF_DISTRIBUTION.items():
        if problem := _problem_with_symbols(options, shape["n_nodes"]):
            raise UnusableError(problem)
        forms = {"form": options.form, "n_symbols": options.symbols}
        records = generate(options.count, f"{options.seed}/ood/{name}", **shape, **forms, exclude=seen)
        write_list(options.out / f"prosqa_ood_{name}.json", list(records))
    return 0


PUBLISHED = "https://raw.githubusercontent.com/facebookresearch/coconut/main/data"
_VALID_SHA256 = "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"
PUBLISHED_COUNTS = {"train": 17886, "valid": 300, "test": 500}


def _download(options: argparse.Namespace) -> int:
    """Download the published files and check every example, since not all have a published checksum."""
    # Imported here, so that generating needs nothing but Python.
    from download import DownloadError, RemoteFile, fetch

    names = {split: f"prosqa_{split}.json" for split in PUBLISHED_COUNTS}
    known: dict[str, Any] = {"valid": {"size": 518208, "sha256": _VALID_SHA256}}
    try:
        fetch(
            (RemoteFile(f"{PUBLISHED}/{names[split]}", names[split], **known.get(split, {})) for split in names),
            options.out,
        )
    except DownloadError as error:
        raise UnusableError(str(error)) from None
    for split, name in names.items():
        records = read_list(options.out / name, "ProsQA")
        if len(records) != PUBLISHED_COUNTS[split]:
            raise UnusableError(f"{options.out / name} has {len(records)} examples, not {PUBLISHED_COUNTS[split]}")
        if report_problems(options.out / name, records, problem_with):
            raise UnusableError(f"{options.out / name} is not what was published, see above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
