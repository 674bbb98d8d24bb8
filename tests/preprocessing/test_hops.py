"""The hops generator: every answer follows from the text alone, no table is in two splits, no shortcut pays."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import combinations, islice
from pathlib import Path

import hops
import hops_tables
import pytest

SHAPES = {
    "edges": hops.Shape(),
    "symbolic": hops.Shape(form="symbolic", n_symbols=12),
    "second order": hops.Shape(n_nodes=5, order=2, n_symbols=5),
    "second order, one word a node": hops.Shape(n_nodes=4, order=2, form="symbolic", n_symbols=6),
    "start first": hops.Shape(start="first"),
    "permutations": hops.Shape(graph="permutation"),
    "several numbers of edges": hops.Shape(hops=(1, 2, 4), n_nodes=10, n_symbols=10),
}


@pytest.fixture(params=SHAPES, scope="module")
def made(request) -> tuple[hops.Shape, list[dict]]:
    shape = SHAPES[request.param]
    return shape, list(hops.generate(200, "test", shape))


def solve(question: str, order: int, n_steps: int) -> list[list[str]]:
    """The walk of a question, from its words alone: [nodes of the state, next node] for every step."""
    first, second = question.split(" ? ")
    facts, asked = (first, second) if len(first) > len(second) else (second, first)
    following = {}
    for fact in re.findall(rf"n\d+(?:\W+n\d+){{{order}}}", facts):
        *state, node = re.findall(r"n\d+", fact)
        assert tuple(state) not in following
        following[tuple(state)] = node
    state = tuple(re.findall(r"n\d+", asked))
    assert len(state) == order
    walk = []
    for _ in range(n_steps):
        walk.append([*state, following[state]])
        state = (*state[1:], following[state])
    return walk


def test_every_answer_follows_from_the_words_of_its_question(made):
    shape, records = made
    for record in records:
        walk = solve(record["question"], shape.order, len(record["steps"]))
        assert [re.findall(r"n\d+", step) for step in record["steps"]] == walk
        assert record["answer"] == walk[-1][-1]
        assert len(record["steps"]) in shape.hops
        assert set(record) == {"question", "steps", "answer"}


def test_the_checker_accepts_what_is_generated_and_finds_every_change(made):
    _, records = made
    for record in records[:20]:
        assert hops.problem_with(record) is None
        assert "the answer" in hops.problem_with(record | {"answer": "n99"})
        assert "the steps" in hops.problem_with(record | {"steps": [*record["steps"][::-1], "n1>n2"]})
        assert hops.problem_with({**record, "steps": []}) is not None
        assert hops.problem_with({"question": record["question"]}).startswith("is not a record")


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("n1>n2 n2>n1", "no '?'"),
        ("n1>n2 n1>n3 ? n1", "two facts about the same state"),
        ("n1>n2 n2-n1>n3 ? n1", "different lengths"),
        ("n1>n2 n2>n1 ? n7", "needs a start that has a fact"),
        ("n1>n2 n2>n1 ? n1 x", "at most a number of edges"),
        ("n1>n2 ? n1", "no fact about ('n2',)"),
    ],
)
def test_a_question_that_cannot_be_walked_is_named(question, problem):
    assert problem in hops.problem_with({"question": question, "steps": ["n1>n2", "n2>n1"], "answer": "n1"})


def test_a_stated_number_of_edges_has_to_be_that_of_the_steps():
    record = next(hops.generate(1, "a", hops.Shape(hops=(2, 3))))
    other = re.sub(r"\d+$", "7", record["question"])
    assert "asks for 7 edges" in hops.problem_with(record | {"question": other})


def test_single_cycles_come_back_to_the_start_only_after_all_states():
    rng = random.Random(0)
    for n_nodes, order in ((8, 1), (5, 2)):
        for _ in range(20):
            table = hops_tables.draw_table(rng, n_nodes, order, "cycle")
            start = next(iter(table))
            states = hops_tables.follow(table, start, n_nodes**order)
            assert states[-1] == start
            assert len(set(states)) == n_nodes**order
            assert set(Counter(table.values()).values()) == {n_nodes ** (order - 1)}


@pytest.mark.parametrize(("n_nodes", "order", "graph"), [(3, 1, "cycle"), (3, 1, "permutation"), (2, 2, "cycle")])
def test_all_tables_of_a_kind_are_drawn_equally_often(n_nodes, order, graph):
    rng, n_draws = random.Random(1), 3000
    drawn = Counter(tuple(sorted(hops_tables.draw_table(rng, n_nodes, order, graph).items())) for _ in range(n_draws))
    count = hops_tables.count_tables(n_nodes, order, graph)
    assert len(drawn) == count
    # Five standard deviations of a binomial count.
    spread = 5 * (n_draws / count) ** 0.5
    assert all(abs(each - n_draws / count) < spread for each in drawn.values())


def written(folder: Path) -> dict[str, list[dict]]:
    return {path.stem.removeprefix("hops_"): json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_no_table_is_in_two_splits_and_no_question_is_asked_twice(tmp_path):
    sizes = ["--train", "2000", "--valid", "100", "--test", "100"]
    assert hops.main(["generate", "--out", str(tmp_path), *sizes, "--hops", "3", "4"]) == 0
    files = written(tmp_path)
    tables = {name: {hops.Question.read(each["question"]).key for each in files[name]} for name in files}
    for name, other in combinations(tables, 2):
        assert not tables[name] & tables[other]
    assert len({each["question"] for each in files["train"]}) == 2000


@pytest.mark.parametrize("numbers", [["4"], ["3", "4"]], ids=["one number", "stated"])
def test_longer_walks_are_asked_of_the_test_questions(tmp_path, numbers):
    sizes = ["--train", "10", "--valid", "10", "--test", "50"]
    assert hops.main(["generate", "--out", str(tmp_path), *sizes, "--hops", *numbers]) == 0
    assert hops.main(["ood", "--out", str(tmp_path), "--hops", "5", "6"]) == 0
    files = written(tmp_path)
    for name, n_steps in (("ood_5", 5), ("ood_6", 6)):
        for record, asked in zip(files[name], files["test"], strict=True):
            assert hops.problem_with(record) is None
            assert len(record["steps"]) == n_steps
            assert record["steps"][:3] == asked["steps"][:3]
            stated = record["question"].endswith(f" {n_steps}")
            assert stated == (len(numbers) > 1)


def test_longer_walks_need_the_test_set(tmp_path, capsys):
    assert hops.main(["ood", "--out", str(tmp_path)]) == 2
    assert "hops_test.json" in capsys.readouterr().err


def test_the_same_seed_writes_the_same_questions():
    first, again, other = (list(islice(hops.generate(5, seed, hops.Shape()), 5)) for seed in ("a", "a", "b"))
    assert first == again != other


def test_stopping_early_never_gives_the_answer_of_a_single_cycle():
    found = hops.statistics(list(hops.generate(500, "s", hops.Shape())))
    assert set(found["stopping_after"].values()) == {0.0}
    assert found["guessing_after"] == pytest.approx({0: 1 / 7, 1: 1 / 6, 2: 1 / 5, 3: 1 / 4})
    assert found["single_cycle"] == 1


def test_permutations_give_the_start_away_as_often_as_their_cycles_are_short():
    found = hops.statistics(list(hops.generate(2000, "s", hops.Shape(graph="permutation"))))
    # Cycles of 1, 2 and 4 nodes of 8 lead back after 4 edges, each length being as likely as any other.
    assert found["stopping_after"][0] == pytest.approx(3 / 8, abs=0.05)
    assert found["single_cycle"] == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--hops", "0"], "at least 1 edge"),
        (["--nodes", "2"], "at least 3"),
        (["--symbols", "5"], "fewer than the 8 nodes"),
        (["--nodes", "4"], "--symbols 8"),
        (["--train", "25000"], "--symbols 16"),
    ],
)
def test_a_request_that_cannot_be_fulfilled_says_why(arguments, problem, tmp_path, capsys):
    assert hops.main(["generate", "--out", str(tmp_path), *arguments]) == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_check_names_wrong_records_and_stats_refuses_them(tmp_path, capsys):
    records = list(hops.generate(3, "c", hops.Shape()))
    records[1]["answer"] = records[1]["steps"][0].split(">")[0]
    path = tmp_path / "hops.json"
    path.write_text(json.dumps(records))
    assert hops.main(["check", str(path)]) == 1
    assert "record 1" in capsys.readouterr().err
    assert hops.main(["stats", str(path)]) == 2
    assert "record 1" in capsys.readouterr().err
