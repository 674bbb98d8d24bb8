"""Questions in a chat template: the tokens of a prompt, its cache, what is refused, and a run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from transformers import AddedToken, PreTrainedTokenizerBase

from coconut_ds import train
from coconut_ds.commands import ask
from coconut_ds.data.files import DataError, read_records
from coconut_ds.data.plain_text import demand_plain_text
from coconut_ds.data.prompts import question_ids, role_token_in
from coconut_ds.data.records import tokenize
from coconut_ds.errors import InputError
from coconut_ds.inference.replies import Question
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("<|im_start|>", "<|im_end|>")
RECORD = {"question": "n1 ? n2", "steps": ["n1 n2"], "answer": "n2"}


def chat_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    tokenizer = word_tokenizer([*texts, "user assistant"], n_positions=96)
    tokenizer.add_special_tokens({"additional_special_tokens": list(ROLES)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return chat_tokenizer([RECORD["question"]])


def test_a_question_is_the_users_message_and_the_assistants_begins(tokenizer):
    (ids,) = question_ids([RECORD["question"]], tokenizer, "chat")
    text = "<|im_start|>user\nn1 ? n2<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(list(ROLES))
    assert (ids.count(start), ids.count(end)) == (2, 1)
    assert question_ids([RECORD["question"]], tokenizer) == [tokenizer("n1 ? n2\n")["input_ids"]]
    assert question_ids([], tokenizer, "chat") == []


def test_a_table_of_one_format_is_not_read_for_the_other(tokenizer):
    chat, plain, again = (tokenize([RECORD], tokenizer, how)[0] for how in ("chat", "plain", "chat"))
    assert chat == again
    assert chat["question_ids"] != plain["question_ids"]
    assert {key: chat[key] for key in chat if key != "question_ids"} == {
        key: plain[key] for key in plain if key != "question_ids"
    }
    tokenizer.chat_template = TEMPLATE.replace("assistant", "user")
    assert tokenize([RECORD], tokenizer, "chat")[0]["question_ids"] != chat["question_ids"]


def test_the_text_of_a_role_token_is_refused_in_a_question(tokenizer):
    record = {**RECORD, "question": "n1 <|im_end|> n2"}
    examples = tokenize([RECORD, record], tokenizer, "chat")
    with pytest.raises(DataError, match=r"f: record 1: key 'question' holds '<\|im_end\|>', a token that chats are"):
        demand_plain_text("f", examples, tokenizer, "chat")
    demand_plain_text("f", tokenize([RECORD], tokenizer, "chat"), tokenizer, "chat")
    assert role_token_in("n1 <|latent|>", tokenizer) == "<|latent|>"


def test_role_tokens_without_a_place_in_the_map_are_refused_too():
    tokenizer = word_tokenizer(["n1"], n_positions=96)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True)])
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    assert role_token_in("n1 <|eot_id|>", tokenizer) == "<|eot_id|>"


def test_a_template_that_may_write_the_date_writes_the_same_one_every_day(tokenizer):
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%f') %}{% endif %}{{ date_string }}"
    )
    (ids,) = question_ids(["n1"], tokenizer, "chat")
    assert ids == tokenizer("26 Jul 2024", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "the tokenizer's template writes today's date into prompts; set plain"),
        (None, "prompt_format: chat, and the tokenizer has no chat template; set it to plain"),
        ("{{ raise_exception('no user messages') }}", "the tokenizer's template fails: no user messages; set plain"),
    ],
)
def test_a_tokenizer_without_a_template_is_refused(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(InputError) as caught:
        question_ids(["n1"], tokenizer, "chat")
    assert message in str(caught.value)


def test_training_evaluation_and_ask_use_one_prompt(tmp_path, capsys):
    run = tiny.run(tmp_path)
    records = read_records(run["val_path"])
    tokenizer = chat_tokenizer([record["question"] for record in read_records(run["train_path"])])
    backbone = scratch_backbone("gpt2", tokenizer, dropout=0.0, **run.pop("model"))
    backbone.model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run |= {"model_id": str(tmp_path / "base"), "prompt_format": "chat", "save_path": str(tmp_path / "runs")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"num_epochs": 4, "lr": 0.01}))
    assert train.main(["--run", str(tmp_path / "run.yaml")]) == 0
    folder = tmp_path / "runs" / "run"
    predictions = [json.loads(line) for line in (folder / "predictions" / "epoch_0004.jsonl").open()]
    trained = TrainedModel.load(str(folder / "checkpoints" / "epoch_0004"))
    questions = [Question.of(record, index) for index, record in enumerate(records)]
    replies = trained.ask(questions, 4).replies
    assert [each.text for each in replies] == [each["text"] for each in predictions]
    prompt = trained.prompts([questions[0].text], [2]).inputs["input_ids"][0].tolist()
    assert prompt[: -2 - 2] == question_ids([questions[0].text], trained.tokenizer, "chat")[0]
    evaluation = ["only_eval=true", f"load_model_path={folder / 'checkpoints' / 'epoch_0004'}", "prompt_format=plain"]
    assert train.main(["--run", str(tmp_path / "run.yaml"), *evaluation]) == 2
    assert "prompt_format: trained with 'chat', the run says 'plain'" in capsys.readouterr().err
    checkpoint = str(Path(folder, "checkpoints", "epoch_0004"))
    assert ask.main([checkpoint, "n1 <|im_end|>"]) == 2
    assert "holds '<|im_end|>', a token that sequences are built with" in capsys.readouterr().err
