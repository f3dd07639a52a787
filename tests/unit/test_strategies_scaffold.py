from __future__ import annotations

import functools
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

LR, SERVER_LR, STEPS, ROUNDS = 0.3, 0.7, 3, 3


def algorithm_1(weights, absent):
    """Karimireddy et al., algorithm 1, option II, in float64.

    Args:
        weights: x at the start.
        absent: Round -> the site that does not answer.

    Returns:
        x, c and every c_k after the last round.
    """
    x, c = weights, np.zeros_like(weights)
    own = {site: np.zeros_like(weights) for site in logistic.SITES}
    for number in range(1, ROUNDS + 1):
        present = [s for s in logistic.SITES if s != absent.get(number)]
        delta_y, delta_c = [], []
        for site in present:
            y = x
            for _ in range(STEPS):
                y = y - LR * (logistic.gradient(y, site) - own[site] + c)
            new = own[site] - c + (x - y) / (STEPS * LR)
            delta_y.append(y - x)
            delta_c.append(new - own[site])
            own[site] = new
        x = x + SERVER_LR * sum(delta_y) / len(present)
        c = c + len(present) / len(logistic.SITES) * sum(delta_c) / len(present)
    return x, c, own


@pytest.mark.parametrize("absent", [{}, {2: "b"}])
def test_rounds_follow_algorithm_1_with_option_ii(tmp_path, absent):
    study = runs.make_study(
        runs.TABLE,
        "scaffold",
        rounds=ROUNDS,
        strategy={"server_lr": SERVER_LR},
        train={
            "batch_size": 30,
            "local_steps": STEPS,
            "optimizer": {"name": "sgd", "lr": LR},
        },
        model=logistic.MODEL,
        tolerance={"quorum": 0.6},
    )
    transport = runs.Recorder()
    if absent:
        transport = runs.Faulty(site=absent[2], round=2, fault="silent")
    result = runs.run(study, tmp_path, transport=transport)
    start = logistic.weights_of(runs.Ward(study).server.shared)
    x, c, own = algorithm_1(start, absent)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    close(logistic.weights_of(result.shared), x)
    control = result.server(ROUNDS, "control")
    close(logistic.weights_of(control), c)
    for site in logistic.SITES:
        kept = logistic.weights_of(result.private(site).states["control"])
        close(kept, own[site])
        assert np.abs(kept - c).max() > 1e-3  # sites do differ


def test_one_site_alone_is_ordinary_sgd(tmp_path):
    """c = c_1 then, so the correction vanishes in every round."""
    shared = {}
    for name in ("fedavg", "scaffold"):
        study = runs.make_study(
            runs.TABLE, name, rounds=3, sites={"include": ["a"]}
        )  # fmt: skip
        shared[name] = runs.run(study, tmp_path / name).shared
    torch.testing.assert_close(shared["scaffold"], shared["fedavg"], rtol=0, atol=1e-13)


def test_the_first_round_is_fedavg_and_later_ones_are_not(tmp_path):
    """All control variates are 0 in round 1."""
    shared = {}
    for rounds in (1, 2):
        for name in ("fedavg", "scaffold"):
            study = runs.make_study(
                runs.TABLE, name, rounds=rounds, strategy={"weighting": "uniform"}
            )
            result = runs.run(study, tmp_path / f"{name}{rounds}")
            shared[name, rounds] = result.shared["head.weight"]
    torch.testing.assert_close(
        shared["scaffold", 1], shared["fedavg", 1], rtol=0, atol=1e-14
    )
    assert (shared["scaffold", 2] - shared["fedavg", 2]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "optimizer", [{"name": "adam"}, {"name": "sgd", "momentum": 0.9}]
)
def test_only_plain_sgd_has_control_variates(tmp_path, optimizer):
    study = runs.make_study(runs.TABLE, "scaffold", train={"optimizer": optimizer})
    with pytest.raises(ConfigError, match="plain SGD"):
        runs.run(study, tmp_path)


def test_a_server_that_stands_still_is_refused():
    with pytest.raises(ConfigError, match=r"strategy\.server_lr"):
        load_strategy("scaffold", {"server_lr": 0})
