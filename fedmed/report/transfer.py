"""Trained on one site, tested on each: the square table of how well sites transfer.

Rows are the sites tested, columns the sites trained on, as the publications of this
field print it; beside it stand the methods that trained on all sites but the one
tested, where the comparison has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmed.report.grid import Box, Grid
from fedmed.report.rows import Row
from fedmed.report.scores import mean_of_finite
from fedmed.report.tables import Table, percent_with_spread
from fedmed.report.wording import NO_VALUE, percent


@dataclass(frozen=True)
class TransferTable:
    """The square table, and what stands beside it.

    Attributes:
        score_name: "Dice" or "Balanced accuracy".
        profile: How cases were evaluated.
        sites: Test sites, downwards.
        columns: Rows of the result table, as columns.
    """

    score_name: str
    profile: str
    sites: tuple[str, ...]
    columns: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What the numbers are."""
        return (
            f"{self.score_name} in per cent of models trained on one site (columns), "
            f"by the site tested (rows), mean ± standard deviation over cases; profile "
            f"{self.profile}"
        )

    @property
    def header(self) -> tuple[str, ...]:
        """Titles of the columns."""
        return ("Tested on", *(column.label for column in self.columns))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that say how to read the page's table, and what it comes to."""
        known = "On the diagonal a site's own test cases; elsewhere all of its cases."
        best = "Bold: the highest of a site that the model never saw."
        return (f"{known} {best}", *self.gaps)

    @property
    def text_notes(self) -> tuple[str, ...]:
        """Sentences that say how to read `text_rows`, and what they come to."""
        known = "*: the site's own test cases; elsewhere all of its cases."
        return (known, *self.gaps)

    @property
    def gaps(self) -> tuple[str, ...]:
        """A sentence a method: what a site's own model loses elsewhere."""
        names = (column.strategy for column in self.columns if column.trained_on)
        return tuple(filter(None, map(self._gap, dict.fromkeys(names))))

    def text_rows(self) -> tuple[tuple[str, ...], ...]:
        """Give every row as text, as long as `header`; last the mean over the unseen.

        Cells of sites that the model was trained on bear an asterisk.
        """
        rows = [
            (site, *(self._text(column, site) for column in self.columns))
            for site in self.sites
        ]
        means = (percent(self._unseen_mean(column)) for column in self.columns)
        return (*rows, ("mean of unseen sites", *means))

    def grid(self) -> Grid:
        """Lay it out for the page; bold: a site's highest value without having seen it.

        The diagonal says in small print that it is one.
        """
        rows = []
        for site in self.sites:
            unseen = [c for c in self.columns if _is_unseen(c, site)]
            best = max((c.cells[site].mean for c in unseen), default=math.nan)
            boxes = [
                Box(
                    percent_with_spread(column.cells.get(site)),
                    "own test cases" if column.trained_on == site else "",
                    column in unseen and column.cells[site].mean == best,
                )
                for column in self.columns
            ]
            rows.append((Box(site), *boxes))
        means = [Box(percent(self._unseen_mean(column))) for column in self.columns]
        rows.append((Box("Mean of unseen sites"), *means))
        return Grid(self.title, self.header, tuple(rows))

    def as_dict(self) -> dict[str, object]:
        """Give plain values for JSON: texts, as printed."""
        return {
            "title": self.title,
            "header": list(self.header),
            "rows": [list(row) for row in self.text_rows()],
            "notes": list(self.text_notes),
        }

    def _gap(self, strategy: str) -> str:
        """Say in words what one site's model loses elsewhere."""
        mine = [c for c in self.columns if c.strategy == strategy and c.trained_on]
        own = mean_of_finite(
            column.cells[column.trained_on or ""].mean
            for column in mine
            if column.trained_on in column.cells
        )
        other = mean_of_finite(map(self._unseen_mean, mine))
        if not (math.isfinite(own) and math.isfinite(other)):
            return ""
        return (
            f"{strategy}: trained on one site, {percent(own)} % there and "
            f"{percent(other)} % at the other sites, on average."
        )

    def _unseen_mean(self, column: Row) -> float:
        return mean_of_finite(
            column.cells[site].mean for site in self.sites if _is_unseen(column, site)
        )

    def _text(self, column: Row, site: str) -> str:
        text = percent_with_spread(column.cells.get(site))
        seen = column.trained_on == site and text != NO_VALUE
        return f"{text} *" if seen else text


def transfer_table(table: Table) -> TransferTable | None:
    """Find the runs that trained on one site, and those that left one out.

    Args:
        table: The result table.

    Returns:
        None if no run trained on one site alone.
    """
    single = [row for row in table.rows if row.trained_on is not None]
    if not single:
        return None
    left_out = [row for row in table.rows if row.is_left_out]
    columns = (*single, *left_out)
    return TransferTable(table.score_name, table.profile, table.sites, columns)


def _is_unseen(column: Row, site: str) -> bool:
    return site in column.cells and column.trained_on != site
