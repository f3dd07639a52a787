"""Is the difference between two strategies more than chance? Paired, by patient.

Every case is segmented by both strategies, so the comparison is within cases: it is
blind to some scans being harder than others. Seeds are averaged first: three seeds of
one case are not three patients, and nor are three scans of one: tests and intervals
take the patient as their unit. Testing many strategies finds differences by luck;
Holm's correction keeps the chance of any false finding in a family at its level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedmed.report.rows import (
    ALONE,
    group_rows,
    mean_over_seeds,
    numbering_sites,
    result_scores,
    row_label,
    way_of_testing,
)
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.scores import mean_of_finite
from fedmed.seeds import numpy_rng

EXACT_UP_TO = 60
"""Pairs up to which the distribution of the rank sum is enumerated."""

NUM_RESAMPLES = 2000
"""Bootstrap draws behind a confidence interval."""

OWN_SITE = "own site alone"
"""Trained on one site, tested there: the diagonal of a cross-site table."""

OTHER_SITE = "one other site alone"
"""Trained on one site, tested elsewhere: a mean over the training sites."""


@dataclass(frozen=True)
class Differences:
    """What two strategies differ by at one site.

    Attributes:
        cases: (n,), one a case.
        patients: (n,), the number of each case's patient, from 0.
    """

    cases: np.ndarray
    patients: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """(m,), cases of each patient."""
        return np.bincount(self.patients)

    @property
    def by_patient(self) -> np.ndarray:
        """(m,), mean over each patient's cases."""
        sums = np.bincount(self.patients, weights=self.cases)
        # Rounded so that ties are ties.
        means: np.ndarray = np.round(sums / self.counts, 12)
        return means


Pairs = dict[str, Differences]
"""Site -> differences."""


@dataclass(frozen=True)
class PairedTest:
    """One strategy against the reference, on the same cases.

    Attributes:
        row: Label of the strategy's row in the result table.
        site: The site, or "" for all sites together.
        difference: Mean over cases of (strategy - reference); for all sites, the
            unweighted mean over sites of that. In [-1, 1].
        low: Lower end of its 95 % bootstrap interval, patients drawn within sites with
            all of their cases.
        high: Upper end.
        num_cases: Pairs.
        num_better: Patients in whose cases the strategy is better on average.
        num_worse: Patients in whose cases it is worse; the rest are equal.
        seed_differences: `difference` of each seed that both have.
        p: Two-sided Wilcoxon signed-rank p-value over patients; NaN if none differs.
        leaning: Which way the ranks lean that `p` is of: 1, -1, or 0 for neither. With
            sites of unequal size it need not be the sign of `difference`, in which each
            site counts alike.
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
    num_patients: int = 0
    leaning: int = 0

    @property
    def is_of_one_mind(self) -> bool:
        """Whether the ranks of patients lean the way of the mean over sites."""
        return self.leaning * self.difference > 0


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
        pairs = _differences(group, against)
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
            for the mean over sites. Rows by their labels; of methods that trained on
            one site at a time also "method (own site alone)", the mean over models
            tested where they trained, and "method (one other site alone)", tested
            elsewhere.

    Returns:
        One test a claim, in the same order; without any pair all values are NaN.
    """
    groups = {row_label(group[0]): group for group in group_rows(comparison)}
    groups |= _own_and_other(comparison)
    tests = []
    for better, worse, site in plan:
        ours, theirs = groups.get(better, ()), groups.get(worse, ())
        pairs = _at(site, _differences(ours, theirs))
        by_seed = [_at(site, found) for found in _seed_pairs(ours, theirs)]
        tests.append(_test(better, site, pairs, [p for p in by_seed if p]))
    return _corrected(tests)


def _own_and_other(comparison: Comparison) -> dict[str, tuple[Entry, ...]]:
    """Divide cross-site runs by whether a case is of the site that trained."""
    found: dict[str, list[Entry]] = {}
    for entry in comparison.entries:
        for what in (OWN_SITE, OTHER_SITE) if entry.trained_on else ():
            cases = tuple(
                row
                for row in entry.run.cases
                if (row["site"] == entry.trained_on) == (what == OWN_SITE)
            )
            label = f"{entry.strategy} ({what})"
            part = replace(entry, run=replace(entry.run, cases=cases))
            found.setdefault(label, []).append(part)
    return {label: tuple(parts) for label, parts in found.items()}


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


def _leaning(differences: np.ndarray) -> int:
    """Sign of the rank sum of positive differences against that of negative ones."""
    kept = differences[np.isfinite(differences) & (differences != 0)]
    ranks = _mean_ranks(np.abs(kept)) if len(kept) else np.zeros(0)
    return int(np.sign((ranks * np.sign(kept)).sum()))


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
    way = way_of_testing(group[0])
    same = [g for g in groups if g[0].strategy == reference]
    same.sort(key=lambda g: way_of_testing(g[0]) != way)
    if reference != ALONE:
        same = [g for g in same if way_of_testing(g[0]) == way]
    return same[0] if same else None


def _differences(group: Sequence[Entry], against: Sequence[Entry]) -> Pairs:
    """Pair by site and case; what only one of the two has does not count."""
    scores, reference = mean_over_seeds(group), mean_over_seeds(against)
    unknown = {s for entry in (*group, *against) for s in numbering_sites(entry)}
    patients = {
        (score.site, score.case_id): score.patient
        for entry in group
        for score in result_scores(entry)
    }
    pairs = {}
    for site in sorted((set(scores) & set(reference)) - unknown):
        found = {
            case: scores[site][case] - reference[site][case]
            for case in sorted(set(scores[site]) & set(reference[site]))
        }
        finite = {case: value for case, value in found.items() if math.isfinite(value)}
        if finite:
            whose = [patients[site, case] for case in finite]
            _, numbers = np.unique(np.array(whose), return_inverse=True)
            values = np.round(np.array(list(finite.values())), 12)
            pairs[site] = Differences(values, numbers)
    return pairs


def _seed_pairs(group: Sequence[Entry], against: Sequence[Entry]) -> list[Pairs]:
    """Pair seed by seed: what would one have seen with this seed alone?"""
    found = []
    for seed in sorted({entry.seed for entry in group}):
        ours = [entry for entry in group if entry.seed == seed]
        theirs = [entry for entry in against if entry.seed == seed]
        pairs = _differences(ours, theirs)
        if pairs:
            found.append(pairs)
    return found


def _mean_difference(pairs: Pairs) -> float:
    return mean_of_finite(float(np.mean(found.cases)) for found in pairs.values())


def _test(label: str, site: str, pairs: Pairs, by_seed: list[Pairs]) -> PairedTest:
    pooled = np.concatenate([np.zeros(0), *(p.by_patient for p in pairs.values())])
    low, high = _bootstrap_interval(pairs)
    return PairedTest(
        label,
        site,
        _mean_difference(pairs),
        low,
        high,
        sum(len(found.cases) for found in pairs.values()),
        int(np.sum(pooled > 0)),
        int(np.sum(pooled < 0)),
        tuple(_mean_difference(found) for found in by_seed),
        wilcoxon_p(pooled),
        num_patients=len(pooled),
        leaning=_leaning(pooled),
    )


def _bootstrap_interval(pairs: Pairs) -> tuple[float, float]:
    """95 % percentile interval of the mean over sites of the mean over cases.

    Patients are drawn with all of their cases, since these are more alike than those
    of different patients.

    Source:
        Davison and Hinkley, Bootstrap Methods and their Application, 1997, 3.8.
    """
    if min((len(found.counts) for found in pairs.values()), default=0) < 2:
        return math.nan, math.nan
    draws = np.zeros(NUM_RESAMPLES)
    for site, found in pairs.items():
        rng = numpy_rng(0, "report", "bootstrap", site)
        size = len(found.counts)
        chosen = rng.integers(size, size=(NUM_RESAMPLES, size))
        sums = np.bincount(found.patients, weights=found.cases)
        means = sums[chosen].sum(axis=1) / found.counts[chosen].sum(axis=1)
        draws += means / len(pairs)
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
