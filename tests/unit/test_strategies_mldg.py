from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmed.episodes import draw_episode
from fedmed.errors import ConfigError
from fedmed.prove import prove
from fedmed.seeds import derive
from fedmed.strategy import Private
from sites.context import HospitalContext

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SGD = {"optimizer": {"name": "sgd", "lr": 0.1}, "local_steps": 1}


def study_of(rounds=1, **strategy):
    return runs.make_study(
        runs.IMAGE, "mldg", rounds=rounds, strategy={"sync": "step"} | strategy,
        train=SGD,
    )  # fmt: skip


def fedsgd_on(site_ids):
    return runs.make_study(
        runs.IMAGE, "fedavg", rounds=1, train=SGD, sites={"include": list(site_ids)},
        strategy={"sync": "step", "weighting": "uniform"},
    )  # fmt: skip


def weights_of(result):
    return {n: t for n, t in result.shared.items() if n.endswith(("weight", "bias"))}


def test_beta_of_zero_is_fedsgd_on_the_meta_train_sites(tmp_path):
    study = study_of(beta=0.0)
    cohort = replace(
        runs.Ward(study).cohort(), rng_seed=derive(study.seed, "strategy", 1)
    )
    episode = draw_episode(cohort, 0)
    found = runs.run(study, tmp_path / "a")
    expected = runs.run(fedsgd_on(episode.meta_train.site_ids), tmp_path / "b")
    torch.testing.assert_close(
        weights_of(found), weights_of(expected), rtol=0, atol=1e-7
    )


def test_without_an_inner_step_both_orders_are_one(tmp_path):
    first = runs.run(study_of(inner_lr=0.0), tmp_path / "a")
    second = runs.run(study_of(inner_lr=0.0, order="second"), tmp_path / "b")
    torch.testing.assert_close(first.shared, second.shared, rtol=0, atol=0)


def test_the_orders_differ_where_the_inner_step_is_long(tmp_path):
    first = runs.run(study_of(inner_lr=0.5), tmp_path / "a").shared
    second = runs.run(study_of(inner_lr=0.5, order="second"), tmp_path / "b").shared
    far = max(float((first[n] - second[n]).abs().max()) for n in first)
    assert far > 1e-4


def test_second_order_asks_three_times(tmp_path):
    result = runs.run(study_of(order="second"), tmp_path)
    assert result.rounds[0]["exchanges"] == 3 + 1


def test_the_curvature_is_that_of_the_network_that_the_gradient_dropped_from():
    network = {"name": "tiny.dropping:Dropping", "mode": "slice"}
    study = runs.make_study(
        runs.IMAGE | {"model": network},
        "mldg", train=SGD | {"precision": "float64"},
        strategy={"sync": "step", "order": "second"},
    )  # fmt: skip
    ward = runs.Ward(study)
    bench, w = ward.benches["a"], ward.server.trainable()
    generator = torch.Generator().manual_seed(0)
    vector = {n: torch.randn(t.shape, generator=generator).to(t) for n, t in w.items()}

    def asked(action, state, **content):
        site = HospitalContext(bench, Private(), 1)
        shared = {**ward.server.shared, **state}
        return action(site, weights=shared, index=0, **content).payload.state

    step = 1e-8  # so short that hardly any activation changes sign
    ahead, behind = (
        asked(ward.strategy.gradient, {n: w[n] + by * vector[n] for n in w})
        for by in (step, -step)
    )
    found = asked(ward.strategy.curvature, {}, vector=vector)
    for name in w:
        expected = (ahead[name] - behind[name]) / (2 * step)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lost", ["a", "b", "c"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_a_site_that_is_lost_in_its_half_costs_the_episode_nothing_else(lost, order):
    ward = runs.Ward(study_of(order=order, inner_lr=0.5))
    cohort = ward.cohort()
    episode = draw_episode(cohort, 0)
    half = ward.strategy.run_round(ward.server, cohort)
    after = ward.finish(half, drop=lost)
    moved = {
        n
        for n in after.shared
        if not torch.equal(after.shared[n], ward.server.shared[n])
    }
    assert all(torch.isfinite(tensor).all() for tensor in after.shared.values())
    assert bool(moved)
    assert len(episode.meta_test.members) == 1


@pytest.mark.parametrize(
    "options",
    [
        "strategy.order=second",
        "strategy.inner_lr=0.5",
        "strategy.beta=0.3",
        "strategy.num_meta_test=2",
    ],
)
def test_it_equals_the_pooled_method(options):
    found = prove("mldg", steps=3, overrides=(options,))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3


def test_impossible_constants_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="inner_lr"):
        runs.run(study_of(inner_lr=-1.0), tmp_path)
