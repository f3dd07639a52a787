"""The result table: strategies down, sites across, as papers of this field print it.

NumPy only, so that the command line can print it without drawing anything. A cell is
the mean over cases ± the sample standard deviation over cases, averaged over seeds;
"Overall" is the unweighted mean over sites, so a large hospital does not drown a
small one; beside it stand the worst site and the gain over training alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmed.profile import STRICT
from fedmed.report.judges import judges_notes
from fedmed.report.rows import (
    ALONE,
    Cell,
    Row,
    make_rows,
    numbering_sites,
    row_label,
)
from fedmed.report.run_folder import Comparison, read_comparison
from fedmed.report.untrained import untrained_notes
from fedmed.report.wording import NO_VALUE, listing, number, percent, signed_points


@dataclass(frozen=True)
class Table:
    """The result table of a run or a comparison.

    Attributes:
        name: Name of the study.
        kind: "segmentation" or "classification".
        score_name: "Dice" or "Balanced accuracy".
        sites: Columns, sorted.
        rows: One a strategy, in the order they were compared.
        notes: Sentences to print below the table.
        profile: How cases were evaluated; see `fedmed.profile`.
    """

    name: str
    kind: str
    score_name: str
    sites: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    profile: str = "strict"

    @property
    def title(self) -> str:
        """What the numbers are."""
        return f"{self.name}: {self.score_name}, profile {self.profile}"

    @property
    def header(self) -> tuple[str, ...]:
        """Column titles of `text_rows`."""
        sites = tuple(f"{site} (%)" for site in self.sites)
        shared = ("Overall (%)", "Worst site (%)", "Gain over alone")
        if self.kind == "classification":
            return ("Strategy", *sites, *shared, "AUC", "Seeds")
        distances = ("ASD (mm)", "HD95 (mm)", "Missed", "Seeds")
        return ("Strategy", *sites, *shared, *distances)

    def text_rows(self) -> tuple[tuple[str, ...], ...]:
        """Give every row as text, for a terminal.

        Returns:
            One tuple a strategy, as long as `header`.
        """
        return tuple(self._text_row(row) for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON; scores in [0, 1], None where there is none."""
        return {
            "study": self.name,
            "kind": self.kind,
            "score": self.score_name,
            "profile": self.profile,
            "sites": list(self.sites),
            "rows": [_row_dict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def _text_row(self, row: Row) -> tuple[str, ...]:
        sites = tuple(percent_with_spread(row.cells.get(site)) for site in self.sites)
        worst = (
            f"{percent(row.worst)} ({row.worst_site})" if row.worst_site else NO_VALUE
        )
        overall = row.overall
        shared = (percent_with_spread(overall), worst, signed_points(overall.gain))
        seeds = str(len(row.seeds))
        if self.kind == "classification":
            return (row.label, *sites, *shared, number(overall.area, 3), seeds)
        distances = (number(overall.assd_mm), number(overall.hd95_mm))
        return (row.label, *sites, *shared, *distances, missed(row), seeds)


def comparison_table(folder: Path) -> Table:
    """Make the result table of a run folder or a comparison folder.

    Args:
        folder: As `fedmed run` or `fedmed compare` wrote it.

    Returns:
        The table, ready to print (`header`, `text_rows`) or to dump (`as_dict`).

    Raises:
        UsageError: If the folder is neither.
        StorageError: If a file in it is damaged.
    """
    return make_table(read_comparison(folder))


def make_table(comparison: Comparison) -> Table:
    """Make the result table of runs already read.

    Args:
        comparison: One run or several.

    Returns:
        One row a strategy, two if it was also tested on sites it never saw.
    """
    rows = make_rows(comparison)
    sites = sorted({site for row in rows for site in row.cells})
    kind = comparison.kind
    score_name = "Balanced accuracy" if kind == "classification" else "Dice"
    profile = comparison.profile
    notes = (
        *_notes(rows, sites),
        *_profile_notes(profile),
        *judges_notes(comparison),
        *_unpaired_notes(comparison),
        *_unfinished_notes(comparison),
        *untrained_notes(comparison),
    )
    return Table(comparison.name, kind, score_name, tuple(sites), rows, notes, profile)


def percent_with_spread(cell: Cell | None) -> str:
    """Print mean ± standard deviation over cases, as papers do."""
    if cell is None or not math.isfinite(cell.mean):
        return NO_VALUE
    if not math.isfinite(cell.std_cases):
        return percent(cell.mean)
    return f"{percent(cell.mean)} ± {percent(cell.std_cases)}"


def missed(row: Row) -> str:
    """Print how many organs were missed at all sites, of how many."""
    return f"{row.num_missed} of {row.num_organs}" if row.num_organs else NO_VALUE


def _unfinished_notes(comparison: Comparison) -> tuple[str, ...]:
    """Say which runs' numbers are of a round on the way."""
    found = [e for e in comparison.entries if e.run.cases and not e.run.summary]
    return tuple(
        f"{row_label(entry)}, seed {entry.seed}: the run has not finished "
        f"({len(entry.run.rounds)} of {entry.run.study.get('rounds', '?')} rounds); "
        "these are the numbers of the last round that was evaluated."
        for entry in found
    )


def _unpaired_notes(comparison: Comparison) -> tuple[str, ...]:
    if len(comparison.entries) < 2:
        return ()
    sites = sorted({s for entry in comparison.entries for s in numbering_sites(entry)})
    if not sites:
        return ()
    return (
        f"{listing(sites)}: the policy lets cases leave as numbers of each message "
        "(case_ids: drop), so that nobody can tell which are the same case in two "
        "runs: no gain and no paired test there.",
    )


def _profile_notes(profile: str) -> tuple[str, ...]:
    if profile == STRICT:
        return ()
    more = " Runs of different profiles stand side by side." if "/" in profile else ""
    return (
        f"Evaluated by the profile {profile}, as the code of older publications does: "
        f"not what a hospital would see.{more}",
    )


def _notes(rows: Sequence[Row], sites: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if not any(row.strategy == ALONE and not row.is_left_out for row in rows):
        notes.append(
            f"No run of “{ALONE}” (each site training alone) is in this folder, "
            "so the gain over training alone is not known."
        )
    alone = [row.label for row in rows if row.trained_on is not None]
    if alone:
        notes.append(f"{listing(alone)}: “Overall” is over the sites never seen.")
    for row in rows:
        aside = [site for site in row.cells if site not in row.overall_sites]
        if aside and row.trained_on is None:
            notes.append(
                f"{row.label}: “Overall” is over the sites that trained; "
                f"{listing(aside)} was held out and is shown beside it."
            )
        absent = [site for site in sites if site not in row.cells]
        if absent:
            notes.append(f"{row.label}: no result for {listing(absent)}.")
    others = _other_cases(sites, rows)
    if others and any(math.isfinite(row.overall.gain) for row in rows):
        others.append("The gain over training alone is over the cases of both rows.")
    notes += others
    return tuple(dict.fromkeys(notes))


def _other_cases(sites: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Warn where rows are not from the same cases, e.g. all of a left-out site."""

    def count(row: Row, site: str) -> str:
        return str(row.cells[site].num_cases) if site in row.cells else "none"

    odd = [
        site
        for site in sites
        if len({row.cells[site].num_cases for row in rows if site in row.cells}) > 1
    ]
    if not odd:
        return []
    groups: dict[str, list[str]] = {}
    for row in rows:
        counts = [count(row, site) for site in odd]
        groups.setdefault(listing(counts), []).append(row.label)
    ordered = sorted(groups.items(), key=lambda group: len(group[1]))
    if len(ordered[-1][1]) > 2 and len(ordered) > 1:
        ordered[-1] = (ordered[-1][0], ["all others"])
    said = "; ".join(f"{counts} in {listing(labels)}" for counts, labels in ordered)
    return [f"Rows differ in the number of cases at {listing(odd)}: {said}."]


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "strategy": row.strategy,
        "label": row.label,
        "seeds": list(row.seeds),
        "site_unseen": row.is_left_out,
        "trained_on": row.trained_on,
        "sites": {site: _cell_dict(cell) for site, cell in row.cells.items()},
        "overall": _cell_dict(row.overall),
        "overall_sites": list(row.overall_sites),
        "worst_site": row.worst_site or None,
    }


def _cell_dict(cell: Cell) -> dict[str, Any]:
    plain = asdict(cell)
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in plain.items()
    }
