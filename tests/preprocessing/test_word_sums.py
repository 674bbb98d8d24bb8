"""The word sums generator: every answer follows from the words, no story is in two splits, no change is idle."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import word_sums


def made(count: int = 300, steps: tuple[int, ...] = (3, 4)) -> list[dict]:
    return list(word_sums.generate(count, "test", steps))


def solve(question: str) -> list[int]:
    """The counts of a story, from its verbs and numbers alone."""
    first, *changes, _ = re.split(r"(?<=[.?]) ", question)
    counts = [int(re.search(r"\d+", first)[0])]
    for change in changes:
        number = re.search(r"\d+", change)
        if number is None:
            assert "doubles" in change
            counts.append(2 * counts[-1])
        else:
            sign = 1 if "more" in change else -1
            counts.append(counts[-1] + sign * int(number[0]))
    return counts


def test_every_answer_follows_from_the_words_of_its_story():
    for record in made():
        counts = solve(record["question"])
        assert record["answer"] == str(counts[-1])
        assert [int(step.split(" = ")[1]) for step in record["steps"]] == counts[1:]
        for before, step in zip(counts, record["steps"]):
            left, right = step.split(" = ")
            assert left.startswith(f"{before} ")
            assert eval(left) == int(right)
        assert set(record) == {"question", "steps", "answer"}


def test_counts_change_in_every_step_and_stay_in_reach():
    records = made(2000, (3, 4, 6))
    assert {len(record["steps"]) for record in records} == {3, 4, 6}
    for record in records:
        counts = solve(record["question"])
        assert all(1 <= count <= word_sums.MOST for count in counts)
        assert all(one != other for one, other in pairwise(counts))
    signs = [step.split()[1] for record in records for step in record["steps"]]
    assert all(0.2 < signs.count(sign) / len(signs) < 0.5 for sign in "+-*")


def test_a_seed_gives_the_same_stories_and_no_story_is_in_two_splits(tmp_path, capsys):
    arguments = ["--train", "200", "--valid", "50", "--test", "50"]
    for folder in ("one", "other"):
        assert word_sums.main(["generate", "--out", str(tmp_path / folder), *arguments]) == 0
    questions = []
    for split, count in (("train", 200), ("valid", 50), ("test", 50)):
        file = f"word_sums_{split}.json"
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "other" / file).read_bytes()
        records = json.loads(content)
        assert len(records) == count
        questions += [record["question"] for record in records]
    assert len(set(questions)) == 300
    assert word_sums.main(["generate", "--out", str(tmp_path / "next"), "--seed", "1", *arguments]) == 0
    other = json.loads((tmp_path / "next" / "word_sums_train.json").read_text())
    assert {record["question"] for record in other} != set(questions[:200])


def test_longer_stories_have_the_steps_asked_for(tmp_path, capsys):
    assert word_sums.main(["ood", "--out", str(tmp_path), "--steps", "5", "7", "--count", "20"]) == 0
    for steps in (5, 7):
        records = json.loads((tmp_path / f"word_sums_ood_{steps}.json").read_text())
        assert [len(record["steps"]) for record in records] == [steps] * 20
        assert word_sums.main(["check", str(tmp_path / f"word_sums_ood_{steps}.json")]) == 0


def test_new_stories_are_in_none_of_the_files_beside_them(tmp_path, capsys):
    few = ["--train", "600", "--valid", "20", "--test", "20", "--steps", "1"]
    assert word_sums.main(["generate", "--out", str(tmp_path), *few]) == 0
    assert word_sums.main(["ood", "--out", str(tmp_path), "--steps", "1", "--count", "200"]) == 0
    files = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    new = {record["question"] for record in files.pop("word_sums_ood_1")}
    assert len(new) == 200
    assert not new & {record["question"] for records in files.values() for record in records}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"answer": "1"}, "the answer is '1', the story's '"),
        ({"steps": []}, "the steps are [], the story's ["),
        ({"question": "How many?"}, "the question is not a word sums story"),
        (
            {"question": "Mia has 7 pens. She eats 2. How many pens does Mia have?"},
            "a sentence 'She eats 2' that is none",
        ),
        ({"question": None}, "is not a record of this task: TypeError"),
    ],
)
def test_what_is_wrong_is_named(changes, problem, tmp_path, capsys):
    record = made(1)[0]
    assert word_sums.problem_with(record) is None
    assert problem in word_sums.problem_with({**record, **changes})
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps([record, {**record, **changes}]))
    assert word_sums.main(["check", str(file)]) == 1
    assert "record 1: " in capsys.readouterr().err
    assert word_sums.main(["stats", str(file)]) == 2
    assert "`check` names every such record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--steps", "0"], "--steps 0: needs at least 1"),
        (["generate", "--steps", "1", "--train", "9999"], "10699 examples of 1 steps: there are not as many stories"),
        (["generate", "--train", "-5"], "-5 examples: a split needs at least 1"),
        (["ood", "--steps", "-1"], "--steps -1: needs at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, capsys, arguments, message):
    assert word_sums.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_statistics_count_what_there_is(tmp_path, capsys):
    found = word_sums.statistics(made(2000))
    assert found["examples"] == 2000
    assert found["steps_share"].keys() == {3, 4}
    assert sum(found["changes_share"].values()) == pytest.approx(1)
    assert found["commonest_answer"] < 0.1
    assert max(found["stopping_after"].values()) < 0.1
