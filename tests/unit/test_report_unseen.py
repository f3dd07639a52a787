"""The table of rules for hospitals that took no part."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from fedmed.errors import StorageError
from fedmed.report.page import build_report
from fedmed.report.run_folder import read_comparison
from fedmed.report.unseen import NEEDS, statistics_note, unseen_table
from fedmed.study import UnseenRule

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")

PLAN = {"overlays": False, "num_rounds": 2, "held_out": ("c",), "missed_case": None}
DICE = {
    "adabn": np.array([0.5, 0.7]),
    "average": np.array([0.8, 0.9]),
    "nearest": np.array([0.1, 0.2]),
}


def _write(run: Path, sites: Sequence[str] = ("c",), shift: float = 0.0) -> None:
    """Three rules at some sites, as the engine writes them."""
    rows = []
    for rule, values in DICE.items():
        used = {"adabn": "", "average": "a b", "nearest": "b"}[rule]
        for site in sites:
            for number, dice in enumerate(values + shift):
                facts = {"round": 2, "rule": rule, "sets_of": used, "split": "test"}
                case = {"case_id": f"case_{number}", "class": "prostate"}
                scores = {"dice": str(dice), "status": "ok"}
                rows.append({**facts, "site": site, **case, **scores})
    with (run / "unseen.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _texts(table: Any) -> list[list[str]]:
    return [[box.text for box in row] for row in table.grid.rows]


def test_a_run_has_one_line_a_rule(tmp_path: Path) -> None:
    run = folders.write_run(tmp_path / "run", folders.Plan(strategy="fedbn", **PLAN))
    assert unseen_table(read_comparison(run)) is None
    _write(run)
    table = unseen_table(read_comparison(run))
    assert table is not None
    assert table.grid.header == ("Strategy", "Rule", "c")
    assert _texts(table) == [
        [
            "fedbn",
            rule,
            f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}",
        ]
        for rule, values in DICE.items()
    ]
    strong = [row[1].text for row in table.grid.rows if row[2].is_strong]
    assert strong == ["average"]
    for rule in DICE:
        assert any(note.startswith(f"Rule {rule} needed") for note in table.notes)
    assert "By rule nearest, c used that of b." in table.notes


def test_seeds_are_averaged_and_strategies_apart(tmp_path: Path) -> None:
    plan = folders.Plan(**PLAN)
    folders.write_comparison(tmp_path / "all", ("fedbn", "ms_net"), (0, 1), plan=plan)
    for seed in (0, 1):
        _write(tmp_path / "all" / "runs" / f"fedbn-{seed}", shift=0.1 * seed)
    table = unseen_table(read_comparison(tmp_path / "all"))
    assert table is not None
    shown = [row[2].split(" ")[0] for row in _texts(table)]
    assert shown == [f"{100 * (v.mean() + 0.05):.2f}" for v in DICE.values()]
    assert {row[0] for row in _texts(table)} == {"fedbn"}


def test_sites_left_out_in_turn_have_a_column_each(tmp_path: Path) -> None:
    plan = folders.Plan(**{**PLAN, "held_out": ()})
    turns = ("b", "c")
    folder = tmp_path / "all"
    folders.write_comparison(folder, ("fedbn",), (0,), leave_out=turns, plan=plan)
    for number, site in enumerate(turns):
        run = folder / "runs" / f"fedbn-0-without-{site}"
        _write(run, (site,), shift=-0.1 * number)
    table = unseen_table(read_comparison(folder))
    assert table is not None
    assert table.grid.header[2:] == turns
    for row, values in zip(_texts(table), DICE.values(), strict=True):
        first, second = (float(text.split(" ")[0]) for text in row[2:])
        assert first == pytest.approx(100 * values.mean())
        assert second == pytest.approx(100 * (values.mean() - 0.1))
    assert "b used that of b; c used that of b" in " ".join(table.notes)


def test_who_shared_nothing_is_named(tmp_path: Path) -> None:
    run = folders.write_run(tmp_path / "run", folders.Plan(strategy="fedbn", **PLAN))
    _write(run)
    lines = (run / "rounds.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-1]), "not_shared": {"b": "its policy"}}
    (run / "rounds.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    table = unseen_table(read_comparison(run))
    assert table is not None
    assert "fedbn: site b shared no normalisation (its policy)." in table.notes


def test_the_page_shows_rules_and_statistics(tmp_path: Path) -> None:
    run = folders.write_run(tmp_path / "run", folders.Plan(strategy="fedbn", **PLAN))
    plain = build_report(run).read_text()
    assert "by rule" not in plain
    assert "evaluate.statistics" not in plain
    _write(run)
    summary = json.loads((run / "summary.json").read_text())
    summary["statistics"] = "recalibrated"
    (run / "summary.json").write_text(json.dumps(summary))
    page = re.sub(r"\s+", " ", build_report(run).read_text())
    assert "Hospitals that took no part, by rule" in page
    assert "85.00 ± 7.07" in page
    assert "(evaluate.statistics: recalibrated)" in page


@pytest.mark.parametrize("how", ["kept", "recalibrated", None])
def test_the_statistics_used_are_told(tmp_path: Path, how: str | None) -> None:
    run = folders.write_run(tmp_path / "run", folders.Plan(strategy="fedbn", **PLAN))
    summary = {**json.loads((run / "summary.json").read_text()), "statistics": how}
    (run / "summary.json").write_text(json.dumps(summary))
    note = statistics_note(read_comparison(run))
    assert (f"evaluate.statistics: {how}" in note) == bool(how)
    assert bool(note) == bool(how)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    run = folders.write_run(tmp_path / "run", folders.Plan(**PLAN))
    (run / "unseen.csv").write_text("some,thing\n1,2\n")
    with pytest.raises(StorageError, match=r"unseen\.csv"):
        read_comparison(run)


def test_every_rule_of_a_study_is_explained() -> None:
    assert {*NEEDS} == {*get_args(UnseenRule)}
