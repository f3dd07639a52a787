"""A study over workers ends with the bytes of one process: draws, kept state, resume.

The real scans are in `test_equal_transports`; here are the ways in which a round can
be other than plain, on small phantoms.
"""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any

import pytest

line: Any = importlib.import_module("command_line")

PLAIN_SGD = {**line.TINY["train"], "optimizer": {"name": "sgd", "lr": 0.01}}
CASES: dict[str, dict[str, Any]] = {
    "drawn": {"strategy": {"name": "fedavg"}, "sites_per_round": 2},
    "drawn-kept": {"strategy": {"name": "fedbn"}, "sites_per_round": 2},
    "kept-step": {"strategy": {"name": "fedbn", "sync": "step"}},
    "seldom-filed": {
        "strategy": {"name": "fedbn"},
        "sites_per_round": 2,
        "checkpoint": {"every": 3},
    },
    "control": {
        "strategy": {"name": "scaffold"},
        "sites_per_round": 2,
        "train": PLAIN_SGD,
    },
}
WORKERS = ("--transport", "workers", "transport.num_workers=2")


def study_of(folder: Path, name: str) -> Path:
    written: Path = line.write_study(folder, rounds=4, **CASES[name])
    return written


@pytest.fixture(scope="module", params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def alone(
    fedmed: Any, tmp_path_factory: pytest.TempPathFactory, name: str
) -> dict[str, str]:
    """What one process gives."""
    folder = tmp_path_factory.mktemp("alone")
    ended = fedmed(
        "run", study_of(folder, name), "--out", folder / "run", "--no-report"
    )
    assert ended.code == 0, ended.err
    found: dict[str, str] = line.hashes(folder / "run")
    return found


def test_workers_change_no_bit(
    fedmed: Any, work: Path, name: str, alone: dict[str, str]
) -> None:
    study, out = study_of(work, name), work / "run"
    ended = fedmed("run", study, "--out", out, *WORKERS, "--no-report")
    assert ended.code == 0, ended.err
    assert line.hashes(out) == alone


@pytest.mark.parametrize("first", ["workers", "inprocess"])
def test_killed_and_resumed_over_workers_it_ends_with_the_same_bytes(
    fedmed: Any, work: Path, name: str, alone: dict[str, str], first: str
) -> None:
    """Whatever transport went before."""
    study, out = study_of(work, name), work / "run"
    before = WORKERS if first == "workers" else ()
    ended = fedmed("run", study, "--out", out, *before, "--no-report", die_at=13)
    assert ended.code == -signal.SIGKILL, ended.err
    ended = fedmed("run", study, "--out", out, *WORKERS, "--resume", "--no-report")
    assert ended.code == 0, ended.err
    assert line.hashes(out) == alone
