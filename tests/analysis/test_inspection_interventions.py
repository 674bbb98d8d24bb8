"""Thoughts replaced by others: what is fed, what stays, and how the answers are counted."""

from __future__ import annotations

from dataclasses import replace

import naive
import numpy as np
import pytest
import torch
from test_inspection import PLAIN, SHORT, SYMBOLIC, trained_on, words_of

from coconut_ds import LatentContext
from coconut_ds.analysis.inspection.averages import averages
from coconut_ds.analysis.inspection.interventions import KINDS, intervene, outcome, replacements, replacing, stacked
from coconut_ds.engine.internals import FakeTensorMode
from coconut_ds.inference.replies import Question, Reply

CONTEXTS = {
    "plain": None,
    "window": LatentContext((0.6, 0.3, 0.1)),
    "last_pass": LatentContext((0.1, 0.3, 0.6), scope="last_pass"),
    "norm": LatentContext((0.6, 0.4), norm="embedding"),
}
COUNTS = [3, 1, 2, 0]
QUESTIONS = [Question.of(record, n_thoughts=count) for record, count in zip([PLAIN, SHORT, SYMBOLIC, PLAIN], COUNTS)]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("thought", [None, 0, 1, 2])
@torch.no_grad()
def test_a_thought_that_replaces_itself_changes_no_bit(context, thought):
    trained = trained_on(words_of(SYMBOLIC), CONTEXTS[context])
    before = trained.ask(QUESTIONS, 4)
    fed = before.thoughts().fed
    after = trained.ask(QUESTIONS, 4, intervene=replacing(fed, thought))
    assert torch.equal(after.decoded.encoded.hidden, before.decoded.encoded.hidden)
    assert torch.equal(after.decoded.encoded.inputs_embeds, before.decoded.encoded.inputs_embeds)
    logits = [trained.model.lm_head(each.decoded.encoded.hidden) for each in (before, after)]
    assert torch.equal(*logits)
    assert torch.equal(after.decoded.tokens, before.decoded.tokens)


@torch.no_grad()
def test_only_the_thought_named_is_replaced_and_later_ones_are_made_from_it():
    trained = trained_on(words_of(SYMBOLIC))
    before = trained.ask(QUESTIONS, 4)
    was = before.thoughts().fed
    now = trained.ask(QUESTIONS, 4, intervene=replacing(torch.zeros_like(was), 1)).thoughts().fed
    assert torch.equal(now[:, 0], was[:, 0])
    assert (now[0, 1] == 0).all()
    assert (now[2, 1] == 0).all()
    assert not torch.allclose(now[0, 2], was[0, 2])
    assert torch.equal(now[1, 0], was[1, 0]), "a row without the thought stays as it is"


@torch.no_grad()
def test_an_answer_after_a_replacement_is_that_of_a_model_fed_so():
    trained = trained_on(words_of(SYMBOLIC))
    instead = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(1))
    after = trained.ask([Question.of(PLAIN, n_thoughts=2)], 1, intervene=replacing(instead))
    ids = trained.prompts([PLAIN["question"]], [2]).inputs["input_ids"][0]
    embeds = trained.model.base_causallm.get_input_embeddings()(ids).clone()
    embeds[ids == trained.tokens.latent] = instead[0]
    hidden = naive._run(trained.model.base_causallm, embeds, torch.arange(len(ids))[None])
    assert int(trained.model.lm_head(hidden[-1]).argmax()) == int(after.decoded.tokens[0, 0])


FED = stacked(
    [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]]), torch.tensor([[9.0, 1.0], [5.0, 0.0]])]
)


def test_the_mean_thought_is_that_of_the_questions_that_have_it():
    assert (replacements("zero", FED, seed=0) == 0).all()
    mean = replacements("mean", FED, seed=0)
    assert mean[1].tolist() == [[5.0, 3.0], [4.0, 2.0]]
    assert torch.equal(mean[0], mean[2])


@pytest.mark.parametrize("seed", range(4))
def test_the_thought_of_another_question_is_never_the_own_one_and_each_is_used_once(seed):
    counts = [3, 1, 2, 3, 2, 1, 1, 3]
    fed = stacked([torch.full((count, 1), float(row)) for row, count in enumerate(counts)])
    others = replacements("other", fed, seed)
    for thought in range(3):
        rows = [row for row, count in enumerate(counts) if count > thought]
        donors = others[rows, thought, 0].int().tolist()
        assert sorted(donors) == rows
        assert all(donor != row for donor, row in zip(donors, rows))
    assert torch.equal(others.isnan(), fed.isnan())
    again = replacements("other", fed, seed)
    assert torch.equal(again.nan_to_num(-1.0), others.nan_to_num(-1.0)), "the seed decides"


def test_a_thought_that_only_one_question_has_stays_its_own():
    fed = stacked([torch.ones(2, 1), torch.zeros(1, 1)])
    assert replacements("other", fed, seed=0)[0].flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("by", KINDS)
def test_no_shape_depends_on_data_so_a_gpu_is_not_waited_for(by):
    with FakeTensorMode() as mode:  # refuses such a shape
        assert replacements(by, mode.from_tensor(FED), seed=0).shape == FED.shape


def replies(given: str, expected: str) -> list[Reply]:
    """One a letter."""
    return [Reply(Question("", expected=right), "", text, 1, cut=False) for text, right in zip(given, expected)]


def test_answers_are_counted_by_which_way_they_flip():
    before, after = (replies(given, "abcde") for given in ("abxxe", "aycze"))
    found = outcome("zero", 1, before, after)
    assert (found.by, found.thought, found.n_replaced) == ("zero", 2, 5)
    assert (found.n_lost, found.n_gained, found.n_changed) == (1, 1, 3)
    assert (found.accuracy, found.change) == (0.6, 0.0)
    assert found.interval[0] < 0 < found.interval[1]


def test_the_interval_of_a_change_pairs_the_answers_of_each_question():
    expected = "a" * 400
    before = "a" * 200 + "b" * 200  # unpaired, half a set each way would say nothing of a change of 5%
    after = "a" * 220 + "b" * 180
    found = outcome("mean", None, replies(before, expected), replies(after, expected))
    low, high = found.interval
    assert found.change == pytest.approx(0.05)
    assert 0.025 < low < 0.05 < high < 0.08


@torch.no_grad()
def test_every_thought_and_all_of_them_are_replaced_by_every_kind():
    trained = trained_on(words_of(SYMBOLIC))
    before = trained.ask(QUESTIONS, 4)
    fed = [row[:count] for row, count in zip(before.thoughts().fed, COUNTS)]
    found = intervene(trained, before.replies, fed, new_tokens=4, rows=3, seed=0)
    cases = [(by, place) for by in KINDS for place in (1, 2, 3, None)]
    without = [("mean", 3), ("other", 3)]  # one question alone has a third thought
    assert [(each.by, each.thought) for each in found] == [each for each in cases if each not in without]
    assert [each.n_replaced for each in found[:4]] == [3, 2, 1, 3]


@torch.no_grad()
def test_accuracies_and_changes_are_over_the_questions_that_have_the_thought():
    trained = trained_on(words_of(SYMBOLIC))
    fed = [row[:count] for row, count in zip(trained.ask(QUESTIONS, 4).thoughts().fed, COUNTS)]
    zeros = trained.ask(QUESTIONS, 4, intervene=replacing(torch.zeros(4, 3, 32), 1)).replies
    given = ["other", zeros[1].given, "other", zeros[3].given]
    before = [
        replace(reply, given=text, question=replace(reply.question, expected=reply.given))
        for reply, text in zip(zeros, given)
    ]
    found = intervene(trained, before, fed, new_tokens=4, rows=3, seed=0)[1]
    assert (found.by, found.thought, found.n_replaced) == ("zero", 2, 2)
    assert (found.accuracy, found.change, found.interval) == (1.0, 1.0, (1.0, 1.0))
    assert (found.n_lost, found.n_gained, found.n_changed) == (0, 2, 2)


def test_averages_have_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = averages({"value": values.tolist(), "constant": [0.6] * 400})
    half = 1.96 * values.std() / 20
    assert found["value"]["mean"] == pytest.approx(values.mean())
    assert found["value"]["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert found["value"]["high"] == pytest.approx(values.mean() + half, abs=0.02)
    assert found["constant"] == pytest.approx({"mean": 0.6, "low": 0.6, "high": 0.6})
