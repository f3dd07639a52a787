from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.prove import prove

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


@pytest.mark.parametrize("sync", ["step", "round"])
def test_without_changes_it_is_fedavg_bit_for_bit(sync, tmp_path):
    found = runs.run(
        runs.make_study(
            runs.IMAGE, "bigaug", strategy={"sync": sync, "probability": 0.0}
        ),
        tmp_path / "a",
    )
    expected = runs.run(
        runs.make_study(runs.IMAGE, "fedavg", strategy={"sync": sync}), tmp_path / "b"
    )
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=0)


def test_both_modes_see_the_same_changed_batches(tmp_path):
    """One local SGD step and one averaged gradient are the same step."""
    results = [
        runs.run(
            runs.make_study(
                runs.IMAGE, "bigaug", rounds=1, strategy={"sync": sync},
                train={"local_steps": 1}, model={"norm": "group"},
            ),
            tmp_path / sync,
        )
        for sync in ("step", "round")
    ]  # fmt: skip
    torch.testing.assert_close(results[0].shared, results[1].shared, rtol=0, atol=1e-6)


def test_changes_are_drawn_anew_in_each_round_and_step():
    ward = runs.Ward(runs.make_study(runs.IMAGE, "bigaug"))
    contexts = importlib.import_module("sites.context")
    seen = [
        batch.images
        for number in (1, 2)
        for batch in ward.strategy._changed(
            contexts.HospitalContext(ward.benches["a"], ward.privates["a"], number),
            0,
            2,
        )
    ]
    assert all(
        not torch.equal(one, other)
        for position, one in enumerate(seen)
        for other in seen[:position]
    )


def test_it_equals_the_pooled_method():
    found = prove("bigaug", steps=2, overrides=("strategy.probability=1.0",))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3


def test_impossible_constants_and_tables_are_refused(tmp_path):
    study = runs.make_study(runs.IMAGE, "bigaug", strategy={"probability": 2.0})
    with pytest.raises(ConfigError, match="probability"):
        runs.run(study, tmp_path)
    ward = runs.Ward(runs.make_study(runs.TABLE, "bigaug"))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    with pytest.raises(ConfigError, match="table"):
        ward.answer(next(half))
