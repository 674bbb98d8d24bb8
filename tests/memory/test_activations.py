"""Memory predicted from small batches against the same meter on larger ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from coconut_ds import Coconut, LatentContext
from coconut_ds.config.deepspeed_config import Device
from coconut_ds.config.resolved_run import resolve
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.batches import Tokens, TokenSequence
from coconut_ds.data.teacher import Taught
from coconut_ds.memory import batch_size
from coconut_ds.memory.activations import (
    ActivationCost,
    batch_of,
    measure,
    measured_peak,
    predicted_peak,
    widest_mixed_sequence,
    widest_sequence,
)
from coconut_ds.memory.batch_size import (
    choose_eval_batch,
    deciding_sequences,
    distinct_stages,
    halved_until_it_fits,
    largest_divisor,
)
from coconut_ds.model import fast
from coconut_ds.model.distillation import Distillation
from coconut_ds.model.jacobi import Jacobi
from coconut_ds.model.latents import _constant

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)


def gpt2(**shape: int) -> Coconut:
    """GPT-2 small with random weights, its dropout and the markers; `shape` holds other values of its configuration."""
    model = Coconut(
        GPT2LMHeadModel(GPT2Config(**{"vocab_size": 50260, **shape})),
        latent_token_id=50259,
        start_latent_id=50257,
        end_latent_id=50258,
        eos_token_id=50256,
        latent_context=LatentContext((0.6, 0.3, 0.1)),
    )
    fast.install(model)
    return model


@pytest.fixture(scope="module")
def gpt2_small() -> Coconut:
    torch.manual_seed(0)
    return gpt2()


@pytest.mark.parametrize(("checkpointed", "written"), [(True, 0), (False, 0), (True, 8)])
def test_the_peak_of_gpt2_small_is_predicted_within_a_tenth(gpt2_small, checkpointed, written):
    # 64 columns, so that it takes seconds; benchmarks/memory.py does the same at the columns of ProsQA. With
    # supervision each thought writes eight tokens, all steps and the answer alone are read; two iterations.
    texts = ((5,) * written,) * 4 if written else ()
    teaching, direct = (Taught([5] * 98, 49, 5), Taught([5] * 58, 49, 9)) if written else (None, None)
    sequence = TokenSequence([5] * 50 + [50259] * 4 + [5] * 10, 50, 4, 55, texts, teaching, direct)
    gpt2_small.solver = Jacobi(2) if written else None
    gpt2_small.distillation = Distillation() if written else None
    gpt2_small.disable_activation_checkpointing()
    if checkpointed:
        gpt2_small.enable_activation_checkpointing()
    cost = measure(gpt2_small, sequence)
    for rows in (2, 4, 8):
        assert cost.peak(rows) == pytest.approx(measured_peak(gpt2_small, batch_of(sequence, rows)), rel=0.1), rows


def test_a_peak_that_moves_is_followed():
    # The first operation costs much at once, the second much per row.
    cost = ActivationCost(torch.tensor([1000, 20]), torch.tensor([1001, 30]))
    assert [cost.peak(rows) for rows in (2, 3, 99, 200)] == [1000, 1001, 1097, 2000]
    for budget in (997, 1000, 1050, 5000):
        rows = cost.most_rows(budget)
        assert rows == 0 or cost.peak(rows) <= budget
        assert cost.peak(rows + 1) > budget


def test_other_operations_give_an_upper_bound():
    cost = ActivationCost(torch.tensor([10, 40]), torch.tensor([10, 10, 60]))
    assert [cost.peak(rows) for rows in (2, 3, 8)] == [40, 60, 160]


def test_both_measurements_take_the_same_operations():
    # The window's weights are on the device from the first forward on.
    _constant.cache_clear()
    cost = measure(
        tiny.coconut("gpt2", LatentContext((0.7, 0.3))), TokenSequence([5] * 6 + [tiny.LATENT] + [5] * 3, 6, 1, 8)
    )
    assert len(cost.two) == len(cost.three)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "context",
    [None, LatentContext((0.6, 0.3, 0.1)), LatentContext((0.5, 0.3, 0.2), learned=True, norm="embedding")],
    ids=["plain", "window", "learned and scaled"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_has_to_be_computed_to_know_the_peak(family, checkpointed, context, dtype):
    model = tiny.coconut(family, context, dropout=0.1, n_layer=3)
    if checkpointed:
        model.enable_activation_checkpointing()
    batch = batch_of(TokenSequence([5] * 30 + [tiny.LATENT] * 4 + [6] * 20, 30, 4, 44), 3)
    # In a cold process too, where what is made once is not there yet.
    _constant.cache_clear()
    predicted = predicted_peak(model, batch, dtype)
    assert predicted == measured_peak(model.to(dtype), batch)


def test_measuring_leaves_the_model_as_it_was():
    model = tiny.coconut("gpt2", None, dropout=0.5).eval()
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    measure(model, TokenSequence([5] * 6 + [tiny.LATENT] + [5] * 3, 6, 1, 8))
    assert torch.equal(torch.rand(2), drawn)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model(**batch_of(TokenSequence([5, 6, 7], 0, 0, 1), 2).inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "the hooks are gone"


def test_the_widest_sequence_writes_as_many_steps_as_any_and_each_as_long_as_the_longest(curriculum):
    rows = Dataset.from_list([tiny.row(4, [3, 2], 2, 0), tiny.row(4, [7, 1], 2, 1)])
    tokens = replace(TOKENS, step_end=tiny.EOS)
    stages = curriculum(max_latent_stage=2, pad_latent_to_max=True)
    assert [len(each) for each in widest_sequence(rows, stages, 2, tokens).written] == [8, 8]
    assert widest_sequence(rows, stages, 2, TOKENS).written == ()


def test_the_widest_teacher_is_as_long_as_any_and_writes_as_much(curriculum):
    rows = Dataset.from_list([tiny.row(9, [3, 2], 2, 0), tiny.row(4, [7, 1], 2, 1)])
    tokens = replace(TOKENS, reads_steps=True, answers_alone=True)
    widest = widest_sequence(rows, curriculum(max_latent_stage=2), 2, tokens)
    assert (len(widest.taught.ids), len(widest.taught.ids) - widest.taught.first_target) == (17, 11)
    assert (len(widest.direct.ids), len(widest.direct.ids) - widest.direct.first_target) == (12, 3)
    batch = batch_of(widest, 2)
    assert (batch.n_verbal_targets, batch.n_direct_targets, batch.n_distilled) == (22, 6, 2)
    without = widest_sequence(rows, curriculum(max_latent_stage=2), 2, TOKENS)
    assert (without.taught, without.direct) == (None, None)


def test_the_widest_sequence_covers_every_example(curriculum):
    rows = Dataset.from_list([tiny.row(9, [2, 2], 3, 0), tiny.row(4, [3, 3, 8], 2, 1), tiny.row(5, [1], 6, 2)])
    plan = curriculum(max_latent_stage=3)
    sequence = widest_sequence(rows, plan, 0, TOKENS)
    # 9 and the start marker; the end marker; 14 of steps and 3 of answer with EOS.
    assert (sequence.first_thought, sequence.n_thoughts, sequence.first_target, len(sequence.ids)) == (10, 0, 11, 28)
    sequence = widest_sequence(rows, plan, 4, TOKENS)
    assert (sequence.first_thought, sequence.n_thoughts, len(sequence.ids)) == (10, 3, 10 + 3 + 1 + 7)


def test_the_widest_sequence_counts_what_is_supervised_before_the_thoughts(curriculum):
    rows = Dataset.from_list([tiny.row(9, [2, 2], 3, 0), tiny.row(4, [3, 3, 8], 2, 1)])
    sequence = widest_sequence(rows, curriculum(max_latent_stage=3, curriculum="reversed"), 1, TOKENS)
    # 9 + 2 and 4 + 6 before the start marker; 4 of the longer answer.
    assert (sequence.first_thought, sequence.n_thoughts, sequence.early) == (12, 1, (1, 7))
    assert batch_of(sequence, 2).n_targets == 2 * (6 + 4)


def test_stages_that_are_drawn_are_bounded_together(curriculum):
    """One row with the longest prefix and one with the most thoughts can stand in one batch."""
    rows = Dataset.from_list([tiny.row(4, [3, 3, 3], 2, 0)])
    plan = curriculum(max_latent_stage=3, thoughts_per_step=2, curriculum="reversed", uniform_prob=0.5)
    sequence = widest_mixed_sequence(rows, plan, TOKENS)
    # 4, two steps and the start marker; three steps of two thoughts; the end marker, three steps and the answer.
    assert (sequence.first_thought, sequence.n_thoughts, len(sequence.ids)) == (11, 6, 11 + 6 + 1 + 9 + 3)
    run = RunConfig(num_epochs=1, max_latent_stage=3, uniform_prob=0.5)
    assert sequence in deciding_sequences(run, rows, plan, TOKENS)
    assert sequence not in deciding_sequences(run, rows, replace(plan, uniform_prob=0.0), TOKENS)


def test_stages_that_differ(curriculum):
    run = RunConfig(num_epochs=9, epochs_per_stage=1, max_latent_stage=2)
    assert distinct_stages(run, curriculum(epochs_per_stage=1, max_latent_stage=2)) == [0, 1, 2, 3]
    assert distinct_stages(run, curriculum(method="cot")) == [0]


def test_micro_batches_divide_the_step():
    assert [largest_divisor(64, limit) for limit in (100, 64, 63, 20, 1, 0)] == [64, 64, 32, 16, 1, 0]
    assert largest_divisor(12, 5) == 4


@pytest.mark.parametrize(("fitting", "expected"), [(64, 64), (40, 32), (1, 1), (0, 0)])
def test_what_runs_out_of_memory_is_halved(monkeypatch, fitting, expected):
    asked = []

    def fits(model, sequence, rows, kept) -> bool:
        asked.append(rows)
        return rows <= fitting

    monkeypatch.setattr(batch_size, "_fits", fits)
    assert halved_until_it_fits(None, [None], 64, 64, 0) == expected
    assert asked == sorted(asked, reverse=True)


SHORT = TokenSequence([5] * 6 + [tiny.LATENT] + [5] * 3, 6, 1, 8)


def test_a_trial_leaves_no_gradients():
    model = tiny.coconut()
    assert batch_size._fits(model, SHORT, 2, kept=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trial_trains():
    # As loaded by from_pretrained: the backbone is in evaluation mode, what is around it is not.
    model = tiny.coconut("gpt2", dropout=0.5)
    model.base_causallm.eval()
    before = [module.training for module in model.modules()]
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.append(module.training))
    assert batch_size._fits(model, SHORT, 2, kept=0)
    assert seen
    assert all(seen)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_trial_is_in_the_precision_of_the_run(monkeypatch, precision, curriculum):
    config = RunConfig(
        batch_size_training="auto", train_batch_size=4, num_epochs=1, method="coconut", precision=precision
    )
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    draft = resolve(config, {"zero_optimization": {"stage": 2}}, Device("cuda", has_bf16=True, has_fp16=True), 1)
    model, tried = tiny.coconut("llama"), []

    def trial(model, deciding, micro, per_rank, kept) -> int:
        tried.append(model)
        return micro

    monkeypatch.setattr(batch_size.distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(batch_size, "memory_budget", lambda: 2**33)
    monkeypatch.setattr(batch_size, "halved_until_it_fits", trial)
    examples = Dataset.from_list([tiny.row(9, [2, 2], 3, 0)])
    assert batch_size.choose_micro_batch(draft, model, examples, curriculum(), TOKENS) == 4
    (trial_model,) = tried
    assert {parameter.dtype for parameter in trial_model.parameters()} == {dtype}
    # Angles of rotary positions would be rounded: DeepSpeed leaves buffers alone.
    assert {buffer.dtype for buffer in trial_model.buffers() if buffer.is_floating_point()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_evaluation_batch_fits_the_memory(monkeypatch):
    model = tiny.coconut()
    assert choose_eval_batch(model, 40, 10, n_examples=7) == 7
    monkeypatch.setattr(batch_size, "memory_budget", lambda: 10_000_000)
    small = choose_eval_batch(model, 40, 10, n_examples=1000)
    assert 1 < small < 256
    assert choose_eval_batch(model, 80, 10, n_examples=1000) < small
    monkeypatch.setattr(batch_size, "memory_budget", lambda: 10)
    assert choose_eval_batch(model, 40, 10, n_examples=1000) == 1
