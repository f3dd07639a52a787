"""Embeddings in three grades, and the modules that methods with episodes share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.losses.known_voxels import one_hot_of_known
from fedmed.networks.build import build_network
from fedmed.networks.metric_network import MetricNetwork, features_before_head
from fedmed.training.alignment import Alignment, RowTally
from fedmed.training.clustering import (
    CENTROIDS,
    KINDS,
    LAYERS,
    SHOWN,
    VECTORS,
    Clustering,
    Embedded,
    Tally,
    cropped_to,
    embed,
    features_of,
    joined,
    others_of,
)
from fedmed.training.coupled import NOTHING_TOLD, Measured, Pass, captured
from fedmed.training.local import local_training, trained_outcome
from fedmed.training.meta_update import MetaUpdate, clip_each, sum_of_parts
from fedmed.training.passes import train_on_passes
from sites.context import HospitalContext

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

NETWORKS = {
    "unet": (1, 13, 10),
    "residual_unet": (1, 13, 10),
    "dilated_residual": (1, 13, 10),
    "classifier": (1, 13, 10),
    "mlp": (5,),
}


@pytest.mark.parametrize(("name", "shape"), NETWORKS.items(), ids=NETWORKS)
def test_features_before_the_head_of_every_network(name, shape):
    """Of the width that the metric network is built for, and of the labels' size."""
    network = build_network(name, in_channels=shape[0], num_classes=3, seed=0)
    images = torch.randn(2, *shape)
    with captured(network, LAYERS) as outputs:
        logits = network(images)
    labels = torch.zeros(2, *logits.shape[2:], dtype=torch.int64)
    features = features_of(Pass(network, logits, labels, outputs))
    assert features.shape == (2, features_before_head(network), *logits.shape[2:])
    masks = one_hot_of_known(labels, num_classes=3)
    metric = MetricNetwork(features.shape[1], (4, 3))
    assert embed(metric, features, masks).vectors_NF.shape == (2, 3)


def test_a_network_without_a_head_is_refused():
    with pytest.raises(ConfigError, match="has no part of that name"):
        features_before_head(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("widths", [(), (3, 0)])
def test_impossible_widths_are_refused(widths):
    with pytest.raises(ConfigError, match="metric network"):
        MetricNetwork(4, widths)


def test_the_metric_network_is_drawn_from_the_studys_seed():
    drawn = [
        runs.Ward(runs.make_study(runs.IMAGE, "saml", seed=seed)).server.shared
        for seed in (1, 1, 2)
    ]
    name = "metric.layers.0.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


def test_cropping_leaves_features_of_the_right_size_alone():
    features = torch.randn(2, 3, 8, 8)
    assert cropped_to(torch.zeros(2, 5, 6), features).shape == (2, 3, 5, 6)
    assert torch.equal(cropped_to(torch.zeros(2), features), features)


def embedded(kinds, voxels, dims=3, num_kinds=3):
    rng = torch.Generator().manual_seed(1)
    vectors = torch.randn(len(kinds), dims, generator=rng, dtype=torch.float64)
    return Embedded(vectors, torch.tensor(kinds), torch.tensor(voxels), num_kinds)


def test_a_mean_of_few_voxels_or_of_one_example_is_not_told():
    example = embedded([0, 0, 1, 1, 2], [9, 8, 3, 4, 99])
    told = Tally.of(example).told(10)
    assert told.facts[SHOWN].tolist() == [1, 0, 0]
    torch.testing.assert_close(
        told.values[CENTROIDS][0], example.vectors_NF[:2].mean(dim=0)
    )
    assert not told.values[CENTROIDS][1:].any()
    assert told.min_count == 17
    assert Tally.of(example).told(7).min_count == 7
    assert Tally.of(example).told(1000).min_count == NOTHING_TOLD


def test_what_is_counted_twice_counts_once():
    example = embedded([0, 0, 1, 1], [9, 8, 3, 4], num_kinds=2)
    twice = Tally.total([Tally.of(example), Tally.of(example)])
    found, expected = twice.told(8, passes=2), Tally.of(example).told(8)
    assert found.min_count == expected.min_count == 17
    torch.testing.assert_close(found.values, expected.values)


def test_rows_of_classes_that_nobody_shows_count_as_nothing():
    logits, labels = torch.randn(2, 3, 4), torch.full((2, 4), 255)
    told = Alignment(1.0, 2.0, 1).told(RowTally.of(logits, labels))
    assert told.min_count == NOTHING_TOLD
    assert joined(told, Measured({"x": logits})).min_count == NOTHING_TOLD
    assert joined(told, Measured({"x": logits}, min_count=3)).min_count == 3


def test_proxies_are_those_of_the_others():
    proxies = {
        site: {
            CENTROIDS: torch.full((2, 3), float(n)),
            SHOWN: torch.tensor([1.0, float(site != "b")]),
        }
        for n, site in enumerate("abc")
    }
    others = others_of(proxies, "a")
    assert others[KINDS].tolist() == [0, 0, 1]
    assert others[VECTORS][:, 0].tolist() == [1, 2, 2]
    assert others_of({"a": proxies["a"]}, "a") == {}
    assert others_of({}, "a") == {}


def test_without_others_a_proxy_loss_is_zero_and_differentiable():
    example = embedded([0, 1], [4, 4])
    example.vectors_NF.requires_grad_()
    loss = Clustering("proxy", 1.0, 0.5, 1).here(example, {})
    loss.backward()
    assert loss.item() == 0
    assert not example.vectors_NF.grad.any()


def test_a_weight_of_zero_leaves_every_grade_out():
    for grade in ("exact", "proxy", "within_site"):
        nothing = Clustering(grade, 1.0, 0.0, 1)
        assert not any((nothing.is_exact, nothing.by_proxies, nothing.is_here))
        assert not nothing.told(embedded([0], [1])).values


def test_each_tensor_is_clipped_by_its_own_norm():
    gradient = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1, 0.0])}
    clipped = clip_each(gradient, 2.5)
    torch.testing.assert_close(clipped["a"], torch.tensor([1.5, 2.0]))
    assert clipped["b"] is gradient["b"]
    assert clip_each(gradient, None) is gradient


def test_the_inner_step_is_clipped_and_leaves_the_rest():
    server = runs.Ward(runs.make_study(runs.IMAGE, "saml")).server
    name = "head.weight"
    gradient = {name: torch.full_like(server.shared[name], 10.0)}
    ahead = MetaUpdate(tensor_clip=1.0).ahead(server, gradient, 0.5).shared
    step = server.shared[name] - ahead[name]
    assert float(step.norm()) == pytest.approx(0.5, rel=1e-5)
    assert all(ahead[n] is t for n, t in server.shared.items() if n != name)


def test_parts_are_added_name_by_name():
    one = torch.ones(2)
    found = sum_of_parts({"b": {"x": one, "y": 3 * one}, "a": {"x": 2 * one}})
    assert {n: t.tolist() for n, t in found.items()} == {"x": [3, 3], "y": [3, 3]}


def test_steps_on_the_tasks_loss_are_ordinary_training():
    ward = runs.Ward(runs.make_study(runs.IMAGE, "fedavg"))
    context = HospitalContext(ward.benches["c"], ward.privates["c"], 1)
    done = train_on_passes(context, ward.server.shared, lambda _, task: task)
    found = trained_outcome(context, done.model, done.result).payload
    expected = local_training(context, ward.server.shared).payload
    torch.testing.assert_close(found.state, expected.state, rtol=0, atol=0)
    assert found.values == expected.values
    assert done.passes == 2  # two batches of two from two examples


def test_no_step_where_there_is_nothing_to_minimise():
    ward = runs.Ward(runs.make_study(runs.IMAGE, "fedavg"))
    context = HospitalContext(ward.benches["a"], ward.privates["a"], 1)
    done = train_on_passes(context, ward.server.shared, lambda _, __: None)
    for name, parameter in done.model.named_parameters():
        assert torch.equal(parameter.detach(), ward.server.shared[name])
