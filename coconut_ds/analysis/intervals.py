"""Intervals and tests of accuracies and their differences, from arrays of right and wrong answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_DIVISIONS = 20_000
_DRAWS_AT_ONCE = 1000  # their weights are in memory together: 8 MB for 1000 questions


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share (Newcombe 1998, method 3); `total` is at least 1."""
    # Imported here, because scipy belongs to an extra and takes a second to load.
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(
    hits: Mapping[str, NDArray[np.bool_ | np.floating]], draws: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Mean accuracies of resampled groups, (draws,) each; or means of other numbers.

    `hits` are (seeds, questions) of each group, the same questions in the same order. Every draw resamples the
    questions and, crossed with them, the seeds of each group, with replacement (Owen 2007, the pigeonhole bootstrap).
    All groups get the same questions, so draws of two groups can be subtracted; seeds are drawn for each group
    separately. A group's draws do not depend on the other groups.
    """
    n_questions = next(iter(hits.values())).shape[1]
    questions = np.random.default_rng(seed)
    seeds = {name: np.random.default_rng([seed, *name.encode()]) for name in hits}
    means: dict[str, list[NDArray[np.float64]]] = {name: [] for name in hits}
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        question_weights = _weights(questions, n_questions, size)
        for name, group in hits.items():
            seed_weights = _weights(seeds[name], len(group), size)
            sums = ((question_weights @ group.T.astype(float)) * seed_weights).sum(axis=1)
            means[name].append(sums / group.size)
    return {name: np.concatenate(parts) for name, parts in means.items()}


def _weights(rng: np.random.Generator, count: int, draws: int) -> NDArray[np.float64]:
    """How often each of `count` items is taken in a draw of `count` with replacement, (draws, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)


def percentile_interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the middle 95% of the draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Questions that only `first` and only `second` answered right, and the two-sided exact p-value (McNemar 1947).

    Under the null hypothesis either model is equally likely to be right on a question on which they differ. Without
    such a question p is 1.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, differing).pvalue) if differing else 1.0


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value that neither sample tends to be larger (Mann and Whitney 1947), with ties too.

    All ways to divide the values are gone through up to 20,000 of them (8 and 8 values), beyond that as many drawn.
    Each sample has two values or more.
    """
    from scipy.stats import PermutationMethod, mannwhitneyu

    every_way = PermutationMethod(n_resamples=_DIVISIONS, random_state=0)
    return float(mannwhitneyu(first, second, method=every_way).pvalue)


def fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    """Two-sided p-value that two shares, `first` of `of_first` and `second` of `of_second`, are one (Fisher 1934)."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[first, of_first - first], [second, of_second - second]]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for multiple tests (Holm 1979), in the given order."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()
