"""Text and tokenizer: what cannot be used is refused, what is doubtful is counted, of clean data nothing is said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import prontoqa_generator
import prosqa
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coconut_ds.data.doubts import doubts, long_chains, shared_questions, unread
from coconut_ds.data.files import DataError, DataSet, read_records
from coconut_ds.data.markers import MARKERS
from coconut_ds.data.plain_text import demand_plain_text, reserved_in
from coconut_ds.data.records import tokenize
from coconut_ds.model.scratch import word_tokenizer

GOOD = {"question": "Is Alex a bompus?", "steps": ["Alex is a bompus.", "1 + 2 = 3"], "answer": "bompus"}
TEXTS = ["Is Alex a bompus or yumpus ? 1 2 3 4 + 5 = 000 C# F# # ### a b c x , . ! \n Ab.c It's"] * 3


def wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerBase:
    if "bos_token" in names:
        first = (names["bos_token"], tokenizer.token_to_id(names["bos_token"]))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    names = {"eos_token": "</s>", "pad_token": "<pad>", **names}
    return with_markers(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))


def with_markers(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens(list(MARKERS))
    return tokenizer


def words() -> PreTrainedTokenizerBase:
    return with_markers(word_tokenizer([*TEXTS, GOOD["question"], *GOOD["steps"]], 96))


def sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama's: a space before every part, a BOS, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(special_tokens=special, vocab_size=200, show_progress=False)
    )
    rules = json.loads(tokenizer.to_str())
    vocabulary = rules["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return wrapped(Tokenizer.from_str(json.dumps(rules)), unk_token="<unk>", bos_token="<s>")


def lowercase() -> PreTrainedTokenizerBase:
    """As BERT's: lower case without accents, punctuation apart, spaces before it taken away when decoding."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]", "</s>", "<pad>"], vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer, unk_token="[UNK]", bos_token="</s>")


def dropping() -> PreTrainedTokenizerBase:
    """No token for what it does not know, not even an unknown one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(special_tokens=["</s>", "<pad>"], vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer)


def unknown_is_eos() -> PreTrainedTokenizerBase:
    vocabulary = {"</s>": 0, "<pad>": 1, "Is": 2, "it": 3, "?": 4, "\n": 5, "###": 6, "yes": 7, " ": 8}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|###|\?| "), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return with_markers(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))


MADE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "words": words,
    "sentencepiece": sentencepiece,
    "lowercase": lowercase,
    "dropping": dropping,
}


@pytest.fixture(params=MADE)
def tokenizer(request) -> PreTrainedTokenizerBase:
    return MADE[request.param]()


@pytest.fixture
def gpt2(shared) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(shared / "datasets" / "gpt2_tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    return with_markers(tokenizer)


def lines(records: list[dict], tokenizer: PreTrainedTokenizerBase, is_evaluated: bool = True) -> list[str]:
    examples = tokenize(records, tokenizer)
    demand_plain_text("f.json", examples, tokenizer)
    return doubts(DataSet("f.json", records), examples, tokenizer, is_evaluated)


# Text that is a token


def refused(record: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    with pytest.raises(DataError) as caught:
        lines([GOOD, record], tokenizer)
    return str(caught.value)


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("place", ["{}", "a {} b", "a{}", "{}b"])
def test_text_of_a_token_that_sequences_are_built_with_is_refused(tokenizer, key, place):
    for name in (*MARKERS, tokenizer.eos_token, tokenizer.pad_token):
        text = place.format(name)
        if reserved_in(text, tokenizer(text)["input_ids"], tokenizer) is None:
            # Markers are ordinary tokens, which some tokenizers find at the start of a word only.
            assert (name in MARKERS, place, tokenizer.bos_token) == (True, "a{}", "<s>")
            assert tokenizer.get_vocab()[name] not in tokenizer(text)["input_ids"]
            continue
        message = refused({**GOOD, key: ["b", text] if key == "steps" else text}, tokenizer)
        assert message.startswith(
            f"f.json: record 1: key {key!r} holds {name!r}, a token that sequences are built with"
        )
        assert reserved_in(text, tokenizer(text)["input_ids"], tokenizer) == name


@pytest.mark.shared
def test_text_of_a_token_of_gpt2_is_refused(gpt2):
    for name in (*MARKERS, "<|endoftext|>"):
        assert f"holds {name!r}" in refused({**GOOD, "question": f"a {name} b"}, gpt2)
        assert f"holds {name!r}" in refused({**GOOD, "answer": f"{name}b"}, gpt2)
    assert (
        lines([{**GOOD, "question": "<|latent |>", "answer": "<|LATENT|>", "steps": ["<| endoftext |>"]}], gpt2) == []
    )


def test_a_lowercase_tokenizer_finds_markers_in_capitals():
    assert "key 'question' holds '<|latent|>'" in refused({**GOOD, "question": "a <|LATENT|> b"}, lowercase())


def test_a_word_that_is_read_as_the_end_of_text_is_no_literal_end():
    tokenizer = unknown_is_eos()
    assert "record 1: key 'question' holds '</s>'" in refused({**GOOD, "question": "Is it </s> ?"}, tokenizer)
    found = lines([{"question": "Is Alex ?", "steps": ["no"], "answer": "yes"}], tokenizer)
    assert [line.split(" (first")[0] for line in found] == [
        "f.json: 1 of 1 answers cannot be read back from their own tokens, so that nothing a model writes is right",
        "f.json: 1 of 1 chains of steps cannot be read back from their own tokens and do not count as a chain match",
        "f.json: 1 of 1 records have words without a token, read as </s>",
    ]
    assert lines([{"question": "Is it ?", "steps": ["it"], "answer": "yes"}], tokenizer) == []


def test_what_a_chat_template_writes_may_stand_in_a_question_alone():
    tokenizer = words()
    tokenizer.chat_template = "{{ messages[0].content }}<|endoftext|>"
    assert lines([{**GOOD, "question": "Is Alex<|endoftext|>"}], tokenizer) == []
    assert "holds '<|endoftext|>'" in refused({**GOOD, "answer": "Alex<|endoftext|>"}, tokenizer)
    assert "holds '<|pad|>'" in refused({**GOOD, "question": "Is Alex<|pad|>"}, tokenizer)
    tokenizer.chat_template += "<|latent|>"
    assert "holds '<|latent|>'" in refused({**GOOD, "question": "Is Alex<|latent|>"}, tokenizer)


def test_a_bos_that_the_tokenizer_adds_is_not_the_records():
    tokenizer = sentencepiece()
    assert tokenize([GOOD], tokenizer)[0]["question_ids"][0] == tokenizer.bos_token_id
    assert lines([GOOD], tokenizer) == []
    assert "holds '<s>'" in refused({**GOOD, "question": "<s> Is Alex a bompus?"}, tokenizer)


# Text without a token


def test_a_question_or_answer_without_a_token_is_refused():
    for key in ("question", "answer"):
        message = refused({**GOOD, key: "\U0001f600"}, dropping())
        assert message == (
            f"f.json: record 1: key {key!r}: the tokenizer makes nothing of '\U0001f600'; use another model or leave "
            "the record out"
        )
    assert "record 1: key 'question': the tokenizer makes nothing of '\\u200b'" in refused(
        {**GOOD, "question": "\u200b"}, lowercase()
    )


def test_words_that_are_unknown_are_no_reason_to_refuse_a_set():
    tokenizer = with_markers(word_tokenizer(["Every"], 96))
    found = lines([{"question": "How?", "steps": ["So"], "answer": "6"}, {**GOOD, "question": "?"}], tokenizer)
    assert any("2 of 2 records have words without a token" in line for line in found)


@pytest.mark.parametrize("answer", ["#", "###", "# #", "###\n###"])
def test_an_answer_that_is_the_mark_itself_has_tokens(answer):
    demand_plain_text("f.json", tokenize([{**GOOD, "answer": answer}], words()), words())


def test_an_answer_of_commas_is_refused(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "answer": " ,, , "}]))
    with pytest.raises(
        DataError, match=r"record 1: key 'answer' has only commas, which the comparison leaves out: ' ,, "
    ):
        read_records(path)


# What cannot be read back

UNREAD = "answers cannot be read back from their own tokens, so that nothing a model writes is right"


def unread_answer(record: dict, tokenizer: PreTrainedTokenizerBase) -> str | None:
    found = [line for line in lines([GOOD, record], tokenizer) if UNREAD in line]
    return found[0].split("(first: record 1: ")[1].split("); ")[0] if found else None


@pytest.mark.parametrize(
    "answer",
    ["C# 8", "#", "###", "a ### b", "a\nb", " bompus ", "1,000", "F#, b", "bompus.", "a # b\nc"],
)
@pytest.mark.parametrize("make", [words, sentencepiece], ids=["words", "sentencepiece"])
def test_answers_are_read_back_from_their_own_tokens(make, answer):
    tokenizer = with_markers(word_tokenizer([*TEXTS, answer, "a\nb c"], 96)) if make is words else make()
    assert unread_answer({**GOOD, "answer": answer}, tokenizer) is None


@pytest.mark.shared
@pytest.mark.parametrize("answer", [*"#é５\U0001f600", "C# 8", "a ### b", "a\n\nb", "a  b", "a\tb ", "###", "Ω . x's"])
def test_gpt2_reads_back_every_answer(gpt2, answer):
    assert lines([{**GOOD, "answer": answer, "steps": [answer, f" {answer} "]}], gpt2) == []


@pytest.mark.parametrize(
    ("make", "answer", "said"),
    [
        (lowercase, "Alex", "'Alex' is read as 'alex'"),
        (lowercase, "é", "'é' is read as 'e'"),
        (lowercase, "a . b", "'a . b' is read as 'a. b'"),
        (lowercase, "C# a", "'C# a' is read as 'a'"),
        (lowercase, "1,000", "'1000' is read as '1 000'"),
        (dropping, "bompus \U0001f600", "'bompus \U0001f600' is read as 'bompus'"),
        (words, "zumpus", "'zumpus' is read as ''"),
        (words, "a\n### 5", "'a\\n### 5' is read as 'a\\n5'"),
        (sentencepiece, "a\n### b", "'a\\n### b' is read as 'b'"),
    ],
)
def test_an_answer_that_cannot_be_read_back_is_named_and_counted(make, answer, said):
    assert unread_answer({**GOOD, "answer": answer}, make()) == said


def test_a_training_set_is_read_back_from_its_text():
    (line,) = lines([GOOD, {**GOOD, "question": "a", "answer": "a\n### b"}] * 2, words(), is_evaluated=False)[:1]
    assert line.startswith(f"f.json: 2 of 4 {UNREAD} (first: record 1: 'a\\n### b' is read as 'b'); write them")


def test_chains_are_counted_apart_from_answers():
    records = [GOOD, {**GOOD, "question": "a", "steps": ["Alex is a b", "zumpus"]}, {**GOOD, "question": "b"}]
    found = lines(records, words())
    assert found[0].startswith(
        "f.json: 1 of 3 chains of steps cannot be read back from their own tokens and do not count as a chain match "
        "(first: record 1: 'Alex is a b\\nzumpus' is read as 'Alex is a b'); "
    )
    assert found[1].startswith(
        "f.json: 1 of 3 records have words without a token, read as <|unknown|> (first: record 1: "
    )
    assert "'zumpus'" in found[1]
    assert len(found) == 2


def test_a_command_without_a_table_names_records_by_their_index():
    (line,) = unread("f.json", [{**GOOD, "answer": "zumpus"}], words(), first=7)
    assert line.startswith(f"f.json: 1 of 1 {UNREAD} (first: record 7: 'zumpus' is read as ''); ")


# What a set says twice


def test_steps_that_say_nothing_are_counted():
    records = [{**GOOD, "question": text} for text in "abc"]
    (line,) = doubts(DataSet("f.json", records, (1, 2)), tokenize(records, words()), words(), is_evaluated=False)
    assert line == (
        "f.json: 2 of 3 records have steps that are empty or only spaces (first: record 1); they are left out, and "
        "nothing is trained on them"
    )


def test_chains_far_longer_than_the_curriculum_are_counted():
    records = [{**GOOD, "steps": ["a"] * count} for count in (3, 5, 9)]
    (line,) = long_chains(DataSet("f.json", records), 2)
    assert line.startswith(
        "f.json: 2 of 3 records have more than twice as many steps as max_latent_stage, 2 (first: record 1: 5); "
    )
    assert long_chains(DataSet("f.json", records), 3) == long_chains(DataSet("f.json", records), 0) == []


def test_records_that_repeat_or_contradict_another_are_counted():
    other = {**GOOD, "question": "a"}
    records = [GOOD, other, GOOD, {**other, "answer": "Alex"}, {**other, "steps": ["another way"]}, GOOD]
    found = lines([{**each, "steps": each["steps"][:1]} for each in records], words())
    found = [line for line in found if "tokens" not in line]
    assert found[1:] == [
        "f.json: 2 of 6 records repeat another one (first: record 2 is record 0); leave them out",
        "f.json: 1 of 6 records have the question of another one and another answer (first: record 3 and record 1); at "
        "most one of them can be right",
    ]


def test_questions_of_two_sets_are_counted():
    records = [{**GOOD, "question": text} for text in "abcd"]
    others = DataSet("train.json", [GOOD, records[0], records[2], records[3]])
    (line,) = shared_questions(DataSet("valid.json", records[1:]), others)
    assert line == (
        "valid.json: 2 of 3 questions stand in train.json, too (first: record 1); leave them out of one, or the "
        "accuracy says nothing about new questions"
    )
    assert shared_questions(DataSet("valid.json", records), DataSet("train.json", [GOOD])) == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["1,5", "15"], "record 1: '15' and record 0: '1,5'"),
        (["a b", "a, b"], "record 1: 'a, b' and record 0: 'a b'"),
        (["1,000", "1000", "12,345,678", "12345678"], None),
        (["a", " a "], None),
        (["5", "5"], None),
    ],
)
def test_answers_that_differ_by_commas_alone_are_counted(answers, said):
    records = [{"question": text, "steps": [], "answer": answer} for text, answer in zip("abcd", answers)]
    tokenizer = word_tokenizer(["a b c d", *answers], 96)
    found = [line for line in lines(records, tokenizer) if "commas" in line]
    assert [line.split("(first: ")[1].split("); ")[0] for line in found] == ([said] if said else [])
    assert lines(records, tokenizer, is_evaluated=False) == []


# Clean sets


@pytest.mark.parametrize("form", prosqa.FORMS)
def test_of_generated_sets_nothing_is_said(form):
    train, valid = (list(prosqa.generate(count, f"0/{split}", form=form)) for split, count in (("a", 200), ("b", 40)))
    texts = (text for record in train for text in (record["question"], *record["steps"], record["answer"]))
    tokenizer = with_markers(word_tokenizer(texts, 1024))
    assert lines(train, tokenizer, is_evaluated=False) == []
    # A pair of nodes may be new in the form of one word an edge.
    assert form == "edges" or lines(valid, tokenizer) == []
    assert shared_questions(DataSet("valid.json", valid), DataSet("train.json", train)) == []


@pytest.mark.shared
def test_of_published_sets_nothing_is_said(shared, gpt2):
    records = json.loads((shared / "datasets" / "prosqa_valid.json").read_text())
    assert lines(records, gpt2) == lines(records, gpt2, is_evaluated=False) == []
    text = (shared / "datasets" / "gsm8k_aug_valid.txt").read_text()
    parts = [(*line.split("||"),) for line in text.splitlines()]
    records = [
        {"question": question, "steps": rest.split("####")[0].split(), "answer": rest.split("####")[1].strip()}
        for question, rest in parts
    ]
    assert lines(records, gpt2) == []
    assert lines(list(prontoqa_generator.generate(50, "0", hops=5)), gpt2) == []


def test_rows_are_right_in_sets_of_many_chunks():
    draw = random.Random(0)
    records = [{**GOOD, "question": f"{number}", "steps": [] if number % 2 else ["a"]} for number in range(2500)]
    marked = draw.randrange(1500, 2500)
    records[marked] = {**records[marked], "steps": ["a", "<|latent|>"]}
    with pytest.raises(DataError, match=f"record {marked}: key 'steps' holds"):
        lines(records, words())
