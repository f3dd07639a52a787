"""Sums and statistics over sites against NumPy on the pooled numbers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.optimizer import OptimizerSpec
from fedmed.partition import StatePartition, describe_state
from fedmed.reduce import merge_states, weighted_mean
from fedmed.strategy import Server


def test_merged_statistics_are_those_of_the_pooled_data():
    # Law of total variance: sites of different size, mean and spread.
    rng = np.random.default_rng(0)
    data = {
        site: rng.normal(shift, spread, (size, 4))
        for site, size, shift, spread in (
            ("a", 10, -3.0, 1.0),
            ("b", 200, 0.5, 0.1),
            ("c", 55, 40.0, 7.0),
        )
    }
    layer = nn.BatchNorm1d(4, dtype=torch.float64)
    states = {
        site: {
            **layer.state_dict(),
            "running_mean": torch.from_numpy(rows.mean(axis=0)),
            "running_var": torch.from_numpy(rows.var(axis=0)),
        }
        for site, rows in data.items()
    }
    weights = {site: len(rows) for site, rows in data.items()}
    merged = merge_states(states, weights, describe_state(layer))
    pooled = np.concatenate(list(data.values()))
    np.testing.assert_allclose(merged["running_mean"], pooled.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged["running_var"], pooled.var(axis=0), rtol=1e-13)
    averaged = weighted_mean(states, weights)["running_var"].numpy()
    assert (averaged < 0.5 * pooled.var(axis=0)).all()


@pytest.mark.parametrize("num_passes", [1, 2, 5])
def test_after_some_passes_the_variance_is_that_of_passes_of_all(num_passes):
    """Torch moves running statistics by a share; so must what differs between sites."""
    rng = np.random.default_rng(5)
    data = {"a": rng.normal(-3, 1, (64, 4)), "b": rng.normal(3, 2, (64, 4))}
    layer = nn.BatchNorm1d(4, momentum=0.3, dtype=torch.float64)
    start = {n: t.clone() for n, t in layer.state_dict().items()}
    server = server_of(layer, start)
    for _ in range(40):
        states = {}
        for site, rows in data.items():
            layer.load_state_dict(server.shared)
            for _ in range(num_passes):
                layer(torch.from_numpy(rows))
            states[site] = {n: t.clone() for n, t in layer.state_dict().items()}
        server = server.with_shared(server.merge_buffers(states, {"a": 1.0, "b": 1.0}))
    shared = server.shared
    means = np.mean([rows.mean(axis=0) for rows in data.values()], axis=0)
    within = np.mean([rows.var(axis=0, ddof=1) for rows in data.values()], axis=0)
    apart = np.mean(
        [(rows.mean(axis=0) - means) ** 2 for rows in data.values()], axis=0
    )
    left = 0.7 ** (40 * num_passes)  # of the initial mean 0 and variance 1
    np.testing.assert_allclose(shared["running_mean"], means * (1 - left), rtol=1e-12)
    expected = (within + apart) * (1 - left) + left
    np.testing.assert_allclose(shared["running_var"], expected, rtol=1e-12)


def server_of(layer, shared):
    partition = StatePartition.of(layer, ["none"])
    return Server(
        shared, {}, partition.entries, partition, OptimizerSpec("sgd", lr=0.1)
    )


def test_statistics_far_from_zero_keep_their_variance():
    # E[x^2] - mean^2 would lose all digits of a variance of 1 at a mean of 1e8.
    layer = nn.BatchNorm1d(1, dtype=torch.float64)
    states = {
        site: {
            **layer.state_dict(),
            "running_mean": torch.tensor([mean], dtype=torch.float64),
        }
        for site, mean in (("a", 1e8 - 1), ("b", 1e8 + 1))
    }
    merged = merge_states(states, {"a": 1, "b": 1}, describe_state(layer))
    np.testing.assert_allclose(merged["running_var"], [2.0], rtol=1e-12)


def test_weighted_mean_is_numpys_average():
    rng = np.random.default_rng(1)
    arrays = rng.normal(size=(6, 5, 3))
    weights = rng.uniform(1, 100, 6)
    names = [f"site{i}" for i in range(6)]
    mean = weighted_mean(
        {n: {"w": torch.from_numpy(a)} for n, a in zip(names, arrays, strict=True)},
        dict(zip(names, weights.tolist(), strict=True)),
    )["w"]
    expected = np.average(arrays, axis=0, weights=weights)
    np.testing.assert_allclose(mean, expected, rtol=1e-13, atol=1e-15)
