from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
logistic = importlib.import_module("tiny.logistic")
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

ONE_FULL_BATCH = {"batch_size": 30, "local_steps": 1}


def pooled_step(state, lr):
    """One SGD step on the rows of all hospitals together, in plain torch."""
    rows, classes = zip(*(logistic.data(site) for site in logistic.SITES), strict=True)
    inputs = torch.from_numpy(np.concatenate(rows))
    weights = {name: t.clone().requires_grad_() for name, t in state.items()}
    hidden = functional.relu(
        inputs @ weights["encoder.layers.0.weight"].T + weights["encoder.layers.0.bias"]
    )
    logits = hidden @ weights["head.weight"].T + weights["head.bias"]
    loss = functional.cross_entropy(logits, torch.from_numpy(np.concatenate(classes)))
    loss.backward()
    return {n: (w - lr * w.grad).detach() for n, w in weights.items()}


@pytest.mark.parametrize("sync", ["round", "step"])
def test_one_full_batch_step_is_one_step_on_pooled_data(tmp_path, sync):
    study = runs.make_study(
        runs.TABLE, "fedavg", rounds=1, train=ONE_FULL_BATCH, strategy={"sync": sync}
    )
    result = runs.run(study, tmp_path)
    expected = pooled_step(result.server(0), lr=0.2)
    assert (
        max((expected[n] - t).abs().max() for n, t in result.server(0).items()) > 0.01
    )
    # 14 rows of order 1 summed in float64: rounding is some 1e-16.
    torch.testing.assert_close(result.shared, expected, rtol=0, atol=1e-14)


def test_sites_count_by_their_examples(tmp_path):
    study = runs.make_study(
        runs.TABLE,
        "fedavg",
        rounds=1,
        train=ONE_FULL_BATCH,
        strategy={"weighting": "uniform"},
    )
    result = runs.run(study, tmp_path)
    expected = pooled_step(result.server(0), lr=0.2)
    away = max((expected[n] - t).abs().max() for n, t in result.shared.items())
    assert away > 1e-4  # three sites that count equally: not the pooled mean


def test_rounds_of_local_steps_are_weighted_means_of_weights(tmp_path):
    """Algorithm 1: w^{t+1} = sum_k (n_k / n) w_k, after two local steps each."""
    study = runs.make_study(
        runs.TABLE, "fedavg", train={"batch_size": 30, "local_steps": 2},
        model=logistic.MODEL,
    )  # fmt: skip
    result = runs.run(study, tmp_path)
    weights = logistic.weights_of(runs.Ward(study).server.shared)
    shares = logistic.counts() / logistic.counts().sum()
    for _ in range(study.rounds):
        local = []
        for site in logistic.SITES:
            own = weights
            for _ in range(2):
                own = own - 0.2 * logistic.gradient(own, site)
            local.append(own)
        weights = np.tensordot(shares, np.stack(local), axes=1)
    np.testing.assert_allclose(
        logistic.weights_of(result.shared), weights, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("sync", ["round", "step"])
def test_sites_that_hold_the_same_data_are_one_site_alone(tmp_path, sync):
    sites = {"alike": True}
    options = {"strategy": {"sync": sync}, "train": {"batch_size": 30}}
    all_of_them = runs.make_study(runs.TABLE, "fedavg", sites=sites, **options)
    alone = runs.make_study(
        runs.TABLE, "fedavg", sites={**sites, "include": ["b"]}, **options
    )
    together = runs.run(all_of_them, tmp_path / "all").shared
    single = runs.run(alone, tmp_path / "alone").shared
    # Each site draws its rows in its own order: sums differ in their last bits.
    torch.testing.assert_close(together, single, rtol=0, atol=1e-13)


def test_optimizer_memory_is_kept_only_if_the_study_says_so(tmp_path):
    adam = {"optimizer": {"name": "adam", "lr": 0.05}}
    results = {}
    for state in ("reset", "keep"):
        study = runs.make_study(
            runs.TABLE, "fedavg", train={**adam, "optimizer_state": state}
        )
        results[state] = runs.run(study, tmp_path / state)
    assert results["reset"].private("a").states == {}
    memory = results["keep"].private("a").states["optimizer"]
    assert memory["head.bias|step"] == 6  # two rounds of three steps
    assert not torch.equal(
        results["reset"].shared["head.bias"], results["keep"].shared["head.bias"]
    )
