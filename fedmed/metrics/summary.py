"""From the values of cases to the rows of a results table.

A site is one hospital whatever its size, so the mean over sites is unweighted. Stages:
`summarise_site` runs where the cases are, `summarise_sites` where the sites meet, and
`gain_over` compares two methods, for example with training each site separately.

A NaN value is a case in which the class is absent: it is left out and counted. A missed
class and a false alarm are in the mean, by the policy of `fedmed.metrics.case_scores`,
and counted besides.

Source:
    Rows of the results tables in Liu, Dou, Yu, Heng, MS-Net, IEEE TMI 39(9), 2020:
    mean and std over the cases of a site, unweighted mean over sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedmed.errors import DataError
from fedmed.message import SiteId
from fedmed.metrics.case_scores import ClassScore

Metric = Literal["dice", "assd_mm", "asd_mm_pred2gt", "asd_mm_gt2pred", "hd95_mm"]

HIGHER_IS_BETTER: dict[str, bool] = {
    "dice": True,
    "assd_mm": False,
    "asd_mm_pred2gt": False,
    "asd_mm_gt2pred": False,
    "hd95_mm": False,
}


@dataclass(frozen=True)
class SiteSummary:
    """One metric at one site, over its cases.

    Attributes:
        num_cases: Cases in `mean` and `std`.
        num_absent: Cases left out because the class is absent.
        num_missed: Cases in which the class was missed; they are in the mean.
        num_false_alarms: Cases in which it was found but is not; likewise.
        mean: NaN without cases.
        std: Population standard deviation (division by n, as `numpy.std`); NaN with
            fewer than two cases, which show no spread.
    """

    num_cases: int
    num_absent: int
    num_missed: int
    num_false_alarms: int
    mean: float
    std: float


@dataclass(frozen=True)
class StudySummary:
    """One metric of one method, over sites.

    Attributes:
        sites: In sorted order.
        higher_is_better: True for Dice, False for distances.
        mean_over_sites: Unweighted mean of the sites' means, sites without cases left
            out; NaN if none is left.
        worst_site: The site with the worst mean, the first of equals; None without any.
        worst_mean: Its mean.
        sites_without_cases: Sites that are not in the numbers above.
    """

    sites: dict[SiteId, SiteSummary]
    higher_is_better: bool
    mean_over_sites: float
    worst_site: SiteId | None
    worst_mean: float
    sites_without_cases: tuple[SiteId, ...]


@dataclass(frozen=True)
class Gain:
    """How much better one method is than another; positive is better, always.

    Attributes:
        per_site: In sorted order; NaN where either method has no cases.
        mean_over_sites: Unweighted mean over the sites that are not NaN.
        worst_site: The site that gains least, or loses most.
        worst_gain: Its gain.
        num_sites_better: Sites that gain more than 0.
    """

    per_site: dict[SiteId, float]
    mean_over_sites: float
    worst_site: SiteId | None
    worst_gain: float
    num_sites_better: int


def summarise_site(
    values: Iterable[float], *, num_missed: int = 0, num_false_alarms: int = 0
) -> SiteSummary:
    """Summarise one metric over the cases of one site.

    Args:
        values: One per case, NaN if the class is absent.
        num_missed: Passed on.
        num_false_alarms: Passed on.

    Raises:
        DataError: If a value is infinite: no metric of ours ever is.

    Example:
        >>> row = summarise_site([0.8, 0.9, float("nan")])
        >>> row.num_cases, row.num_absent, round(row.mean, 3), round(row.std, 3)
        (2, 1, 0.85, 0.05)
    """
    all_values = np.fromiter(values, dtype=np.float64)
    if np.isinf(all_values).any():
        raise DataError(
            "A case has an infinite score.",
            hint="An empty mask counts as the image's diagonal; see case_scores.",
        )
    present = all_values[~np.isnan(all_values)]
    return SiteSummary(
        num_cases=present.size,
        num_absent=all_values.size - present.size,
        num_missed=num_missed,
        num_false_alarms=num_false_alarms,
        mean=float(present.mean()) if present.size else float("nan"),
        std=float(present.std()) if present.size > 1 else float("nan"),
    )


def summarise_class(
    cases: Iterable[Sequence[ClassScore]], *, metric: Metric, class_index: int
) -> SiteSummary:
    """Summarise one metric of one class over the cases of one site.

    Args:
        cases: What `score_case` gave for each case.
        metric: A field of `ClassScore`.
        class_index: The label value.

    Raises:
        DataError: If a case has no score for the class.
    """
    scores = [_score_of(case, class_index) for case in cases]
    return summarise_site(
        [getattr(score, metric) for score in scores],
        num_missed=sum(score.status == "missed" for score in scores),
        num_false_alarms=sum(score.status == "false_alarm" for score in scores),
    )


def summarise_all_classes(
    cases: Iterable[Sequence[ClassScore]], *, metric: Metric
) -> SiteSummary:
    """Summarise one metric, averaged over the classes of each case first.

    The average of a case is the unweighted mean over its classes, absent ones left
    out. A case counts as missed, or as a false alarm, if any of its classes does.
    """
    cases = list(cases)
    return summarise_site(
        [
            _mean_of_present([getattr(score, metric) for score in case])
            for case in cases
        ],
        num_missed=sum(any(s.status == "missed" for s in case) for case in cases),
        num_false_alarms=sum(
            any(s.status == "false_alarm" for s in case) for case in cases
        ),
    )


def summarise_sites(
    sites: Mapping[SiteId, SiteSummary], *, higher_is_better: bool
) -> StudySummary:
    """Summarise one metric over sites, each counting once.

    Args:
        sites: Site -> its summary, in any order.
        higher_is_better: `HIGHER_IS_BETTER[metric]`.
    """
    ordered = {site: sites[site] for site in sorted(sites)}
    means = {site: row.mean for site, row in ordered.items()}
    worst_site, worst_mean = _worst(means, higher_is_better=higher_is_better)
    return StudySummary(
        sites=ordered,
        higher_is_better=higher_is_better,
        mean_over_sites=_mean_of_present(list(means.values())),
        worst_site=worst_site,
        worst_mean=worst_mean,
        sites_without_cases=tuple(s for s, mean in means.items() if np.isnan(mean)),
    )


def gain_over(summary: StudySummary, reference: StudySummary) -> Gain:
    """Say how much better a method is than a reference, site by site.

    Args:
        summary: The method.
        reference: What it is compared with, e.g. training each site separately, on
            the same sites and the same metric.

    Raises:
        DataError: If the two are not about the same sites and direction.
    """
    comparable = summary.higher_is_better == reference.higher_is_better
    if summary.sites.keys() != reference.sites.keys() or not comparable:
        raise DataError(
            f"A summary of the sites {sorted(summary.sites)} cannot be compared with "
            f"one of {sorted(reference.sites)}, or the metrics differ.",
            hint="Evaluate both methods on the same sites with the same metric.",
        )
    sign = 1.0 if summary.higher_is_better else -1.0
    per_site = {
        site: sign * (row.mean - reference.sites[site].mean)
        for site, row in summary.sites.items()
    }
    worst_site, worst_gain = _worst(per_site, higher_is_better=True)
    return Gain(
        per_site=per_site,
        mean_over_sites=_mean_of_present(list(per_site.values())),
        worst_site=worst_site,
        worst_gain=worst_gain,
        num_sites_better=sum(gain > 0 for gain in per_site.values()),
    )


def _score_of(case: Sequence[ClassScore], class_index: int) -> ClassScore:
    for score in case:
        if score.class_index == class_index:
            return score
    raise DataError(
        f"A case has no score for class {class_index}, only for "
        f"{[score.class_index for score in case]}.",
        hint="Score all cases of a study with the same class names.",
    )


def _mean_of_present(values: Sequence[float]) -> float:
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")


def _worst(
    values: Mapping[SiteId, float], *, higher_is_better: bool
) -> tuple[SiteId | None, float]:
    """Find the worst value that is not NaN, the first site of equals."""
    present = {site: value for site, value in values.items() if not np.isnan(value)}
    if not present:
        return None, float("nan")
    pick = min if higher_is_better else max
    site = pick(present, key=lambda site: present[site])
    return site, present[site]
