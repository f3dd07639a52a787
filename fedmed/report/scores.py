"""One score a case: what every table, test and figure of the report is made of.

Several classes of one case are averaged first, so that a case counts once however
many organs it shows. A class that is in neither mask has no Dice and does not count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmed.errors import StorageError
from fedmed.report.run_folder import CASES_FILE, Run


@dataclass(frozen=True)
class CaseScore:
    """The result of one case.

    Attributes:
        score: Segmentation: Dice in [0, 1], mean over the classes that can be scored.
            Classification: 1 if right, 0 if wrong. NaN: nothing could be scored.
        assd_mm: Average symmetric surface distance, mean over the classes that have
            one. NaN if none has.
        hd95_mm: 95th percentile of the surface distance, likewise.
        num_organs: Classes that the label shows.
        num_missed: Of those, how many the prediction shows nothing of.
        num_false_alarms: Classes predicted that the label does not show.
        by_class: Class -> Dice; in classification the true class -> `score`.
        label: Classification: the true class, else "".
        probability: Classification: the score written for the case, else NaN.
        patient: Whose case it is, at this site; where that is not known, the case.
    """

    site: str
    case_id: str
    score: float
    assd_mm: float = math.nan
    hd95_mm: float = math.nan
    num_organs: int = 0
    num_missed: int = 0
    num_false_alarms: int = 0
    by_class: Mapping[str, float] = field(default_factory=dict)
    label: str = ""
    probability: float = math.nan
    patient: str = ""


def case_scores(run: Run) -> tuple[CaseScore, ...]:
    """Score every case of a run's result split.

    Args:
        run: As read; its `cases` are the rows of the last round.

    Returns:
        One score a case, sorted by site and case.

    Raises:
        StorageError: If a number in `cases.csv` is not one.
    """
    grouped: dict[tuple[str, str], list[Mapping[str, str]]] = defaultdict(list)
    for row in run.cases:
        grouped[row["site"], row["case_id"]].append(row)
    return tuple(_score(*key, grouped[key]) for key in sorted(grouped))


def mean_of_finite(values: Iterable[float]) -> float:
    """Average the finite values; NaN if there are none.

    Example:
        >>> mean_of_finite([1.0, float("nan"), 3.0])
        2.0
    """
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def std_of_finite(values: Iterable[float]) -> float:
    """Sample standard deviation (n - 1) of the finite values; NaN below two.

    Example:
        >>> std_of_finite([1.0, 3.0]) == 2**0.5
        True
    """
    finite = [value for value in values if math.isfinite(value)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


def area_under_curve(scores: Sequence[CaseScore]) -> float:
    """Area under the ROC curve of a two-class study, ties counted as one half.

    Args:
        scores: Cases with `label` "0" or "1" and `probability` of class 1.

    Returns:
        A value in [0, 1]; NaN unless both classes and all probabilities are there.

    Source:
        Hanley and McNeil, Radiology 143, 1982: the area is the Wilcoxon statistic.
    """
    positive = np.array([s.probability for s in scores if s.label == "1"])
    negative = np.array([s.probability for s in scores if s.label == "0"])
    complete = len(positive) and len(negative)
    if not complete or len(positive) + len(negative) < len(scores):
        return math.nan
    difference = positive[:, None] - negative[None, :]
    return float(
        np.mean(
            (difference > 0)
            + 0.5 * (difference == 0)
            + np.where(np.isnan(difference), np.nan, 0.0)
        )
    )


def _score(site: str, case_id: str, rows: Sequence[Mapping[str, str]]) -> CaseScore:
    if "dice" not in rows[0]:
        return _classified(site, case_id, rows[0])
    by_class = {row.get("class", ""): _number(row, "dice") for row in rows}
    status = [row.get("status", "") for row in rows]
    return CaseScore(
        site,
        case_id,
        mean_of_finite(by_class.values()),
        mean_of_finite(_number(row, "assd_mm") for row in rows),
        mean_of_finite(_number(row, "hd95_mm") for row in rows),
        num_organs=sum(word in {"ok", "missed"} for word in status),
        num_missed=status.count("missed"),
        num_false_alarms=status.count("false_alarm"),
        by_class=by_class,
        patient=_patient(rows[0]),
    )


def _classified(site: str, case_id: str, row: Mapping[str, str]) -> CaseScore:
    label, prediction = row.get("label", ""), row.get("prediction", "")
    known = bool(label and prediction)
    return CaseScore(
        site,
        case_id,
        float(label == prediction) if known else math.nan,
        by_class={label: float(label == prediction)} if known else {},
        label=label,
        probability=_number(row, "score"),
        patient=_patient(row),
    )


def _patient(row: Mapping[str, str]) -> str:
    """Runs of older versions did not write whose case it is."""
    return row.get("subject_id") or row["case_id"]


def _number(row: Mapping[str, str], column: str) -> float:
    text = row.get(column) or ""
    try:
        return float(text) if text else math.nan
    except ValueError as error:
        raise StorageError(
            f"{CASES_FILE}: {column} of case {row['case_id']!r} at site "
            f"{row['site']!r} is {text[:20]!r}, not a number.",
            hint="Leave a cell empty where there is no value.",
        ) from error
