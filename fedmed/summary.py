"""The final numbers of a run: per site, overall, worst site."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.metrics.classification import balanced_accuracy, roc_auc

Row = Mapping[str, Any]

_DISTANCES = ("assd_mm", "hd95_mm")


def score_rows(kind: str, rows: Sequence[Row]) -> float:
    """One number for model selection: mean Dice over cases, or balanced accuracy."""
    if kind == "classification":
        return _balanced_accuracy(rows)
    values = list(_case_means(rows, "dice").values())
    return float(np.mean(values)) if values else float("nan")


def summarise(
    cases_file: Path,
    kind: str,
    *,
    rounds: int,
    held_out: Sequence[str] = (),
    records: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Summarise the last round's test rows; without any, its validation rows.

    Args:
        cases_file: As the engine wrote it.
        kind: "segmentation" or "classification".
        rounds: Number of the last round.
        held_out: Sites that took no part in training. They answer another question,
            so they are averaged apart, unless there is no other site.
        records: Of the rounds; the last one says why a site has no result.

    Returns:
        "split", "metric", "sites" (one mapping each, held-out ones too), "overall"
        (unweighted mean over the sites that trained), "worst_site" (of these), and
        "held_out": "sites", "overall" and "worst_site" of the sites held out, None
        if there is none; and "missing": why a site that failed has no result.
    """
    rows = _last_rows(cases_file, rounds)
    tested = [row for row in rows if row["split"] == "test"]
    split = "test" if tested else "validation"
    chosen = tested or [row for row in rows if row["split"] == "validation"]
    by_site: dict[str, list[Row]] = defaultdict(list)
    for row in chosen:
        by_site[row["site"]].append(row)
    describe = _classified if kind == "classification" else _segmented
    sites = {site: describe(by_site[site]) for site in sorted(by_site)}
    main = "balanced_accuracy" if kind == "classification" else "dice"
    unseen = {site: row for site, row in sites.items() if site in held_out}
    trained = {site: row for site, row in sites.items() if site not in unseen}
    return {
        "split": split,
        "metric": main,
        "sites": sites,
        **_together(trained or sites, main),
        "held_out": {"sites": unseen, **_together(unseen, main)} if unseen else None,
        "missing": {
            site: why
            for site, why in _problems(records, rounds).items()
            if site not in sites
        },
    }


def summarise_unseen(
    unseen_file: Path, kind: str, *, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Summarise what held-out sites got by each rule: rule -> site -> numbers.

    Args:
        unseen_file: As the engine wrote it, or not there.
        kind: As in `summarise`.
        rounds: Number of the last round.
    """
    describe = _classified if kind == "classification" else _segmented
    found: dict[str, dict[str, list[Row]]] = {}
    for row in _last_rows(unseen_file, rounds):
        by_site = found.setdefault(row["rule"], {})
        by_site.setdefault(row["site"], []).append(row)
    return {
        rule: {site: describe(by_site[site]) for site in sorted(by_site)}
        for rule, by_site in found.items()
    }


def _problems(records: Sequence[Mapping[str, Any]], rounds: int) -> dict[str, str]:
    """Why sites failed or were refused in the last round."""
    last = [record for record in records if record["round"] == rounds]
    found = {
        site: str(why)
        for record in last
        for key in ("refused", "failed")
        for site, why in record.get(key, {}).items()
    }
    return dict(sorted(found.items()))


def _together(sites: Mapping[str, Mapping[str, float]], main: str) -> dict[str, Any]:
    known = {site: row for site, row in sites.items() if np.isfinite(row[main])}
    return {
        "overall": _overall(known),
        "worst_site": min(known, key=lambda s: known[s][main]) if known else None,
    }


def _overall(sites: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = {name for values in sites.values() for name in values}
    return {
        name: float(np.mean([values[name] for values in sites.values()]))
        for name in sorted(names - {"num_cases"})
    }


def _last_rows(cases_file: Path, rounds: int) -> list[Row]:
    if not cases_file.exists():
        return []
    with cases_file.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["round"]) == rounds]


def _case_means(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Mean over the classes that a case holds; a missed class counts, as 0 Dice."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[name] not in {"", None} and np.isfinite(float(row[name])):
            values[row["case_id"]].append(float(row[name]))
    return {case: float(np.mean(found)) for case, found in values.items()}


def _segmented(rows: Sequence[Row]) -> dict[str, float]:
    dice = list(_case_means(rows, "dice").values())
    summary = {
        "dice": float(np.mean(dice)) if dice else float("nan"),
        "dice_std": float(np.std(dice, ddof=1)) if len(dice) > 1 else 0.0,
        "num_cases": float(len({row["case_id"] for row in rows})),
        "num_missed": float(sum(row["status"] == "missed" for row in rows)),
    }
    for name in _DISTANCES:
        found = list(_case_means(rows, name).values())
        summary[name] = float(np.mean(found)) if found else float("nan")
    return summary


def _classified(rows: Sequence[Row]) -> dict[str, float]:
    right = [int(row["label"]) == int(row["prediction"]) for row in rows]
    return {
        "accuracy": float(np.mean(right)),
        "balanced_accuracy": _balanced_accuracy(rows),
        "auc": _auc(rows),
        "num_cases": float(len(rows)),
    }


def _balanced_accuracy(rows: Sequence[Row]) -> float:
    labels_B = np.array([int(row["label"]) for row in rows])
    is_right_B = labels_B == [int(row["prediction"]) for row in rows]
    return balanced_accuracy(is_right_B, labels_B)


def _auc(rows: Sequence[Row]) -> float:
    labels_B = np.array([int(row["label"]) for row in rows])
    if {*labels_B.tolist()} != {0, 1}:
        return float("nan")  # one class only, or more than two
    score_B = np.array([float(row["score"]) for row in rows])
    return roc_auc(np.stack([1 - score_B, score_B], axis=1), labels_B)
