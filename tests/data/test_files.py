"""Data files: every format gives the same records, what is wrong is named by file, record and key."""

from __future__ import annotations

import contextlib
import csv
import json
import random
from pathlib import Path

import datasets
import pytest

from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.files import DataError, Source, read_records, read_set

GOOD = {"question": "Is it?", "steps": ["It is."], "answer": "Yes"}


def write(tmp_path, content) -> str:
    path = tmp_path / "some.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


BAD_FILES = {
    "missing key": (
        [GOOD, {"question": "a", "step": [], "answer": "b"}],
        "record 1: key 'steps' is missing (did",
    ),
    "empty question": ([{**GOOD, "question": " "}], "record 0: key 'question' is empty"),
    "empty answer": ([{**GOOD, "answer": ""}], "record 0: key 'answer' is empty"),
    "wrong type": ([GOOD, GOOD, {**GOOD, "answer": 7}], "record 2: key 'answer' must be text, found int 7"),
    "steps as text": ([{**GOOD, "steps": "one"}], "record 0: key 'steps' must be a list of texts, found str 'one'"),
    "wrong step": ([{**GOOD, "steps": ["a", None]}], "record 0: key 'steps': entry 1 must be text, found NoneType"),
    "no record": ([GOOD, "text"], "record 1: must be an object with question, steps, answer, found str"),
    "not JSON": ('[{"question": ', "is not JSON"),
    "empty file": ("", "is empty"),
    "empty list": ("[]", "must hold a list of records with question, steps, answer; found an empty list"),
    "nested without end": ("[" * 100_000, "must hold a JSON list of records"),
    "huge number": (f"[{'9' * 5000}]", "must hold a JSON list of records"),
    "half a character": (
        '[{"question": "\\ud800", "steps": [], "answer": "b"}]',
        "'question' holds half",
    ),
    "half a step": (
        '[{"question": "a", "steps": ["\\udfff"], "answer": "b"}]',
        "'steps': entry 0 holds half",
    ),
    "no list": ("{}", "must hold a list of records with question, steps, answer; found a JSON dict"),
}


def test_a_key_of_another_meaning_is_no_hint(tmp_path):
    with pytest.raises(DataError, match=r"key 'steps' is missing$"):
        read_records(write(tmp_path, [{"question": "a", "stages": [], "answer": "b"}]))


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["\ufeff{}", "{}\r\n", "\ufeff\r\n{}"], ids=["BOM", "CRLF", "both"])
def test_files_written_elsewhere_are_read(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_bytes(content.replace("{}", json.dumps([GOOD, GOOD], indent=2).replace("\n", "\r\n")).encode())
    assert read_records(path) == [GOOD, GOOD]


def test_whatever_is_in_a_file_it_is_read_or_named(tmp_path):
    """A thousand damaged files: bytes changed, cut out, doubled, or the end missing."""
    draw = random.Random(0)
    path = tmp_path / "some.json"
    whole = json.dumps([GOOD, {**GOOD, "question": "Größe: 1e999, -0.5, \u2028?"}], ensure_ascii=False).encode()
    read = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(damaged))
            end = start + draw.randint(0, 12)
            other = [b"", bytes([draw.randrange(256)]), damaged[start:end] * 2, b"NaN", b"\\ud9"]
            damaged[start:end] = draw.choice(other)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            json.dumps(read_records(path), ensure_ascii=False).encode()
            read += 1
    assert 10 < read < 990


def test_a_missing_file_says_where_to_get_data(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: No such file or directory; data/README.md"):
        read_records(tmp_path / "none.json")


def test_limit(tmp_path):
    assert len(read_records(write(tmp_path, [GOOD] * 5), limit=2)) == 2


# Other formats

TWO = [GOOD, {"question": 'Say "a,\nb"', "steps": ["1 + 1 = 2", "2 + 1 = 3"], "answer": "13"}]


def written(folder, ending: str) -> str:
    """`TWO`, with steps as one text where a format has no lists."""
    path = folder / f"some{ending}"
    if ending in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, TWO)) + "\n\n")
    elif ending == ".parquet":
        datasets.Dataset.from_list(TWO).to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            rows = csv.DictWriter(file, TWO[0], delimiter="\t" if ending == ".tsv" else ",")
            rows.writeheader()
            rows.writerows({**each, "steps": "; ".join(each["steps"])} for each in TWO)
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".parquet", ".csv", ".tsv"])
def test_every_format_gives_the_same_records(tmp_path, ending):
    found = read_set(Source(written(tmp_path, ending), steps_separator=";"))
    assert found.records == TWO
    assert found.sha256 is None


def test_a_name_with_brackets_is_a_file_and_no_pattern(tmp_path):
    (tmp_path / "p[1].parquet").write_bytes(Path(written(tmp_path, ".parquet")).read_bytes())
    assert read_records(tmp_path / "p[1].parquet") == TWO


def test_columns_of_other_names_are_taken_and_other_keys_kept(tmp_path):
    record = {"problem": "a", "rationale": " b \n\nc", "label": "d", "answer": "no", "edges": [[0, 1]]}
    columns = {"question": "problem", "steps": "rationale", "answer": "label"}
    path = write(tmp_path, [record])
    (found,) = read_set(Source(path, columns, "\n")).records
    assert (found["question"], found["steps"], found["answer"]) == ("a", ["b", "c"], "d")
    assert found["edges"] == [[0, 1]]
    with pytest.raises(DataError, match="record 0: key 'rationales' is missing \\(did you mean 'rationale'"):
        read_set(Source(path, {**columns, "steps": "rationales"}, "\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": 1}\n{"quest', "line 2 is not JSON: Unterminated string"),
        ("a.jsonl", "", "found an empty list"),
        ("a.jsonl", '["a"]', "record 0: must be an object"),
        ("a.jsonl", f"[{'9' * 5000}]", "line 1 is not JSON: "),
        ("a.csv", "question,steps\na,b", "record 0: key 'answer' is missing"),
        ("a.csv", "question,steps,answer\na,b", "record 0: key 'answer' must be text, found NoneType"),
        ("a.csv", "question,steps,answer\na,b,c", "key 'steps' must be a list of texts, found str 'b'; set steps_sep"),
        ("a.csv", "question,steps,answer\na," + "b" * 200_000, "is not CSV: field larger than field limit"),
        ("a.csv", "question,steps,answer\na,b,c,d", "record 0: has more cells than the header (line 2); put text"),
        ("a.csv", "question,step,answer\na,b,c,d", "record 0: has more cells than the header"),
        ("a.parquet", "PAR", "is not Parquet: "),
        ("a.json", '{"question": "a"}\n{"question": "b"}', "a record each, are read from a file named .jsonl"),
    ],
)
def test_what_is_wrong_with_another_format_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet"])
def test_another_missing_file_says_where_to_get_data_too(tmp_path, name):
    with pytest.raises(DataError, match=r"cannot be read: No such file or directory; data/README.md"):
        read_records(tmp_path / name)


def test_empty_steps_are_left_out_and_counted(tmp_path):
    records = [GOOD, {**GOOD, "steps": ["", "a", " \n"]}, {**GOOD, "steps": []}, {**GOOD, "steps": [" "]}]
    found = read_set(Source(write(tmp_path, records)))
    assert [each["steps"] for each in found.records] == [GOOD["steps"], ["a"], [], []]
    assert found.shortened == (1, 3)


# Subsets


def test_a_subset_is_the_same_in_every_run_and_part_of_a_larger_one(tmp_path):
    path = write(tmp_path, [{**GOOD, "question": str(number)} for number in range(100)])

    def taken(size, limit=None):
        return [int(each["question"]) for each in read_set(Source(path, size=size), limit).records]

    assert taken(10) == taken(10) == sorted(taken(10)) != list(range(10))
    assert set(taken(10)) < set(taken(40)) < set(range(100))
    assert taken(100) == taken(500) == taken(None) == list(range(100))
    assert taken(10, limit=3) == taken(10)[:3]
    assert read_set(Source(path, size=10)).name == f"{path} (10 of 100 records)"


def test_sizes_belong_to_their_sets():
    config = RunConfig(train_path="a", val_path="b", test_path="c", train_size=1, val_size=2, test_size=3)
    assert [Source.of(config, split).size for split in ("train", "val", "test")] == [1, 2, 3]


# The hub


def test_a_dataset_of_the_hub_is_loaded_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list(TWO)

    monkeypatch.setattr(datasets, "load_dataset", load)
    first = read_set(Source("hub:owner/name:train[:10%]"))
    assert first.records == TWO
    assert read_set(Source("hub:owner/name/main:test")).sha256 == first.sha256 is not None
    assert asked == [(("owner/name",), {"split": "train[:10%]"}), (("owner/name", "main"), {"split": "test"})]


@pytest.mark.parametrize("name", ["name:train", "owner/name", "owner/name:", "/name:train", "a/b/c/d:e"])
def test_a_name_that_is_none_of_the_hub_says_how_it_is_written(name):
    with pytest.raises(DataError, match="a dataset of the hub is written hub:OWNER/NAME:SPLIT or hub:"):
        read_set(Source(f"hub:{name}"))


def test_a_dataset_that_cannot_be_loaded_is_named_in_one_line(monkeypatch):
    def load(*names, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"owner/name:train: the dataset cannot be loaded: Couldn't reach .*; check"):
        read_set(Source("hub:owner/name:train"))
