"""One step and one round of latent regularisation from its two losses, by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedmed.networks.build import build_network
from fedmed.seeds import derive

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

LR, PULL = 0.2, 0.7
R = "site_classifier"


def study_of(sync, local_steps):
    options = {"latent_weight": PULL, "ramp": 0.0, "hidden_width": 6, "max_sites": 4}
    return runs.make_study(
        runs.TABLE,
        "latreg",
        strategy={"sync": sync, **options},
        train={
            "local_steps": local_steps,
            "optimizer": {"name": "sgd", "lr": LR},
        },
    )


def network():
    return build_network(
        "mlp",
        in_channels=4,
        num_classes=2,
        seed=derive(0, "network"),
        dtype=torch.float64,
        widths=(5,),
        missing_indicator=False,
        norm="none",
    )


def classifier_of(state):
    """A map from z to log-probabilities of three sites; and its weights."""
    weights = {
        n: t.clone().requires_grad_() for n, t in state.items() if n.startswith(R)
    }
    first, second = (
        (weights[f"{R}.{k}.weight"], weights[f"{R}.{k}.bias"]) for k in (0, 2)
    )

    def probabilities(z):
        hidden = (z @ first[0].T + first[1]).clamp(min=0)
        logits = (hidden @ second[0].T + second[1])[:, :3]
        return logits.exp() / logits.exp().sum(dim=1, keepdim=True)

    return probabilities, weights


def losses_of(model, probabilities, batch, number):
    """The task's loss with the confusion; and the classifier's."""
    z = model.encoder(batch.images.double())
    task = functional.cross_entropy(model.head(z), batch.labels)
    confusion = -probabilities(z).log().sum(dim=1).mean() / 3
    recognition = -probabilities(z)[:, number].log().mean()
    return task + PULL * confusion, recognition


def close(found, expected):
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


def test_one_step():
    ward = runs.Ward(study_of("step", 1))
    start = ward.server.shared
    server = ward.finish(ward.strategy.run_round(ward.server, ward.cohort()))
    model = network()
    probabilities, weights = classifier_of(start)
    pairs = [
        losses_of(model, probabilities, bench.batch(1, 0), number)
        for number, bench in enumerate(ward.benches.values())
    ]
    outer, recognition = (sum(terms) / 3 for terms in zip(*pairs, strict=True))
    named = dict(model.named_parameters())
    kept = torch.autograd.grad(outer, list(named.values()), retain_graph=True)
    for (name, p), slope in zip(named.items(), kept, strict=True):
        close(server.shared[name], p - LR * slope)
    own = torch.autograd.grad(recognition, list(weights.values()))
    for (name, w), slope in zip(weights.items(), own, strict=True):
        close(server.shared[name], w - LR * slope)
    # Of the four outputs one has no site, and stands still.
    assert torch.equal(server.shared[f"{R}.2.bias"][3], start[f"{R}.2.bias"][3])
    assert not torch.equal(server.shared[f"{R}.2.bias"][2], start[f"{R}.2.bias"][2])


@pytest.mark.parametrize("steps", [1, 3])
def test_one_round(steps):
    """R is frozen at the sites; its gradient is the mean over the local steps."""
    ward = runs.Ward(study_of("round", steps))
    start = ward.server.shared
    server = ward.finish(ward.strategy.run_round(ward.server, ward.cohort()))
    probabilities, weights = classifier_of(start)
    slopes = {name: torch.zeros_like(w) for name, w in weights.items()}
    ends = []
    for number, bench in enumerate(ward.benches.values()):
        model = network()
        for index in range(steps):
            pair = losses_of(model, probabilities, bench.batch(1, index), number)
            own = torch.autograd.grad(
                pair[1], list(weights.values()), retain_graph=True
            )
            for name, slope in zip(weights, own, strict=True):
                slopes[name] += slope / (3 * steps)
            model.zero_grad()
            pair[0].backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(LR * p.grad)
        ends.append(dict(model.named_parameters()))
    for name in ends[0]:
        close(server.shared[name], sum(end[name] for end in ends) / 3)
    for name, w in weights.items():
        close(server.shared[name], w - LR * slopes[name])
