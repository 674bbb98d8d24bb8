"""ProntoQA: the official file converts without loss, the checker misses nothing, the generator draws the same task."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from math import log, sqrt
from pathlib import Path
from statistics import mean, stdev

import prontoqa
import prontoqa_generator as task
import pytest

SPLITS = ("train", "valid", "test")
N_GENERATED = 4000


def splits_in(folder: Path) -> dict[str, list[dict]]:
    return {split: json.loads((folder / f"prontoqa_{split}.json").read_text()) for split in SPLITS}


@pytest.fixture(scope="module")
def raw(shared) -> dict:
    with gzip.open(shared / "datasets" / "5hop_0shot_random.json.gz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory) -> dict[str, list[dict]]:
    out = tmp_path_factory.mktemp("converted")
    source = shared / "datasets" / "5hop_0shot_random.json.gz"
    assert prontoqa.main(["convert", str(source), "--out", str(out)]) == 0
    return splits_in(out)


@pytest.fixture(scope="module")
def official(converted) -> list[dict]:
    return [record for split in SPLITS for record in converted[split]]


@pytest.fixture(scope="module")
def generated() -> list[dict]:
    return list(task.generate(N_GENERATED, "test"))


@pytest.fixture(scope="module")
def both_statistics(official, generated) -> tuple[dict, dict]:
    return prontoqa.statistics(official), prontoqa.statistics(generated)


# The official file


@pytest.mark.shared
def test_the_official_file_converts_without_loss(raw, converted, official):
    assert {split: len(records) for split, records in converted.items()} == {"train": 9000, "valid": 200, "test": 800}
    assert len(raw) == len(official)
    for trial, record in zip(raw.values(), official):
        example = trial["test_example"]
        assert list(record) == ["question", "steps", "answer"]
        assert record["question"] == example["question"] + " " + example["query"]
        assert record["answer"] == example["answer"]
        assert [step.count(".") for step in record["steps"]] == [2, 2, 2, 2, 2, 1]
        assert re.findall(r"[^. ][^.]*\.", " ".join(record["steps"])) == example["chain_of_thought"]
        assert all(". " in step for step in record["steps"][:-1])


@pytest.mark.shared
def test_the_checker_accepts_the_official_file(official):
    assert list(prontoqa.find_problems(official)) == []


# The checker


def test_the_checker_accepts_what_is_generated(generated):
    assert list(prontoqa.find_problems(generated)) == []


def test_the_concepts_of_a_proof_differ(generated):
    for record in generated[:200]:
        chain = [task.read_sentence(sentence) for sentence in task.proof_sentences(record["steps"])][::2]
        assert all(before.subject == after.subject for before, after in pairwise(chain))
        assert len({fact.predicate for fact in chain}) == 6


@pytest.mark.parametrize("hops", range(1, task.MOST_HOPS + 1))
def test_any_number_of_hops_gives_proofs_that_hold(hops):
    for record in task.generate(100, "hops", hops=hops):
        assert len(record["steps"]) == hops + 1


def solve(question: str) -> str:
    """True or False from the question's text alone, by another reader than the checker's."""
    *context, query = question.lower().replace("uses", "us").split(". ")
    says = re.compile(r"(?:each |every |true or false: )?(\w+) (?:is|are) (not )?(?:an? )?(\w+)\.?")
    rules = [says.fullmatch(sentence).groups() for sentence in context]
    name, negated, asked = says.fullmatch(query).groups()
    known = {name}
    for _ in context:
        known |= {predicate for subject, sign, predicate in rules if subject in known and not sign}
    signs = {sign for subject, sign, predicate in rules if subject in known and predicate == asked}
    assert len(signs) == 1, "the property is settled, in one way"
    return str(signs == {negated})


def test_answers_are_those_of_another_reader(generated):
    for record in generated[:1000]:
        assert solve(record["question"]) == record["answer"]


@pytest.mark.shared
def test_official_answers_are_those_of_another_reader(official):
    for record in official[:1000]:
        assert solve(record["question"]) == record["answer"]


def flip_answer(record):
    record["answer"] = {"True": "False", "False": "True"}[record["answer"]]


def flip_query(record):
    context, query = record["question"].split(task.QUERY)
    flipped = query.replace("is not ", "is ") if "is not " in query else query.replace("is ", "is not ")
    record["question"] = context + task.QUERY + flipped


def ask_another_property(record):
    asked = task.read_question(record["question"]).query.predicate
    other = next(word for family in task.FAMILIES if asked not in family for word in family)
    context, query = record["question"].split(task.QUERY)
    record["question"] = context + task.QUERY + query.replace(asked, other)


def drop_sentence_from_step(record):
    record["steps"][1] = record["steps"][1].split(". ")[0] + "."


def drop_step(record):
    del record["steps"][2]


def drop_last_step(record):
    del record["steps"][-1]
    record["steps"][-1] = record["steps"][-1].split(". ")[0] + "."


def swap_steps(record):
    record["steps"][1], record["steps"][2] = record["steps"][2], record["steps"][1]


def swap_sentences_of_step(record):
    first, second = task.split_sentences(record["steps"][1])
    record["steps"][1] = f"{second} {first}"


def swap_concept(record):
    entity, path_2 = re.match(r"(\w+) is an? (\w+)", record["steps"][1]).groups()
    wrong = next(word for word in task.CONCEPTS if word != path_2 and word[0] != "i")
    record["steps"][1] = re.sub(r"^\w+ is an? \w+\.", f"{entity} is a {wrong}.", record["steps"][1])


def swap_concept_in_rule(record):
    first, rule = task.split_sentences(record["steps"][0])
    said = task.read_sentence(rule)
    wrong = next(word for word in task.CONCEPTS if word not in record["question"].lower())
    record["steps"][0] = f"{first} {task.forms(said._replace(predicate=wrong))[0]}"


def reword_rule(record):
    """The same rule in another form: a proof quotes the context word for word."""
    first, rule = task.split_sentences(record["steps"][0])
    other = next(form for form in task.forms(task.read_sentence(rule)) if form != rule)
    record["steps"][0] = f"{first} {other}"


def change_entity(record):
    entity = record["steps"][0].split()[0]
    other = next(name for name in task.NAMES if name != entity)
    record["steps"] = [step.replace(entity, other) for step in record["steps"]]


def negate_conclusion(record):
    said = task.read_sentence(record["steps"][-1])
    record["steps"][-1] = task.forms(said.opposite())[0]


def remove_rule(record):
    rule = task.split_sentences(record["steps"][2])[1]
    record["question"] = record["question"].replace(rule + " ", "")


def remove_fact(record):
    fact = task.split_sentences(record["steps"][0])[0]
    record["question"] = record["question"].replace(fact + " ", "")


def take_the_distractor(record):
    """The rule of the opposing concept in place of the right one, with its conclusion and answer."""
    said = task.read_question(record["question"])
    rule = task.read_sentence(task.split_sentences(record["steps"][-2])[1])
    opposing = next(
        sentence
        for sentence, other in zip(said.sentences, said.statements)
        if other.predicate == rule.predicate and other.subject != rule.subject
    )
    record["steps"][-2] = f"{task.split_sentences(record['steps'][-2])[0]} {opposing}"
    negate_conclusion(record)
    flip_answer(record)


def contradict(record):
    rule = task.read_sentence(task.split_sentences(record["steps"][-2])[1])
    start = task.read_sentence(task.split_sentences(record["steps"][0])[0]).predicate
    record["question"] = f"Each {start} is {'not ' if rule.holds else ''}{rule.predicate}. {record['question']}"


def contradict_far_from_the_proof(record):
    """Something nobody asked about both holds and does not."""
    entity = task.read_question(record["question"]).query.subject
    record["question"] = f"{entity} is quick. {entity} is not quick. {record['question']}".replace("quick", "mean")


def misspell(record):
    record["question"] = record["question"].replace("pus", "pvs", 1)


def wrong_article(record):
    record["question"] = re.sub(
        r" is an? (\w)", lambda found: f" is {'an' if found[1] != 'i' else 'a'} {found[1]}", record["question"], count=1
    )


def two_spaces(record):
    record["question"] = record["question"].replace(". ", ".  ", 1)


def no_query(record):
    record["question"] = record["question"].split(" " + task.QUERY)[0]


CORRUPTIONS = [
    (flip_answer, "but the proof ends in"),
    (flip_query, "but the proof ends in"),
    (ask_another_property, "which does not decide"),
    (drop_sentence_from_step, r"step 2 has 1 sentence\(s\), not 2"),
    (drop_step, "step 3: .* does not follow"),
    (drop_last_step, "which does not decide"),
    (swap_steps, "step 2: .* does not follow"),
    (swap_sentences_of_step, "step 2: .* does not follow"),
    (swap_concept, "step 2: .* does not follow"),
    (swap_concept_in_rule, "step 1: .* is not in the context"),
    (reword_rule, "step 1: .* is not in the context"),
    (change_entity, "step 1: .* is not in the context"),
    (negate_conclusion, "step 6: .* does not follow"),
    (remove_rule, "step 3: .* is not in the context"),
    (remove_fact, "step 1: .* is not in the context"),
    (take_the_distractor, "step 6: .* does not follow"),
    (contradict, "the context gives both .* and its opposite"),
    (contradict_far_from_the_proof, "the context gives both .* and its opposite"),
    (misspell, "is not a sentence of the task"),
    (wrong_article, "is not a sentence of the task"),
    (two_spaces, "is not a sentence of the task"),
    (no_query, "the question ends in"),
    (lambda record: record.pop("steps"), "'steps' is missing or is not a list"),
    (lambda record: record.update(answer=True), "'answer' is missing or is not a str"),
    (lambda record: record.update(answer="Maybe"), "the answer is 'Maybe'"),
    (lambda record: record.update(steps=record["steps"][-1:]), r"1 step\(s\)"),
    (lambda record: record.update(steps=[]), r"0 step\(s\)"),
    (lambda record: record["steps"].append(3), "an entry that is not text"),
    (lambda record: record.update(question=""), "the question ends in ''"),
]


@pytest.mark.parametrize(("corrupt", "reason"), CORRUPTIONS)
def test_the_checker_names_what_is_wrong(corrupt, reason, generated):
    for record in generated[:40]:
        damaged = copy.deepcopy(record)
        corrupt(damaged)
        with pytest.raises(ValueError, match=reason):
            task.check_record(damaged)


def test_nothing_follows_from_what_an_entity_is_not():
    rule = task.Statement("wumpus", "shy", False)
    assert task.modus_ponens(task.Statement("Max", "wumpus"), rule) == task.Statement("Max", "shy", False)
    assert task.modus_ponens(task.Statement("Max", "wumpus", False), rule) is None
    assert task.modus_ponens(task.Statement("Max", "impus"), rule) is None


def test_check_command(tmp_path, generated, capsys):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(generated[:5]))
    assert prontoqa.main(["check", str(path)]) == 0
    assert "5 records, 5 hold, 0 do not" in capsys.readouterr().out
    records = copy.deepcopy(generated[:5])
    flip_answer(records[1])
    records[3] = "text"
    reordered = task.split_sentences(records[0]["question"])
    records.append({**records[0], "question": " ".join([*reversed(reordered[:-1]), reordered[-1]])})
    path.write_text(json.dumps(records))
    assert prontoqa.main(["check", str(path)]) == 1
    seen = capsys.readouterr()
    assert "6 records, 3 hold, 3 do not" in seen.out
    lines = seen.err.splitlines()
    assert len(lines) == 3
    assert "record 1: the answer is" in lines[0]
    assert "record 3: it is not an object" in lines[1]
    assert "record 5: the same question as record 0" in lines[2]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"3", b"[{", b"\xff\xfe[\x00]\x00", b"\x1f\x8bno"])
@pytest.mark.parametrize("command", ["check", "stats"])
def test_unusable_files_of_records(command, content, tmp_path, capsys):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    assert prontoqa.main([command, str(path)]) == 2
    assert str(path) in capsys.readouterr().err


# The generator beside the official file


def three_errors(share: float, *sizes: int) -> float:
    """Three standard errors of the difference between shares counted in two samples of these sizes."""
    return 3 * sqrt(share * (1 - share) * sum(1 / size for size in sizes))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["answer_true", "query_negated", "proof_fact_first"])
def test_shares_of_the_examples(name, both_statistics, official):
    published, own = both_statistics
    assert own[name] == pytest.approx(published[name], abs=three_errors(published[name], len(official), N_GENERATED))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("part", "rules", "share"),
    [
        ("asked", 1, task.NEGATED_ASKED),
        ("opposing", 1, 1 - task.NEGATED_ASKED),
        ("on the path", 4, task.NEGATED_ON_THE_WAY),
        ("off the path", 6, task.NEGATED),
    ],
)
def test_shares_of_negated_rules(part, rules, share, both_statistics, official):
    """Both files beside the shares that follow from the official weights, with so many rules a question."""
    published, own = (found["negated_share"][part] for found in both_statistics)
    assert published == pytest.approx(share, abs=three_errors(share, rules * len(official)))
    assert own == pytest.approx(share, abs=three_errors(share, rules * N_GENERATED))


@pytest.mark.shared
def test_what_the_official_generator_fixes_is_the_same(both_statistics, official, generated):
    published, own = both_statistics
    for name in ("sentences", "steps_share", "facts_last", "shapes"):
        assert own[name] == published[name]
    assert own["sentences"] == 25
    assert own["shapes"] == own["facts_last"] == 1
    assert task.shape(generated[0]) == task.shape(official[0])
    assert published["distinct_questions"] == len(official)
    assert own["distinct_questions"] == N_GENERATED


@pytest.mark.shared
def test_forms_length_and_order(both_statistics, official, generated):
    published, own = both_statistics
    sizes = len(official), N_GENERATED
    for form, share in published["form_share"].items():
        # 25 sentences a question, of which 23 draw their form, each by itself.
        assert own["form_share"][form] == pytest.approx(share, abs=three_errors(share, *(25 * n for n in sizes)))
    # Four pairs of neighbours a proof; that they share rules makes their mean vary less, not more.
    assert own["proof_in_order"] == pytest.approx(0.5, abs=three_errors(0.5, 4 * N_GENERATED))
    assert published["proof_in_order"] == pytest.approx(0.5, abs=three_errors(0.5, 4 * len(official)))
    error = sqrt(sum(1 / n for n in sizes))
    # Places from 0 to 1 drawn evenly spread by sqrt(1/12).
    assert own["asked_place"] == pytest.approx(published["asked_place"], abs=3 * sqrt(1 / 12) * error)
    spread = stdev(len(record["question"].split()) for record in official)
    assert own["question_words"] == pytest.approx(published["question_words"], abs=3 * spread * error)


@pytest.mark.shared
def test_no_part_of_a_question_has_its_place_in_it(official, generated):
    for records in (official, generated):
        places: dict[tuple, list[int]] = {}
        for record in records:
            parts = task.roles(record)
            for place, said in enumerate(task.read_question(record["question"]).statements[:23]):
                places.setdefault((parts[said.subject], parts[said.predicate]), []).append(place)
        assert len(places) == 23
        # 23 places drawn evenly spread by sqrt((23^2 - 1) / 12) = 6.63; four errors, as 46 means are compared.
        for found in places.values():
            assert mean(found) == pytest.approx(11, abs=4 * 6.63 / sqrt(len(found)))


PROPERTIES = [word for family in task.FAMILIES for word in family]
KINDS = dict.fromkeys(task.NAMES, "NAME") | dict.fromkeys(PROPERTIES, "PROPERTY")
NAME_OR_PROPERTY = re.compile("|".join(KINDS))


def templates(records: list[dict]) -> set[str]:
    """Every sentence of questions and steps with kinds in the place of words; articles and plurals stay."""
    texts = {text for record in records for text in (record["question"], *record["steps"])}
    sentences = {sentence for text in texts for sentence in text.rstrip(".").split(". ")}
    return {
        re.sub(r"\w+pus", "CONCEPT", NAME_OR_PROPERTY.sub(lambda word: KINDS[word[0]], sentence))
        for sentence in sentences
    }


def word_counts(records: list[dict]) -> Counter:
    """How many questions have each name, concept and property."""
    return Counter(
        word
        for record in records
        for word in {word for said in task.read_question(record["question"]).statements for word in said[:2]}
    )


@pytest.mark.shared
def test_same_sentences_and_words(official, generated):
    assert templates(generated) == templates(official)
    words = {*task.NAMES, *task.CONCEPTS, *PROPERTIES}
    assert set(word_counts(official)) == set(word_counts(generated)) == words
    for family in task.FAMILIES:
        for record in official[::20]:
            said = task.read_question(record["question"])
            assert len({rule.predicate for rule in said.statements if rule.predicate in family}) <= 1


@pytest.mark.shared
@pytest.mark.parametrize("kind", ["names", "concepts", "properties", "asked"])
def test_words_are_drawn_as_often(kind, official, generated):
    if kind == "asked":
        ours, theirs = (
            Counter(task.read_question(record["question"]).query.predicate for record in records)
            for records in (generated, official)
        )
        words = PROPERTIES
    else:
        ours, theirs = word_counts(generated), word_counts(official)
        words = {"names": task.NAMES, "concepts": task.CONCEPTS, "properties": PROPERTIES}[kind]
    surprise = 0.0
    for word in words:
        total = ours[word] + theirs[word]
        for count, size in ((ours[word], N_GENERATED), (theirs[word], len(official))):
            expected = total * size / (N_GENERATED + len(official))
            surprise += (count - expected) ** 2 / expected
    # Chi-square with one degree of freedom a word but one: its mean and three of its standard deviations.
    # Words drawn without replacement, as all but names and asked ones are, give less.
    assert surprise < len(words) - 1 + 3 * sqrt(2 * (len(words) - 1))


# Shortcuts


@pytest.mark.shared
def test_shortcuts_give_no_more_away_than_in_the_official_file(both_statistics, official):
    published, own = (found["shortcuts"] for found in both_statistics)
    assert own.keys() == published.keys()
    for cue, share in published.items():
        assert own[cue] == pytest.approx(share, abs=three_errors(share, len(official), N_GENERATED)), cue


def surface_features(record: dict) -> list[tuple]:
    """What can be seen without following a rule: signs, forms, places and words around the property asked about."""
    question = task.read_question(record["question"])
    asked = question.query
    on_it = [index for index, said in enumerate(question.statements) if said.predicate == asked.predicate]
    first, second = (question.sentences[index].split()[0] in ("Each", "Every") for index in on_it)
    features = {
        "query": asked.holds,
        "first rule": question.statements[on_it[0]].holds == asked.holds,
        "word": asked.predicate,
        "name": asked.subject,
        "forms": (first, second),
        "first place": on_it[0] // 6,
        "second place": on_it[1] // 6,
        "order of facts": question.statements[-2].predicate < question.statements[-1].predicate,
        "negations": sum(not said.holds for said in question.statements),
    }
    return [*features.items(), *combinations(features.items(), 2)]


def learned_accuracy(records: list[dict]) -> float:
    """Naive Bayes over the features and their pairs, learned on one half of the records, measured on the other."""
    half = len(records) // 2
    seen = {"True": Counter(), "False": Counter()}
    for record in records[:half]:
        seen[record["answer"]].update(surface_features(record))
    right = 0
    for record in records[half:]:
        odds = sum(log((seen["True"][f] + 1) / (seen["False"][f] + 1)) for f in surface_features(record))
        right += (odds > 0) == (record["answer"] == "True")
    return right / (len(records) - half)


@pytest.mark.shared
def test_a_reader_of_surface_features_learns_no_more(official, generated):
    published, own = learned_accuracy(official), learned_accuracy(generated)
    assert own == pytest.approx(published, abs=three_errors(published, len(official) // 2, N_GENERATED // 2))
    # The most that the sign of the query gives away, by its share of negated rules, is 53%.
    assert own < 0.53 + three_errors(0.53, N_GENERATED // 2)


# The generate command

SMALL = ["--train", "60", "--valid", "10", "--test", "20"]


def generate_into(folder: Path, *arguments: str, hash_seed: str = "0") -> dict[str, bytes]:
    command = [sys.executable, prontoqa.__file__, "generate", "--out", str(folder), *SMALL, *arguments]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_seed_same_bytes(tmp_path):
    first = generate_into(tmp_path / "a", "--seed", "3", hash_seed="1")
    assert set(first) == {f"prontoqa_{split}.json" for split in SPLITS}
    assert first == generate_into(tmp_path / "b", "--seed", "3", hash_seed="2")
    other = generate_into(tmp_path / "c", "--seed", "4")
    assert all(other[name] != first[name] for name in first)


def test_no_question_stands_twice_in_the_splits(tmp_path, monkeypatch):
    """Every split draws from the same seed here, and would begin with the same questions as the one before."""
    monkeypatch.setattr(prontoqa, "generate", lambda count, seed, **options: task.generate(count, "same", **options))
    assert prontoqa.main(["generate", "--out", str(tmp_path), *SMALL]) == 0
    splits = splits_in(tmp_path)
    assert {split: len(records) for split, records in splits.items()} == {"train": 60, "valid": 10, "test": 20}
    assert len({task.question_key(record) for records in splits.values() for record in records}) == 90


def test_excluded_questions_are_left_out():
    first = list(task.generate(3, "same"))
    keys = [task.question_key(record) for record in first]
    assert list(task.generate(2, "same", exclude=keys[:1])) == first[1:]


def test_stats_command(tmp_path, generated, capsys):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(generated[:50]))
    assert prontoqa.main(["stats", str(path)]) == 0
    assert "its concept named most: 100.0%" in capsys.readouterr().out
    damaged = copy.deepcopy(generated[:3])
    flip_answer(damaged[2])
    path.write_text(json.dumps(damaged))
    assert prontoqa.main(["stats", str(path)]) == 2
    assert "record 2: the answer is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "0"], "--train 0: a split needs at least 1 example"),
        (["--valid", "-1"], "--valid -1: a split needs"),
        (["--test", "0"], "--test 0: a split needs"),
        (["--hops", "0"], "enough for 1 to 6"),
        (["--hops", "7"], "enough for 1 to 6"),
    ],
)
def test_impossible_requests_say_why(arguments, message, tmp_path, capsys):
    assert prontoqa.main(["generate", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert prontoqa.main(["generate", "--out", str(tmp_path / "file"), *SMALL]) == 2
    assert "file" in capsys.readouterr().err


# The convert command on files that are not as they should be


def trial(number: int, **changes) -> dict:
    example = {
        "question": f"Sentence {number}.",
        "query": "True or false: Max is shy.",
        "chain_of_thought": ["A.", "B.", "C.", "D.", "E."],
        "answer": "True",
    }
    return {"test_example": {key: value for key, value in (example | changes).items() if value is not ...}}


def trials(*values: object) -> str:
    """A raw file of these trials, named example1 and so on."""
    return json.dumps({f"example{number}": value for number, value in enumerate(values, start=1)})


def convert(folder: Path, content: bytes | str, name: str = "raw.json") -> int:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return prontoqa.main(["convert", str(path), "--out", str(folder / "out"), "--train", "1", "--valid", "1"])


GOOD = trials(*(trial(number) for number in range(4)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("raw.json", GOOD.encode()),
        ("raw.json.gz", gzip.compress(GOOD.encode(), mtime=0)),
        ("packed_without_saying_so.json", gzip.compress(GOOD.encode(), mtime=0)),
        ("named_gz_but_plain.gz", GOOD.encode()),
        ("with_bom.json", b"\xef\xbb\xbf" + GOOD.encode()),
        ("with_bom.json.gz", gzip.compress(b"\xef\xbb\xbf" + GOOD.encode(), mtime=0)),
        ("with_crlf.json", json.dumps(json.loads(GOOD), indent=1).replace("\n", "\r\n").encode()),
        ("more_keys.json", trials(*(trial(number) | {"in_context_example0": {}} for number in range(4))).encode()),
    ],
)
def test_ways_to_store_the_same_trials(name, content, tmp_path, capsys):
    assert convert(tmp_path, content, name) == 0
    assert capsys.readouterr().err == ""
    splits = splits_in(tmp_path / "out")
    assert [len(splits[split]) for split in SPLITS] == [1, 1, 2]
    assert splits["valid"] == [
        {"question": "Sentence 1. True or false: Max is shy.", "steps": ["A. B.", "C. D.", "E."], "answer": "True"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON, or is cut off"),
        (GOOD[:-9], "is not JSON, or is cut off"),
        (GOOD + "}", "is not JSON, or is cut off"),
        ("question||steps", "is not JSON, or is cut off"),
        (GOOD.replace("Max", "Zoë").encode("latin-1"), "is neither gzip nor UTF-8"),
        (GOOD.encode("utf-16"), "is neither gzip nor UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "is neither gzip nor UTF-8"),
        (gzip.compress(GOOD.encode(), mtime=0)[:-20], "is cut off or damaged gzip"),
        (gzip.compress(GOOD.encode(), mtime=0) + b"more", "is cut off or damaged gzip"),
        (b"\x1f\x8b and no more", "is cut off or damaged gzip"),
        (gzip.compress(b"", mtime=0)[:10] + b"\x07" * 20, "is cut off or damaged gzip"),
        ("[" * 100_000, "nested too deeply"),
        ("[[]]", "is a list, not an object of trials"),
        (json.dumps([trial(1)]), "is a list, not an object of trials"),
        ("7", "is a number, not an object of trials"),
        ("null", "null, not an object of trials"),
        ("{}", "has no trials"),
        (trials(trial(1), trial(2)), "has 2 usable trials; --train 1 --valid 1 and a test set need at least 3"),
        (trials(trial(1), trial(2), {}), "has 2 usable trials"),
    ],
)
def test_unusable_files_end_with_one_clear_error(content, message, tmp_path, capsys):
    assert convert(tmp_path, content) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("prontoqa.py convert: ")
    assert str(tmp_path / "raw.json") in last
    assert message in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_paths_that_cannot_be_read(name, tmp_path, capsys):
    assert prontoqa.main(["convert", str(tmp_path / name), "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (trial(9, question=...), "'question' is missing"),
        (trial(9, query=...), "'query' is missing"),
        (trial(9, chain_of_thought=...), "'chain_of_thought' is missing"),
        (trial(9, answer=...), "'answer' is missing"),
        (trial(9, question=5), "'question' is a number, not text"),
        (trial(9, query=["True or false?"]), "'query' is a list, not text"),
        (trial(9, answer=True), "'answer' is true or false, not text"),
        (trial(9, answer="Unknown"), "'answer' is 'Unknown', not 'True' or 'False'"),
        (trial(9, question=""), "'question' is empty"),
        (trial(9, query=" \r\n"), "'query' is empty"),
        (trial(9, chain_of_thought=[]), "'chain_of_thought' is empty"),
        (trial(9, chain_of_thought="A. B."), "'chain_of_thought' is text, not a list"),
        (trial(9, chain_of_thought={"1": "A."}), "'chain_of_thought' is an object, not a list"),
        (trial(9, chain_of_thought=["A.", ""]), "sentence 2 of the chain is empty"),
        (trial(9, chain_of_thought=["A.", 2.5]), "sentence 2 of the chain is a number, not text"),
        (trial(9, chain_of_thought=[["A."]]), "sentence 1 of the chain is a list, not text"),
        ({}, "'test_example' is missing"),
        ({"test_example": [1]}, "'test_example' is a list, not an object"),
        ([trial(9)], "the trial is a list, not an object"),
        (3, "the trial is a number, not an object"),
        (None, "the trial is missing or null, not an object"),
        (trial(0), "the same question as trial 'example1'"),
    ],
)
def test_malformed_trials_are_named_counted_and_left_out(bad, reason, tmp_path, capsys):
    assert convert(tmp_path, trials(trial(0), trial(1), bad, trial(3))) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("prontoqa.py convert: trial 'example3' left out: ")
    assert reason in lines[0]
    assert lines[1] == "prontoqa.py convert: 1 of 4 trials left out"
    kept = [record["question"][:11] for split in SPLITS for record in splits_in(tmp_path / "out")[split]]
    assert kept == ["Sentence 0.", "Sentence 1.", "Sentence 3."]


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('"example3"', '"example2"', "trial 'example2' left out: its id stood before"),
        ('"query"', '"question": "Q.", "query"', "the key 'question' more than once"),
    ],
)
def test_keys_that_stand_twice(before, after, reason, tmp_path, capsys):
    fourth = GOOD.index('"example3"')
    assert convert(tmp_path, GOOD[:fourth] + GOOD[fourth:].replace(before, after, 1)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert reason in lines[0]
    assert lines[1] == "prontoqa.py convert: 1 of 4 trials left out"
    kept = [record["question"][:11] for split in SPLITS for record in splits_in(tmp_path / "out")[split]]
    assert kept == ["Sentence 0.", "Sentence 1.", "Sentence 3."]


def test_every_cut_of_a_raw_file_is_an_error(tmp_path, capsys):
    packed = gzip.compress(GOOD.encode(), mtime=0)
    cuts = [GOOD.encode()[:end] for end in range(0, len(GOOD), 37)] + [packed[:end] for end in range(len(packed))]
    for content in cuts:
        assert convert(tmp_path, content) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_every_damaged_byte_ends_in_an_error_or_the_same_trials(tmp_path, capsys):
    """A gzip header has bytes that mean nothing to the reader; all others are covered by its checksum."""
    packed = gzip.compress(GOOD.encode(), mtime=0)
    assert convert(tmp_path, packed) == 0
    whole = splits_in(tmp_path / "out")
    for place in range(len(packed)):
        status = convert(tmp_path, packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :])
        assert status == 2 or (place < 10 and status == 0)
        assert splits_in(tmp_path / "out") == whole
