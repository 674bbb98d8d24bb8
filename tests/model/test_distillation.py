"""Distillation: what the teacher reads, and its losses and gradients against the naive twin."""

from __future__ import annotations

from dataclasses import replace

import naive
import pytest
import tiny
import torch
from datasets import Dataset
from test_step_decoder import WINDOWS

from coconut_ds.data.batches import Size, Tokens, collate_training, grown, training_sequence
from coconut_ds.data.stages import Layout
from coconut_ds.data.teacher import check_taught_lengths, taught
from coconut_ds.errors import InputError
from coconut_ds.model import fast
from coconut_ds.model.distillation import Distillation
from coconut_ds.model.jacobi import Jacobi

# Question tokens and layout of each row: some, all, one and no step replaced; more thoughts than steps.
RAGGED = [(9, Layout(2, 2)), (14, Layout(3, 3)), (2, Layout(1, 1)), (7, Layout(0, 0)), (5, Layout(3, 6, per_step=2))]
# The first token of every answer of `rows_of`.
LEAD = 7
TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT, answer_lead=(LEAD,), reads_steps=True)
SETTINGS = {
    "all layers": Distillation(),
    "chosen layers": Distillation(layers=(1, 2)),
    "micro-batch": Distillation(deviation="micro_batch"),
}


def sequences_of(shapes, tokens=TOKENS):
    rows = [tiny.row(question, [3, 4, 5], 4, seed) for seed, (question, _) in enumerate(shapes)]
    for row in rows:
        row["answer_ids"] = [LEAD, *row["answer_ids"]]
    return [training_sequence(row, layout, tokens) for row, (_, layout) in zip(rows, shapes)]


def student(family, window):
    model = tiny.coconut(family, WINDOWS[window])
    model.distillation = Distillation()
    return model


def batch_of(shapes):
    sequences = sequences_of(shapes)
    return collate_training(sequences, list(range(len(sequences))), tiny.PAD, has_teacher=True)


def test_the_teacher_reads_steps_and_answer_without_markers():
    row = {"question_ids": [5], "steps_ids": [[10, 11], [12]], "answer_ids": [7, 8, 14, tiny.EOS]}
    assert taught(row, (7, 8), omits_last_step=False) == ([5, 10, 11, 12, 7, 8, 14, tiny.EOS], 1, 2)
    assert taught(row, (7, 8), omits_last_step=True) == ([5, 10, 11, 7, 8, 14, tiny.EOS], 1, 2)
    assert taught(row, (7, 9), omits_last_step=True).n_answer == 3, "the space went into the answer's first token"
    assert taught(row, (), omits_last_step=False).n_answer == 4
    short = {"question_ids": [5], "steps_ids": [], "answer_ids": [7, tiny.EOS]}
    assert taught(short, (7, tiny.EOS), omits_last_step=True) == ([5, 7, tiny.EOS], 1, 1)
    assert taught(row, None, omits_last_step=False).n_answer == 0, "nothing is compared"
    assert training_sequence(row, Layout(2, 2), replace(TOKENS, reads_steps=False)).taught is None


def test_states_are_compared_at_the_same_token():
    batch = batch_of(RAGGED)
    teacher = batch.inputs["teacher"]
    assert batch.inputs["input_ids"].flatten()[teacher.student].tolist() == [LEAD] * len(RAGGED)
    assert teacher.input_ids.flatten()[teacher.before_answer].tolist() == [LEAD] * len(RAGGED)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    ("speed", "settings"), [("plain", "all layers"), ("fast", "chosen layers"), ("recomputed", "micro-batch")]
)
def test_losses_and_gradients_equal_the_naive_twin(family, window, speed, settings):
    model = tiny.coconut(family, WINDOWS[window], plain=True)
    model.distillation = SETTINGS[settings]
    if speed != "plain":
        fast.install(model)
    if speed == "recomputed":
        model.enable_activation_checkpointing()
    batch = batch_of(RAGGED)
    output = model(**batch.inputs)

    def backward(sequence, teacher, distance):
        total = 0.5 * sequence / batch.n_targets + 0.7 * teacher / batch.n_verbal_targets
        (total + 3.0 * distance / batch.n_distilled).backward()

    backward(output.loss_sum, output.verbal_loss_sum, output.distance_sum)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    if speed == "recomputed":
        model.disable_activation_checkpointing()
    inputs = batch.inputs
    rows = [(each.ids, each.taught) for each in sequences_of(RAGGED)]
    teacher, distance = naive.teacher_losses(model, rows)
    sequence = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    backward(sequence, teacher, distance)
    assert batch.n_distilled == len(RAGGED)
    assert batch.n_verbal_targets == sum(len(each.ids) - each.first_target for _, each in rows)
    assert output.verbal_loss_sum.item() == pytest.approx(teacher.item(), rel=1e-6)
    assert output.distance_sum.item() == pytest.approx(distance.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


def test_thoughts_of_enough_iterations_have_the_same_losses():
    """The last states of a column are read, not those of an earlier iteration."""
    model = student("llama", "sequence")
    batch = batch_of(RAGGED)
    first, end = batch.inputs["thought_span"]
    columns = batch.inputs["teacher"].student % batch.inputs["input_ids"].shape[1]
    assert any(first <= column < end for column in columns), "some answers begin where others still think"
    in_turn = model(**batch.inputs)
    model.solver = Jacobi(end - first)
    at_once = model(**batch.inputs)
    assert at_once.distance_sum.item() == pytest.approx(in_turn.distance_sum.item(), rel=1e-6)


def test_the_loss_of_the_sequence_stays_bit_for_bit():
    model = student("gpt2", "sequence")
    batch = batch_of(RAGGED)
    with_teacher = model(**batch.inputs)
    without = model(**{key: value for key, value in batch.inputs.items() if key != "teacher"})
    assert torch.equal(with_teacher.loss_sum, without.loss_sum)
    assert without.verbal_loss_sum is None
    assert without.distance_sum is None


def test_where_no_step_is_replaced_the_distance_is_that_of_the_markers_alone():
    tokens = replace(TOKENS, start_latent=None, end_latent=None)
    sequences = sequences_of([(7, Layout(0, 0)), (4, Layout(0, 0))], tokens)
    batch = collate_training(sequences, [0, 1], tiny.PAD, has_teacher=True)
    output = student("llama", "plain")(**batch.inputs)
    assert output.distance_sum.item() == pytest.approx(0, abs=1e-6)
    assert output.verbal_loss_sum.item() == pytest.approx(output.loss_sum.item(), rel=1e-6)


MIXED = replace(TOKENS, answer_lead=None, answers_alone=True)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layouts", ["verbal and direct", "direct"])
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_a_mixture_has_the_losses_of_its_layouts(family, layouts, plain):
    reads_steps = layouts != "direct"
    sequences = sequences_of(RAGGED, replace(MIXED, reads_steps=reads_steps))
    batch = collate_training(sequences, [0, 1, 2, 3, 4], tiny.PAD, has_teacher=reads_steps, answers_alone=True)
    model = tiny.coconut(family, WINDOWS["sequence"], plain=plain)
    output = model(**batch.inputs)
    assert output.distance_sum is None
    assert batch.n_distilled == 0
    (output.verbal_loss_sum + 2 * output.direct_loss_sum).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.base_causallm.named_parameters()}
    model.zero_grad()
    verbal = [naive.plain_loss(model, each.taught.ids, each.taught.first_target) for each in sequences if reads_steps]
    direct = [naive.plain_loss(model, each.direct.ids, each.direct.first_target) for each in sequences]
    (sum(verbal) + 2 * sum(direct)).backward()
    assert output.verbal_loss_sum.item() == pytest.approx(sum(each.item() for each in verbal), rel=1e-6)
    assert output.direct_loss_sum.item() == pytest.approx(sum(direct).item(), rel=1e-6)
    assert batch.n_direct_targets == sum(len(each.direct.ids) - each.direct.first_target for each in sequences)
    for name, parameter in model.base_causallm.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


def test_the_answer_alone_stands_right_behind_the_question():
    row = {"question_ids": [5, 6], "steps_ids": [[10, 11], [12]], "answer_ids": [7, 14, tiny.EOS]}
    assert training_sequence(row, Layout(1, 1), MIXED).direct == ([5, 6, 7, 14, tiny.EOS], 2, 3)
    assert training_sequence(row, Layout(1, 1), TOKENS).direct is None


def test_a_filler_runs_the_teacher_and_adds_nothing():
    model = student("llama", "sequence")
    batch = batch_of([])
    assert batch.counts_of_losses == (0, 0, 0, 0, 0)
    output = model(**batch.inputs)
    assert (output.verbal_loss_sum.item(), output.distance_sum.item()) == (0, 0)
    (output.loss_sum + output.verbal_loss_sum + output.distance_sum).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert not any(each is not None and each.any() for each in gradients)


@pytest.mark.parametrize("deviation", ["example", "micro_batch"])
def test_a_batch_grown_to_that_of_another_rank_has_the_same_losses(deviation):
    def batch_of(shapes):
        sequences = sequences_of(shapes, replace(TOKENS, answers_alone=True))
        return collate_training(sequences, list(range(len(shapes))), tiny.PAD, has_teacher=True, answers_alone=True)

    model = student("llama", "sequence")
    model.distillation = Distillation(deviation=deviation)
    small, large = batch_of(RAGGED[:1]), batch_of(RAGGED)
    size = Size.of(small) | Size.of(large)
    before, after = model(**small.inputs), model(**grown(small, size, tiny.PAD).inputs)
    assert len(grown(small, size, tiny.PAD).inputs["teacher"].supervised) == large.n_verbal_targets
    for ours, theirs in zip(after.sums_of_losses, before.sums_of_losses):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    empty = model(**grown(batch_of([]), size, tiny.PAD).inputs)
    assert (empty.verbal_loss_sum.item(), empty.distance_sum.item(), empty.direct_loss_sum.item()) == (0, 0, 0)


def test_sequences_of_the_teacher_that_do_not_fit_are_refused():
    rows = Dataset.from_list([tiny.row(4, [3, 2], 2, 0), tiny.row(4, [3, 20], 2, 1)])
    check_taught_lengths("f.json", rows, False, 30)
    check_taught_lengths("f.json", rows, True, 12)
    with pytest.raises(
        InputError, match=r"record 1: .* 30 tokens with all steps, as supervision reads them, the model"
    ):
        check_taught_lengths("f.json", rows, False, 29)


def test_layers_that_the_model_does_not_have_are_refused():
    Distillation(layers=(0, 3)).check(3)
    with pytest.raises(InputError, match=r"supervision\.distill.layers: 4, 7: the model has 3 layers; name"):
        Distillation(layers=(0, 4, 7)).check(3)
