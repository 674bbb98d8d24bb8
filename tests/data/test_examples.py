"""Data files: what is wrong is named by file, record and key; tokenizing follows the published parts."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from coconut_ds.data.files import DataError
from coconut_ds.data.records import check_lengths, tokenize
from coconut_ds.model.scratch import word_tokenizer

GOOD = {"question": "Is it?", "steps": ["It is."], "answer": "Yes"}


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
