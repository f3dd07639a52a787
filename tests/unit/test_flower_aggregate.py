"""Flower's strategies as aggregators, against formulas in NumPy."""

import numpy as np
import pytest
import torch

from fedmed.errors import ConfigError, SiteError
from fedmed.flower.aggregate import (
    Aggregate,
    TrainRound,
    aggregate_with_flower,
    aggregators,
)
from fedmed.message import State

RNG = np.random.default_rng(5)
START = RNG.normal(size=(3, 2)).astype(np.float32)
LOCAL = {site: RNG.normal(size=(3, 2)).astype(np.float32) for site in "badce"}
WEIGHTS = {site: float(k + 1) for k, site in enumerate("badce")}


def state(array: np.ndarray, counter: int = 0) -> State:
    return {
        "w": torch.from_numpy(array.copy()),
        "num_batches_tracked": torch.tensor(counter),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }


REPLIES = {
    site: (state(array, counter), WEIGHTS[site])
    for counter, (site, array) in enumerate(LOCAL.items())
}


def run(
    name: str, server_round: int = 1, memory: State | None = None, **options: float
) -> Aggregate:
    losses = dict.fromkeys(REPLIES, 0.5)
    train_round = TrainRound(server_round, state(START), REPLIES, losses)
    return aggregate_with_flower(name, options, train_round, memory=memory)


def weighted_mean() -> np.ndarray:
    total = sum(WEIGHTS.values())
    parts = [LOCAL[s].astype(np.float64) * WEIGHTS[s] / total for s in LOCAL]
    mean: np.ndarray = np.sum(parts, axis=0)
    return mean


def test_fedavg_is_the_weighted_mean() -> None:
    result = run("FedAvg")
    np.testing.assert_allclose(result.state["w"], weighted_mean(), rtol=1e-6)
    assert result.memory == {}


def test_integers_stay_integers_and_dtypes_stay() -> None:
    result = run("FedMedian").state
    assert list(result) == list(state(START))
    assert result["num_batches_tracked"].dtype == torch.int64
    assert result["num_batches_tracked"].item() == len(LOCAL) - 1
    assert result["half"].dtype == torch.bfloat16
    stacked = np.stack(list(LOCAL.values()))
    np.testing.assert_array_equal(result["w"], np.median(stacked, axis=0))


def test_trimmed_mean_drops_the_extremes() -> None:
    result = run("FedTrimmedAvg", beta=0.2).state["w"]
    ordered = np.sort(np.stack(list(LOCAL.values())).astype(np.float64), axis=0)
    np.testing.assert_allclose(result, ordered[1:-1].mean(axis=0), rtol=1e-5)


def test_krum_gives_one_of_the_replies() -> None:
    result = run("Krum", num_malicious_nodes=1).state["w"].numpy()
    assert any(np.allclose(result, array) for array in LOCAL.values())


def test_fedadam_steps_from_the_start_and_keeps_its_moments() -> None:
    eta, beta_1, beta_2, tau = 0.1, 0.9, 0.99, 1e-3
    first = run("FedAdam", 1)
    second = run("FedAdam", 2, first.memory)
    delta = weighted_mean() - START
    m, v = (1 - beta_1) * delta, (1 - beta_2) * delta**2
    for server_round, result in ((1, first), (2, second)):
        rate = eta * np.sqrt(1 - beta_2 ** (server_round + 1))
        rate /= 1 - beta_1 ** (server_round + 1)
        expected = START + rate * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(result.state["w"], expected, rtol=1e-4)
        m, v = beta_1 * m + (1 - beta_1) * delta, beta_2 * v + (1 - beta_2) * delta**2
    forgetful = run("FedAdam", 2).state["w"]
    assert not torch.equal(forgetful, second.state["w"])


def test_fedavgm_keeps_its_momentum() -> None:
    first = run("FedAvgM", 1, server_momentum=0.9)
    second = run("FedAvgM", 2, first.memory, server_momentum=0.9)
    gradient = START - weighted_mean()
    np.testing.assert_allclose(first.state["w"], START - gradient, rtol=1e-4)
    np.testing.assert_allclose(second.state["w"], START - 1.9 * gradient, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(aggregators()))
def test_every_aggregator_runs_and_ignores_the_order_of_replies(name: str) -> None:
    shuffled = {site: REPLIES[site] for site in reversed(REPLIES)}
    needed = {"QFedAvg": {"client_learning_rate": 0.1}}.get(name, {})
    results = [
        aggregate_with_flower(
            name,
            needed,
            TrainRound(1, state(START), replies, dict.fromkeys(REPLIES, 0.5)),
        )
        for replies in (REPLIES, shuffled)
    ]
    assert torch.equal(results[0].state["w"], results[1].state["w"])
    assert bool(results[0].state["w"].isfinite().all())
    assert torch.equal(REPLIES["a"][0]["w"], torch.from_numpy(LOCAL["a"]))


def test_unknown_names_and_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="FedTrimmedAvg"):
        run("FedTrimedAvg")
    with pytest.raises(ConfigError, match="beta"):
        run("FedTrimmedAvg", betta=0.2)
    with pytest.raises(ConfigError, match="fedprox"):
        run("FedProx", proximal_mu=0.1)


@pytest.mark.parametrize("shape", [(5, 3), (2,), ()])
def test_replies_that_do_not_fit_are_an_error(shape: tuple[int, ...]) -> None:
    broken = {**REPLIES, "a": (state(np.zeros(shape, np.float32)), 1.0)}
    with pytest.raises(SiteError, match="'w' of site a"):
        aggregate_with_flower("FedAvg", {}, TrainRound(4, state(START), broken))


def test_weights_that_sum_to_nothing_are_an_error() -> None:
    idle = {site: (state(array), 0.0) for site, array in LOCAL.items()}
    with pytest.raises(SiteError, match="FedAvg refuses round 4"):
        aggregate_with_flower("FedAvg", {}, TrainRound(4, state(START), idle))
