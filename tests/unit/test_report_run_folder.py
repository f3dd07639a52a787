from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from fedmed.errors import StorageError, UsageError
from fedmed.report.run_folder import read_comparison, read_run

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(folders.write_run(tmp_path / "run", folders.Plan(overlays=False)))


def test_the_result_is_the_last_round_of_the_test_split(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    rows = [
        {"round": 9, "split": "validation", "site": "a", "case_id": "v", "dice": 0.1},
        {"round": 2, "split": "test", "site": "a", "case_id": "old", "dice": 0.2},
        {"round": 4, "split": "test", "site": "a", "case_id": "new", "dice": 0.3},
        {
            "round": 3,
            "split": "validation",
            "site": "b",
            "case_id": "only",
            "dice": 0.4,
        },
    ]
    folders.write_rows(folder / "cases.csv", folders.CASE_COLUMNS, rows)
    run = read_run(folder)
    assert [row["case_id"] for row in run.cases] == ["new", "only"]
    assert run.splits == {"a": "test", "b": "validation"}


def test_what_is_missing_becomes_a_note(run: Path) -> None:
    for name in ("rounds.jsonl", "cases.csv", "summary.json"):
        (run / name).unlink()
    read = read_run(run)
    assert (read.rounds, read.cases, read.summary) == ((), (), {})
    assert len(read.notes) == 3


def test_a_last_line_cut_off_by_a_crash_is_left_out(run: Path) -> None:
    with (run / "rounds.jsonl").open("a") as file:
        file.write('{"round": 21, "loss": {"a"')
    read = read_run(run)
    assert len(read.rounds) == 20
    assert "cut off" in read.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rounds.jsonl", '{"round": 1}\nnonsense\n{"round": 2}\n', "line 2"),
        ("summary.json", "[1]", "holds no object"),
        ("study.lock.yaml", "a: [", "is not YAML"),
        ("cases.csv", "round,split\n", "no column case_id, site"),
        ("cases.csv", "round,split,site,case_id\nx,test,a,1\n", "line 2"),
    ],
)
def test_damage_is_an_error_that_names_the_file(
    run: Path, name: str, content: str, message: str
) -> None:
    (run / name).write_text(content)
    with pytest.raises(StorageError, match=message) as caught:
        read_run(run)
    assert name in str(caught.value)
    assert str(run.parent) not in str(caught.value)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        read_comparison(tmp_path)


@pytest.mark.parametrize("folder", ["../outside", "/etc", ""])
def test_a_comparison_never_reads_outside_its_folder(
    tmp_path: Path, folder: str
) -> None:
    inside = tmp_path / "compare"
    inside.mkdir()
    folders.write_run(tmp_path / "outside", folders.Plan(overlays=False))
    content = {"study": "s", "runs": [{"strategy": "x", "seed": 0, "folder": folder}]}
    (inside / "compare.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match="does not lie below"):
        read_comparison(inside)


def test_a_run_that_is_not_there_yet_is_named(tmp_path: Path) -> None:
    folder = folders.write_comparison(tmp_path / "c", ("fedavg",), (0,))
    content = json.loads((folder / "compare.json").read_text())
    content["runs"].append({"strategy": "fedbn", "seed": 7, "folder": "runs/x"})
    (folder / "compare.json").write_text(json.dumps(content))
    comparison = read_comparison(folder)
    assert len(comparison.entries) == 1
    assert comparison.missing[0].startswith("fedbn, seed 7")


def test_sites_with_a_slash_keep_their_overlays(tmp_path: Path) -> None:
    target = tmp_path / "run" / "sites" / "prostate" / "rumc" / "overlays"
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    target.mkdir(parents=True)
    folders.write_overlay(target, "case_01", 0.9, "worst")
    assert list(read_run(folder).overlay_files) == ["prostate/rumc"]
