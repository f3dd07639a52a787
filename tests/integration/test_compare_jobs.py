"""Legs side by side: equal to legs in turn, through kills, and with failing legs."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fedmed.report.run_folder import read_comparison
from fedmed.report.significance import paired_tests

sys.path.insert(0, str(Path(__file__).parent))
line = importlib.import_module("command_line")

METHODS = "separate,joint,fedprox[mu=0.1]"


def arguments(study, out, *more):
    return (
        "compare", study, "--strategies", METHODS, "--seeds", "0,1", "--out", out, *more
    )  # fmt: skip


def hashes(out):
    index = json.loads((out / "compare.json").read_text())
    return {run["folder"]: line.hashes(out / run["folder"]) for run in index["runs"]}


def legs_of(pid):
    """Find living processes whose comparison is this process or was started by it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                told = (folder / "environ").read_bytes()
            except OSError:
                continue
            if f"COMPARE_TEST={pid}".encode() in told:
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def in_turn(fedmed, tmp_path_factory):
    work = tmp_path_factory.mktemp("turn")
    study = line.write_study(work, rounds=4)
    record = fedmed(*arguments(study, work / "out"), "--json").record
    return study, hashes(work / "out"), record["table"]


def test_killed_twice_and_resumed_ends_with_the_same_table(fedmed, in_turn, work):
    study, expected, table = in_turn
    out = work / "out"
    for number in (1, 3):
        started = fedmed.start(
            *arguments(study, out, "--jobs", "3"), COMPARE_TEST=str(number)
        )
        started.until(lambda n=number: len([*out.glob("*/summary.json")]) >= n)
        started.send(signal.SIGKILL)
        started.wait()
        _until_alone(number)
        assert len([*out.glob("*/summary.json")]) < len(expected)
    done = [*out.glob("*/summary.json")]
    before = {path: path.stat().st_mtime_ns for path in done}
    ended = fedmed(*arguments(study, out, "--jobs", "3"), "--json")
    assert ended.code == 0, ended.err
    assert ended.record["table"] == table
    assert hashes(out) == expected
    assert {path: path.stat().st_mtime_ns for path in done} == before


def _until_alone(name):
    stop = time.monotonic() + 20
    while legs_of(name):
        assert time.monotonic() < stop, "legs outlived their comparison"
        time.sleep(0.05)


def test_ctrl_c_lets_running_legs_finish_their_round(fedmed, in_turn, work):
    study, expected, _ = in_turn
    out = work / "out"
    started = fedmed.start(*arguments(study, out, "--jobs", "2"))
    started.until(lambda: [*out.glob("*/checkpoints/round-000001*")])
    started.send(signal.SIGINT)
    ended = started.wait()
    assert ended.code == 130
    assert f"the same command goes on from here (--out {out})" in ended.err
    assert fedmed(*arguments(study, out, "--jobs", "2")).code == 0
    assert hashes(out) == expected


def test_a_leg_that_fails_does_not_stop_the_others(fedmed, in_turn, work):
    study, expected, _ = in_turn
    out = work / "out"
    bad = out / "joint-seed0" / "checkpoints"
    bad.mkdir(parents=True)
    (out / "compare.json").write_text(json.dumps({"study": "small", "runs": []}))
    bad.rmdir()
    bad.write_text("not a folder")
    told = fedmed(*arguments(study, out, "--jobs", "2"), "--json")
    assert told.code == 6
    assert "joint-seed0" in told.record["message"]
    done = sorted(path.parent.name for path in out.glob("*/summary.json"))
    assert done == sorted(set(expected) - {"joint-seed0"})
    bad.unlink()
    assert fedmed(*arguments(study, out, "--jobs", "2")).code == 0
    assert hashes(out) == expected


def test_a_leg_that_is_killed_is_named(fedmed, in_turn, work):
    study, _, _ = in_turn
    out = work / "out"
    started = fedmed.start(*arguments(study, out, "--jobs", "2"))
    started.until((out / "separate-seed0" / "run.pid").is_file)
    owner = json.loads((out / "separate-seed0" / "run.pid").read_text())
    os.kill(owner["pid"], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 4
    assert "separate-seed0: the process of it was ended by signal 9" in ended.err
    assert len([*out.glob("*/summary.json")]) == 5


@pytest.mark.parametrize("case_ids", ["pseudonym", "drop"])
def test_cases_are_paired_under_the_names_that_a_policy_lets_out(
    fedmed, work, case_ids
):
    """Pseudonyms are those of the comparison; numbers of a message cannot be paired."""
    policy = work / "policy.yaml"
    kinds = "allowed_kinds: [Card, Metrics, Weights]"
    policy.write_text(f"{kinds}\ncase_ids: {case_ids}\nmin_count: 0\n")
    study = line.write_study(
        work, rounds=1, sites={**line.TINY["sites"], "policy": str(policy)}
    )
    out = work / "out"
    ended = fedmed(
        "compare", study, "--strategies", "separate,fedavg", "--seeds", "0,1",
        "--out", out, "--jobs", "2", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = {row["label"]: row for row in ended.record["table"]["rows"]}
    comparison = read_comparison(out)
    overall, _ = paired_tests(comparison, "separate")
    if case_ids == "drop":
        assert overall == ()
        assert "case_ids: drop" in " ".join(ended.record["table"]["notes"])
        return
    (test,) = overall
    assert test.num_cases == test.num_patients > 0
    assert len(test.seed_differences) == 2
    names = {r["case_id"] for entry in comparison.entries for r in entry.run.cases}
    sites = {r["site"] for entry in comparison.entries for r in entry.run.cases}
    assert len(names) == test.num_cases
    assert rows["fedavg"]["overall"]["gain"] is not None
    keys = sorted(out.rglob("pseudonym.key"))
    assert keys == sorted(out / "secrets" / site / "pseudonym.key" for site in sites)
