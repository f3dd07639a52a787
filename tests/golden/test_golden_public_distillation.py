"""FedMD and FedDF on tables, from their algorithm boxes, in NumPy and float64.

The network is softmax regression and every batch holds each row equally often, so that
a whole run is a few lines.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
hospitals = importlib.import_module("tiny.hospitals")
logistic = importlib.import_module("tiny.logistic")
modules_are_listed_once = runs.modules_are_listed_once

LR, ROUNDS, LOCAL_STEPS = 0.2, 3, 2
SITES = logistic.SITES


def study_of(name, **options):
    return runs.make_study(
        runs.TABLE,
        name,
        rounds=ROUNDS,
        sites={"with_public": True, "public": "p"},
        model=logistic.MODEL,
        strategy=options,
        train={
            "batch_size": runs.FULL_BATCH,
            "local_steps": LOCAL_STEPS,
            "optimizer": {"name": "sgd", "lr": LR},
        },
    )


def public_inputs():
    """Rows of the public site and a column of ones; nobody reads their classes."""
    found = hospitals.open_sites(kind="table", with_public=True)[-1]
    rows = np.stack([ref.read().image for ref in found.cases]).astype(np.float64)
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def softmax(logits_NL):
    odds = np.exp(logits_NL - logits_NL.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def centred(values_NL):
    return values_NL - values_NL.mean(axis=1, keepdims=True)


def kl_gradient(weights, inputs, goal_NL, temperature=1.0):
    """Of T^2 times the mean over rows of KL(softmax(goal / T) || softmax(z / T))."""
    logits = inputs @ weights.T
    excess = softmax(logits / temperature) - softmax(goal_NL / temperature)
    return temperature * excess.T @ inputs / len(inputs)


def mae_gradient(weights, inputs, goal_NL):
    """Of the mean over rows and classes of |centred z - goal|."""
    signs = np.sign(centred(inputs @ weights.T) - goal_NL)
    return centred(signs).T @ inputs / signs.size


def trained(weights, site):
    for _ in range(LOCAL_STEPS):
        weights = weights - LR * logistic.gradient(weights, site)
    return weights


def start(study):
    return logistic.weights_of(runs.Ward(study).benches["a"].initial)


GRADIENTS = {"kl": kl_gradient, "mae": mae_gradient}
SETTINGS = [
    {"digest_weight": 0.7},
    {"digest_weight": 2.0, "temperature": 3.0, "weighting": "examples"},
    {"digest": "mae", "digest_epochs": 3},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_fedmd_digests_the_mean_of_what_all_predict(tmp_path, options):
    study = study_of("fedmd", public_batches=1, wire="float32", **options)
    inputs, extra = public_inputs(), {}
    if "temperature" in options:
        extra["temperature"] = options["temperature"]
    gradient = GRADIENTS[options.get("digest", "kl")]
    counts = logistic.counts()
    shares = np.ones(3) if "weighting" not in options else counts
    shares = shares / shares.sum()
    weights = dict.fromkeys(SITES, start(study))
    consensus = None
    for _ in range(ROUNDS):
        for site in SITES:
            if consensus is not None:
                for _ in range(options.get("digest_epochs", 1)):
                    step = gradient(weights[site], inputs, consensus, **extra)
                    scale = options.get("digest_weight", 1.0)
                    weights[site] = weights[site] - LR * scale * step
            weights[site] = trained(weights[site], site)
        told = [centred(inputs @ weights[site].T) for site in SITES]
        consensus = sum(s * t for s, t in zip(shares, told, strict=True))
    result = runs.run(study, tmp_path)
    moved = 0.0
    for site in SITES:
        found = logistic.weights_of(result.private(site).states["kept"])
        # What travels is float32.
        np.testing.assert_allclose(found, weights[site], rtol=0, atol=2e-7)
        moved = max(moved, np.abs(found - trained_alone(study, site)).max())
    assert moved > 1e-3


def trained_alone(study, site):
    weights = start(study)
    for _ in range(ROUNDS):
        weights = trained(weights, site)
    return weights


@pytest.mark.parametrize(("wire", "tolerance"), [("float16", 2e-3), ("uint8", 2.5e-3)])
def test_fewer_bits_change_the_consensus_by_their_last_one_only(
    tmp_path, wire, tolerance
):
    study = study_of("fedmd", public_batches=1, wire=wire)
    study = study.model_copy(update={"rounds": 1})
    result = runs.run(study, tmp_path)
    told = result.server(1, "consensus")["0"].double().numpy()
    inputs = public_inputs()
    logits = [inputs @ trained(start(study), site).T for site in SITES]
    coded = [centred(z) if wire == "float16" else softmax(z) for z in logits]
    expected = sum(coded) / 3
    # Batches come in another order than rows, each row six times.
    found = np.unique(told.round(6), axis=0)
    assert len(found) == len(expected)
    np.testing.assert_allclose(
        found, expected[np.argsort(expected[:, 0])], rtol=0, atol=tolerance
    )


@pytest.mark.parametrize(
    ("schedule", "temperature", "weighting"),
    [("cosine", 1.0, "examples"), ("constant", 2.0, "examples")],
)
def test_feddf_takes_steps_of_adam_towards_the_plain_mean_of_all_logits(
    tmp_path, schedule, temperature, weighting
):
    steps, rate = 7, 0.03
    study = study_of(
        "feddf",
        distillation_steps=steps,
        distillation_lr=rate,
        schedule=schedule,
        temperature=temperature,
        weighting=weighting,
    )
    inputs, counts = public_inputs(), logistic.counts()
    weights = start(study)
    for _ in range(ROUNDS):
        local = [trained(weights, site) for site in SITES]
        goal = sum(inputs @ w.T for w in local) / 3
        weights = sum(n * w for n, w in zip(counts, local, strict=True)) / counts.sum()
        mean, square = np.zeros_like(weights), np.zeros_like(weights)
        for t in range(1, steps + 1):
            gradient = kl_gradient(weights, inputs, goal, temperature)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            lr = rate
            if schedule == "cosine":
                lr = rate * (1 + np.cos(np.pi * (t - 1) / steps)) / 2
            step = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
            weights = weights - lr * step
    result = runs.run(study, tmp_path)
    found = logistic.weights_of(result.shared)
    np.testing.assert_allclose(found, weights, rtol=0, atol=1e-9)
