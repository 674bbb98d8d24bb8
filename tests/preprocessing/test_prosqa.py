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


SHAPES = {"text": {}, "symbolic": {"n_nodes": 8, "min_steps": 2, "max_steps": 3}, "edges": {"n_symbols": 40}}


@pytest.mark.parametrize("form", prosqa.FORMS)
def test_the_command_checks_what_it_generates(form, tmp_path, capsys):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(list(prosqa.generate(300, "check", form=form, **SHAPES[form]))))
    assert prosqa.main(["check", str(path)]) == 0
    assert "300 examples, 0 with a problem" in capsys.readouterr().out


def test_the_command_accepts_the_published_file(shared, capsys):
    assert prosqa.main(["check", str(shared / "datasets" / "prosqa_valid.json")]) == 0
    assert "300 examples, 0 with a problem" in capsys.readouterr().out


def edited(record: dict, **changes) -> dict:
    return {**json.loads(json.dumps(record)), **changes}


def spoiled(record: dict) -> dict[str, dict]:
    """What the checker has to say, and the record it has to say it about."""
    steps, symbols = record["steps"], record["idx_to_symbol"]
    root, target, other = (symbols[record[key]] for key in ("root", "target", "neg_target"))
    sentence = next(m.group() for m in SENTENCE.finditer(record["question"]) if m[2] not in (root, target))
    return {
        "do not lead from": edited(record, steps=steps[1:]),
        "the steps do not lead": edited(record, steps=[*steps, sentence]),
        "are not in the graph": edited(record, steps=[f"{root} is a {target}."]),
        "are not edges": edited(record, steps=[*steps[:-1], steps[-1].rstrip(".")]),
        "steps [] are not": edited(record, steps=[]),
        "the answer is": edited(record, answer=f"{root} is a {other}."),
        "question and edges differ": edited(record, question=record["question"].replace(sentence, "", 1)),
        "can be reached from": edited(record, edges=[*record["edges"], [record["root"], record["neg_target"]]]),
        "is not a ProsQA record": edited(record, target=99),
    }


def test_the_checker_rejects_what_was_spoiled(generated):
    for record in generated[:20]:
        assert prosqa.problem_with(record) is None
        for problem, wrong in spoiled(record).items():
            if problem == "can be reached from":
                symbols = record["idx_to_symbol"]
                added = f"{symbols[record['root']]} is a {symbols[record['neg_target']]}. "
                wrong["question"] = added + wrong["question"]
            assert problem in str(prosqa.problem_with(wrong))


@pytest.mark.parametrize("record", [None, 3, [], {}, {"question": 5}, {"question": "a b | ? a b c"}], ids=str)
def test_the_checker_names_what_is_no_record(record):
    assert "is not a ProsQA record" in str(prosqa.problem_with(record))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a ProsQA file"),
        (b"[{", "is not a ProsQA file"),
        (b'["\xff"]', "is not a ProsQA file"),
        (b"[" * 100_000, "is not a ProsQA file"),
        (b"[" + b"9" * 5000 + b"]", "is not a ProsQA file"),
        (b"{}", "must hold a list"),
        (b"[]", "must hold a list"),
        (None, "cannot be read"),
    ],
    ids=["empty", "cut", "no UTF-8", "nested", "huge number", "no list", "empty list", "missing"],
)
@pytest.mark.parametrize("command", ["check", "stats"])
def test_files_that_cannot_be_used_are_named(command, content, message, tmp_path, capsys):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    assert prosqa.main([command, str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_with_wrong_examples_gives_status_1(generated, tmp_path, capsys):
    path = tmp_path / "some.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([generated[0], edited(generated[1], answer="?")]).encode())
    assert prosqa.main(["check", str(path)]) == 1
    captured = capsys.readouterr()
    assert "record 1: the answer is '?'" in captured.err
    assert "2 examples, 1 with a problem" in captured.out


def test_out_of_distribution_sets_are_longer_and_denser(generated, tmp_path):
    (tmp_path / "prosqa_train.json").write_text(json.dumps(generated))
    assert prosqa.main(["ood", "--out", str(tmp_path), "--count", "60"]) == 0
    usual = prosqa.statistics(generated)
    sets = {name: json.loads((tmp_path / f"prosqa_ood_{name}.json").read_text()) for name in ("longer", "denser")}
    for records in sets.values():
        assert len(records) == 60
        for record in records:
            check_text_record(record)
            assert prosqa.problem_with(record) is None
    assert {len(record["steps"]) for record in sets["longer"]} <= {7, 8, 9}
    dense = prosqa.statistics(sets["denser"])
    assert dense["edges"] / dense["nodes"] > 1.2 * usual["edges"] / usual["nodes"]
    assert prosqa.main(["ood", "--out", str(tmp_path / "again"), "--count", "60"]) == 0
    for name in sets:
        first, second = (folder / f"prosqa_ood_{name}.json" for folder in (tmp_path, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()


def test_out_of_distribution_sets_leave_out_what_was_trained_on(tmp_path):
    arguments = ["ood", "--out", str(tmp_path), "--count", "20"]
    assert prosqa.main(arguments) == 0
    known = json.loads((tmp_path / "prosqa_ood_denser.json").read_text())
    (tmp_path / "prosqa_train.json").write_text(json.dumps(known))
    assert prosqa.main(arguments) == 0
    keys = {prosqa.question_key(record) for record in known}
    assert not keys & {prosqa.question_key(r) for r in json.loads((tmp_path / "prosqa_ood_denser.json").read_text())}


def test_mean_parents_sets_the_density():
    few, many = (
        prosqa.statistics(list(prosqa.generate(200, "d", mean_parents=mean, min_steps=2))) for mean in (1.2, 2.5)
    )
    assert many["edges"] > 1.4 * few["edges"]


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
        (["--mean-parents", "0"], "--mean-parents 0.0: needs a number above 0"),
        (["--form", "symbolic", "--symbols", "20"], "--symbols 20 is fewer than the 28 nodes"),
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
