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

SGD = {"optimizer": {"name": "sgd", "lr": 0.1}, "local_steps": 1}


def study_of(sync="step", **strategy):
    return runs.make_study(
        runs.IMAGE, "per_fedavg", rounds=1, train=SGD,
        strategy={"sync": sync} | strategy,
    )  # fmt: skip


@pytest.mark.parametrize("order", ["first", "second"])
def test_without_adaptation_it_is_fedavg_on_the_judging_batch(order):
    """Batch 1 of the first step's three; the weights move as with plain SGD."""
    ward = runs.Ward(study_of(inner_lr=0.0, order=order))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    replies = ward.answer(next(half))
    for site, bench in ward.benches.items():
        model = bench.load(ward.server.shared, ward.privates[site]).train()
        bench.trainer.gradient(model, bench.batch(1, 0))
        expected, _ = bench.trainer.gradient(model, bench.batch(1, 1))
        torch.testing.assert_close(replies[site].state, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_one_step_is_the_same_in_both_modes(tmp_path, sync):
    result = runs.run(study_of(sync, inner_lr=0.1), tmp_path / sync)
    other = "round" if sync == "step" else "step"
    again = runs.run(study_of(other, inner_lr=0.1), tmp_path / other)
    for name, tensor in result.shared.items():
        if name.endswith(("weight", "bias")):
            torch.testing.assert_close(tensor, again.shared[name], rtol=0, atol=1e-6)


def test_local_steps_heed_the_largest_norm_of_a_gradient():
    limited = runs.make_study(
        runs.IMAGE, "per_fedavg", train=SGD | {"clip_norm": 1e-3}, strategy={}
    )
    ward = runs.Ward(limited)
    (reply, *_) = ward.answer(
        next(ward.strategy.run_round(ward.server, ward.cohort()))
    ).values()
    moved = [reply.state[n] - w for n, w in ward.server.trainable().items()]
    length = torch.cat([tensor.reshape(-1) for tensor in moved]).norm()
    torch.testing.assert_close(float(length), 0.1 * 1e-3, rtol=1e-2, atol=0)


def test_a_site_is_evaluated_after_one_step_on_its_own_data(tmp_path):
    plain = runs.run(study_of(inner_lr=0.0), tmp_path / "a")
    ward = runs.Ward(study_of(inner_lr=5.0))
    bench = ward.benches["a"]
    model = bench.load(plain.shared, ward.privates["a"]).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    evaluation = importlib.import_module("sites.evaluation")
    options = {"weights": plain.shared, "splits": ("test",)}
    evaluation.evaluate(bench, ward.privates["a"], **options)
    after = dict(model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before)
    gradient, _ = bench.trainer.gradient(
        bench.load(plain.shared, ward.privates["a"]).train(), bench.batch(0, 0)
    )
    expected = {name: w - 5.0 * gradient[name] for name, w in before.items()}
    evaluation.evaluate(bench, ward.privates["a"], **options)
    found = {name: p.detach() for name, p in bench.model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", ["strategy.order=second", "strategy.inner_lr=0.2"])
def test_it_equals_the_pooled_method(options):
    found = prove("per_fedavg", steps=3, overrides=(options,))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3


def test_impossible_constants_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="inner_lr"):
        runs.run(study_of(inner_lr=-1.0), tmp_path)
