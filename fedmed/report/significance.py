"""Is the difference between two strategies more than chance? Paired, by case.

Every case is segmented by both strategies, so the comparison is within cases: it is
blind to some scans being harder than others. Seeds are averaged first: three seeds of
one case are not three patients. Testing many strategies finds differences by luck;
Holm's correction keeps the chance of any false finding in a family at its level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedmed.report.rows import ALONE, Scores, group_rows, mean_over_seeds, row_label
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.scores import mean_of_finite
from fedmed.seeds import numpy_rng

EXACT_UP_TO = 60
"""Pairs up to which the distribution of the rank sum is enumerated."""

NUM_RESAMPLES = 2000
"""Bootstrap draws behind a confidence interval."""

Pairs = dict[str, np.ndarray]
"""Site -> differences, one a case."""


@dataclass(frozen=True)
class PairedTest:
    """One strategy against the reference, on the same cases.

    Attributes:
        row: Label of the strategy's row in the result table.
        site: The site, or "" for all sites together.
        difference: Mean over cases of (strategy - reference); for all sites, the
            unweighted mean over sites of that. In [-1, 1].
        low: Lower end of its 95 % bootstrap interval, cases drawn within sites.
        high: Upper end.
        num_cases: Pairs.
        num_better: Pairs in which the strategy is better.
        num_worse: Pairs in which it is worse; the rest are equal.
        seed_differences: `difference` of each seed that both have.
        p: Two-sided Wilcoxon signed-rank p-value; NaN if no pair differs.
        p_holm: The same after Holm's correction within its family: all strategies
            over all sites, or all strategies at each single site.
    """

    row: str
    site: str
    difference: float
    low: float
    high: float
    num_cases: int
    num_better: int
    num_worse: int
    seed_differences: tuple[float, ...]
    p: float
    p_holm: float = math.nan


def paired_tests(
    comparison: Comparison, reference: str
) -> tuple[tuple[PairedTest, ...], tuple[PairedTest, ...]]:
    """Test every strategy against one of them.

    Args:
        comparison: The runs.
        reference: Name of the strategy to test against.

    Returns:
        Tests over all sites, one a strategy; and tests at each site. Each of the two
        is one family for Holm's correction. Empty if nothing can be paired.
    """
    groups = group_rows(comparison)
    overall: list[PairedTest] = []
    by_site: list[PairedTest] = []
    for group in groups:
        against = _partner(groups, group, reference)
        if against is None:
            continue
        pairs = _differences(mean_over_seeds(group), mean_over_seeds(against))
        by_seed = _seed_pairs(group, against)
        label = row_label(group[0])
        if pairs:
            overall.append(_test(label, "", pairs, by_seed))
        for site, found in pairs.items():
            at_site = [{site: seed[site]} for seed in by_seed if site in seed]
            by_site.append(_test(label, site, {site: found}, at_site))
    return _corrected(overall), _corrected(by_site)


def planned_tests(
    comparison: Comparison, plan: Sequence[tuple[str, str, str]]
) -> tuple[PairedTest, ...]:
    """Test what was claimed before the results were seen; one family for Holm.

    Args:
        comparison: The runs.
        plan: Claims: the row that should be better, the other one, and the site, or ""
            for the mean over sites. Rows by their labels.

    Returns:
        One test a claim, in the same order; without any pair all values are NaN.
    """
    groups = {row_label(group[0]): group for group in group_rows(comparison)}
    tests = []
    for better, worse, site in plan:
        ours, theirs = groups.get(better, ()), groups.get(worse, ())
        pairs = _at(site, _differences(mean_over_seeds(ours), mean_over_seeds(theirs)))
        by_seed = [_at(site, found) for found in _seed_pairs(ours, theirs)]
        tests.append(_test(better, site, pairs, [p for p in by_seed if p]))
    return _corrected(tests)


def _at(site: str, pairs: Pairs) -> Pairs:
    return {name: found for name, found in pairs.items() if site in {"", name}}


def choose_reference(comparison: Comparison) -> str | None:
    """Choose what to test against: as asked, else FedAvg, training alone, the first.

    Returns:
        A strategy of the comparison; None if there are not two to compare.
    """
    strategies = comparison.strategies
    if len(group_rows(comparison)) < 2:
        return None
    wished = (comparison.reference, "fedavg", ALONE)
    return next((name for name in wished if name in strategies), strategies[0])


def wilcoxon_p(differences: np.ndarray) -> float:
    r"""Two-sided p-value of the Wilcoxon signed-rank test.

    Zero differences are dropped, ties share their mean rank. Up to `EXACT_UP_TO`
    pairs the distribution of $W = \sum_{d_i > 0} r_i$ under all $2^n$ signs is
    enumerated, which is exact with ties too; beyond, a normal with the variance
    $\sum r_i^2 / 4$ of those very ranks.

    Args:
        differences: (n,), one a case.

    Returns:
        A value in (0, 1]; NaN if no difference is left.

    Source:
        Wilcoxon, Biometrics Bulletin 1(6), 1945.

    Example:
        >>> wilcoxon_p(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
        0.0625
    """
    kept = differences[np.isfinite(differences) & (differences != 0)]
    if not len(kept):
        return math.nan
    ranks = _mean_ranks(np.abs(kept))
    positive = float(ranks[kept > 0].sum())
    if len(kept) > EXACT_UP_TO:
        centre, spread = ranks.sum() / 2, math.sqrt(float((ranks**2).sum()) / 4)
        return math.erfc(abs(positive - centre) / spread / math.sqrt(2))
    return _exact_p(np.rint(2 * ranks).astype(int), round(2 * positive))


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Correct p-values for their number, step by step from the smallest.

    $\tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1) p_{(j)})$; NaN stays NaN and
    is not counted in $m$.

    Args:
        p_values: One family of tests.

    Returns:
        Corrected values in the same order.

    Source:
        Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if math.isfinite(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for step, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - step) * p))
        corrected[index] = largest
    return corrected


def _partner(
    groups: Sequence[tuple[Entry, ...]], group: tuple[Entry, ...], reference: str
) -> tuple[Entry, ...] | None:
    """Find the reference's runs that were tested the same way.

    Training alone is tested in one way only, so every row may be held against it.
    """
    if group[0].strategy == reference:
        return None
    left_out = group[0].held_out is not None
    same = [g for g in groups if g[0].strategy == reference]
    same.sort(key=lambda g: (g[0].held_out is not None) != left_out)
    if reference != ALONE:
        same = [g for g in same if (g[0].held_out is not None) == left_out]
    return same[0] if same else None


def _differences(scores: Scores, reference: Scores) -> Pairs:
    """Pair by site and case; what only one of the two has does not count."""
    pairs = {}
    for site in sorted(set(scores) & set(reference)):
        shared = sorted(set(scores[site]) & set(reference[site]))
        found = np.array([scores[site][c] - reference[site][c] for c in shared])
        found = np.round(found[np.isfinite(found)], 12)  # so that ties are ties
        if len(found):
            pairs[site] = found
    return pairs


def _seed_pairs(group: Sequence[Entry], against: Sequence[Entry]) -> list[Pairs]:
    """Pair seed by seed: what would one have seen with this seed alone?"""
    found = []
    for seed in sorted({entry.seed for entry in group}):
        ours = [entry for entry in group if entry.seed == seed]
        theirs = [entry for entry in against if entry.seed == seed]
        pairs = _differences(mean_over_seeds(ours), mean_over_seeds(theirs))
        if pairs:
            found.append(pairs)
    return found


def _mean_difference(pairs: Pairs) -> float:
    return mean_of_finite(float(np.mean(found)) for found in pairs.values())


def _test(label: str, site: str, pairs: Pairs, by_seed: list[Pairs]) -> PairedTest:
    pooled = np.concatenate([np.zeros(0), *pairs.values()])
    low, high = _bootstrap_interval(pairs)
    return PairedTest(
        label,
        site,
        _mean_difference(pairs),
        low,
        high,
        len(pooled),
        int(np.sum(pooled > 0)),
        int(np.sum(pooled < 0)),
        tuple(_mean_difference(found) for found in by_seed),
        wilcoxon_p(pooled),
    )


def _bootstrap_interval(pairs: Pairs) -> tuple[float, float]:
    """95 % percentile interval of the mean over sites of the mean over cases."""
    if min((len(found) for found in pairs.values()), default=0) < 2:
        return math.nan, math.nan
    draws = np.zeros(NUM_RESAMPLES)
    for site, found in pairs.items():
        rng = numpy_rng(0, "report", "bootstrap", site)
        chosen = rng.integers(len(found), size=(NUM_RESAMPLES, len(found)))
        draws += found[chosen].mean(axis=1) / len(pairs)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _corrected(tests: Sequence[PairedTest]) -> tuple[PairedTest, ...]:
    corrected = holm([test.p for test in tests])
    return tuple(
        replace(test, p_holm=p) for test, p in zip(tests, corrected, strict=True)
    )


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[which]
    return ranks


def _exact_p(doubled_ranks: np.ndarray, doubled_positive: int) -> float:
    """Enumerate the rank sum under random signs; ranks doubled to be whole."""
    total = int(doubled_ranks.sum())
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    for rank in doubled_ranks:
        moved = np.zeros_like(chance)
        moved[rank:] = chance[: total + 1 - rank]
        chance = (chance + moved) / 2
    tail = min(doubled_positive, total - doubled_positive)
    return min(1.0, 2 * float(chance[: tail + 1].sum()))
