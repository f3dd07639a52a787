from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.resolve import load_strategy

sys.path.insert(0, str(Path(__file__).parents[1]))
logistic = importlib.import_module("tiny.logistic")
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


@pytest.mark.parametrize("sync", ["round", "step"])
def test_beta_0_and_server_lr_1_is_fedavg(tmp_path, sync):
    fedavg = runs.make_study(runs.IMAGE, "fedavg", strategy={"sync": sync})
    plain = {"sync": sync, "beta": 0.0, "server_lr": 1.0}
    fedavgm = runs.make_study(runs.IMAGE, "fedavgm", strategy=plain)
    expected = runs.run(fedavg, tmp_path / "avg").shared
    found = runs.run(fedavgm, tmp_path / "avgm").shared
    # w + (w' - w) is w' up to one rounding of float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_rounds_follow_the_recurrence_of_section_4(tmp_path):
    """v <- beta v + Delta, w <- w + eta_g v, with Delta of two local steps a site."""
    beta, server_lr, lr = 0.6, 0.8, 0.2
    study = runs.make_study(
        runs.TABLE,
        "fedavgm",
        rounds=3,
        strategy={"beta": beta, "server_lr": server_lr},
        train={"batch_size": 30, "local_steps": 2},
        model=logistic.MODEL,
    )
    result = runs.run(study, tmp_path)
    weights = logistic.weights_of(runs.Ward(study).server.shared)
    velocity = np.zeros_like(weights)
    shares = logistic.counts() / logistic.counts().sum()
    for _ in range(3):
        delta = np.zeros_like(weights)
        for share, site in zip(shares, logistic.SITES, strict=True):
            own = weights
            for _ in range(2):
                own = own - lr * logistic.gradient(own, site)
            delta += share * (own - weights)
        velocity = beta * velocity + delta
        weights = weights + server_lr * velocity
    found = logistic.weights_of(result.shared)
    np.testing.assert_allclose(found, weights, rtol=0, atol=1e-13)
    memory = logistic.weights_of(result.server(3, "momentum"))
    np.testing.assert_allclose(memory, velocity, rtol=0, atol=1e-13)


def test_steps_are_heavy_ball_momentum_on_pooled_data(tmp_path):
    """`sync: step` with plain SGD equals torch's SGD with momentum, by its formula."""
    study = runs.make_study(
        runs.TABLE, "fedavgm", rounds=1, strategy={"sync": "step", "beta": 0.5},
        train={"batch_size": 30, "local_steps": 4}, model=logistic.MODEL,
    )  # fmt: skip
    result = runs.run(study, tmp_path)
    weights = torch.from_numpy(logistic.weights_of(result.server(0))).requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=0.2, momentum=0.5)
    shares = logistic.counts() / logistic.counts().sum()
    for _ in range(4):
        now = weights.detach().numpy()
        pooled = sum(
            share * logistic.gradient(now, site)
            for share, site in zip(shares, logistic.SITES, strict=True)
        )
        weights.grad = torch.from_numpy(pooled)
        optimizer.step()
    found = logistic.weights_of(result.shared)
    np.testing.assert_allclose(found, weights.detach().numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"beta": -0.1}, {"server_lr": 0}])
def test_impossible_constants_are_refused(options):
    with pytest.raises(ConfigError, match=r"strategy\.beta"):
        load_strategy("fedavgm", options)
