from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.training.local import num_weighted, optimizer_at, share_of, stepped

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


def test_shares_of_a_mean_add_up_to_one_and_of_a_sum_to_the_number_of_sites():
    weights = {"a": 3.0, "b": 1.0, "c": 0.0}
    assert num_weighted(weights) == 2
    assert share_of(weights) == {
        "a": {"share": 0.75},
        "b": {"share": 0.25},
        "c": {"share": 0.0},
    }
    assert share_of(weights, total=True) == {
        "a": {"share": 1.5},
        "b": {"share": 0.5},
        "c": {"share": 0.0},
    }
    equal = dict.fromkeys("abc", 1.0)
    assert [s["share"] for s in share_of(equal, total=True).values()] == [1.0] * 3


@pytest.mark.parametrize("total", [False, True])
def test_a_step_along_the_sum_counts_the_sites_that_answered(total):
    ward = runs.Ward(runs.make_study(runs.IMAGE, "fedbn", strategy={"sync": "step"}))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    replies = ward.answer(next(half))
    replies.pop("b")
    after = stepped(
        ward.server, replies, dict.fromkeys("abc", 1.0), total=total, memory="phase"
    )
    name = "encoder.levels.0.conv1.weight"
    along = replies["a"].state[name] + replies["c"].state[name]
    expected = ward.server.shared[name] - 0.05 * along / (1 if total else 2)
    torch.testing.assert_close(after.shared[name], expected)
    assert set(after.memory) == {"phase"}


def test_the_optimiser_of_a_step_counts_the_rounds_before():
    train = {"lr_decay": {"factor": 0.5, "every_steps": 10}}
    ward = runs.Ward(runs.make_study(runs.IMAGE, "fedbn", train=train))
    bench = ward.benches["a"]
    site = runs.HospitalContext(bench, ward.privates["a"], 5, first_step=8)
    assert [optimizer_at(site, index).lr for index in (1, 2, 12)] == [
        0.05,
        0.025,
        0.0125,
    ]
