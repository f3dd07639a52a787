"""What is decided and refused before a run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedmed.errors import ConfigError, ResumeError
from fedmed.preflight import check_folder, check_options, settle
from fedmed.runfolder import RunFolder
from fedmed.study import Study, study_from_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = {"dataset": "tiny.hospitals", "kind": "table"}


def study(**changes: Any) -> Study:
    model = {"name": "mlp", "mode": "row"}
    base = {"name": "s", "sites": SITES, "model": model}
    return study_from_dict(base | changes)


AUTO = {"train": {"precision": "auto"}}


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Stands for the measurement, which is slow and tested elsewhere."""
    asked: list[tuple[str, Path]] = []
    module = ModuleType("fedmed.training.precision")

    def decide_precision(study: Study, task: Any, cache: Path) -> str:
        asked.append((task.kind, cache))
        return "bfloat16"

    module.decide_precision = decide_precision  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_a_named_precision_is_left_alone(
    tmp_path: Path, decided: list[tuple[str, Path]]
) -> None:
    given = study()
    assert settle(given, RunFolder(tmp_path), tmp_path) is given
    assert not decided


def test_auto_is_decided_once_and_stands_in_the_lock(
    tmp_path: Path, decided: list[tuple[str, Path]]
) -> None:
    folder = RunFolder(tmp_path)
    found = settle(study(**AUTO), folder, tmp_path)
    assert found.train.precision == "bfloat16"
    assert decided == [("classification", tmp_path)]
    assert found == study(train={"precision": "bfloat16"})
    folder.write_lock(
        study(train={"precision": "float32"}).to_dict() | {"versions": {}}
    )
    assert settle(study(**AUTO), folder, tmp_path).train.precision == "float32"
    assert len(decided) == 1


def test_a_run_of_auto_is_resumed_with_what_its_lock_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lock = study(train={"precision": "bfloat16"}).to_dict()
    lock["strategy"]["sync"] = "round"
    folder.write_lock(lock)
    check_folder(folder, study(**AUTO), resume=True)
    with pytest.raises(ResumeError, match=r"train\.precision"):
        check_folder(folder, study(), resume=True)


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lock = study().to_dict()
    lock["strategy"]["sync"] = "round"
    folder.write_lock(lock)
    sites = {**SITES, "ledger_digests": False}
    other = study(checkpoint={"every": 7}, sites=sites)
    check_folder(folder, other, resume=True)
    with pytest.raises(ResumeError, match="sites_per_round: None -> 2"):
        check_folder(folder, study(sites_per_round=2), resume=True)


def test_an_unknown_option_of_a_transport() -> None:
    def open_workers(num_workers: int = 1) -> None:
        del num_workers

    given = study(transport={"name": "workers", "num_worker": 4})
    with pytest.raises(ConfigError, match="did you mean 'num_workers'"):
        check_options(open_workers, given, set())
