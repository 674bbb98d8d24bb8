"""A training step on CUDA: devices, precisions, what the host waits for, threads, the order of gradients."""

from __future__ import annotations

import itertools

import pytest

from fake_cuda.run import on_fake_cuda

FAMILIES = ("gpt2", "llama", "qwen3")
DTYPES = ("float32", "float16", "bfloat16")
WINDOWS = ("one", "three", "learned", "last_pass", "embedding_norm")
MODELS = list(itertools.product(FAMILIES, (False, True), WINDOWS))
"""Family, whether activations are recomputed, window."""


def case(family, recomputed, window, dtype="float16", thoughts=3, device="cuda"):
    names = ("what", "family", "recomputed", "window", "dtype", "thoughts", "device")
    return dict(zip(names, ("backward", family, recomputed, window, dtype, thoughts, device)))


ON_CUDA = [case(*model, dtype) for model in MODELS for dtype in DTYPES]
ORDERED = [model for model in MODELS if model[2] in ("one", "learned")]
OTHERS = [
    other
    for model in ORDERED
    for other in (case(*model, thoughts=0), case(*model, thoughts=1), case(*model, dtype="bfloat16", device="cpu"))
]
"""Against the order of three thoughts on CUDA."""
LOW_RANK = [case(family, False, "three", dtype="float32", device="cpu") for family in FAMILIES]


STEPS = [
    {"what": "step", "family": family, "normalization": normalization, "micro_batches": 4, "iterations": iterations}
    for family, normalization, iterations in [
        *itertools.product(("gpt2", "llama"), ("token", "micro_batch"), (0,)),
        ("llama", "token", 2),
    ]
]


@pytest.fixture(scope="module")
def facts():
    return on_fake_cuda("fake_cuda.training:check", [*ON_CUDA, *OTHERS, *LOW_RANK, *STEPS])


def name(values) -> str:
    return "-".join(map(str, values.values()))


@pytest.mark.parametrize("case", ON_CUDA, ids=name)
def test_a_backward_stays_on_the_device_in_its_precision_and_its_thread_without_a_wait(facts, case):
    # Operations over two devices have raised already.
    found = facts.of(**case)
    assert found["devices"] == ["cuda:0"]
    assert found["dtypes"] == [f"torch.{case['dtype']}"]
    assert found["waits"] == {}
    assert found["in_main_thread"] == [False], "on a GPU the device has a thread of its own"


@pytest.mark.parametrize("other", OTHERS, ids=name)
def test_gradients_become_ready_in_one_order_however_many_thoughts_and_on_the_cpu(facts, other):
    # Else the buckets of two ranks' reductions would hold different parameters.
    assert facts.of(**other)["order"] == facts.of(**case(*list(other.values())[1:4]))["order"]


@pytest.mark.parametrize("on_cpu", LOW_RANK, ids=name)
def test_low_rank_gradients_are_left_to_the_cpu(facts, on_cpu):
    assert facts.of(**on_cpu)["factors_kept"] > 0
    assert facts.of(**{**on_cpu, "device": "cuda"})["factors_kept"] == 0


@pytest.mark.parametrize("step", STEPS, ids=name)
def test_a_step_makes_the_host_wait_once_for_its_metrics(facts, step):
    found = facts.of(**step)
    assert found["counted"]
    assert found["accumulating"] == {}
    assert list(found["fetching"].values()) == [1]
