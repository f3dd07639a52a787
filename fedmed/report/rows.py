"""From cases to the rows of the result table: sites across, seeds merged.

A cell is the mean over cases and the sample standard deviation over cases, each
averaged over seeds. "Overall" is the unweighted mean over sites, so that a large
hospital does not drown a small one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.scores import (
    CaseScore,
    area_under_curve,
    case_scores,
    mean_of_finite,
    std_of_finite,
)

ALONE = "separate"
"""Name of the strategy in which every site trains for itself."""


Scores = dict[str, dict[str, float]]
"""Site -> case -> score, mean over seeds."""


@dataclass(frozen=True)
class Cell:
    """One strategy at one site, seeds merged.

    Attributes:
        mean: Mean over cases, then over seeds, in [0, 1]. Classification: mean over
            classes of the share recognised (balanced accuracy).
        std_cases: Standard deviation over cases, mean over seeds.
        std_seeds: Standard deviation of the seeds' means; NaN with one seed.
        num_cases: Cases that could be scored.
        num_missed: Organs shown by the label and missed entirely, all seeds together.
        num_organs: Organs shown by the label, all seeds together.
        area: Area under the ROC curve (two-class studies), else NaN.
        gain: Mean minus that of training alone at this site, both over the cases that
            the two have in common; NaN without any.
        is_unseen: True if the site took no part in training.
    """

    mean: float
    std_cases: float = math.nan
    std_seeds: float = math.nan
    num_cases: int = 0
    assd_mm: float = math.nan
    hd95_mm: float = math.nan
    num_missed: int = 0
    num_organs: int = 0
    num_false_alarms: int = 0
    area: float = math.nan
    gain: float = math.nan
    is_unseen: bool = False


@dataclass(frozen=True)
class Row:
    """One strategy.

    Attributes:
        label: What to print: the strategy, and how it was tested if that differs.
        is_left_out: True if each site's value comes from a model that never saw it.
        cells: Site -> result.
        overall: Unweighted mean over `overall_sites`.
        overall_sites: The sites averaged. Held-out sites are left out of the mean
            where other sites were trained on, since the two answer other questions.
            Where one site trained alone, the others.
        worst_site: Site with the lowest mean, of `overall_sites`.
        trained_on: The only site that trained, where each does in turn.
    """

    label: str
    strategy: str
    seeds: tuple[int, ...]
    is_left_out: bool
    cells: Mapping[str, Cell]
    overall: Cell
    overall_sites: tuple[str, ...]
    worst_site: str
    trained_on: str | None = None

    @property
    def worst(self) -> float:
        """Mean at the worst site."""
        return self.cells[self.worst_site].mean if self.worst_site else math.nan

    @property
    def num_missed(self) -> int:
        """Organs missed at all sites, the held-out ones too."""
        return sum(cell.num_missed for cell in self.cells.values())

    @property
    def num_organs(self) -> int:
        """Organs shown by the labels of all sites."""
        return sum(cell.num_organs for cell in self.cells.values())

    @property
    def num_false_alarms(self) -> int:
        """Organs predicted at all sites that the label does not show."""
        return sum(cell.num_false_alarms for cell in self.cells.values())


def group_rows(comparison: Comparison) -> tuple[tuple[Entry, ...], ...]:
    """Group runs into table rows: same strategy, same way of testing.

    Args:
        comparison: One run or several.

    Returns:
        Groups in order of first appearance, then those of unseen sites, then those in
        which one site trained; each holds the runs of all seeds.
    """
    grouped: dict[tuple[str, tuple[bool, str]], list[Entry]] = {}
    for entry in comparison.entries:
        grouped.setdefault((entry.strategy, way_of_testing(entry)), []).append(entry)
    keys = sorted(grouped, key=lambda key: (bool(key[1][1]), key[1][0]))  # stable
    return tuple(tuple(grouped[key]) for key in keys)


def way_of_testing(entry: Entry) -> tuple[bool, str]:
    """Tell who trained and who was tested; only equal ones are rivals."""
    return entry.held_out is not None, entry.trained_on or ""


def make_rows(comparison: Comparison) -> tuple[Row, ...]:
    """Make one row a strategy, and one more if it was tested on sites it never saw.

    Args:
        comparison: One run or several.

    Returns:
        Rows in order of first appearance, gains over training alone filled in.
    """
    groups = group_rows(comparison)
    rows = [_row(entries) for entries in groups]
    places = [
        place
        for place, row in enumerate(rows)
        if row.strategy == ALONE and not row.is_left_out and not row.trained_on
    ]
    if not places:
        return tuple(rows)
    alone = places[0]
    return tuple(
        row
        if place == alone
        else _with_gain(row, rows[alone], (groups[place], groups[alone]))
        for place, row in enumerate(rows)
    )


def result_scores(entry: Entry) -> tuple[CaseScore, ...]:
    """Give the scores of a run that count for its row of the table.

    Args:
        entry: If it left a site out, only that site's cases count.

    Returns:
        The scores, sorted by site and case.
    """
    scores = case_scores(entry.run)
    if entry.held_out is None:
        return scores
    return tuple(score for score in scores if score.site == entry.held_out)


def mean_over_seeds(entries: Sequence[Entry]) -> Scores:
    """Average each case over seeds: three seeds of one case are not three patients.

    Args:
        entries: The runs of one row.

    Returns:
        Site -> case -> score; of several runs without sites that number their cases
        anew in each.
    """
    values: dict[str, dict[str, list[float]]] = {}
    unknown: set[str] = set()
    if len(entries) > 1:
        unknown.update(site for entry in entries for site in numbering_sites(entry))
    for entry in entries:
        for score in result_scores(entry):
            if score.site in unknown:
                continue
            cases = values.setdefault(score.site, {})
            cases.setdefault(score.case_id, []).append(score.score)
    return {
        site: {case_id: mean_of_finite(found) for case_id, found in cases.items()}
        for site, cases in values.items()
    }


def numbering_sites(entry: Entry) -> frozenset[str]:
    """Sites whose policy numbers cases in each message (`case_ids: drop`).

    Nobody outside can tell which of them are the same case in two runs.
    """
    data = entry.run.study.get("data") or {}
    return frozenset(
        str(site)
        for site, facts in data.items()
        if facts and facts.get("case_names") == "drop"
    )


def row_label(entry: Entry) -> str:
    """Name the row that a run belongs to."""
    if entry.trained_on is not None:
        return f"{entry.strategy} (trained on {entry.trained_on})"
    return f"{entry.strategy} (site unseen)" if entry.held_out else entry.strategy


def _row(entries: Sequence[Entry]) -> Row:
    by_site: dict[str, list[Cell]] = {}
    for entry in entries:
        for site, cell in _seed_cells(entry).items():
            by_site.setdefault(site, []).append(cell)
    cells = {site: _merge_seeds(by_site[site]) for site in sorted(by_site)}
    trained = tuple(site for site, cell in cells.items() if not cell.is_unseen)
    averaged = trained or tuple(cells)
    if entries[0].trained_on is not None:
        elsewhere = tuple(site for site, cell in cells.items() if cell.is_unseen)
        averaged = elsewhere or tuple(cells)
    scored = [site for site in averaged if math.isfinite(cells[site].mean)]
    return Row(
        row_label(entries[0]),
        entries[0].strategy,
        tuple(sorted({entry.seed for entry in entries})),
        entries[0].held_out is not None,
        cells,
        _overall([cells[site] for site in averaged], _seed_means(entries, averaged)),
        averaged,
        min(scored, key=lambda site: cells[site].mean, default=""),
        entries[0].trained_on,
    )


def _seed_cells(entry: Entry) -> dict[str, Cell]:
    """Give each site's result in one run, from its cases or else its summary."""
    scores = result_scores(entry)
    by_site: dict[str, list[CaseScore]] = {}
    for score in scores:
        by_site.setdefault(score.site, []).append(score)
    if not entry.run.cases:
        return _summary_cells(entry)
    unseen = _unseen_sites(entry)
    return {site: _cell(found, site in unseen) for site, found in by_site.items()}


def _unseen_sites(entry: Entry) -> tuple[str, ...]:
    return entry.run.held_out if entry.held_out is None else (entry.held_out,)


def _cell(scores: Sequence[CaseScore], is_unseen: bool) -> Cell:
    values = [score.score for score in scores]
    is_classified = bool(scores[0].label)
    return Cell(
        _balanced_accuracy(scores) if is_classified else mean_of_finite(values),
        math.nan if is_classified else std_of_finite(values),
        num_cases=sum(map(math.isfinite, values)),
        assd_mm=mean_of_finite(score.assd_mm for score in scores),
        hd95_mm=mean_of_finite(score.hd95_mm for score in scores),
        num_missed=sum(score.num_missed for score in scores),
        num_organs=sum(score.num_organs for score in scores),
        num_false_alarms=sum(score.num_false_alarms for score in scores),
        area=area_under_curve(scores),
        is_unseen=is_unseen,
    )


def _balanced_accuracy(scores: Sequence[CaseScore]) -> float:
    """Mean over classes of the share recognised, as the engine selects models by."""
    by_class: dict[str, list[float]] = {}
    for score in scores:
        by_class.setdefault(score.label, []).append(score.score)
    return mean_of_finite(mean_of_finite(found) for found in by_class.values())


def _summary_cells(entry: Entry) -> dict[str, Cell]:
    sites = entry.run.summary.get("sites") or {}
    unseen = _unseen_sites(entry)
    wanted = {entry.held_out} if entry.held_out else set(sites)
    return {
        site: Cell(
            _value(row, "dice", "balanced_accuracy"),
            _value(row, "dice_std"),
            num_cases=int(row.get("num_cases") or 0),
            assd_mm=_value(row, "assd_mm"),
            hd95_mm=_value(row, "hd95_mm"),
            is_unseen=site in unseen,
        )
        for site, row in sites.items()
        if site in wanted
    }


def _value(row: Mapping[str, Any], *names: str) -> float:
    found = (row[name] for name in names if row.get(name) is not None)
    return float(next(found, math.nan))


def _merge_seeds(cells: Sequence[Cell]) -> Cell:
    means = [cell.mean for cell in cells]
    return Cell(
        mean_of_finite(means),
        mean_of_finite(cell.std_cases for cell in cells),
        std_of_finite(means),
        max(cell.num_cases for cell in cells),
        mean_of_finite(cell.assd_mm for cell in cells),
        mean_of_finite(cell.hd95_mm for cell in cells),
        sum(cell.num_missed for cell in cells),
        sum(cell.num_organs for cell in cells),
        sum(cell.num_false_alarms for cell in cells),
        mean_of_finite(cell.area for cell in cells),
        is_unseen=cells[0].is_unseen,
    )


def _overall(cells: Sequence[Cell], seed_means: Sequence[float]) -> Cell:
    """Average sites without weights; the spread is that of one case at one site."""
    variance = mean_of_finite(cell.std_cases**2 for cell in cells)
    return Cell(
        mean_of_finite(cell.mean for cell in cells),
        math.sqrt(variance) if math.isfinite(variance) else math.nan,
        std_of_finite(seed_means),
        sum(cell.num_cases for cell in cells),
        mean_of_finite(cell.assd_mm for cell in cells),
        mean_of_finite(cell.hd95_mm for cell in cells),
        sum(cell.num_missed for cell in cells),
        sum(cell.num_organs for cell in cells),
        sum(cell.num_false_alarms for cell in cells),
        mean_of_finite(cell.area for cell in cells),
        is_unseen=all(cell.is_unseen for cell in cells) and bool(cells),
    )


def _seed_means(entries: Sequence[Entry], sites: Sequence[str]) -> list[float]:
    """Give the overall mean of each seed that has every site."""
    by_seed: dict[int, dict[str, float]] = {}
    for entry in entries:
        for site, cell in _seed_cells(entry).items():
            by_seed.setdefault(entry.seed, {})[site] = cell.mean
    complete = (found for found in by_seed.values() if set(sites) <= set(found))
    return [mean_of_finite(found[site] for site in sites) for found in complete]


def _with_gain(
    row: Row, alone: Row, entries: tuple[Sequence[Entry], Sequence[Entry]]
) -> Row:
    """Fill in the gain over training alone, on the sites that both have."""
    own, others = (
        [result_scores(entry) for entry in found if entry.run.cases]
        for found in entries
    )
    unknown = {s for found in entries for e in found for s in numbering_sites(e)}
    cells = {
        site: replace(cell, gain=math.nan)
        if site in unknown
        else replace(cell, gain=_gain(site, own, others))
        if own and others
        else replace(cell, gain=_gain_of_cells(cell, alone.cells.get(site)))
        for site, cell in row.cells.items()
    }
    gain = mean_of_finite(cells[site].gain for site in row.overall_sites)
    return replace(row, cells=cells, overall=replace(row.overall, gain=gain))


def _gain(
    site: str,
    own: Sequence[Sequence[CaseScore]],
    alone: Sequence[Sequence[CaseScore]],
) -> float:
    """Compare on the cases that both have: other patients are no gain."""
    shared = _cases_at(site, own) & _cases_at(site, alone)
    return _mean_on(site, shared, own) - _mean_on(site, shared, alone)


def _cases_at(site: str, runs: Sequence[Sequence[CaseScore]]) -> set[str]:
    return {score.case_id for scores in runs for score in scores if score.site == site}


def _mean_on(site: str, cases: set[str], runs: Sequence[Sequence[CaseScore]]) -> float:
    """Mean over some cases of a site, then over runs; NaN without any."""
    chosen = (
        [score for score in scores if score.site == site and score.case_id in cases]
        for scores in runs
    )
    return mean_of_finite(_cell(found, False).mean for found in chosen if found)


def _gain_of_cells(cell: Cell, alone: Cell | None) -> float:
    """Where single cases are not known, their number must at least agree."""
    if alone is None or cell.num_cases != alone.num_cases:
        return math.nan
    return cell.mean - alone.mean
