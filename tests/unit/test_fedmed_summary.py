"""The final numbers of a run, and that its report shows the same."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmed.report.tables import comparison_table
from fedmed.summary import summarise

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")

DICE = {"a": (0.9, 0.8), "b": (0.7, 0.6), "c": (0.2, 0.4)}


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Two cases a site; the earlier round must not count."""
    path = tmp_path / "cases.csv"
    rows = [
        {"round": number, "split": "test", "site": site, "case_id": str(index)}
        | {"class": "organ", "dice": value * number / 2, "status": "ok"}
        for number in (1, 2)
        for site, values in DICE.items()
        for index, value in enumerate(values)
    ]
    folders.write_rows(path, folders.CASE_COLUMNS, rows)
    return path


def _summarise(cases: Path, *held_out: str) -> dict[str, Any]:
    return summarise(cases, "segmentation", rounds=2, held_out=held_out)


def test_without_held_out_sites_all_are_averaged(cases: Path) -> None:
    summary = _summarise(cases)
    assert summary["overall"]["dice"] == pytest.approx((0.85 + 0.65 + 0.3) / 3)
    assert summary["worst_site"] == "c"
    assert summary["held_out"] is None


def test_held_out_sites_are_averaged_apart(cases: Path) -> None:
    summary = _summarise(cases, "c")
    assert sorted(summary["sites"]) == ["a", "b", "c"]
    assert summary["overall"]["dice"] == pytest.approx((0.85 + 0.65) / 2)
    assert summary["worst_site"] == "b"
    assert summary["held_out"]["sites"] == {"c": summary["sites"]["c"]}
    assert summary["held_out"]["overall"]["dice"] == pytest.approx(0.3)
    assert summary["held_out"]["worst_site"] == "c"


def test_a_held_out_site_that_was_not_evaluated_is_not_there(cases: Path) -> None:
    assert _summarise(cases, "d")["held_out"] is None


def test_only_held_out_sites_make_the_overall_value(cases: Path) -> None:
    summary = _summarise(cases, "a", "b", "c")
    assert summary["overall"]["dice"] == pytest.approx((0.85 + 0.65 + 0.3) / 3)
    assert summary["held_out"]["overall"]["dice"] == summary["overall"]["dice"]


@pytest.mark.parametrize("held_out", [(), ("c",), ("b",), ("a", "b", "c")])
def test_the_report_of_the_same_run_agrees(
    tmp_path: Path, held_out: tuple[str, ...]
) -> None:
    plan = folders.Plan(overlays=False, num_rounds=2, held_out=held_out)
    folder = folders.write_run(tmp_path / "run", plan)
    summary = _summarise(folder / "cases.csv", *held_out)
    row = comparison_table(folder).rows[0]
    with (folder / "cases.csv").open(newline="") as file:
        assert {row["split"] for row in csv.DictReader(file)} == {"test"}
    assert summary["overall"]["dice"] == pytest.approx(row.overall.mean)
    assert summary["worst_site"] == row.worst_site


def test_a_site_without_a_result_is_named_with_the_reason(cases: Path) -> None:
    records = [
        {"round": 1, "refused": {"x": "earlier"}, "failed": {}},
        {"round": 2, "refused": {"d": "NaN"}, "failed": {"a": "late", "e": "died"}},
    ]
    summary = summarise(cases, "segmentation", rounds=2, records=records)
    assert summary["missing"] == {"d": "NaN", "e": "died"}
