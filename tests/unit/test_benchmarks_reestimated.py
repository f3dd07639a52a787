"""Runs tested once more: only what normalisation by own images changes is changed."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reestimated import reestimate
from fedmed.report.run_folder import read_comparison
from fedmed.runfolder import RunFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


def _compared(folder: Path, norm: str) -> Path:
    """A run that left site c out, as three methods' of which one is asked for."""
    study = runs.make_study(
        runs.IMAGE,
        "fedavg",
        rounds=1,
        split={"train": 0.5, "validation": 0.25, "test": 0.25, "held_out": ["c"]},
        model={"norm": norm},
        cache=str(folder / "cache"),
    )
    runs.run(study, folder / "one")
    listed = [
        {"strategy": name, "seed": 0, "folder": "one", "held_out": site}
        for name, site in (("fedavg", "c"), ("separate", None), ("fedprox", "c"))
    ]
    (folder / "compare.json").write_text(json.dumps({"study": "x", "runs": listed}))
    return folder


def _rows(folder: Path) -> list[dict[str, str]]:
    with RunFolder(folder / "one").cases_file.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_only_the_hospital_left_out_is_tested_again(tmp_path: Path, norm: str) -> None:
    source = _compared(tmp_path / "source", norm)
    target = tmp_path / "target"
    reestimate(source, target, ("fedavg",), 1)
    before, after = _rows(source), _rows(target)
    assert len(before) == len(after)
    there = [n for n, row in enumerate(before) if row["site"] == "c"]
    assert there
    pairs = enumerate(zip(before, after, strict=True))
    changed = [number for number, (old, new) in pairs if old != new]
    # Without running values there is nothing to estimate.
    assert changed == (there if norm == "batch" else [])
    dice = [float(after[n]["dice"]) for n in there]
    assert np.all((np.array(dice) >= 0) & (np.array(dice) <= 1))
    (entry,) = read_comparison(target).entries
    assert (entry.strategy, entry.held_out) == ("fedavg", "c")


def test_what_was_tested_again_is_not_once_more(tmp_path: Path) -> None:
    source, target = _compared(tmp_path / "source", "batch"), tmp_path / "target"
    reestimate(source, target, ("fedavg",), 1)
    file = RunFolder(target / "one").cases_file
    file.write_text("mark")
    reestimate(source, target, ("fedavg",), 1)
    assert file.read_text() == "mark"


def test_a_run_of_other_cases_is_refused(tmp_path: Path) -> None:
    source = _compared(tmp_path / "source", "batch")
    file = RunFolder(source / "one").cases_file
    file.write_text(re.sub(r",case(\d)", r",other\1", file.read_text()))
    with pytest.raises(ValueError, match="tested other cases of site c"):
        reestimate(source, tmp_path / "target", ("fedavg",), 1)
