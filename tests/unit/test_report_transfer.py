from __future__ import annotations

import math

import pytest

from fedmed.report.rows import Cell, Row
from fedmed.report.tables import Table
from fedmed.report.transfer import transfer_table
from fedmed.report.wording import NO_VALUE


def row(label: str, values: dict[str, float], only: str | None = None) -> Row:
    cells = {s: Cell(v, 0.01, is_unseen=s != only) for s, v in values.items()}
    overall, sites = Cell(math.nan), tuple(values)
    return Row(label, "joint", (0,), only is None, cells, overall, sites, "", only)


def table(*rows: Row) -> Table:
    return Table("brain", "segmentation", "Dice", ("a", "b", "c"), rows)


SINGLE = (
    row("joint (trained on a)", {"a": 0.9, "b": 0.5, "c": 0.7}, "a"),
    row("joint (trained on b)", {"a": 0.6, "b": 0.8, "c": 0.4}, "b"),
)
DEEPALL = row("joint (site unseen)", {"a": 0.65, "b": 0.7})


def test_test_sites_downwards_training_sites_across() -> None:
    found = transfer_table(table(DEEPALL, *SINGLE))
    assert found is not None
    assert found.header == (
        "Tested on", *(r.label for r in SINGLE), "joint (site unseen)",
    )  # fmt: skip
    assert found.text_rows() == (
        ("a", "90.00 ± 1.00 *", "60.00 ± 1.00", "65.00 ± 1.00"),
        ("b", "50.00 ± 1.00", "80.00 ± 1.00 *", "70.00 ± 1.00"),
        ("c", "70.00 ± 1.00", "40.00 ± 1.00", NO_VALUE),
        ("mean of unseen sites", "60.00", "50.00", "67.50"),
    )
    assert "85.00 % there and 55.00 % at the other sites" in found.notes[1]
    assert found.text_notes[0].startswith("*: ")


def test_bold_is_the_best_that_never_saw_the_site() -> None:
    found = transfer_table(table(*SINGLE, DEEPALL))
    assert found is not None
    strong = [[box.is_strong for box in line[1:]] for line in found.grid().rows]
    assert strong == [
        [False, False, True], [False, False, True], [True, False, False], [False] * 3,
    ]  # fmt: skip
    assert found.grid().rows[0][1].below == "own test cases"


@pytest.mark.parametrize("rows", [(), (DEEPALL,)])
def test_without_single_sites_there_is_none(rows: tuple[Row, ...]) -> None:
    assert transfer_table(table(*rows)) is None
