"""Evaluation, decoding and inspection on CUDA: they run, equal the CPU's, and wait no more than they have to."""

from __future__ import annotations

from typing import Any

import pytest

from fake_cuda.run import on_fake_cuda

FAMILIES = ("gpt2", "llama", "qwen3")
DEVICES = ("cuda", "cpu")


def on_both(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In fp32 on the CPU as well, to compare."""
    return [
        {**case, "device": device}
        for case in cases
        for device in DEVICES
        if case["dtype"] == "float32" or device == "cuda"
    ]


def named(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


def demand_equal(found: Any, expected: Any) -> None:
    """Numbers up to rounding: CUDA's path has other attention and no low-rank products."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            demand_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            demand_equal(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


DECODED = [
    {"what": "decoding", "family": family, "dtype": dtype, "thoughts": thoughts, "new_tokens": new_tokens}
    for family in FAMILIES
    for dtype, thoughts, new_tokens in (("float32", 2, 4), ("float32", 2, 8), ("float32", 4, 4), ("bfloat16", 2, 4))
]
EVALUATED = [
    {"what": "evaluation", "family": "gpt2", "window": "three", "dtype": "float32"},
    {"what": "evaluation", "family": "llama", "window": "last_pass", "dtype": "float32"},
    {"what": "evaluation", "family": "qwen3", "window": "learned", "dtype": "float16"},
]
INSPECTED = [
    {"what": "inspection", "family": "gpt2", "window": "three", "dtype": "float32"},
    {"what": "inspection", "family": "llama", "window": "learned", "dtype": "float32"},
    {"what": "inspection", "family": "qwen3", "window": "embedding_norm", "dtype": "bfloat16"},
]


@pytest.fixture(scope="module")
def facts():
    return on_fake_cuda("fake_cuda.inference:check", on_both([*DECODED, *EVALUATED, *INSPECTED]))


@pytest.mark.parametrize("case", DECODED, ids=named)
def test_decoding_gives_the_tokens_of_the_cpu(facts, case):
    found = facts.of(**case, device="cuda")
    assert found["tokens"]
    if case["dtype"] == "float32":
        assert found["tokens"] == facts.of(**case, device="cpu")["tokens"]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_waits_once_per_token_and_not_for_thoughts(facts, family):
    def waits(thoughts: int, new_tokens: int) -> int:
        case = {
            "what": "decoding",
            "family": family,
            "dtype": "float32",
            "thoughts": thoughts,
            "new_tokens": new_tokens,
        }
        return sum(facts.of(**case, device="cuda")["waits"].values())

    # Whether every answer has ended, which `generate` of transformers asks after each token.
    assert waits(2, 8) - waits(2, 4) == 4
    assert waits(4, 4) == waits(2, 4)
    # Per batch: how prompts end, the preparation of `generate`, and one for each of two layers of its cache.
    assert waits(2, 4) <= 4 + 12


@pytest.mark.parametrize("case", EVALUATED, ids=named)
def test_an_evaluation_gives_what_the_cpu_gives(facts, case):
    found = facts.of(**case, device="cuda")
    assert len(found["predictions"]) == found["metrics"]["n_total"] == 3
    if case["dtype"] == "float32":
        expected = facts.of(**case, device="cpu")
        for part in ("metrics", "predictions"):
            demand_equal(found[part], expected[part])


@pytest.mark.parametrize("case", EVALUATED, ids=named)
def test_the_loss_of_an_evaluation_waits_once_per_batch_and_to_sum_over_ranks(facts, case):
    # Two batches: a loss each, the sums to the device and back.
    assert sum(facts.of(**case, device="cuda")["waits"].values()) <= 4


@pytest.mark.parametrize("case", INSPECTED, ids=named)
def test_an_inspection_with_interventions_finds_what_it_finds_on_the_cpu(facts, case):
    found = facts.of(**case, device="cuda")
    assert {each["by"] for each in found["interventions"]} == {"zero", "mean", "other"}
    if case["dtype"] == "float32":
        demand_equal(found, facts.of(**case, device="cpu"))
