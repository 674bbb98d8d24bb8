"""The ProsQA generator: its construction, its statistics beside the published ones, and that it gives nothing away."""

from __future__ import annotations

import json
import re
from itertools import islice, pairwise

import prosqa
import pytest

SENTENCE = re.compile(r"(Every )?(\w+) is a (\w+)\.")


@pytest.fixture(scope="module")
def generated() -> list[dict]:
    return list(prosqa.generate(2000, "test"))


def edges_in(question: str) -> set[tuple[str, str]]:
    return {(subject, kind) for _, subject, kind in SENTENCE.findall(question)}


def reachable(edges: set[tuple[str, str]], root: str) -> set[str]:
    found, frontier = {root}, [root]
    for node in frontier:
        for parent, child in edges:
            if parent == node and child not in found:
                found.add(child)
                frontier.append(child)
    return found


def check_text_record(record: dict) -> None:
    """Solve the question from its text alone and compare everything else with that."""
    edges = edges_in(record["question"])
    root, first, second = re.search(r"Is (\w+) a (\w+) or (\w+)\?$", record["question"]).groups()
    found = reachable(edges, root)
    right = {option for option in (first, second) if option in found}
    assert len(right) == 1, "exactly one option can be reached"
    assert record["answer"] == f"{root} is a {right.pop()}."
    hops = [SENTENCE.fullmatch(step).groups()[1:] for step in record["steps"]]
    assert set(hops) <= edges
    assert hops[0][0] == root
    assert all(before[1] == after[0] for before, after in pairwise(hops))
    assert record["answer"].endswith(f"{hops[-1][1]}.")
    symbols = record["idx_to_symbol"]
    assert {(symbols[a], symbols[b]) for a, b in record["edges"]} == edges
    assert symbols[record["root"]] == root
    assert {symbols[record["target"]], symbols[record["neg_target"]]} == {first, second}
    assert symbols[record["target"]] in found


def test_every_generated_question_can_be_solved_in_one_way(generated):
    for record in generated:
        check_text_record(record)


def test_the_checker_accepts_the_published_file(shared):
    for record in json.loads((shared / "datasets" / "prosqa_valid.json").read_text()):
        check_text_record(record)


def test_same_keys_and_names_as_the_published_file(shared, generated):
    published = json.loads((shared / "datasets" / "prosqa_valid.json").read_text())
    assert set(published[0]) == set(generated[0])
    names = {symbol for record in published for symbol in record["idx_to_symbol"]}
    assert names == set(prosqa.PERSONS) | set(prosqa.CONCEPTS)
    assert {type(value) for value in generated[0].values()} == {type(value) for value in published[0].values()}


def test_statistics_of_the_published_file(shared, generated):
    published = prosqa.statistics(json.loads((shared / "datasets" / "prosqa_valid.json").read_text()))
    own = prosqa.statistics(generated)
    # 300 published examples: three standard errors of nodes (1.9), edges (5.6) and words are 0.3, 1.0 and 4.5.
    assert own["nodes"] == pytest.approx(published["nodes"], abs=0.33)
    assert own["edges"] == pytest.approx(published["edges"], abs=1.0)
    assert own["steps"] == pytest.approx(published["steps"], abs=0.13)
    assert own["question_words"] == pytest.approx(published["question_words"], abs=4.5)
    assert own["parentless"] == pytest.approx(published["parentless"], abs=0.2)
    assert own["steps_share"].keys() == published["steps_share"].keys() == {3, 4, 5, 6}
    for steps, share in published["steps_share"].items():
        assert own["steps_share"][steps] == pytest.approx(share, abs=0.09)


def test_nothing_but_the_edges_gives_the_answer_away(generated):
    named_first = prosqa.statistics(generated)["answer_named_first"]
    assert named_first == pytest.approx(0.5, abs=0.035)  # three standard errors of 2000 draws
    # The order of the facts is drawn: the edge into the answer stands in the first half as often as in the second.
    places = []
    for record in generated:
        facts = SENTENCE.findall(record["question"])
        answer = record["idx_to_symbol"][record["target"]]
        places += [index / len(facts) for index, fact in enumerate(facts) if fact[2] == answer]
    assert sum(place < 0.5 for place in places) / len(places) == pytest.approx(0.5, abs=0.03)
    # Names are drawn: no name is the answer more often than chance allows.
    answers = [record["answer"].split()[-1].rstrip(".") for record in generated]
    most = max(answers.count(name) for name in prosqa.CONCEPTS)
    assert most < 2 * len(answers) / len(prosqa.CONCEPTS)


def test_same_seed_same_examples():
    first = list(prosqa.generate(20, "a"))
    assert first == list(prosqa.generate(20, "a"))
    assert first != list(prosqa.generate(20, "b"))


def symbolic_edges(text: str) -> set[tuple[str, str]]:
    return {tuple(fact.split()) for fact in text.split(" |") if fact}


def edge_words(text: str) -> set[tuple[str, str]]:
    return {tuple(word.split(">")) for word in text.split()}


@pytest.mark.parametrize(("form", "read"), [("symbolic", symbolic_edges), ("edges", edge_words)])
def test_word_forms_can_be_solved_in_one_way(form, read):
    for record in prosqa.generate(500, "s", n_nodes=8, min_steps=2, max_steps=3, form=form):
        facts, question = record["question"].split(" ? ")
        edges = read(facts)
        root, first, second = question.split()
        found = reachable(edges, root)
        assert [option for option in (first, second) if option in found] == [record["answer"]]
        hops = [next(iter(read(step))) for step in record["steps"]]
        assert hops[0][0] == root
        assert all(before[1] == after[0] for before, after in pairwise(hops))
        assert hops[-1][1] == record["answer"]
        assert set(hops) <= edges
        assert 2 <= len(record["steps"]) <= 3


def test_no_question_of_one_split_stands_in_another(tmp_path):
    arguments = "--form symbolic --nodes 6 --min-steps 2 --max-steps 2 --train 2000 --valid 200 --test 200"
    assert prosqa.main(["generate", "--out", str(tmp_path), *arguments.split()]) == 0
    keys = {
        split: {prosqa.question_key(record) for record in json.loads((tmp_path / f"prosqa_{split}.json").read_text())}
        for split in ("train", "valid", "test")
    }
    assert not keys["train"] & keys["valid"]
    assert not keys["train"] & keys["test"]
    assert not keys["valid"] & keys["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-steps", "4", "--max-steps", "3"], "needs 1 <= min <= max"),
        (["--nodes", "6"], "--nodes 6 is too few for paths of 6 steps"),
        (["--form", "symbolic", "--symbols", "20"], "--symbols 20 is fewer than --nodes 28"),
    ],
)
def test_impossible_requests_say_why(arguments, message, tmp_path, capsys):
    assert prosqa.main(["generate", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_stats_command(tmp_path, capsys):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(list(islice(prosqa.generate(50, "x"), 50))))
    assert prosqa.main(["stats", str(path)]) == 0
    assert "steps_share" in capsys.readouterr().out
    path.write_text("[]")
    assert prosqa.main(["stats", str(path)]) == 2
    assert "is not a ProsQA file" in capsys.readouterr().err
