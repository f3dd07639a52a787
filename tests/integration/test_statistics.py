"""Replies that are no whole network: the strategy says so, and the gate knows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import QuorumError

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once
MODULE = "tiny.statistic_strategies"


def test_a_statistic_of_another_size_than_asked_costs_that_site_its_round(
    tmp_path: Path,
) -> None:
    """Even if most sites send it: what was asked for is right."""
    study = runs.make_study(
        runs.TABLE,
        f"{MODULE}:Counting",
        rounds=1,
        strategy={"sync": "round", "wide": ["b", "c"]},
        tolerance={"quorum": 0.3, "retries": 0},
    )
    result = runs.run(study, tmp_path)
    (record,) = result.rounds
    assert record["answered"] == ["a"]
    assert sorted(record["refused"]) == ["b", "c"]
    assert "expected (2,)" in record["refused"]["b"]
    assert list(result.server(1, "counts")) == ["a"]


@pytest.mark.parametrize("transport", ["inprocess", "workers"])
def test_a_statistic_arrives_by_any_transport(tmp_path: Path, transport: str) -> None:
    study = runs.make_study(
        runs.TABLE, f"{MODULE}:Counting", rounds=1, transport={"name": transport}
    )
    counts = runs.run(study, tmp_path).server(1, "counts")
    assert sorted(counts) == ["a", "b", "c"]
    assert all(c.sum() == study.train.batch_size for c in counts.values())


def test_sites_may_send_different_parts_of_the_network(tmp_path: Path) -> None:
    def study(*, declared: bool) -> object:
        return runs.make_study(
            runs.TABLE,
            f"{MODULE}:InParts",
            rounds=1,
            strategy={"sync": "step", "declared": declared},
            tolerance={"quorum": 1.0, "retries": 0},
        )

    result = runs.run(study(declared=True), tmp_path / "declared")
    assert result.rounds[0]["answered"] == ["a", "b", "c"]
    before, after = result.server(0), result.server(1)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(QuorumError, match=r"which (no|the) other"):
        runs.run(study(declared=False), tmp_path / "undeclared")
