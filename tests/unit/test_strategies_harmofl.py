from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.message_size import network_size
from fedmed.networks.amplitude_normalisation import REFERENCE
from fedmed.payload import kinds_in
from fedmed.prove import prove
from fedmed.training.amplitude import amplitude_centre
from strategies.harmofl import HarmoFL

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
contexts = importlib.import_module("sites.context")
modules_are_listed_once = runs.modules_are_listed_once

OFF = {"alpha": 0.0, "normalise": False}


def study_of(name="harmofl", sync="round", **changes):
    strategy = {"sync": sync, **changes.pop("strategy", {})}
    return runs.make_study(runs.IMAGE, name, strategy=strategy, **changes)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_without_perturbation_and_normalisation_it_is_fedavg_bit_for_bit(
    sync, tmp_path
):
    found = runs.run(study_of(sync=sync, strategy=OFF), tmp_path / "a")
    fedavg = study_of("fedavg", sync, strategy={"weighting": "uniform"})
    expected = runs.run(fedavg, tmp_path / "b")
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=0)


def test_the_reference_is_the_mean_of_the_sites_and_fixed_after_round_1(tmp_path):
    recorder = runs.Recorder()
    study = study_of(rounds=3, strategy={"momentum": 0.5})
    result = runs.run(study, tmp_path, transport=recorder)
    told = [m for _, m in recorder.up if "AmplitudeStatistic" in kinds_in(m)]
    name = f"extra/amplitude_statistic/{REFERENCE}"
    assert len(told) == 3
    mean = torch.stack([m.tensors[name].double() for m in told]).mean(dim=0)
    fixed = [result.server(number)[REFERENCE] for number in (2, 3)]
    torch.testing.assert_close(fixed[0].double(), mean, rtol=0, atol=1e-7)
    assert torch.equal(fixed[0], fixed[1])
    assert fixed[0].shape == (1, 7, 7)
    assert told[0].tensors[name].numel() * 4 == 196


@pytest.mark.parametrize("sync", ["step", "round"])
def test_the_reference_is_never_averaged_as_a_weight(sync, tmp_path):
    recorder = runs.Recorder()
    runs.run(study_of(sync=sync), tmp_path, transport=recorder)
    names = {n for _, m in recorder.up for n in m.tensors}
    assert f"buffers/{REFERENCE}" not in names
    states = {
        n for _, m in recorder.up if m.kind != "AmplitudeStatistic" for n in m.tensors
    }
    assert f"state/{REFERENCE}" not in states


def test_each_site_follows_its_own_batches_in_round_1():
    momentum = 0.25
    study = study_of(strategy={"momentum": momentum}, train={"local_steps": 3})
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    told = ward.answer(next(half))
    for site, payload in told.items():
        context = contexts.HospitalContext(ward.benches[site], ward.privates[site], 1)
        expected = None
        for batch in context.batches(0, 3):
            mean = amplitude_centre(batch.images, 3).mean(dim=0)
            expected = (
                mean
                if expected is None
                else (1 - momentum) * expected + momentum * mean
            )
        found = payload.extra["amplitude_statistic"][REFERENCE]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert payload.min_count == min(6, payload.num_examples)


def test_a_reference_that_is_the_last_batch_s_says_so_to_the_policy():
    study = study_of(strategy={"momentum": 1.0}, train={"batch_size": 1})
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    for payload in ward.answer(next(half)).values():
        assert payload.min_count == 1


def test_the_reference_of_single_steps_is_told_before_them(tmp_path):
    recorder = runs.Recorder()
    result = runs.run(study_of(sync="step"), tmp_path, transport=recorder)
    told = [s for s, m in recorder.up if m.kind == "AmplitudeStatistic"]
    assert told == ["a", "b", "c"]
    assert [r["exchanges"] for r in result.rounds] == [1 + 2, 2 + 1]


def test_the_gradient_is_that_at_the_perturbed_weights():
    """Two passes by hand; the network itself is left at w, statistics too."""
    alpha = 0.3
    study = study_of(sync="step", strategy={"alpha": alpha, "normalise": False})
    ward = runs.Ward(study)
    bench = ward.benches["a"]
    context = contexts.HospitalContext(bench, ward.privates["a"], 1)
    (batch,) = context.batches(0, 1)
    model = context.load(ward.server.shared)
    first, _ = context.trainer.gradient(model, batch)
    once = {n: b.clone() for n, b in model.named_buffers()}
    norm = torch.cat([g.reshape(-1) for g in first.values()]).norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(alpha * first[name] / norm)
    expected, _ = context.trainer.gradient(model, batch)
    outcome = ward.strategy.gradient(context, ward.server.shared, 0)
    found = outcome.payload.state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert max(float((found[n] - first[n]).abs().max()) for n in found) > 1e-3
    torch.testing.assert_close(outcome.payload.buffers, once, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), ward.server.shared[name])


@pytest.mark.parametrize(
    "options",
    ["{alpha: 0.5}", "{half_width: 0, weighting: examples}", "{normalise: false}"],
)
def test_it_equals_the_pooled_method(options):
    override = f"strategy={options}".replace("{", "{name: harmofl, sync: step, ")
    found = prove("harmofl", steps=2, overrides=(override,))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3


def test_the_published_network_has_the_published_number_of_weights():
    size = network_size(HarmoFL(), HarmoFL.published_model)
    parts = {part.part: part.shared_values for part in size.parts}
    assert parts["all"] - parts["amplitude"] == 7_757_186
    assert parts["amplitude"] == 3 * 7 * 7


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", -1.0), ("half_width", -1), ("momentum", 0.0)]
)
def test_impossible_constants_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        HarmoFL(**{name: value})
