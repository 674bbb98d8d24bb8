"""What is planned for a card on a CPU, against live bytes on fake CUDA under the attention kernel of a card."""

from __future__ import annotations

import itertools

import pytest
import torch
from fake_cuda.run import on_fake_cuda
from test_activations import gpt2

from coconut_ds import Coconut
from coconut_ds.data.batches import TokenSequence
from coconut_ds.memory.activations import measure
from coconut_ds.memory.batch_size import CARD_OVERHEAD_GIB, CARD_SHARE, card_budget

PREFIX, THOUGHTS, TAIL = 340, 6, 36
SHAPE = {"rows": 16, "prefix": PREFIX, "thoughts": THOUGHTS, "tail": TAIL}
# GPT-2 small at the columns of ProsQA, but for the number of layers, which is a matter of time here.
MODEL = {"vocab_size": 50260, "n_layer": 3}
CASES = [
    {"dtype": dtype, "recomputed": recomputed, **SHAPE, "model": MODEL}
    for dtype, recomputed in itertools.product(("float16", "float32"), (True, False))
]


@pytest.fixture(scope="module")
def on_card():
    return on_fake_cuda("fake_cuda.live_bytes:peak", CASES)


@pytest.fixture(scope="module")
def planned() -> Coconut:
    return gpt2(**MODEL)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_for_a_card_is_within_a_tenth(on_card, planned, case):
    planned.disable_activation_checkpointing()
    if case["recomputed"]:
        planned.enable_activation_checkpointing()
    ids = [5] * PREFIX + [50259] * THOUGHTS + [5] * TAIL
    sequence = TokenSequence(ids, PREFIX, THOUGHTS, PREFIX + THOUGHTS + 1)
    cost = measure(planned, sequence, getattr(torch, case["dtype"]), for_card=True)
    assert 0.98 < cost.peak(case["rows"]) / on_card.of(**case) < 1.1


def test_context_nccl_and_fragments_are_not_planned_with():
    assert card_budget(10.76) == pytest.approx(CARD_SHARE * (10.76 - CARD_OVERHEAD_GIB) * 2**30, abs=1)
    assert card_budget(10.76) < 9.4 * 2**30
    assert card_budget(0.5) == 0
