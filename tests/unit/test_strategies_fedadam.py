from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmed.errors import ConfigError
from fedmed.resolve import load_strategy

sys.path.insert(0, str(Path(__file__).parents[1]))
logistic = importlib.import_module("tiny.logistic")
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

BETA1, BETA2, TAU, SERVER_LR, LR = 0.7, 0.9, 1e-2, 0.05, 0.2
OPTIONS = {"beta1": BETA1, "beta2": BETA2, "tau": TAU, "server_lr": SERVER_LR}


def reddi(weights, updates, local_steps):
    """Algorithm 2 of Reddi et al., FedAdam, lines 6-15, in float64."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    shares = logistic.counts() / logistic.counts().sum()
    for _ in range(updates):
        delta = np.zeros_like(weights)
        for share, site in zip(shares, logistic.SITES, strict=True):
            own = weights
            for _ in range(local_steps):
                own = own - LR * logistic.gradient(own, site)
            delta += share * (own - weights)
        m = BETA1 * m + (1 - BETA1) * delta
        v = BETA2 * v + (1 - BETA2) * delta**2
        weights = weights + SERVER_LR * m / (np.sqrt(v) + TAU)
    return weights, m, v


@pytest.mark.parametrize(
    ("sync", "rounds", "local_steps"), [("round", 3, 2), ("step", 2, 3)]
)
def test_updates_follow_algorithm_2(tmp_path, sync, rounds, local_steps):
    study = runs.make_study(
        runs.TABLE,
        "fedadam",
        rounds=rounds,
        strategy={**OPTIONS, "sync": sync},
        train={"batch_size": 30, "local_steps": local_steps},
        model=logistic.MODEL,
    )
    result = runs.run(study, tmp_path)
    start = logistic.weights_of(runs.Ward(study).server.shared)
    in_steps = sync == "step"
    updates = rounds * local_steps if in_steps else rounds
    weights, m, v = reddi(start, updates, 1 if in_steps else local_steps)
    assert np.abs(weights - start).max() > 0.1
    # An error of 1e-16 in Delta, divided by tau = 1e-2.
    found = logistic.weights_of(result.shared)
    np.testing.assert_allclose(found, weights, rtol=0, atol=1e-12)
    for name, expected in (("first_moment", m), ("second_moment", v)):
        memory = logistic.weights_of(result.server(rounds, name))
        np.testing.assert_allclose(memory, expected, rtol=1e-9, atol=1e-15)


def test_a_large_tau_is_momentum_on_the_server(tmp_path):
    """tau >> sqrt(v): w <- w + (eta_g / tau) m, FedAvgM with scaled constants."""
    shared = {}
    for name, options in {
        "fedadam": {"beta1": 0.5, "beta2": 0.5, "tau": 1e9, "server_lr": 1e9},
        "fedavgm": {"beta": 0.5, "server_lr": 0.5},
    }.items():
        study = runs.make_study(runs.TABLE, name, rounds=3, strategy=options)
        shared[name] = runs.run(study, tmp_path / name).shared
    for name, weight in shared["fedavgm"].items():
        np.testing.assert_allclose(shared["fedadam"][name], weight, rtol=0, atol=1e-7)


def test_running_statistics_are_merged_and_not_moved_by_adam(tmp_path):
    study = runs.make_study(runs.IMAGE, "fedadam", rounds=1)
    average = runs.make_study(runs.IMAGE, "fedavg", rounds=1)
    found = runs.run(study, tmp_path / "adam").shared
    expected = runs.run(average, tmp_path / "avg").shared
    buffers = [n for n in found if "running" in n or "num_batches" in n]
    assert len(buffers) > 5
    assert all((found[n] == expected[n]).all() for n in buffers)
    others = [n for n in found if n not in buffers]
    assert not any((found[n] == expected[n]).all() for n in others)


@pytest.mark.parametrize(
    "options", [{"beta1": 1.0}, {"beta2": -0.1}, {"tau": 0}, {"server_lr": -1}]
)
def test_impossible_constants_are_refused(options):
    with pytest.raises(ConfigError, match=r"strategy\.beta1"):
        load_strategy("fedadam", options)
