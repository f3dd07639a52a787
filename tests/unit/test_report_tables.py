from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.report.tables import comparison_table

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")


def _column(folder: Path, site: str, name: str) -> np.ndarray:
    """Read one column of the last round, with the csv module alone."""
    with (folder / "cases.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["site"] == site]
    last = max(int(row["round"]) for row in rows)
    values = [row[name] for row in rows if int(row["round"]) == last]
    return np.array([float(value) if value else np.nan for value in values])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t") / "compare"
    plan = folders.Plan(overlays=False, num_rounds=4)
    folders.write_comparison(folder, ("separate", "fedavg"), (0, 1), plan=plan)
    return folder


def test_cells_are_means_over_cases_then_seeds(compared: Path) -> None:
    row = comparison_table(compared).rows[1]
    runs = [compared / "runs" / f"fedavg-{seed}" for seed in (0, 1)]
    for site in ("a", "b", "c"):
        dice = [_column(run, site, "dice") for run in runs]
        means = [values.mean() for values in dice]
        assert row.cells[site].mean == pytest.approx(np.mean(means))
        stds = [values.std(ddof=1) for values in dice]
        assert row.cells[site].std_cases == pytest.approx(np.mean(stds))
        assert row.cells[site].std_seeds == pytest.approx(np.std(means, ddof=1))
        hd95 = [np.nanmean(_column(run, site, "hd95_mm")) for run in runs]
        assert row.cells[site].hd95_mm == pytest.approx(np.mean(hd95))


def test_overall_is_the_unweighted_mean_over_sites(compared: Path) -> None:
    separate, fedavg = comparison_table(compared).rows
    cells = [fedavg.cells[site] for site in ("a", "b", "c")]
    assert len({cell.num_cases for cell in cells}) > 1
    mean = np.mean([cell.mean for cell in cells])
    assert fedavg.overall.mean == pytest.approx(mean)
    variance = np.mean([cell.std_cases**2 for cell in cells])
    assert fedavg.overall.std_cases == pytest.approx(np.sqrt(variance))
    assert fedavg.worst_site == "c"
    gain = fedavg.overall.mean - separate.overall.mean
    assert fedavg.overall.gain == pytest.approx(gain)
    assert math.isnan(separate.overall.gain)


def test_a_missed_organ_is_dice_zero_and_counted(compared: Path) -> None:
    row = comparison_table(compared).rows[0]
    assert row.num_missed == row.cells["c"].num_missed == 1
    assert row.num_organs == 2 * (10 + 10 + 6)
    assert np.isnan(_column(compared / "runs/separate-0", "c", "assd_mm")).sum() == 1
    assert math.isfinite(row.cells["c"].assd_mm)


def test_text_rows_fit_the_header(compared: Path) -> None:
    table = comparison_table(compared)
    for row in table.text_rows():
        assert len(row) == len(table.header)
    assert "±" in table.text_rows()[0][1]


def test_json_holds_no_nan(compared: Path) -> None:
    content = comparison_table(compared).as_dict()
    text = json.dumps(content, allow_nan=False)
    assert json.loads(text)["rows"][0]["overall"]["gain"] is None


def test_a_left_out_site_counts_only_where_it_was_unseen(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4)
    folder = folders.write_comparison(
        tmp_path / "c", ("fedavg",), (0,), leave_out=("a", "b", "c"), plan=plan
    )
    (row,) = comparison_table(folder).rows
    for site in ("a", "b", "c"):
        values = _column(folder / f"runs/fedavg-0-without-{site}", site, "dice")
        assert row.cells[site].mean == pytest.approx(values.mean())
        assert row.cells[site].is_unseen
    assert row.label == "fedavg (site unseen)"
    assert row.overall_sites == ("a", "b", "c")


def test_a_held_out_site_stays_out_of_overall(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4, held_out=("b",))
    table = comparison_table(folders.write_run(tmp_path / "run", plan))
    assert table.rows[0].overall_sites == ("a", "c")
    assert any("b was held out" in note for note in table.notes)
    assert any("separate" in note for note in table.notes)


def test_without_cases_the_summary_is_used(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    before = comparison_table(folder).rows[0]
    (folder / "cases.csv").unlink()
    after = comparison_table(folder).rows[0]
    assert after.cells["a"].mean == pytest.approx(before.cells["a"].mean)
    assert after.cells["a"].num_cases == before.cells["a"].num_cases


def test_absent_classes_do_not_count_and_classes_average_by_case(
    tmp_path: Path,
) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    shared: dict[str, Any] = {"round": 1, "split": "test", "site": "a"}
    rows = [
        {**shared, "case_id": "1", "class": "disc", "dice": 0.8, "status": "ok"},
        {**shared, "case_id": "1", "class": "cup", "dice": 0.4, "status": "ok"},
        {**shared, "case_id": "2", "class": "disc", "dice": 1.0, "status": "ok"},
        {**shared, "case_id": "2", "class": "cup", "dice": "", "status": "absent"},
        {**shared, "case_id": "3", "class": "cup", "dice": 0, "status": "false_alarm"},
        {**shared, "case_id": "4", "class": "cup", "dice": "nan", "status": "absent"},
    ]
    folders.write_rows(folder / "cases.csv", folders.CASE_COLUMNS, rows)
    cell = comparison_table(folder).rows[0].cells["a"]
    assert cell.mean == pytest.approx((0.6 + 1.0 + 0.0) / 3)
    assert (cell.num_cases, cell.num_organs, cell.num_false_alarms) == (3, 3, 1)


def test_classification_reports_balanced_accuracy_and_auc(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    label = [0, 0, 0, 0, 1, 1]
    score = [0.1, 0.6, 0.2, 0.3, 0.6, 0.4]
    rows = [
        {
            **{"round": 1, "split": "test", "site": "a", "case_id": str(index)},
            **{"label": truth, "prediction": int(value > 0.5), "score": value},
        }
        for index, (truth, value) in enumerate(zip(label, score, strict=True))
    ]
    columns = ("round", "split", "site", "case_id", "label", "prediction", "score")
    folders.write_rows(folder / "cases.csv", columns, rows)
    table = comparison_table(folder)
    cell = table.rows[0].cells["a"]
    assert table.score_name == "Balanced accuracy"
    assert cell.mean == pytest.approx((3 / 4 + 1 / 2) / 2)
    # 8 pairs: 0.6 beats three of four and ties with 0.6; 0.4 beats three.
    assert cell.area == pytest.approx((3 + 0.5 + 3) / 8)
    assert len(table.text_rows()[0]) == len(table.header)


def test_rows_from_other_cases_are_noted(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4)
    folder = folders.write_comparison(
        tmp_path / "c", ("separate", "x"), (0,), plan=plan
    )
    cases = folder / "runs/x-0/cases.csv"
    lines = cases.read_text().splitlines(keepends=True)
    cases.write_text("".join(line for line in lines if ",a,case_00," not in line))
    notes = comparison_table(folder).notes
    expected = "Rows differ in the number of cases at a: 10 in separate; 9 in x."
    assert expected in notes


def _keep_cases(cases: Path, site: str, numbers: range) -> None:
    """Let only some cases of a site be in a run."""
    kept = tuple(f",{site},case_{number:02d}," for number in numbers)
    lines = cases.read_text().splitlines(keepends=True)
    text = (x for x in lines if f",{site}," not in x or any(k in x for k in kept))
    cases.write_text("".join(text))


@pytest.fixture
def unseen(tmp_path: Path) -> Path:
    """`separate` with all sites, and `fedavg` without site a."""
    plan = folders.Plan(overlays=False, num_rounds=4)
    folder = folders.write_comparison(
        tmp_path / "c", ("separate", "fedavg"), (0,), leave_out=(None, "a"), plan=plan
    )
    index = json.loads((folder / "compare.json").read_text())
    index["runs"] = [
        run
        for run in index["runs"]
        if (run["strategy"] == "separate") == (run["held_out"] is None)
    ]
    (folder / "compare.json").write_text(json.dumps(index))
    return folder


def test_the_gain_over_alone_is_over_shared_cases_only(unseen: Path) -> None:
    """Training alone tests on a part of the site, its left-out model on all of it."""
    _keep_cases(unseen / "runs/separate-0/cases.csv", "a", range(3))
    _, row = comparison_table(unseen).rows
    alone = _column(unseen / "runs/separate-0", "a", "dice")
    left_out = _column(unseen / "runs/fedavg-0-without-a", "a", "dice")
    assert (len(alone), len(left_out)) == (3, 10)
    assert row.cells["a"].mean == pytest.approx(left_out.mean())
    expected = left_out[:3].mean() - alone.mean()
    assert abs(expected - (left_out.mean() - alone.mean())) > 1e-3
    assert row.cells["a"].gain == pytest.approx(expected)
    assert row.overall.gain == pytest.approx(expected)
    assert any("cases of both rows" in note for note in comparison_table(unseen).notes)


def test_there_is_no_gain_without_shared_cases(unseen: Path) -> None:
    _keep_cases(unseen / "runs/separate-0/cases.csv", "a", range(3))
    _keep_cases(unseen / "runs/fedavg-0-without-a/cases.csv", "a", range(3, 10))
    table = comparison_table(unseen)
    assert math.isnan(table.rows[1].cells["a"].gain)
    column = table.header.index("Gain over alone")
    assert table.text_rows()[1][column] == "–"  # noqa: RUF001


def test_numbers_of_a_run_on_the_way_are_called_that(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4)
    folder = folders.write_comparison(
        tmp_path / "c", ("separate", "fedavg"), (0, 1), plan=plan
    )
    assert not any("not finished" in n for n in comparison_table(folder).notes)
    (folder / "runs/fedavg-1/summary.json").unlink()
    (note,) = [n for n in comparison_table(folder).notes if "not finished" in n]
    assert note.startswith("fedavg, seed 1: the run has not finished (4 of ")
