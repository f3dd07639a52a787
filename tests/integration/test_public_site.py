"""Distillation on public images ends with the same bytes wherever the sites are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
runs: Any = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

HOSPITALS = ("a", "b", "c")
METHODS: dict[str, dict[str, Any]] = {
    "feddf": {"distillation_steps": 4},
    "fedmd": {"wire": "float16"},
    "fedmd-uint8": {"wire": "uint8", "public_batches": 2},
}


def run(method: str, out: Path, **changes: Any) -> Any:
    study = runs.make_study(
        runs.IMAGE,
        method.partition("-")[0],
        rounds=3,
        sites={"with_public": True, "public": "p"},
        strategy=METHODS[method],
        **changes,
    )
    return runs.run(study, out)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        found.everything(HOSPITALS), expected.everything(HOSPITALS), rtol=0, atol=0
    )
    for one, other in zip(found.rounds, expected.rounds, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize("method", METHODS)
def test_workers_end_with_the_bytes_of_one_process(method: str, tmp_path: Path) -> None:
    alone = run(method, tmp_path / "alone")
    transport = {"name": "workers", "num_workers": 2}
    assert_same(run(method, tmp_path / "workers", transport=transport), alone)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("method", ["feddf", "fedmd-uint8"])
def test_ray_ends_with_the_bytes_of_one_process(method: str, tmp_path: Path) -> None:
    alone = run(method, tmp_path / "alone")
    transport = {"name": "ray", "num_workers": 2}
    assert_same(run(method, tmp_path / "ray", transport=transport), alone)
