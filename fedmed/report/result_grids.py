"""The tables of results: scores, distances, classes and paired tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedmed.report.grid import Box, Grid
from fedmed.report.rows import Cell, Row, group_rows, result_scores, row_label
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.scores import mean_of_finite, std_of_finite
from fedmed.report.significance import PairedTest
from fedmed.report.tables import Table, missed, percent_with_spread
from fedmed.report.wording import NO_VALUE, number, p_value, percent, signed_points


def results_grid(table: Table) -> Grid:
    """Lay out the result table as the field prints it; best of each column in bold."""
    has_gain = any(math.isfinite(row.overall.gain) for row in table.rows)
    rows = tuple(_result_row(row, table, has_gain) for row in table.rows)
    sites = [_site_title(site, table) for site in table.sites]
    gain = ["Gain over alone"] if has_gain else []
    header = ("Strategy", *sites, "Overall", "Worst site", *gain, "Seeds")
    caption = (
        f"{table.score_name} in per cent, mean ± standard deviation over cases; "
        f"profile {table.profile}"
    )
    return Grid(caption, header, rows)


def distances_grid(table: Table) -> Grid | None:
    """Lay out surface distances and missed organs; None for a classification."""
    if table.kind == "classification":
        return None
    rows = []
    for row in table.rows:
        cells = [_distance_box(row.cells.get(site)) for site in table.sites]
        false_alarms = Box(str(row.num_false_alarms))
        totals = (_distance_box(row.overall), Box(missed(row)), false_alarms)
        rows.append((Box(row.label), *cells, *totals))
    header = ("Strategy", *table.sites, "Overall", "Organs missed", "False alarms")
    caption = (
        f"Surface distances in mm: ASD, and below it HD95; profile {table.profile}"
    )
    return Grid(caption, header, tuple(rows))


def classes_grid(comparison: Comparison, table: Table) -> Grid | None:
    """Lay out one row a strategy and class; None if there is only one class."""
    names = _class_names(comparison)
    rows = []
    classes: set[str] = set()
    for group in group_rows(comparison):
        found = _by_class(group)
        classes |= set(found)
        for name in sorted(found, key=lambda name: _class_rank(name, names)):
            cells = [Box(found[name].get(site, NO_VALUE)) for site in table.sites]
            rows.append((Box(row_label(group[0])), Box(names.get(name, name)), *cells))
    if len(classes) < 2:
        return None
    what = "Dice" if table.kind == "segmentation" else "Share of cases recognised"
    header = ("Strategy", "Class", *table.sites)
    caption = (
        f"{what} by class, per cent, mean ± standard deviation over cases; "
        f"profile {table.profile}"
    )
    return Grid(caption, header, tuple(rows), num_text=2)


def tests_grid(tests: Sequence[PairedTest], reference: str, *, by_site: bool) -> Grid:
    """Lay out the paired tests against the reference."""
    header = (
        "Strategy",
        *(["Site"] if by_site else []),
        "Mean difference (points)",
        "95 % interval",
        "Smallest to largest seed",
        "Better / worse / equal",
        "p",
        "p (Holm)",
    )
    where = "at each site" if by_site else "all sites"
    caption = f"Compared with {reference}, {where}"
    rows = tuple(_test_row(test, by_site) for test in tests)
    return Grid(caption, header, rows, num_text=2 if by_site else 1)


def _result_row(row: Row, table: Table, has_gain: bool) -> tuple[Box, ...]:
    rivals = [other for other in table.rows if _is_rival(other, row)]
    if len(rivals) < 2:
        rivals = []
    best = {s: _best(rival.cells.get(s) for rival in rivals) for s in table.sites}
    overall, best_overall = row.overall, _best(rival.overall for rival in rivals)
    best_worst = max((r.worst for r in rivals if r.worst_site), default=math.nan)
    gain = [Box(signed_points(overall.gain))] if has_gain else []
    return (
        Box(row.label),
        *(_score_box(row.cells.get(site), best[site]) for site in table.sites),
        Box(percent_with_spread(overall), is_strong=overall.mean == best_overall),
        Box(percent(row.worst), row.worst_site, row.worst == best_worst),
        *gain,
        Box(str(len(row.seeds)), _seed_spread(row)),
    )


def _is_rival(other: Row, row: Row) -> bool:
    """Whether two rows were trained and tested at the same sites."""
    same = other.is_left_out == row.is_left_out
    return same and other.trained_on == row.trained_on


def _site_title(site: str, table: Table) -> str:
    """Mark a column whose values are all of a model that never saw the site."""
    own = [row for row in table.rows if not row.is_left_out and not row.trained_on]
    found = [row for row in own if site in row.cells]
    unseen = bool(found) and all(row.cells[site].is_unseen for row in found)
    return f"{site} (held out)" if unseen else site


def _best(cells: Iterable[Cell | None]) -> float:
    means = [c.mean for c in cells if c is not None and math.isfinite(c.mean)]
    return max(means, default=math.nan)


def _score_box(cell: Cell | None, best: float) -> Box:
    if cell is None:
        return Box(NO_VALUE)
    gain = f"{signed_points(cell.gain)} vs alone" if math.isfinite(cell.gain) else ""
    return Box(percent_with_spread(cell), gain, cell.mean == best)


def _distance_box(cell: Cell | None) -> Box:
    if cell is None:
        return Box(NO_VALUE)
    return Box(number(cell.assd_mm), f"HD95 {number(cell.hd95_mm)}")


def _seed_spread(row: Row) -> str:
    spread = row.overall.std_seeds
    return f"± {percent(spread)} between" if math.isfinite(spread) else ""


def _class_names(comparison: Comparison) -> dict[str, str]:
    """Name numbered classes by the study's list, where it has one."""
    task = comparison.entries[0].run.study.get("task") or {}
    names = task.get("classes") if isinstance(task, Mapping) else None
    if isinstance(names, Mapping):
        return {str(key): str(name) for key, name in names.items()}
    return {str(index): str(name) for index, name in enumerate(names or ())}


def _class_rank(name: str, names: Mapping[str, str]) -> tuple[int, str]:
    """Keep the study's order of classes, whether the rows hold numbers or names."""
    order = [*names, *names.values()]
    return (order.index(name) if name in order else len(order), name)


def _by_class(entries: Sequence[Entry]) -> dict[str, dict[str, str]]:
    """Class -> site -> printed mean ± standard deviation, seeds averaged."""
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for entry in entries:
        for score in result_scores(entry):
            for name, value in score.by_class.items():
                seeds = values.setdefault((name, score.site), {})
                seeds.setdefault(entry.seed, []).append(value)
    printed: dict[str, dict[str, str]] = {}
    for (name, site), seeds in values.items():
        mean = mean_of_finite(mean_of_finite(found) for found in seeds.values())
        spread = mean_of_finite(std_of_finite(found) for found in seeds.values())
        cell = Cell(mean, spread)
        printed.setdefault(name, {})[site] = percent_with_spread(cell)
    return printed


def _test_row(test: PairedTest, by_site: bool) -> tuple[Box, ...]:
    equal = test.num_patients - test.num_better - test.num_worse
    interval = NO_VALUE
    if math.isfinite(test.low):
        interval = f"{signed_points(test.low)} to {signed_points(test.high)}"
    return (
        Box(test.row),
        *([Box(test.site)] if by_site else []),
        Box(signed_points(test.difference)),
        Box(interval),
        Box(_seed_range(test)),
        Box(f"{test.num_better} / {test.num_worse} / {equal}"),
        Box(p_value(test.p)),
        Box(p_value(test.p_holm), is_strong=test.p_holm < 0.05),
    )


def _seed_range(test: PairedTest) -> str:
    found = test.seed_differences
    if len(found) < 2:
        return NO_VALUE
    return f"{signed_points(min(found))} to {signed_points(max(found))}"
