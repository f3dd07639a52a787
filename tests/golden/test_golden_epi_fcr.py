"""Two steps of Epi-FCR from its equations, networks taken apart, without our engine."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedmed.networks.build import build_network
from fedmed.seeds import derive, numpy_rng

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

LR = 0.2
WEIGHTS = {"feature_weight": 2.0, "classifier_weight": 0.3, "random_weight": 0.7}


def network(*draw):
    return build_network(
        "mlp",
        in_channels=4,
        num_classes=2,
        seed=derive(0, "network", *draw),
        dtype=torch.float64,
        widths=(5,),
        missing_indicator=False,
        norm="none",
    )


def loss_of(features, head, batch):
    logits = head(features(batch.images.double()))
    return functional.cross_entropy(logits, batch.labels)


def descend(model, loss):
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(LR * p.grad)


def frozen(module):
    return copy.deepcopy(module).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("relay", ["all", "heads"])
def test_two_steps_of_the_aggregate(relay):
    study = runs.make_study(
        runs.TABLE,
        "epi_fcr",
        strategy={"sync": "step", "relay": relay, **WEIGHTS},
        train={"local_steps": 2, "optimizer": {"name": "sgd", "lr": LR}},
    )
    ward = runs.Ward(study)
    cohort = ward.cohort()
    server = ward.finish(ward.strategy.run_round(ward.server, cohort))

    sites = sorted(ward.benches)
    aggregate, random = network(), frozen(network("random_head").head)
    own = {site: network() for site in sites}
    for index in range(2):
        order = numpy_rng(cohort.rng_seed, "pairs", index).permutation(len(sites))
        i, j = (sites[position] for position in order[:2])
        batches = {site: ward.benches[site].batch(1, index) for site in sites}
        f, t = aggregate.encoder, aggregate.head
        loss = sum(loss_of(f, t, batches[site]) for site in sites)
        loss = loss + 2.0 * loss_of(f, frozen(own[j].head), batches[i])
        if relay == "all":
            loss = loss + 0.3 * loss_of(frozen(own[j].encoder), t, batches[i])
        loss = loss + 0.7 * sum(loss_of(f, random, batches[site]) for site in sites)
        descend(aggregate, loss / len(sites))
        for site in sites:
            descend(
                own[site], loss_of(own[site].encoder, own[site].head, batches[site])
            )
    for name, expected in aggregate.named_parameters():
        found = server.shared[name]
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
    for site in sites:
        kept = ward.privates[site].states["own_network"]
        for name, expected in own[site].named_parameters():
            torch.testing.assert_close(
                kept[name], expected.detach(), rtol=0, atol=1e-12
            )
