"""Answers and chains are read as published where that can be right, and read back from every target otherwise."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from launching import ROOT

from coconut_ds.data.answers import clean_answer, clean_chain, given_answer, given_chain, matches, target
from coconut_ds.data.batches import Tokens
from coconut_ds.data.records import tokenize
from coconut_ds.inference import replies
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.model.decoding import Decoded
from coconut_ds.model.scratch import word_tokenizer


def published_answer(text: str) -> str:
    return text.split("#")[-1].replace(",", "").strip()


def published_chain(text: str) -> str:
    return text.split("#")[0].strip()


PIECES = ["a", "5", "1,000", " ", "\n", "#", "###", "### ", "\n###", "C#", ",", "<<1+2=3>>", "."]


def test_what_has_no_mark_of_its_own_is_read_as_published_in_any_text():
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 8)))
        assert given_answer(text, "5") == published_answer(text)
        if "\n" not in published_chain(text):
            assert given_chain(text, "a") == published_chain(text)


MARKED = [
    (["one", "two"], "C# 8"),
    (["one", "two"], "#5"),
    (["one", "two"], "5#"),
    (["one", "two"], "#"),
    (["one", "two"], "###"),
    (["one", "two"], "a ### b"),
    (["C# is a language", "x # 1"], "5"),
    (["### one", "two ###"], "5"),
    (["#"], "C#"),
    (["####"], "#### 5"),
    ([], "C#"),
    (["one\ntwo # three"], "a\nb # c"),
    ([" one # ", "two "], " F#, 1,000 # "),
]


@pytest.mark.parametrize(("steps", "answer"), MARKED)
@pytest.mark.parametrize("space", ["", " ", "  "], ids=["no space", "a space", "two"])
def test_steps_and_answers_with_a_mark_are_read_back(steps, answer, space):
    # Some tokenizers put a space before each part.
    text = space + target(steps, answer).replace("\n", f"\n{space}")
    expected, chain = clean_answer(answer.replace("\n", f"\n{space}")), clean_chain(steps)
    assert (given_answer(text, expected), given_chain(text, chain)) == (expected, chain)


@pytest.mark.parametrize("steps", [["one", "two"], ["1,000 + 1 = 1,001"], [], [""], ["", "a", " "], [" a", "b  "]])
@pytest.mark.parametrize("answer", ["5", " 5 ", "1,000", "a\nb", "a. b", "5 ", ",5,"])
def test_plain_steps_and_answers_are_read_back(steps, answer):
    text, expected, chain = target(steps, answer), clean_answer(answer), clean_chain(steps)
    assert (given_answer(text, expected), given_chain(text, chain)) == (expected, chain)
    assert given_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("one\n### C# 8", "C# 8"),
        ("one\n### 5", "5"),
        ("### 5### 6", "6"),
        ("no mark", "no mark"),
        ("one # 5", "5"),
        ("", ""),
    ],
)
def test_an_answer_to_a_question_without_an_expected_one(text, answer):
    assert given_answer(text) == answer


def test_a_chain_matches_whatever_spaces_its_lines_end_in():
    assert clean_chain([" a ", "b "]) == given_chain("a\nb\n### 5", "a\nb") == given_chain(" a\n b \n ### 5", "a\nb")
    assert given_chain("a  b\n### 5", "a b") == "a  b"


@pytest.mark.parametrize(("steps", "answer"), MARKED[:11])
def test_a_model_that_writes_the_target_is_right(monkeypatch, curriculum, steps, answer):
    record = {"question": "What?", "steps": steps, "answer": answer}
    tokenizer = word_tokenizer([record["question"], *steps, answer], n_positions=96)
    examples = tokenize([record], tokenizer)
    row = examples[0]
    ids = [token for step in row["steps_ids"] for token in step] + row["answer_ids"]
    evaluation, (prediction,) = evaluated(monkeypatch, examples, tokenizer, curriculum, ids)
    assert (prediction["correct"], prediction["cot_correct"]) == (True, True)
    assert (evaluation.accuracy, evaluation.cot_match) == (1, 1)


def evaluated(monkeypatch, examples, tokenizer, curriculum, ids: list[int], **options):
    """What an evaluation says of a model that writes `ids`."""
    monkeypatch.setattr(replies, "decode", lambda *_, **__: Decoded(torch.tensor([ids]), None))
    monkeypatch.setattr(Evaluator, "loss", lambda *_: 0.0)
    tokens, plan = Tokens(pad=tokenizer.pad_token_id), curriculum(method="cot")
    return Evaluator(torch.nn.Module(), examples, plan, tokens, tokenizer, 1, len(ids), **options).run(0)


def test_an_evaluation_compares_numbers_where_that_is_asked_for(monkeypatch, curriculum):
    tokenizer = word_tokenizer(["What?", "5", "5.0"], n_positions=96)
    examples, (ids,) = (
        tokenize([{"question": "What?", "steps": [], "answer": answer}], tokenizer) for answer in ("5", "5.0")
    )
    for how, accuracy in (("text", 0), ("number", 1)):
        found = evaluated(monkeypatch, examples, tokenizer, curriculum, ids["answer_ids"], answer_match=how)
        assert found[0].accuracy == accuracy


@pytest.mark.parametrize(
    ("given", "expected", "is_number"),
    [
        ("5.0", "5", True),
        ("$5", "5", True),
        ("5.", "5", True),
        ("05", "5.00", True),
        ("-5", "- 5", True),
        (".5", "0.50", True),
        ("1,000", "1000.0", True),
        ("5 €", "5", True),
        ("5", "6", False),
        ("5 3", "53", False),
        ("-5", "5", False),
        ("5%", "5", False),
        ("1e3", "1000", False),
        ("5 apples", "5", False),
        ("", "0", False),
        ("nan", "NaN", False),
        ("1/2", "0.5", False),
        ("0.1", "0.10000000000000000000001", False),
    ],
)
def test_numbers_are_compared_by_value_where_that_is_asked_for(given, expected, is_number):
    given, expected = clean_answer(given), clean_answer(expected)
    assert matches(given, expected, "number") is is_number
    assert matches(given, expected, "text") is (given == expected)
    assert matches(expected, expected, "number")
    assert not matches(given, None, "number")


def test_the_form_needs_no_heavy_library():
    code = "import sys; import coconut_ds.data.answers; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"
