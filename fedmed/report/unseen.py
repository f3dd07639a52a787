"""What methods with normalisation per site did at hospitals they never saw, by rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedmed.report.grid import Box, Grid, NotedGrid
from fedmed.report.rows import Row, make_rows
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.tables import percent_with_spread
from fedmed.report.wording import NO_VALUE, listing

NEEDS: Mapping[str, str] = {
    "adabn": "needed nothing of any other hospital: initial scale and shift, running "
    "statistics re-estimated on the newcomer's own images without labels.",
    "average": "needed what the training sites keep of normalisation and adapters, "
    "sent once, and nothing of the newcomer: the average of it.",
    "average_adabn": "needed what average needs, and the newcomer's own images without "
    "labels: the average, but running statistics re-estimated there.",
    "nearest": "needed what one training site keeps, and the public cards of all: the "
    "site whose modality, vendor, field strength and further facts are most alike.",
    "ensemble": "needed what every training site keeps, all of it at the newcomer: "
    "the mean of the predictions with each of them.",
}
"""Rule -> what it had to know, after "Rule x"."""


def unseen_table(comparison: Comparison) -> NotedGrid | None:
    """Lay out the results at held-out sites by rule.

    Args:
        comparison: One run or several.

    Returns:
        One row a strategy and rule, one column a site, and what each rule needed to
        know; None if no run tried more than `adabn`.
    """
    rules = list(
        dict.fromkeys(row["rule"] for e in comparison.entries for row in e.run.unseen)
    )
    if not rules:
        return None
    found = {rule: _rows_of(comparison, rule) for rule in rules}
    labels = list(dict.fromkeys(row.label for rows in found.values() for row in rows))
    sites = sorted({s for rows in found.values() for row in rows for s in row.cells})
    by_label = {
        label: {
            rule: row for rule in rules for row in found[rule] if row.label == label
        }
        for label in labels
    }
    lines = [line for label in labels for line in _lines(by_label[label], sites)]
    is_classified = comparison.kind == "classification"
    score = "Balanced accuracy" if is_classified else "Dice"
    caption = f"Hospitals that took no part: {score} in per cent, by rule"
    header = ("Strategy", "Rule", *sites)
    bold = ("Bold: the rule that a method does best with.",) if len(rules) > 1 else ()
    notes = (*bold, *_needs(rules), *_nearest(comparison), *_not_shared(comparison))
    return NotedGrid(Grid(caption, header, tuple(lines), num_text=2), notes)


def statistics_note(comparison: Comparison) -> str:
    """Say which running statistics the sites were evaluated with.

    Returns:
        A sentence; empty if no strategy keeps any at its sites.
    """
    used: dict[str, list[str]] = {}
    for entry in comparison.entries:
        if how := entry.run.summary.get("statistics"):
            names = used.setdefault(str(how), [])
            names += [entry.strategy] if entry.strategy not in names else []
    words = {
        "kept": "as training left them",
        "recalibrated": "re-estimated with the final weights on the site's own "
        "training images, without labels",
    }
    said = [
        f"{listing(names)}: {words.get(how, how)} (evaluate.statistics: {how})"
        for how, names in sorted(used.items())
    ]
    if not said:
        return ""
    return f"Running statistics of normalisation kept at the sites: {'; '.join(said)}."


def _rows_of(comparison: Comparison, rule: str) -> tuple[Row, ...]:
    """The table's rows as if a rule's results were all there is."""
    entries = tuple(
        replace(entry, run=replace(entry.run, cases=cases))
        for entry in comparison.entries
        if (cases := _tested(entry, rule))
    )
    return make_rows(replace(comparison, entries=entries))


def _tested(entry: Entry, rule: str) -> tuple[Mapping[str, str], ...]:
    rows = entry.run.unseen
    return tuple(r for r in rows if r["rule"] == rule and r["split"] == "test")


def _lines(rows: Mapping[str, Row], sites: Sequence[str]) -> list[tuple[Box, ...]]:
    """One line a rule; the best of each site in bold."""
    best = {
        site: max(
            (
                row.cells[site].mean
                for row in rows.values()
                if site in row.cells and math.isfinite(row.cells[site].mean)
            ),
            default=math.nan,
        )
        for site in sites
    }
    lines = []
    for rule, row in rows.items():
        boxes = [_box(row, site, best[site], len(rows) > 1) for site in sites]
        lines.append((Box(row.label), Box(rule), *boxes))
    return lines


def _box(row: Row, site: str, best: float, has_rivals: bool) -> Box:
    cell = row.cells.get(site)
    if cell is None:
        return Box(NO_VALUE)
    strong = has_rivals and cell.mean == best
    return Box(percent_with_spread(cell), is_strong=strong)


def _needs(rules: Sequence[str]) -> list[str]:
    return [f"Rule {rule} {NEEDS[rule]}" for rule in rules if rule in NEEDS]


def _nearest(comparison: Comparison) -> list[str]:
    """Name the site that was most like each newcomer."""
    found: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for row in entry.run.unseen:
            if row["rule"] == "nearest":
                names = found.setdefault(row["site"], [])
                names += [row["sets_of"]] if row["sets_of"] not in names else []
    said = [f"{site} used that of {listing(found[site])}" for site in sorted(found)]
    return [f"By rule nearest, {'; '.join(said)}."] if said else []


def _not_shared(comparison: Comparison) -> list[str]:
    """Name the sites whose normalisation no rule could use, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in comparison.entries:
        for line in entry.run.rounds[-1:]:
            reasons: Mapping[str, Any] = line.get("not_shared") or {}
            for site, why in sorted(reasons.items()):
                names = found.setdefault((str(site), str(why)), [])
                names += [entry.strategy] if entry.strategy not in names else []
    return [
        f"{listing(names)}: site {site} shared no normalisation ({why})."
        for (site, why), names in sorted(found.items())
    ]
