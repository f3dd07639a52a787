"""What is decided and refused before a run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedmed.errors import ConfigError, ResumeError
from fedmed.preflight import check_folder, check_method, check_options, settle
from fedmed.resolve import load_strategy
from fedmed.runfolder import RunFolder
from fedmed.study import Study, study_from_dict
from fedmed.task import Task

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


TABLE = Task("classification", ("well", "ill"), 8, 0)
PICTURES = Task("classification", ("well", "ill"), 1, 2)
VOLUMES = Task("segmentation", ("background", "organ"), 1, 3)
NO_SHAPES = {"compact_weight": 0, "smooth_weight": 0}


def check(name: str, task: Task, sites: int = 6, **options: Any) -> None:
    own = study(strategy={"name": name, **options})
    check_method(load_strategy(name, own.strategy.options), own, task, sites)


@pytest.mark.parametrize(
    ("name", "options", "task", "told"),
    [
        ("bigaug", {}, TABLE, "images.*table"),
        ("harmofl", {}, TABLE, "images.*table"),
        ("feddg", {"boundary_weight": 0}, TABLE, "images.*table"),
        ("feddg", {}, PICTURES, "no boundary"),
        ("saml", {}, PICTURES, "shapes"),
        ("saml", {"compact_weight": 0}, TABLE, "shapes"),
        ("masf", {}, TABLE, "min_count is 100, and a batch holds 8"),
        ("ummkd", {"min_count": 9}, PICTURES, "min_count is 9, and a batch holds 8"),
    ],
)
def test_a_method_that_has_nothing_to_say_about_the_data_is_refused(
    name: str, options: dict[str, Any], task: Task, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        check(name, task, **options)
    check(name, VOLUMES, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("harmofl", {"normalise": False}),
        ("feddg", {"interpolation": 0, "boundary_weight": 0}),
        ("saml", NO_SHAPES),
        ("masf", {"min_count": 8}),
        ("ummkd", {"min_count": 8}),
        ("fedavg", {}),
    ],
)
def test_what_is_switched_off_asks_for_nothing(
    name: str, options: dict[str, Any]
) -> None:
    check(name, TABLE, **options)


@pytest.mark.parametrize("name", ["mldg", "masf", "saml"])
def test_an_episode_needs_a_site_in_each_of_its_groups(name: str) -> None:
    check(name, VOLUMES, 2)
    with pytest.raises(ConfigError, match="needs 2 sites that train, and there are 1"):
        check(name, VOLUMES, 1)
    with pytest.raises(ConfigError, match="needs 5 sites that train, and there are 4"):
        check(name, VOLUMES, 4, num_meta_train=2, num_meta_test=3)


def test_a_round_of_one_site_has_no_episode() -> None:
    own = study(strategy={"name": "mldg"}, sites_per_round=1)
    with pytest.raises(ConfigError, match="sites_per_round is 1"):
        check_method(load_strategy("mldg", {}), own, VOLUMES, 6)
