from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.resolve import load_strategy
from strategies.fedprox import proximal

sys.path.insert(0, str(Path(__file__).parents[1]))
logistic = importlib.import_module("tiny.logistic")
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


def distance(result):
    pairs = zip(result.shared.values(), result.server(0).values(), strict=True)
    return float(sum((a - b).square().sum() for a, b in pairs) ** 0.5)


@pytest.mark.parametrize("base", [runs.TABLE, runs.IMAGE])
def test_mu_0_is_fedavg_bit_for_bit(tmp_path, base):
    fedavg = runs.run(runs.make_study(base, "fedavg"), tmp_path / "avg").shared
    study = runs.make_study(base, "fedprox", strategy={"mu": 0})
    fedprox = runs.run(study, tmp_path / "prox").shared
    torch.testing.assert_close(fedprox, fedavg, rtol=0, atol=0)


def test_mu_that_is_tiny_changes_little_and_a_large_one_holds_the_model_back(tmp_path):
    moved = {}
    for mu in (0.0, 1e-9, 1.0, 3.0):
        study = runs.make_study(
            runs.TABLE, "fedprox", rounds=1, strategy={"mu": mu},
            train={"batch_size": 30, "local_steps": 20},
        )  # fmt: skip
        moved[mu] = distance(runs.run(study, tmp_path / str(mu)))
    assert moved[1e-9] == pytest.approx(moved[0.0], rel=1e-6)
    assert moved[1.0] < 0.8 * moved[0.0]
    assert moved[3.0] < 0.8 * moved[1.0]


def test_local_steps_descend_eq_2(tmp_path):
    """Eq. (2): each local step is along grad L_k(w) + mu (w - w^t)."""
    mu, lr = 0.7, 0.2
    study = runs.make_study(
        runs.TABLE, "fedprox", strategy={"mu": mu}, train={"batch_size": 30},
        model=logistic.MODEL,
    )  # fmt: skip
    result = runs.run(study, tmp_path)
    received = logistic.weights_of(runs.Ward(study).server.shared)
    shares = logistic.counts() / logistic.counts().sum()
    for _ in range(2):
        total = np.zeros_like(received)
        for share, site in zip(shares, logistic.SITES, strict=True):
            own = received
            for _ in range(3):
                pull = mu * (own - received)
                own = own - lr * (logistic.gradient(own, site) + pull)
            total += share * own
        received = total
    found = logistic.weights_of(result.shared)
    np.testing.assert_allclose(found, received, rtol=0, atol=1e-13)


def test_a_step_is_fedavgs_step(tmp_path):
    shared = {}
    for name in ("fedavg", "fedprox"):
        study = runs.make_study(runs.IMAGE, name, strategy={"sync": "step"})
        shared[name] = runs.run(study, tmp_path / name).shared
    torch.testing.assert_close(shared["fedprox"], shared["fedavg"], rtol=0, atol=0)


def test_the_penalty_is_half_mu_times_the_squared_distance_of_shared_entries():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    reference = {"0.weight": torch.zeros(2, 3), "1.running_mean": torch.full((2,), 9.0)}
    penalty = proximal(reference, 0.5)(layer)
    assert penalty.item() == pytest.approx(
        0.25 * float((layer[0].weight.detach() ** 2).sum()), rel=1e-6
    )
    penalty.backward()
    torch.testing.assert_close(layer[0].weight.grad, 0.5 * layer[0].weight.detach())
    assert layer[0].bias.grad is None


@pytest.mark.parametrize("mu", [-1e-9, "nan", "much"])
def test_an_impossible_mu_is_refused(mu):
    with pytest.raises(ConfigError, match=r"strategy\.mu"):
        load_strategy("fedprox", {"mu": mu})
