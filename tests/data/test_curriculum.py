"""Stages, layouts, batches and loaders against the rules of DESIGN section 4."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from coconut_ds import LatentContext
from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.data.batches import Size, Tokens, collate_prompts, collate_training, prompt_sequence, training_sequence
from coconut_ds.data.files import read_records
from coconut_ds.data.loaders import TrainingSteps, loss_loader, prompt_loader, training_loader
from coconut_ds.data.records import tokenize
from coconut_ds.data.stages import Layout
from coconut_ds.data.step_targets import texts_of_groups

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
PLAIN = Tokens(tiny.PAD)


def test_stage_grows_every_epochs_per_stage(curriculum):
    assert [curriculum(epochs_per_stage=2).stage(epoch) for epoch in range(6)] == [0, 0, 1, 1, 2, 2]
    longer = curriculum(epochs_per_stage=(3, 1, 2))
    assert [longer.stage(epoch) for epoch in range(9)] == [0, 0, 0, 1, 2, 2, 3, 3, 4]
    assert curriculum(method="cot").stage(40) == curriculum(method="no_cot").stage(40) == 0
    assert curriculum(method="no_thoughts", epochs_per_stage=2).stage(4) == 2


@pytest.mark.parametrize(
    ("changes", "stage", "n_steps", "expected"),
    [
        ({}, 0, 4, Layout(0, 0)),
        ({}, 2, 4, Layout(2, 2)),
        ({}, 6, 4, Layout(4, 6)),
        ({}, 7, 4, Layout(4, 6)),
        ({"pad_latent_to_max": False}, 7, 4, Layout(4, 4)),
        ({"pad_latent_to_max": False, "max_latent_stage": 3}, 4, 5, Layout(5, 3)),
        ({"max_latent_stage": 3}, 3, 5, Layout(3, 3)),
        ({"thoughts_per_step": 2, "max_latent_stage": 2}, 2, 5, Layout(2, 4)),
        ({"thoughts_per_step": 2, "max_latent_stage": 2, "pad_latent_to_max": False}, 9, 1, Layout(1, 2)),
        ({"eval_thoughts": 9}, 2, 4, Layout(2, 9)),
        ({"eval_thoughts": 9}, 7, 4, Layout(4, 9)),
        ({"method": "no_cot", "thoughts_per_step": 0}, 0, 4, Layout(4, 0)),
        ({"method": "cot", "thoughts_per_step": 0}, 0, 4, Layout(0, 0)),
        ({"method": "no_thoughts", "thoughts_per_step": 0}, 2, 4, Layout(2, 0)),
    ],
)
def test_layouts(curriculum, changes, stage, n_steps, expected):
    assert curriculum(**changes).layout(stage, n_steps) == expected


@pytest.mark.parametrize(
    ("changes", "stage", "n_steps", "expected"),
    [
        ({}, 2, 4, 2),
        ({}, 9, 4, 6),
        ({"pad_latent_to_max": False}, 9, 4, 4),
        ({"pad_latent_to_max": False}, 5, 4, 4),
        ({"pad_latent_to_max": False, "thoughts_per_step": 2}, 3, 2, 4),
        ({"eval_thoughts": 9}, 2, 4, 9),
    ],
)
def test_prompt_thoughts(curriculum, changes, stage, n_steps, expected):
    assert curriculum(**changes).prompt_thoughts(stage, n_steps) == expected


def test_uniform_draws_depend_on_seed_epoch_and_index_alone(curriculum):
    mixed = curriculum(uniform_prob=0.5, max_latent_stage=3, epochs_per_stage=2)
    draws = [mixed.training_layout(4, epoch=7, index=index) for index in range(4000)]
    assert draws == [mixed.training_layout(4, epoch=7, index=index) for index in range(4000)]
    assert draws != [mixed.training_layout(4, epoch=6, index=index) for index in range(4000)]
    shares = Counter(draws)
    # Half keep stage 3; the other half is spread evenly over the stages 0 to 4.
    assert shares[Layout(3, 3)] / 4000 == pytest.approx(0.6, abs=0.03)
    for other in (Layout(0, 0), Layout(1, 1), Layout(2, 2), Layout(4, 3)):
        assert shares[other] / 4000 == pytest.approx(0.1, abs=0.02)


def test_training_sequence_is_supervised_after_the_markers():
    row = {"question_ids": [10, 11], "steps_ids": [[12, 13], [14], [15]], "answer_ids": [16, tiny.EOS]}
    sequence = training_sequence(row, Layout(1, 2), TOKENS)
    assert sequence.ids == [10, 11, tiny.START, tiny.LATENT, tiny.LATENT, tiny.END, 14, 15, 16, tiny.EOS]
    batch = collate_training([sequence], [0], tiny.PAD)
    assert batch.inputs["labels"][0].tolist() == [-100] * 6 + [14, 15, 16, tiny.EOS]
    assert batch.inputs["thought_span"] == (3, 5)
    assert batch.n_targets == 4
    plain = training_sequence(row, Layout(1, 0), PLAIN)
    assert plain.ids == [10, 11, 14, 15, 16, tiny.EOS]
    assert prompt_sequence(row, Layout(0, 2), TOKENS).ids == [10, 11, tiny.START, tiny.LATENT, tiny.LATENT, tiny.END]
    assert prompt_sequence(row, Layout(0, 0), PLAIN).ids == [10, 11]


def test_a_reversed_curriculum_replaces_the_last_steps_first(curriculum):
    plan = curriculum(max_latent_stage=2, thoughts_per_step=2, curriculum="reversed")
    layouts = [plan.layout(stage, 3) for stage in range(4)]
    steps = ["a", "b", "c"]
    found = [tuple(map("".join, (each.before(steps), each.replaced(steps), each.after(steps)))) for each in layouts]
    assert found == [("", "", "abc"), ("ab", "c", ""), ("a", "bc", ""), ("", "abc", "")]
    assert [each.n_thoughts for each in layouts] == [0, 2, 4, 4]
    assert plan.layout(2, 1) == Layout(1, 4)
    other = replace(plan, eval_thoughts=1)
    assert [other.layout(stage, 3).before(steps) for stage in range(4)] == [[], ["a", "b"], ["a"], []]
    without = curriculum(method="no_thoughts", thoughts_per_step=0, curriculum="reversed")
    assert without.layout(1, 3).after(steps) == ["a", "b"]


def test_thoughts_of_a_reversed_curriculum_write_the_steps_they_stand_for(curriculum):
    row = {"question_ids": [5], "steps_ids": [[10], [11], [12]], "answer_ids": [14, tiny.EOS]}
    layout = curriculum(max_latent_stage=3, curriculum="reversed").layout(2, 3)
    assert texts_of_groups(row, layout, tiny.EOS) == ((11, tiny.EOS), (12, tiny.EOS))


def test_first_thoughts_stand_in_one_column_and_rows_without_any_are_not_moved():
    rows = [tiny.row(count, [3, 3], 2, seed) for seed, count in enumerate((4, 9, 6))]
    layouts = [Layout(1, 1), Layout(2, 3), Layout(0, 0)]
    sequences = [training_sequence(row, layout, TOKENS) for row, layout in zip(rows, layouts)]
    inputs = collate_training(sequences, [0, 1, 2], tiny.PAD).inputs
    thoughts = inputs["input_ids"] == tiny.LATENT
    assert thoughts.int().argmax(dim=1)[:2].tolist() == [10, 10]
    assert inputs["thought_span"] == (10, 13)
    assert inputs["attention_mask"].argmax(dim=1).tolist() == [5, 0, 0]
    padding = inputs["attention_mask"] == 0
    assert (inputs["labels"][padding] == -100).all()
    assert (inputs["position_ids"][padding] == 0).all()
    for ids, mask, positions, sequence in zip(*(inputs[key] for key in _TENSORS), sequences):
        assert ids[mask.bool()].tolist() == sequence.ids
        assert positions[mask.bool()].tolist() == list(range(len(sequence.ids)))


_TENSORS = ("input_ids", "attention_mask", "position_ids")


def test_prompts_end_in_the_same_column():
    rows = [tiny.row(count, [3], 2, seed) for seed, count in enumerate((4, 9))]
    sequences = [prompt_sequence(row, Layout(0, count), TOKENS) for row, count in zip(rows, (3, 1))]
    inputs = collate_prompts(sequences, [0, 1], tiny.PAD).inputs
    assert inputs["input_ids"][:, -1].tolist() == [tiny.END, tiny.END]
    assert inputs["thought_span"] == (8, 11)


@pytest.fixture(scope="module")
def examples() -> Dataset:
    return Dataset.from_list([tiny.row(3 + index % 5, [2, 3], 2, index) for index in range(45)])


def windows_of(examples, curriculum, sizes: BatchSizes, epoch: int = 0) -> list[list[list]]:
    """[rank][window][micro-batch] -> indices."""
    return [
        [[batch.indices for batch in window] for window in _windows(examples, curriculum, sizes, rank, epoch)]
        for rank in range(sizes.world)
    ]


def _windows(examples, curriculum, sizes, rank, epoch):
    windows = TrainingSteps(examples, curriculum, TOKENS, sizes, rank, epoch)
    return [windows[index] for index in range(len(windows))]


SPLITS = [BatchSizes(8, 1, 1), BatchSizes(4, 2, 1), BatchSizes(2, 4, 1), BatchSizes(4, 1, 2), BatchSizes(1, 4, 2)]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_an_epoch_holds_every_example_once_whatever_the_split(examples, curriculum, sizes):
    ranks = windows_of(examples, curriculum(), sizes)
    assert len(ranks[0]) == 6  # 45 examples, 8 a step, the last window smaller
    everything = [index for windows in ranks for window in windows for batch in window for index in batch]
    assert sorted(everything) == list(range(45))
    counts = [[len(window) for window in windows] for windows in ranks]
    assert all(each == counts[0] for each in counts), "every rank runs the same number of micro-batches"
    # A window holds the same examples as in one undivided batch.
    whole = windows_of(examples, curriculum(), BatchSizes(8, 1, 1))[0]
    for number, window in enumerate(whole):
        mine = {index for windows in ranks for batch in windows[number] for index in batch}
        assert mine == set(window[0])


def test_the_order_changes_with_epoch_and_seed_and_not_otherwise(examples, curriculum):
    sizes = BatchSizes(8, 1, 1)
    first = windows_of(examples, curriculum(), sizes)
    assert windows_of(examples, curriculum(), sizes) == first
    assert windows_of(examples, curriculum(), sizes, epoch=1) != first
    assert windows_of(examples, curriculum(seed=1), sizes) != first


def lengths_of(examples, windows) -> list[list[int]]:
    return [[len(examples[i]["question_ids"]) for batch in window for i in batch.indices] for window in windows]


@pytest.mark.parametrize("sizes", [BatchSizes(4, 8, 1), BatchSizes(4, 4, 2), BatchSizes(8, 1, 1)], ids=str)
def test_grouping_puts_like_lengths_together(curriculum, sizes):
    examples = Dataset.from_list([tiny.row(3 + index * 7 % 50, [2], 2, index) for index in range(300)])

    def windows(group: bool, epoch: int = 0):
        sets = [TrainingSteps(examples, curriculum(), TOKENS, sizes, rank, epoch, group) for rank in range(sizes.world)]
        return [[batch for each in sets for batch in each[number]] for number in range(len(sets[0]))]

    grouped, plain = windows(True), windows(False)
    for order in (grouped, plain, windows(True, epoch=1)):
        assert sorted(batch_index for w in order for b in w for batch_index in b.indices) == list(range(300))
    assert lengths_of(examples, grouped) != lengths_of(examples, windows(True, epoch=1))
    assert padding(grouped) < 0.5 * padding(plain)
    # Longest first within a window, so that a micro-batch that is too long shows at once.
    for rank_order in TrainingSteps(examples, curriculum(), TOKENS, sizes, 0, 0):
        lengths = lengths_of(examples, [rank_order])[0]
        assert lengths == sorted(lengths, reverse=True)


def padding(windows) -> float:
    batches = [batch for window in windows for batch in window if batch.n_tokens]
    return 1 - sum(b.n_tokens for b in batches) / sum(b.inputs["input_ids"].numel() for b in batches)


def test_grouping_leaves_large_windows_what_they_were(curriculum):
    examples = Dataset.from_list([tiny.row(3 + index % 9, [2], 2, index) for index in range(400)])
    sizes = BatchSizes(8, 16, 1)
    grouped, plain = (
        TrainingSteps(examples, curriculum(), TOKENS, sizes, 0, 0, group_by_length=group) for group in (True, False)
    )
    for number in range(len(plain)):
        chosen = [{index for batch in windows[number] for index in batch.indices} for windows in (grouped, plain)]
        assert chosen[0] == chosen[1]


def test_tokens_are_counted_and_a_filler_has_none(examples, curriculum):
    batch = TrainingSteps(examples, curriculum(), TOKENS, BatchSizes(8, 1, 1), 0, 0)[0][0]
    assert batch.n_tokens == int(batch.inputs["attention_mask"].sum())
    assert collate_training([], [], tiny.PAD).n_tokens == 0


@pytest.mark.shared
def test_padding_of_prosqa_in_micro_batches_of_eight(shared, curriculum):
    records = read_records(shared / "datasets" / "prosqa_valid.json")
    tokenizer = AutoTokenizer.from_pretrained(shared / "datasets" / "gpt2_tokenizer")
    examples = tokenize(records, tokenizer)

    def share(group: bool, stage: int, sizes: BatchSizes) -> float:
        plan = curriculum(epochs_per_stage=1)
        windows = TrainingSteps(examples, plan, TOKENS, sizes, 0, stage, group)
        return padding([windows[number] for number in range(len(windows))])

    for stage in (0, 6):
        for sizes in (BatchSizes(8, 16, 1), BatchSizes(8, 8, 2), BatchSizes(8, 1, 1)):
            assert share(True, stage, sizes) < 0.08, (stage, sizes)
            assert share(False, stage, sizes) > 0.15, (stage, sizes)


def test_a_loader_draws_no_number_of_the_run(examples, curriculum):
    """A run that goes on within an epoch starts a loader once more than one that was left alone."""
    before = torch.get_rng_state()
    windows = TrainingSteps(examples, curriculum(), TOKENS, BatchSizes(4, 2, 1), 0, 0)
    assert list(training_loader(windows))
    assert list(prompt_loader(examples, curriculum(), TOKENS, 1, 7, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("epoch", [0, 2], ids=["most without thoughts", "most with thoughts"])
def test_micro_batches_in_step_make_as_many_passes_on_every_rank(examples, curriculum, epoch):
    stages = curriculum(epochs_per_stage=1, uniform_prob=0.5)
    sizes = BatchSizes(2, 3, 2)
    model = tiny.coconut(context=LatentContext((0.6, 0.3, 0.1)))
    differ = 0
    alone, in_step = (
        [TrainingSteps(examples, stages, TOKENS, sizes, rank, epoch, in_step=together) for rank in range(2)]
        for together in (False, True)
    )
    # The last window ends in a filler.
    for number in (0, 1, len(alone[0]) - 1):
        for batches in zip(*(windows[number] for windows in (*alone, *in_step)), strict=True):
            here, there, grown_here, grown_there = batches
            assert Size.of(grown_here).n_thoughts == Size.of(grown_there).n_thoughts
            assert len(grown_here.inputs["supervised"]) == len(grown_there.inputs["supervised"])
            differ += Size.of(here) != Size.of(there)
            for batch, grown in ((here, grown_here), (there, grown_there)):
                assert (grown.n_targets, grown.n_tokens, grown.indices) == (
                    batch.n_targets,
                    batch.n_tokens,
                    batch.indices,
                )
                losses = [model(**each.inputs).loss_sum for each in (batch, grown)]
                gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
                torch.testing.assert_close(losses[1], losses[0])
                torch.testing.assert_close(gradients[1], gradients[0], atol=2e-5, rtol=1e-4)
    assert differ > 2


def test_a_loader_starts_where_it_is_told(examples, curriculum):
    windows = TrainingSteps(examples, curriculum(), TOKENS, BatchSizes(4, 2, 1), 0, 0)
    whole = [[batch.indices for batch in window] for window in training_loader(windows)]
    rest = [[batch.indices for batch in window] for window in training_loader(windows, first=4)]
    assert rest == whole[4:]


def test_a_worker_that_collates_ahead_changes_nothing(examples, curriculum):
    windows = TrainingSteps(examples, curriculum(), TOKENS, BatchSizes(4, 2, 1), 0, 0)
    here = [batch for window in training_loader(windows) for batch in window]
    # What a machine with a GPU does, memory that only a GPU can pin aside.
    there = [batch for window in training_loader(windows, num_workers=1) for batch in window]
    assert [batch.indices for batch in there] == [batch.indices for batch in here]
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(here, there, strict=True))
    shares = [list(prompt_loader(examples, curriculum(), TOKENS, 1, 7, 0, 1, n)) for n in (0, 1)]
    assert [b.indices for b in shares[0]] == [b.indices for b in shares[1]] != []


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("make", [loss_loader, prompt_loader])
def test_evaluation_holds_every_example_once(examples, curriculum, make, world):
    seen = []
    for rank in range(world):
        for batch in make(examples, curriculum(), TOKENS, 1, 7, rank, world):
            assert batch.inputs["input_ids"].shape[0] == len(batch.indices) <= 7
            seen += batch.indices
    assert sorted(seen) == list(range(45))


def test_a_stage_is_a_view_of_the_same_set(examples, curriculum):
    stages = curriculum(epochs_per_stage=1)
    for epoch, n_thoughts in ((0, 0), (1, 1), (2, 2)):
        batch = TrainingSteps(examples, stages, TOKENS, BatchSizes(8, 1, 1), 0, epoch)[0][0]
        thoughts = (batch.inputs["input_ids"] == tiny.LATENT).sum(dim=1)
        assert torch.equal(thoughts, torch.full_like(thoughts, n_thoughts))
