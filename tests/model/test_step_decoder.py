"""Step supervision: the texts of groups of thoughts, and the decoder's loss and gradients against the naive twin."""

from __future__ import annotations

from dataclasses import replace

import naive
import pytest
import tiny
import torch
from datasets import Dataset

from coconut_ds import LatentContext
from coconut_ds.data.batches import Size, Tokens, collate_training, grown, training_sequence
from coconut_ds.data.stages import Layout
from coconut_ds.data.step_targets import check_written_lengths
from coconut_ds.errors import InputError
from coconut_ds.model import fast
from coconut_ds.model.step_decoder import copy_of, write_steps, written_steps_loss

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT, step_end=tiny.EOS)
WINDOWS = {
    "plain": None,
    "sequence": LatentContext((0.6, 0.3, 0.1)),
    "last_pass": LatentContext((0.1, 0.3, 0.6), "last_pass"),
    "learned": LatentContext((0.5, 0.3, 0.2), learned=True, norm="embedding"),
}
# (question tokens, layout) of each row: one and two thoughts a step, more groups than steps, fewer, none.
ONE = [(9, Layout(2, 2)), (14, Layout(3, 3)), (2, Layout(1, 1)), (7, Layout(0, 0))]
TWO = [(9, Layout(2, 4, per_step=2)), (14, Layout(3, 8, per_step=2)), (5, Layout(3, 4, per_step=2))]


def sequences_of(shapes):
    rows = [tiny.row(question, [3, 4, 5], 4, seed) for seed, (question, _) in enumerate(shapes)]
    return [training_sequence(row, layout, TOKENS) for row, (_, layout) in zip(rows, shapes)]


def batch_of(shapes):
    sequences = sequences_of(shapes)
    return collate_training(sequences, list(range(len(sequences))), tiny.PAD, writes_steps=True)


def test_a_group_writes_its_step_the_last_one_the_rest_and_a_spare_one_the_answer():
    row = {"question_ids": [5], "steps_ids": [[10, 11], [12], [13]], "answer_ids": [14, tiny.EOS]}
    end = tiny.EOS

    def written(layout):
        return training_sequence(row, layout, TOKENS).written

    assert written(Layout(2, 2)) == ((10, 11, end), (12, end))
    assert written(Layout(2, 4, per_step=2)) == ((10, 11, end), (12, end))
    assert written(Layout(3, 2)) == ((10, 11, end), (12, 13, end))
    assert written(Layout(3, 5)) == ((10, 11, end), (12, end), (13, end), (14, end), (14, end))
    assert written(Layout(0, 0)) == ()
    assert training_sequence(row, Layout(2, 2), replace(TOKENS, step_end=None)).written == ()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shapes", [ONE, TWO], ids=["one thought", "two thoughts"])
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("decoder", ["shared", "copy"])
def test_loss_and_gradients_equal_the_naive_twin(family, window, shapes, plain, decoder):
    model = tiny.coconut(family, WINDOWS[window], plain=True)
    if decoder == "copy":
        model.step_decoder = copy_of(model.base_causallm)
        with torch.no_grad():
            for parameter in model.step_decoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    if not plain:
        fast.install(model)
    batch = batch_of(shapes)
    output = model(**batch.inputs)
    (output.loss_sum / batch.n_targets + 0.7 * output.step_loss_sum / batch.n_step_targets).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    rows = [(each.ids, each.written) for each in sequences_of(shapes)]
    written = naive.step_loss(model, rows)
    inputs = batch.inputs
    sequence = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    (sequence / batch.n_targets + 0.7 * written / batch.n_step_targets).backward()
    assert batch.n_step_targets == sum(len(text) for _, texts in rows for text in texts)
    assert output.step_loss_sum.item() == pytest.approx(written.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("shapes", [ONE, []], ids=["thoughts", "filler"])
def test_every_weight_of_a_copy_gets_a_gradient_in_every_backward(shapes):
    model = tiny.coconut("llama", WINDOWS["sequence"], plain=True)
    model.step_decoder = copy_of(model.base_causallm)
    fast.install(model)
    model.enable_activation_checkpointing()
    output = model(**batch_of(shapes).inputs)
    (output.loss_sum + output.step_loss_sum).backward()
    assert all(parameter.grad is not None for parameter in model.step_decoder.parameters())
    own = sum(parameter.numel() for parameter in model.step_decoder.parameters())
    table = model.base_causallm.get_input_embeddings().weight.numel()
    assert own == sum(parameter.numel() for parameter in model.base_causallm.parameters()) - table


@pytest.mark.parametrize("window", ["plain", "sequence"])
def test_a_thought_gets_a_gradient_from_its_own_text_alone(window):
    model = tiny.coconut("llama", WINDOWS[window])
    batch = batch_of([(9, Layout(2, 2))])
    encoded = model.encode(batch.inputs["input_ids"])
    fed = encoded.inputs_embeds.detach().requires_grad_()
    targets = batch.inputs["steps"]
    first = targets._replace(supervised=targets.supervised[targets.supervised < targets.tokens.shape[1]])
    written_steps_loss(model, fed, first).backward()
    (columns,) = fed.grad[0].norm(dim=1).nonzero(as_tuple=True)
    assert columns.tolist() == [10], "the question has 9 tokens, the marker one"


def test_the_loss_of_the_sequence_stays_bit_for_bit():
    model = tiny.coconut("gpt2", WINDOWS["sequence"])
    batch = batch_of(TWO)
    with_steps = model(**batch.inputs)
    without = model(**{key: value for key, value in batch.inputs.items() if key != "steps"})
    assert torch.equal(with_steps.loss_sum, without.loss_sum)
    assert without.step_loss_sum is None


@pytest.mark.parametrize("shapes", [[], [(9, Layout(0, 0)), (4, Layout(0, 0))]], ids=["filler", "stage 0"])
def test_without_thoughts_the_decoder_runs_and_adds_nothing(shapes):
    model = tiny.coconut("llama", WINDOWS["sequence"])
    batch = batch_of(shapes)
    output = model(**batch.inputs)
    assert (batch.n_step_targets, output.step_loss_sum.item()) == (0, 0.0)
    output.step_loss_sum.backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_batch_grown_to_that_of_another_rank_has_the_same_losses():
    model = tiny.coconut("llama", WINDOWS["sequence"])
    small, large = batch_of(ONE[:1]), batch_of(ONE)
    size = Size.of(small) | Size.of(large)
    assert size.n_step_targets == large.n_step_targets > small.n_step_targets
    before, after = model(**small.inputs), model(**grown(small, size, tiny.PAD).inputs)
    assert after.loss_sum.item() == pytest.approx(before.loss_sum.item(), rel=1e-6)
    assert after.step_loss_sum.item() == pytest.approx(before.step_loss_sum.item(), rel=1e-6)
    empty = grown(batch_of([]), size, tiny.PAD)
    assert model(**empty.inputs).step_loss_sum.item() == 0


def test_texts_that_do_not_fit_the_positions_are_refused(curriculum):
    rows = Dataset.from_list([tiny.row(4, [3, 2], 2, 0), tiny.row(4, [9, 9, 9], 2, 1)])
    stages = curriculum(method="no_curriculum", max_latent_stage=2, pad_latent_to_max=True, thoughts_per_step=2)
    check_written_lengths("f.json", rows, stages, tiny.EOS, 20)
    with pytest.raises(InputError, match="record 1: key 'steps': 19 tokens are to be written from the last 2 thoughts"):
        check_written_lengths("f.json", rows, stages, tiny.EOS, 19)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("decoder", ["shared", "copy"])
def test_each_written_token_is_the_most_probable_after_those_before_it(family, decoder):
    model = tiny.coconut(family, LatentContext((0.6, 0.3, 0.1)), plain=True)
    if decoder == "copy":
        model.step_decoder = copy_of(model.base_causallm)
        with torch.no_grad():
            for parameter in model.step_decoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = sequences_of(TWO)[1].ids
    groups = naive.groups_of(model, ids, 4)
    fast.install(model)
    written = write_steps(model, torch.stack([torch.stack(own) for own in groups]), 5).tolist()
    fast.uninstall(model)
    assert len({tuple(each) for each in written}) > 1
    for own, text in zip(groups, written):
        assert text == [naive.logits_after(model, own, text[:place]).argmax().item() for place in range(5)]
