"""The rounds that validation picked, beside the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedmed.report.grid import Box, Grid, NotedGrid
from fedmed.report.rows import Row, make_rows, row_label
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.tables import percent_with_spread
from fedmed.report.wording import NO_VALUE, count, listing, signed_points


def selected_table(comparison: Comparison) -> NotedGrid | None:
    """Lay out the results of the rounds that validation picked.

    Args:
        comparison: One run or several.

    Returns:
        One row a strategy, one column a site, and how rounds were picked; None if no
        study asked for it, or no round could be picked.
    """
    chosen = tuple(entry for entry in comparison.entries if entry.run.selected)
    if not chosen:
        return None
    # Both columns must be of the same runs.
    last = {row.label: row for row in make_rows(replace(comparison, entries=chosen))}
    picked = tuple(
        replace(entry, run=replace(entry.run, cases=entry.run.selected))
        for entry in chosen
    )
    rows = make_rows(replace(comparison, entries=picked))
    sites = sorted({site for row in rows for site in row.cells})
    is_classified = comparison.kind == "classification"
    score = "Balanced accuracy" if is_classified else "Dice"
    header = (
        "Strategy",
        "Rounds picked",
        *sites,
        "Overall",
        "Against the last, points",
    )
    runs_of = {
        row.label: [entry for entry in chosen if row_label(entry) == row.label]
        for row in rows
    }
    lines = [
        (
            Box(row.label),
            Box(_rounds(runs_of[row.label])),
            *(Box(percent_with_spread(row.cells.get(site))) for site in sites),
            Box(percent_with_spread(row.overall)),
            Box(_gain(row, last.get(row.label), runs_of[row.label])),
        )
        for row in rows
    ]
    caption = f"{score} in per cent, test cases, in the rounds picked"
    notes = (
        "Picked: the round with the highest mean over the sites that trained, on their "
        "validation cases. A hospital held out has no say, nor has any test case.",
        *_missing(chosen),
    )
    return NotedGrid(Grid(caption, header, tuple(lines), num_text=2), notes)


def _has_all_sites(entry: Entry) -> bool:
    """Whether the picked round has results of the same sites as the last."""
    run = entry.run
    return {row["site"] for row in run.selected} == {row["site"] for row in run.cases}


def _rounds(entries: Sequence[Entry]) -> str:
    """Say how often which round was picked."""
    found: dict[int, int] = {}
    for entry in entries:
        number = int(entry.run.selected[0]["round"])
        found[number] = found.get(number, 0) + 1
    if len(entries) == 1:
        return str(next(iter(found)))
    words = [f"{n} ({count(found[n], 'run')})" for n in sorted(found)]
    return listing(words)


def _gain(row: Row, last: Row | None, entries: Sequence[Entry]) -> str:
    if last is None or not all(map(_has_all_sites, entries)):
        return NO_VALUE
    return signed_points(row.overall.mean - last.overall.mean)


def _missing(entries: Sequence[Entry]) -> list[str]:
    """Name the sites without a result in the round picked, and why."""
    found: dict[tuple[str, str], None] = {}
    for entry in entries:
        picked = entry.run.summary.get("selected") or {}
        for site, why in (picked.get("missing") or {}).items():
            found[str(site), str(why)] = None
    return [
        f"Site {site} has no result in a round picked: {why}." for site, why in found
    ]
