"""Data files: what is wrong is named by file, record and key; tokenizing follows the published parts."""

from __future__ import annotations

import contextlib
import json
import random

import pytest
from transformers import AutoTokenizer

from coconut_ds.data.files import DataError, read_records
from coconut_ds.data.records import check_lengths, tokenize
from coconut_ds.model.scratch import word_tokenizer

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


@pytest.mark.shared
def test_parts_are_tokenized_apart_as_published(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "datasets" / "gpt2_tokenizer")
    record = {
        "question": "Is Tom a lempus?",
        "steps": ["Tom is a terpus.", "Every terpus is a lempus."],
        "answer": "Yes",
    }
    row = tokenize([record, {**record, "steps": []}], tokenizer)[0]
    assert row["question_ids"] == tokenizer.encode("Is Tom a lempus?\n", add_special_tokens=True)
    assert row["steps_ids"] == [tokenizer.encode(step + "\n", add_special_tokens=False) for step in record["steps"]]
    assert row["answer_ids"] == [*tokenizer.encode("### Yes", add_special_tokens=False), tokenizer.eos_token_id]
    assert tokenize([{**record, "steps": []}], tokenizer)[0]["steps_ids"] == []


def test_examples_that_do_not_fit_the_model_are_named(curriculum):
    records = [GOOD, {**GOOD, "question": " ".join(["long"] * 30)}]
    tokenizer = word_tokenizer(["Is it ? It is . Yes long"], n_positions=64)
    examples = tokenize(records, tokenizer)
    check_lengths("f.json", examples, curriculum(), n_positions=64, new_tokens=4)
    with pytest.raises(DataError, match=r"f\.json: record 1: .* tokens with thoughts and answer, the model has 40"):
        check_lengths("f.json", examples, curriculum(), n_positions=40, new_tokens=4)
    with pytest.raises(DataError, match=r"record 1: .* max_new_tokens 30 need .* lower max_new_tokens"):
        check_lengths("f.json", examples, curriculum(), n_positions=64, new_tokens=30)
    # The bound is exact: with as many positions as the longest layout needs, nothing is refused.
    needed = 30 + 1 + 2 + 6 + 3
    check_lengths("f.json", examples, curriculum(), n_positions=needed, new_tokens=1)
    check_lengths("f.json", examples, curriculum(), n_positions=needed - 1, new_tokens=1, stage=0)
    with pytest.raises(DataError):
        check_lengths("f.json", examples, curriculum(), n_positions=needed - 1, new_tokens=1)
