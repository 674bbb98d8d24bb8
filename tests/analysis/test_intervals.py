"""Intervals and tests against published values, hand computations and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coconut_ds.analysis.intervals import bootstrap, fisher, holm, mann_whitney, mcnemar, percentile_interval, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By hand: at 0 the upper end is z^2 / (n + z^2) with z^2 = 3.8415, and 10 of 10 is its mirror image.
        (0, 10, 0.0, 3.8415 / 13.8415),
        (10, 10, 10 / 13.8415, 1.0),
    ],
)
def test_wilson_intervals(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def answers(text: str) -> np.ndarray:
    return np.array([letter == "x" for letter in text])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("xxxx....", "xxxx....", (0, 0, 1.0)),
        ("xxx...xx", "...xxxxx", (3, 3, 1.0)),
        (".....xx", "xxxxxxx", (0, 5, 2 / 2**5)),
        ("xxxxxxxxx.x", ".........xx", (9, 1, 2 * (1 + 10) / 2**10)),
        ("xxx.", "...x", (3, 1, 2 * (1 + 4) / 2**4)),
    ],
)
def test_mcnemar_is_the_binomial_of_the_answers_that_differ(first, second, expected):
    assert mcnemar(answers(first), answers(second)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not fall below the one before.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.6, 0.7, 0.001], [1.0, 1.0, 0.003]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted)


def test_one_seed_resamples_questions_alone():
    hits = np.arange(200)[None] < 150
    draws = bootstrap({"a": hits}, 10_000, 0)["a"]
    assert draws.shape == (10_000,)
    assert draws.mean() == pytest.approx(0.75, abs=0.002)
    # The binomial's standard deviation; that of 10,000 draws is known to 0.7%.
    assert draws.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 200), rel=0.03)
    # Seeds that answer alike add nothing.
    assert np.array_equal(bootstrap({"a": np.repeat(hits, 3, axis=0)}, 10_000, 0)["a"], draws)


def test_the_spread_over_seeds_counts():
    # Three seeds are right everywhere, one nowhere: questions say nothing, the mean of 4 drawn seeds is binomial.
    draws = bootstrap({"a": np.repeat([[True], [True], [True], [False]], 50, axis=1)}, 10_000, 0)["a"]
    assert set(draws.tolist()) == {0, 0.25, 0.5, 0.75, 1}
    assert draws.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 4), rel=0.03)
    # One seed of two is right on the first half, the other on the second: 0, 1 or 2 of 50 questions each.
    crossed = np.array([[True] * 50 + [False] * 50, [False] * 50 + [True] * 50])
    variance = bootstrap({"a": crossed}, 10_000, 0)["a"].var()
    # Where the drawn seeds are the same, half of the time, the questions vary by 1/400; otherwise not at all.
    assert variance == pytest.approx(0.25 / 100 / 2, rel=0.06)


def test_groups_share_questions_and_not_seeds():
    hits = np.random.default_rng(1).random((1, 100)) < 0.5
    same = bootstrap({"a": hits, "b": hits}, 2000, 0)
    assert not (same["a"] - same["b"]).any()
    opposite = np.repeat([[True], [False]], 20, axis=1)
    apart = bootstrap({"a": opposite, "b": opposite}, 10_000, 0)
    # Means of two seeds, 1/8 of variance each: their difference has 1/4 when they are independent.
    assert (apart["a"] - apart["b"]).var() == pytest.approx(0.25, rel=0.06)


def test_same_seed_same_draws_whatever_else_is_compared():
    rng = np.random.default_rng(2)
    a, b = rng.random((3, 60)) < 0.8, rng.random((2, 60)) < 0.5
    alone = bootstrap({"a": a}, 1500, 0)["a"]
    assert np.array_equal(bootstrap({"b": b, "a": a}, 1500, 0)["a"], alone)
    assert not np.array_equal(bootstrap({"a": a}, 1500, 1)["a"], alone)


@pytest.mark.parametrize(("share", "n_seeds"), [(1.0, 1), (1.0, 3), (0.0, 3), (0.7, 1), (0.7, 5)])
def test_an_interval_contains_the_mean(share, n_seeds):
    hits = np.random.default_rng(3).random((n_seeds, 80)) < share
    low, high = percentile_interval(bootstrap({"a": hits}, 1000, 0)["a"])
    assert low <= hits.mean() <= high
    assert (high - low > 0.05) == (0 < share < 1)


def test_percentiles():
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


def test_ten_seeds_cover_what_they_should():
    """Questions and seeds both differ: 95% is meant, and 10 seeds come near it."""
    rng = np.random.default_rng(4)

    def shares(n_seeds: int, n_questions: int) -> np.ndarray:
        return 1 / (1 + np.exp(-1 - 0.5 * rng.normal(size=(n_seeds, 1)) - rng.normal(size=n_questions)))

    truth = shares(1000, 1000).mean()
    covered = []
    for _ in range(300):
        expected = shares(10, 100)
        low, high = percentile_interval(bootstrap({"a": rng.random(expected.shape) < expected}, 400, 0)["a"])
        covered.append(low <= truth <= high)
    # Three standard errors of 300 intervals are 0.04.
    assert 0.88 < np.mean(covered) < 0.99


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        # By counting the divisions of five and five: one is the most extreme on each side.
        ([1, 2, 3, 4, 5], [6, 7, 8, 9, math.inf], 2 / math.comb(10, 5)),
        ([1, 1, 1, 1, 1], [math.inf] * 5, 2 / math.comb(10, 5)),
        ([math.inf] * 5, [math.inf] * 5, 1.0),
        # Of the 6 divisions of 1, 1, 2, 2 one has both 1s in front, one both 2s.
        ([1, 1], [2, 2], 2 / 6),
        ([1, 2], [1, 2], 1.0),
    ],
)
def test_mann_whitney_is_exact_with_ties(first, second, p):
    assert mann_whitney(first, second) == pytest.approx(p)
    assert mann_whitney(second, first) == pytest.approx(p)


def test_fisher():
    # The lady tasting tea: 3 of 4 cups, (1 + 16) / 70 on one side.
    assert fisher(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert fisher(5, 5, 0, 5) == pytest.approx(2 / math.comb(10, 5))
    assert fisher(5, 5, 5, 5) == 1.0
