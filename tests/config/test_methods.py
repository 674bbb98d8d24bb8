"""Every method's layout: the worked example of docs/METHODS.md made from the code, schedules, and training for real."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import launching
import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.methods import METHODS, Method
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import IcotConfig
from coconut_ds.data.batches import (
    Tokens,
    collate_prompts,
    collate_training,
    prompt_sequence,
    shuffle_facts,
    training_sequence,
)
from coconut_ds.data.loaders import TrainingSteps
from coconut_ds.data.records import check_lengths, longest_prompt, tokenize
from coconut_ds.data.stages import Curriculum, Layout
from coconut_ds.model.backbone import add_markers
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer
from coconut_ds.training.setup import _tokens
from coconut_ds.training.step import LOSSES

EXAMPLE = {"question": "a b | b c | c d | ? a d e", "steps": ["a b", "b c", "c d"], "answer": "d"}
LINE = re.compile(r"\| `(\w+)` \| (\d) \| `(.+)` \|")
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "METHODS.md").read_text(encoding="utf-8")
DOCUMENTED = [(method, int(stage), text) for method, stage, text in LINE.findall(DOCUMENT)]
OF_REVERSED = re.compile(r"\| `(\w+)`, reversed \| (\d) \| `(.+)` \|")
REVERSED = [(method, int(stage), text) for method, stage, text in OF_REVERSED.findall(DOCUMENT)]


def config_of(method: Method) -> RunConfig:
    icot = IcotConfig(tokens_per_stage=4, smoothing=None) if method == "icot" else None
    return RunConfig(method=method, max_latent_stage=2, pad_latent_to_max=True, icot=icot)


@pytest.fixture(scope="module")
def backbone():
    backbone = scratch_backbone(
        "gpt2",
        word_tokenizer([EXAMPLE["question"], *EXAMPLE["steps"]], 64),
        n_layer=1,
        n_embd=8,
        n_head=1,
        n_positions=64,
        dropout=0.0,
    )
    add_markers(backbone)
    return backbone


def test_every_method_is_documented():
    assert {method for method, _, _ in DOCUMENTED} == set(METHODS) == set(get_args(Method))
    assert len(REVERSED) == 5
    for method in METHODS:
        assert f"| `{method}` | `Q" in DOCUMENT, "in the table of formulas"


@pytest.mark.parametrize(("method", "stage", "text"), DOCUMENTED)
def test_the_documented_sequences_are_what_the_code_makes(backbone, method, stage, text):
    config = config_of(method)
    curriculum, tokens = Curriculum.of(config), _tokens(config, backbone)
    assert stage in {curriculum.stage(epoch) for epoch in range(4)}
    row = tokenize([EXAMPLE], backbone.tokenizer)[0]
    layout = curriculum.layout(stage, 3)
    sequence = training_sequence(row, layout, tokens)
    ours = written(backbone, config, row, sequence.ids, sequence.first_target)
    if sequence.taught is not None:
        teacher = written(backbone, config, row, sequence.taught.ids, sequence.taught.first_target)
        ours = f"{ours}`, its teacher `{teacher}"
    assert ours == text
    # An epoch has the layout of its stage when it begins.
    epoch = next(epoch for epoch in range(4) if curriculum.stage(epoch) == stage)
    assert training_sequence(row, curriculum.training_layout(3, epoch, index=0), tokens) == sequence
    assert layout in curriculum.layouts(3) or method == "icot"
    prompt = prompt_sequence(row, curriculum.prompt_layout(stage, 3), tokens)
    assert prompt.ids == sequence.ids[: sequence.first_target]
    labels = collate_training([sequence], [0], tokens.pad).inputs["labels"][0]
    assert labels.tolist() == [-100] * sequence.first_target + sequence.ids[sequence.first_target :]


@pytest.mark.parametrize(("method", "stage", "text"), REVERSED)
def test_the_documented_sequences_of_a_reversed_curriculum(backbone, method, stage, text):
    """Steps that stand before the thoughts are supervised, too; `->` stands before all that is after the thoughts."""
    config = config_of(method).model_copy(update={"curriculum": "reversed"})
    curriculum, tokens = Curriculum.of(config), _tokens(config, backbone)
    row = tokenize([EXAMPLE], backbone.tokenizer)[0]
    sequence = training_sequence(row, curriculum.layout(stage, 3), tokens)
    assert written(backbone, config, row, sequence.ids, sequence.first_target) == text
    prompt = prompt_sequence(row, curriculum.prompt_layout(stage, 3), tokens)
    assert prompt.ids == sequence.ids[: sequence.first_target]
    batch = collate_training([sequence], [0], tokens.pad)
    supervised = [sequence.ids[column] for column, label in enumerate(batch.inputs["labels"][0]) if label != -100]
    markers = {tokens.latent, tokens.start_latent, tokens.end_latent}
    assert supervised == [token for token in sequence.ids[len(row["question_ids"]) :] if token not in markers]
    assert batch.n_targets == len(supervised)


def written(backbone, config, row, ids: list[int], first_target: int) -> str:
    n_question = len(row["question_ids"])
    assert ids[:n_question] == row["question_ids"]
    latent = "p" if config.traits.thoughts == "pause" else "t"
    spelled = {"<|start-latent|>": "[start]", "<|end-latent|>": "[end]", "<|latent|>": latent, "\n": "/"}
    spelled["<|endoftext|>"] = "[eos]"
    words = [token.lstrip("▁") for token in backbone.tokenizer.convert_ids_to_tokens(ids)]
    words = [spelled.get(word, word) for word in words]
    return " ".join(["Q", *words[n_question:first_target], "->", *words[first_target:]])


def test_pauses_are_ordinary_tokens(backbone):
    config = config_of("pause_as_thought")
    tokens = _tokens(config, backbone)
    assert tokens.thought is None
    assert _tokens(config_of("coconut"), backbone).thought == tokens.latent
    row = tokenize([EXAMPLE], backbone.tokenizer)[0]
    rows = [training_sequence(row, Layout(1, 2), tokens), training_sequence(row, Layout(0, 0), tokens)]
    batch = collate_training(rows, [0, 1], tokens.pad)
    assert batch.inputs["thought_span"] == (), "one pass"
    assert batch.inputs["attention_mask"][:, 0].tolist() == [1, 1], "nothing to align"
    assert collate_prompts([prompt_sequence(row, Layout(0, 2), tokens)], [0], tokens.pad).inputs["thought_span"] == ()


def test_a_stage_of_a_method_without_curriculum_never_changes(curriculum):
    for method in ("pause", "no_curriculum", "codi"):
        plan = curriculum(method=method, max_latent_stage=6)
        assert {plan.stage(epoch) for epoch in range(100)} == {7}
        assert plan.layout(7, 4) == Layout(4, 6)
        assert plan.layouts(4) == {Layout(4, 6)}
        few = curriculum(method=method, pad_latent_to_max=False, thoughts_per_step=2)
        assert few.layout(7, 4) == Layout(4, 8)
        assert few.prompt_thoughts(7, 4) == 8


def icot(**changes) -> Curriculum:
    return Curriculum("icot", 0, 1, 0, True, 0.0, 0, IcotConfig(**changes))


def test_icot_removes_token_after_token():
    plan = icot(tokens_per_stage=8, smoothing=None, all_beyond=None)
    removed = [plan.training_layout(5, 3, 0, progress).n_drop for progress in (0, 0.12, 0.125, 0.5, 0.999)]
    assert removed == [24, 24, 25, 28, 31]
    slow = Curriculum("icot", 0, 4, 0, True, 0.0, 0, IcotConfig(tokens_per_stage=8, smoothing=None))
    assert [slow.training_layout(5, epoch, 0).n_drop for epoch in range(6)] == [0, 2, 4, 6, 8, 10]
    assert [slow.stage(epoch) for epoch in (0, 3, 4)] == [0, 0, 1]
    assert slow.layout(1, 5).n_drop == 8


def test_icot_drops_the_whole_chain_beyond_a_limit():
    plan = icot(tokens_per_stage=8, smoothing=0.1, all_beyond=39)
    extra = [plan.training_layout(5, 4, index, 0.87).n_drop - 38 for index in range(50)]
    assert min(extra) == 0
    assert 2 < max(extra) < 100, "the draw does not count"
    assert {plan.training_layout(5, 4, index, 0.88).n_drop > 1000 for index in range(50)} == {True}
    row = {"question_ids": [5], "steps_ids": [[6] * 300, [7] * 300], "answer_ids": [8, 1]}
    assert training_sequence(row, plan.training_layout(2, 5, 0), Tokens(0)).ids == [5, 8, 1]
    assert training_sequence(row, plan.layout(5, 2), Tokens(0)).ids == [5, 8, 1]


def test_icot_smoothing_is_geometric_and_depends_on_seed_epoch_and_index_alone():
    plan = icot(tokens_per_stage=1, smoothing=0.7, all_beyond=None)
    drawn = [plan.training_layout(5, 2, index, 0.5).n_drop - 2 for index in range(5000)]
    assert drawn == [plan.training_layout(5, 2, index, 0.5).n_drop - 2 for index in range(5000)]
    assert drawn != [plan.training_layout(5, 3, index).n_drop - 3 for index in range(5000)]
    shares = Counter(drawn)
    # P(o) = (1 - e^-0.7) e^-0.7 o: 0.503, 0.250, 0.124; three standard errors of 5000 draws are below 0.022.
    for extra, share in enumerate((0.503, 0.250, 0.124)):
        assert shares[extra] / 5000 == pytest.approx(share, abs=0.022)


def test_icot_follows_the_steps_of_an_epoch():
    rows = Dataset.from_list([tiny.row(3, [4, 4], 2, index) for index in range(40)])
    windows = TrainingSteps(rows, icot(tokens_per_stage=8, smoothing=None), Tokens(0), BatchSizes(4, 1, 1), 0, 0)
    lengths = [{len(ids[mask.bool()]) for ids, mask in zip(*_rows(windows[index][0]))} for index in range(10)]
    # 3 of the question, 8 of the steps less those removed, 3 of the answer with its end.
    assert lengths == [{14 - (8 * index) // 10} for index in range(10)]


def _rows(batch):
    return batch.inputs["input_ids"], batch.inputs["attention_mask"]


@pytest.mark.parametrize(
    ("method", "order"),
    [*((method, "forward") for method in METHODS), ("coconut", "reversed"), ("no_thoughts", "reversed")],
)
def test_lengths_are_those_of_the_method(backbone, method, order):
    config = config_of(method).model_copy(update={"curriculum": order})
    curriculum = Curriculum.of(config)
    examples = tokenize([EXAMPLE], backbone.tokenizer)
    tokens, row = _tokens(config, backbone), examples[0]
    layouts = [curriculum.layout(curriculum.stage(epoch), 3) for epoch in range(5)]
    longest = max(len(training_sequence(row, layout, tokens).ids) for layout in layouts)
    check_lengths("some.json", examples, curriculum, longest, 1)
    with pytest.raises(ValueError, match=f"{longest} tokens with thoughts and answer"):
        check_lengths("some.json", examples, curriculum, longest - 1, 1)
    prompts = [curriculum.prompt_layout(curriculum.stage(epoch), 3) for epoch in range(5)]
    prompt = max(len(prompt_sequence(row, each, tokens).ids) for each in prompts)
    assert longest_prompt(examples, curriculum) == prompt
    check_lengths("some.json", examples, curriculum, prompt + 100, 100)
    with pytest.raises(ValueError, match=f"a prompt of {prompt} tokens and max_new_tokens 100 need {prompt + 100} pos"):
        check_lengths("some.json", examples, curriculum, prompt + 99, 100)


def test_facts_are_shuffled_and_nothing_else(backbone):
    row = tokenize([EXAMPLE], backbone.tokenizer)[0]
    ids = row["question_ids"]
    (end,) = backbone.tokenizer("|", add_special_tokens=False)["input_ids"]
    tokens = Tokens(0, fact_end=end, bos=backbone.tokenizer.bos_token_id)
    texts = {
        backbone.tokenizer.decode(shuffle_facts(ids, tokens, random.Random(seed))).replace("\n", "")
        for seed in range(60)
    }
    facts = {" ".join(sorted(re.findall(r"\w \w \|", text))) for text in texts}
    assert len(texts) == 6, "every order of three facts"
    assert facts == {"a b | b c | c d |"}
    assert {text[text.index("?") :] for text in texts} == {"? a d e"}
    assert shuffle_facts([5, 6], tokens, random.Random(0)) == [5, 6]


def test_a_token_before_the_question_stays_there():
    tokens = Tokens(0, fact_end=7, bos=1)
    orders = {tuple(shuffle_facts([1, 10, 7, 11, 7, 20], tokens, random.Random(seed))) for seed in range(20)}
    assert orders == {(1, 10, 7, 11, 7, 20), (1, 11, 7, 10, 7, 20)}


def test_facts_stand_in_another_order_every_epoch():
    rows = Dataset.from_list(
        [{"question_ids": [10, 7, 11, 7, 12, 7, 13, 7, 20], "steps_ids": [[9]], "answer_ids": [8, 1]}] * 8
    )
    tokens = Tokens(0, fact_end=7)

    def epoch(number: int) -> list[list[int]]:
        plan = Curriculum("cot", 0, 1, 0, True, 0.0, 0)
        (batch,) = TrainingSteps(rows, plan, tokens, BatchSizes(8, 1, 1), 0, number)[0]
        order = sorted(range(8), key=lambda place: batch.indices[place])
        return batch.inputs["input_ids"][order].tolist()

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    for row in epoch(0) + epoch(1):
        assert sorted(row[:8]) == [7, 7, 7, 7, 10, 11, 12, 13]
        assert row[8:] == [20, 9, 8, 1]


def run_of(method: Method, folder: Path) -> dict:
    run = tiny.run(folder) | {"method": method, "num_epochs": 4, "batch_size_training": 4, "max_new_tokens": 3}
    del run["coconut"]
    return run | {"save_path": str(folder / "runs"), "name": method, "deepspeed": "ds_configs/zero2.json"}


def trained(runs: list[dict], folder: Path) -> None:
    """Let two ranks do one run after the other, in one process each."""
    files = [str(launching.write_run(run, folder / str(number))) for number, run in enumerate(runs)]
    code = "from coconut_ds import train\nfrom coconut_ds.config.run_file import load_run_config\n"
    code += "for file in files:\n    train.run(load_run_config(file), train.parse_arguments(['--run', file]))\n"
    launching.on_ranks(2, code + "result = None", files=files)


MORE = {
    "pause_as_thought": {"curriculum": "reversed", "supervision": {"mixture": {"verbal": 0.5, "direct": 0.5}}},
}
TRAINED: tuple[Method, ...] = ("pause", "pause_as_thought", "icot", "no_curriculum", "codi")


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory) -> Path:
    """Run folders of methods, each trained for four epochs and then evaluated."""
    folder = tmp_path_factory.mktemp("methods")
    runs = []
    for method in TRAINED:
        run = run_of(method, folder) | {"shuffle_facts": "|"} | MORE.get(method, {})
        checkpoint = folder / "runs" / method / "checkpoints" / "epoch_0004"
        runs += [run, run | {"only_eval": True, "load_model_path": str(checkpoint)}]
    trained(runs, folder)
    return folder / "runs"


@pytest.mark.ranks
@pytest.mark.parametrize("method", TRAINED)
def test_each_method_trains_saves_and_is_evaluated(method, runs_folder):
    folder = runs_folder / method
    losses = [event["loss"] for event in launching.events(folder, "train_step")]
    assert len(losses) == len(set(losses)) == 4
    stages = {"icot": [0, 1, 2, 3], "pause_as_thought": [0, 1, 2, 3]}.get(method, [3] * 4)
    assert [event["stage"] for event in launching.events(folder, "eval")] == stages
    assert launching.events(folder, "end") == [{"event": "end", "epochs": 4, "step": 4}]
    again = (folder / "predictions" / "eval_prosqa_valid.jsonl").read_text()
    assert again == (folder / "predictions" / "epoch_0004.jsonl").read_text()
    recorded = [{name for name in LOSSES if name in event} for event in launching.events(folder, "train_step")]
    of_method = {"codi": {"verbal_loss", "distance"}, "pause_as_thought": {"verbal_loss", "direct_loss"}}
    assert recorded == [{"loss"} | of_method.get(method, set())] * 4
    n_thoughts = '"n_thoughts": 2' if method in ("no_curriculum", "codi") else '"n_thoughts": 0'
    assert again.count(n_thoughts) == 4


@pytest.mark.ranks
def test_a_learned_window_is_saved_restored_and_evaluated(tmp_path):
    run = run_of("coconut", tmp_path) | {"lr": 0.05, "latent_norm": "embedding", "name": "whole"}
    run["latent_context"] = {"weights": "exponential", "window": 3, "learned": True}
    supervision = {"steps": {"weight": 0.5, "decoder": "copy"}, "distill": {"gamma": 2.0, "layers": [1]}}
    run |= {"supervision": supervision, "solver": {"iterations": 2}}
    folder = tmp_path / "runs" / "whole"
    checkpoint = folder / "checkpoints" / "epoch_0004"
    # The second run stops after two epochs and goes on: its window goes on from where it was.
    parts = run | {"name": "parts"}
    evaluation = run | {"only_eval": True, "load_model_path": str(checkpoint)}
    trained([run, parts | {"num_epochs": 2}, parts, evaluation, evaluation | {"eval_thoughts": 5}], tmp_path)
    learned = [event["latent_weights"] for event in launching.events(folder, "eval")]
    assert learned[0] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=1e-3), "in stage 0 nothing but decay moves it"
    assert max(abs(a - b) for a, b in zip(learned[0], learned[-1])) > 0.01
    assert sum(learned[-1]) == pytest.approx(1)
    assert learned == [event["latent_weights"] for event in launching.events(tmp_path / "runs" / "parts", "eval")]
    losses = [
        [[event.get(loss) for loss in LOSSES] for event in launching.events(tmp_path / "runs" / name, "train_step")]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert [of_steps is None for _, of_steps, *_ in losses[0]] == [True, False, False, False]
    assert all((None in others) is False for _, _, *others, _ in losses[0])
    assert (checkpoint / "step_decoder.safetensors").is_file()
    assert not list((checkpoint / "model").glob("step_decoder*"))
    predictions = folder / "predictions"
    assert (predictions / "eval_prosqa_valid.jsonl").read_text() == (predictions / "epoch_0004.jsonl").read_text()
    longer = (predictions / "eval_prosqa_valid_with_5_thoughts.jsonl").read_text()
    assert longer.count('"n_thoughts": 5,') == longer.count("\n") == 4
    stored = load_file(checkpoint / "model" / "latent_window.safetensors")
    assert stored["latent_window.logits"].softmax(dim=0).tolist() == pytest.approx(learned[-1], rel=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint / "model", output_loading_info=True)[1]
    assert not plain["unexpected_keys"], "the window is no weight of the backbone"


def test_markers_and_pauses_have_embeddings_that_learn(backbone):
    config = config_of("pause")
    model_ids = _tokens(config, backbone)
    assert (model_ids.start_latent, model_ids.end_latent) == (None, None)
    assert model_ids.latent == backbone.marker_ids()["<|latent|>"]
    weight = backbone.model.get_input_embeddings().weight
    row = tokenize([EXAMPLE], backbone.tokenizer)[0]
    batch = collate_training([training_sequence(row, Layout(3, 2), model_ids)], [0], model_ids.pad)
    inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask", "labels")}
    backbone.model(**inputs).loss.backward()
    assert torch.isfinite(weight.grad).all()
    assert weight.grad[model_ids.latent].norm() > 0
    weight.grad = None
