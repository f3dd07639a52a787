"""A published table beside ours: the publication's layout, both numbers in each cell.

The numbers are transcribed in `published_tables/<name>.yaml`, with their citation. They
were measured on the publication's own patients, ours on what the study names, so the
two are marked and never compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedmed.errors import ConfigError
from fedmed.report.grid import Box, Grid
from fedmed.report.rows import ALONE, Cell, Row
from fedmed.report.run_folder import Comparison
from fedmed.report.tables import Table, percent_with_spread
from fedmed.report.wording import NO_VALUE, number
from fedmed.spelling import did_you_mean

FOLDER = Path(__file__).parent / "published_tables"


@dataclass(frozen=True)
class PublishedRow:
    """One method of a publication.

    Attributes:
        method: As the publication calls it.
        strategy: Our strategy of the same method; "" if there is none.
        cells: Column -> the numbers printed there, in the order of `values`.
        overall: Those of the last column.
        trained_on: The column of the only site trained on, "" if there were more.
    """

    method: str
    strategy: str
    cells: Mapping[str, tuple[float, ...]]
    overall: tuple[float, ...]
    trained_on: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """A table of a publication.

    Attributes:
        title: What was asked.
        citation: The publication.
        data: The publication's patients.
        score: "Dice", in per cent.
        values: What the numbers of a cell are: "mean", then "std" or "asd_mm".
        columns: Names of the columns: the sites tested.
        overall: Name of the last column; "" if the publication has none.
        rows: In the publication's order.
        unseen: Whether sites were tested by models that never saw them.
        sites_down: Printed with the sites downwards and the methods across.
    """

    title: str
    citation: str
    data: str
    score: str
    values: tuple[str, ...]
    columns: tuple[str, ...]
    overall: str
    rows: tuple[PublishedRow, ...]
    unseen: bool = False
    sites_down: bool = False

    @property
    def titles(self) -> tuple[str, ...]:
        """The columns, and the last one if there is one."""
        return (*self.columns, self.overall) if self.overall else self.columns


Pair = tuple[str, str]
"""A number of ours and a published one, as texts."""


@dataclass(frozen=True)
class SideBySide:
    """Our rows in a publication's layout.

    Attributes:
        source: The publication's table.
        ours: Where our numbers are from, e.g. "measured on phantoms".
        sites: Column -> our site; columns without one are missing.
        rows: Method, our row or None, the publication's row or None.
    """

    source: PublishedTable
    ours: str
    sites: Mapping[str, str]
    rows: tuple[tuple[str, Row | None, PublishedRow | None], ...]

    @property
    def header(self) -> tuple[str, ...]:
        """Column titles of `text_rows`: each column twice, ours first."""
        corner, *titles = self._layout()[0]
        pairs = [(f"{t} here", f"{t} published") for t in titles]
        return (corner, *(word for pair in pairs for word in pair))

    @property
    def marks(self) -> tuple[str, ...]:
        """Sentences that say what is what."""
        missing = [c for c in self.source.columns if c not in self.sites]
        notes = [
            f"here: {self.ours}, {self.source.score} in per cent, mean ± standard "
            "deviation over cases, averaged over seeds.",
            f"published: other data, not measured with this software. "
            f"{self.source.citation}. {self.source.data}.",
            "Numbers here and published are of different patients: compare orders of "
            "methods, not heights.",
        ]
        if self.source.overall:
            last = f"{self.source.overall} is the unweighted mean over the columns"
            notes.append(f"{last} that have a value.")
        if missing:
            notes.append(f"No site of this study stands for {', '.join(missing)}.")
        return tuple(notes)

    def text_rows(self) -> tuple[tuple[str, ...], ...]:
        """Give every row as text, as long as `header`."""
        return tuple(
            (name, *(text for pair in pairs for text in pair))
            for name, pairs in self._layout()[1]
        )

    def grid(self) -> Grid:
        """Lay the table out: our number, and the published one below it."""
        caption = (
            f"{self.source.title}. Above: {self.ours}. Below, small: published, "
            "other data"
        )
        header, body = self._layout()
        rows = []
        for name, pairs in body:
            boxes = [
                Box(ours, "" if theirs == NO_VALUE else f"published {theirs}")
                for ours, theirs in pairs
            ]
            rows.append((Box(name), *boxes))
        return Grid(caption, header, tuple(rows))

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON: texts, as printed."""
        return {
            "header": list(self.header),
            "rows": [list(row) for row in self.text_rows()],
            "notes": list(self.marks),
        }

    def _layout(self) -> tuple[tuple[str, ...], tuple[tuple[str, list[Pair]], ...]]:
        """Give header and rows, with methods or sites downwards as published."""
        titles = self.source.titles
        rows = [
            (method, self._pairs(ours, theirs)) for method, ours, theirs in self.rows
        ]
        if not self.source.sites_down:
            return ("Method", *titles), tuple(rows)
        across = tuple(
            (title, [pairs[place] for _, pairs in rows])
            for place, title in enumerate(titles)
        )
        return ("Tested on", *(method for method, _ in rows)), across

    def _pairs(self, ours: Row | None, theirs: PublishedRow | None) -> list[Pair]:
        found = []
        for column in self.source.columns:
            site = self.sites.get(column)
            cell = None if ours is None or site is None else ours.cells.get(site)
            printed = () if theirs is None else theirs.cells.get(column, ())
            found.append((self._ours(cell), self._theirs(printed)))
        if self.source.overall:
            cell = None if ours is None else ours.overall
            printed = () if theirs is None else theirs.overall
            found.append((self._ours(cell), self._theirs(printed)))
        return found

    def _ours(self, cell: Cell | None) -> str:
        if cell is None or "asd_mm" not in self.source.values:
            return percent_with_spread(cell)
        return f"{number(100 * cell.mean)} ({number(cell.assd_mm)} mm)"

    def _theirs(self, values: tuple[float, ...]) -> str:
        if not values:
            return NO_VALUE
        if len(values) == 1:
            return number(values[0])
        if "asd_mm" in self.source.values:
            return f"{number(values[0])} ({number(values[1])} mm)"
        return f"{number(values[0])} ± {number(values[1])}"


def known_tables() -> tuple[str, ...]:
    """Name the published tables that are here."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_published(name: str) -> PublishedTable:
    """Read a published table.

    Args:
        name: File in `published_tables`, without its ending.

    Raises:
        ConfigError: If there is none of this name.
    """
    if name not in known_tables():
        raise ConfigError(
            f"report.published: there is no table {name!r}"
            + did_you_mean(name, known_tables()),
            hint=f"Known: {', '.join(known_tables())}",
        )
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    columns = tuple(content["columns"])
    return PublishedTable(
        content["title"],
        content["citation"],
        content["data"],
        content["score"],
        tuple(content["values"]),
        columns,
        content.get("overall", ""),
        tuple(_row(row, columns) for row in content["rows"]),
        bool(content.get("unseen")),
        bool(content.get("sites_down")),
    )


def side_by_side(comparison: Comparison, table: Table) -> SideBySide | None:
    """Put our table beside the published one that the study names.

    Args:
        comparison: The runs.
        table: Their table.

    Returns:
        Both; None if the study names no published table.

    Raises:
        ConfigError: If there is no such table, or `report.columns` names a column that
            it does not have.
    """
    study = comparison.entries[0].run.study
    section = study.get("report") or {}
    if not section.get("published"):
        return None
    source = read_published(str(section["published"]))
    sites = _sites_of(source, table.sites, section.get("columns") or {})
    dataset = str((study.get("sites") or {}).get("dataset", "the study's data"))
    where = "phantoms" if dataset == "phantom" else dataset
    ours = f"measured on {where}, profile {table.profile}"
    return SideBySide(source, ours, sites, _paired(source, sites, table.rows))


def check_published(name: str | None, columns: Collection[str]) -> None:
    """Refuse a published table at the start of a study, not after hours.

    Args:
        name: `report.published` of a study, None if it names none.
        columns: Keys of its `report.columns`.

    Raises:
        ConfigError: If there is no such table, or it has no such column.
    """
    if name:
        _check_columns(read_published(name), columns)


def _check_columns(source: PublishedTable, columns: Collection[str]) -> None:
    for column in columns:
        if column not in source.columns:
            raise ConfigError(
                f"report.columns: the published table has no column {column!r}",
                hint=f"It has {', '.join(source.columns)}.",
            )


def _row(row: Mapping[str, Any], columns: Sequence[str]) -> PublishedRow:
    cells = {name: tuple(map(float, row[name])) for name in columns if row.get(name)}
    overall = tuple(map(float, row.get("overall") or ()))
    only = row.get("trained_on", "")
    return PublishedRow(row["method"], row.get("strategy", ""), cells, overall, only)


def _sites_of(
    source: PublishedTable, sites: Sequence[str], given: Mapping[str, str]
) -> dict[str, str]:
    """Find our site for each column: as the study says, else of the same name."""
    _check_columns(source, given)
    by_name = {site.lower(): site for site in sites}
    same = {c: by_name[c.lower()] for c in source.columns if c.lower() in by_name}
    # A column whose named site took no part is told as missing, like one without.
    return {c: site for c, site in {**same, **given}.items() if site in sites}


def _paired(
    source: PublishedTable, sites: Mapping[str, str], ours: Sequence[Row]
) -> tuple[tuple[str, Row | None, PublishedRow | None], ...]:
    """Pair rows by method, in the publication's order; then what only we have."""
    left = [row for row in ours if math.isfinite(row.overall.mean)]
    pairs: list[tuple[str, Row | None, PublishedRow | None]] = []
    for theirs in source.rows:
        found = _match(theirs, left, sites=sites, unseen=source.unseen)
        if found is not None:
            left.remove(found)
        pairs.append((theirs.method, found, theirs))
    return (*pairs, *((row.label, row, None) for row in left))


def _match(
    theirs: PublishedRow,
    rows: Sequence[Row],
    *,
    sites: Mapping[str, str],
    unseen: bool,
) -> Row | None:
    """Find our row of a published one: trained at the same sites, tested alike.

    A strategy with options in brackets is meant with just these; of one without, that
    without options is preferred, then the first with some.
    """
    if not theirs.strategy:
        return None
    only = sites.get(theirs.trained_on, "none") if theirs.trained_on else None
    same = [
        row
        for row in rows
        if row.trained_on == only
        and theirs.strategy in {row.strategy, row.strategy.partition("[")[0]}
        and (only or row.is_left_out == unseen or row.strategy == ALONE)
    ]
    same.sort(key=lambda row: "[" in row.strategy)
    return same[0] if same else None
