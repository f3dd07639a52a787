"""UMMKD's coupling of hospitals, from its equations, in NumPy and float64."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.payload import CLASS_STATISTIC
from fedmed.resolve import load_strategy
from fedmed.training.coupled import Pass, cotangents
from fedmed.training.statistic_bank import updated_bank

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

NUM_CLASSES, TEMPERATURE, WEIGHT, MIN_COUNT = 4, 2.0, 0.5, 3
SITES = ("ct", "mr", "mr2")


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def soft_labels(logits_NL, labels_N):
    """q_c = softmax(mean of class c / T); no entry for a class of too few voxels."""
    return {
        c: softmax(logits_NL[labels_N == c].mean(axis=0) / TEMPERATURE)
        for c in range(NUM_CLASSES)
        if (labels_N == c).sum() >= MIN_COUNT
    }


def kl(p, q):
    return (p * np.log(p / q)).sum()


def distillation(data, *, half, divide_by):
    """0.5 x mean over pairs of 1/C' sum_c [KL(q_i, q_j) + KL(q_j, q_i)]."""
    rows = {site: soft_labels(*data[site]) for site in data}
    values = []
    for i, j in itertools.combinations(sorted(rows), 2):
        both = sorted(rows[i].keys() & rows[j].keys())
        divisor = NUM_CLASSES if divide_by == "all" else max(1, len(both))
        terms = [kl(rows[i][c], rows[j][c]) + kl(rows[j][c], rows[i][c]) for c in both]
        values.append((0.5 if half else 1.0) * sum(terms) / divisor)
    return WEIGHT * sum(values) / len(values)


def hospitals():
    """Logits (N, L) and labels (N,); mr lacks class 3, mr2 has two voxels of it."""
    rng = np.random.default_rng(3)
    data = {}
    for site, classes in zip(SITES, ((0, 1, 2, 3), (0, 1, 2), (0, 1, 2)), strict=True):
        labels = np.concatenate([rng.integers(0, 3, 30), np.repeat(classes, 5)])
        if site == "mr2":
            labels = np.concatenate([labels, [3, 3]])
        logits = 2 * rng.normal(size=(len(labels), NUM_CLASSES))
        data[site] = (logits, labels)
    return data


def as_pass(logits_NL, labels_N):
    """A batch of one flat image."""
    logits = torch.from_numpy(logits_NL.T[None].copy()).requires_grad_()
    return Pass(torch.nn.Identity(), logits, torch.from_numpy(labels_N[None]))


def strategy(**changes):
    return dataclasses.replace(
        load_strategy("ummkd", {}), min_count=MIN_COUNT, **changes
    )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("divide_by", ["present", "all"])
def test_value_and_gradient_through_both_halves(half, divide_by):
    """The gradient with respect to every logit, against central differences."""
    data = hospitals()
    method = strategy(half=half, divide_by=divide_by)
    passes = {site: as_pass(*data[site]) for site in SITES}
    measured = {site: method._soft_confusion(passes[site]) for site in SITES}
    told = {s: {**m.values, **m.facts} for s, m in measured.items()}
    value, found = cotangents(told, method._distance, names=["rows"])
    options = {"half": half, "divide_by": divide_by}
    assert value == pytest.approx(distillation(data, **options), rel=1e-12)
    rng, step = np.random.default_rng(4), 1e-5
    for site in SITES:
        logits, labels = data[site]
        (gradient,) = torch.autograd.grad(
            measured[site].values["rows"], passes[site].logits, found[site]["rows"]
        )
        direction = rng.normal(size=logits.shape)
        moved = [
            distillation({**data, site: (logits + s * direction, labels)}, **options)
            for s in (step, -step)
        ]
        expected = (moved[0] - moved[1]) / (2 * step)
        slope = (gradient.numpy()[0].T * direction).sum()
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert abs(slope) > 1e-4


def test_what_leaves_is_rows_of_present_classes_and_nothing_of_the_others():
    data = hospitals()
    for site in SITES:
        measured = strategy()._soft_confusion(as_pass(*data[site]))
        expected = soft_labels(*data[site])
        present = measured.facts["present"].tolist()
        assert present == [float(c in expected) for c in range(NUM_CLASSES)]
        rows = measured.values["rows"].detach().numpy()
        for c in range(NUM_CLASSES):
            if c in expected:
                np.testing.assert_allclose(np.exp(rows[c]), expected[c], rtol=1e-12)
            else:
                assert not rows[c].any()
        counts = np.bincount(data[site][1], minlength=NUM_CLASSES)
        assert measured.min_count == min(n for n in counts if n >= MIN_COUNT)
    assert present == [1.0, 1.0, 1.0, 0.0]  # two voxels are too few


def test_an_absent_class_pulls_nobody():
    """In the reference an absent class counts as a uniform row; here it is left out."""
    data = {site: hospitals()[site] for site in ("ct", "mr")}
    logits, labels = data["ct"]
    before = distillation(data, half=True, divide_by="present")
    logits = logits.copy()
    logits[labels == 3] += 7.0
    told = {}
    for site, (z, y) in {**data, "ct": (logits, labels)}.items():
        measured = strategy()._soft_confusion(as_pass(z, y))
        told[site] = {**measured.values, **measured.facts}
    value, found = cotangents(told, strategy()._distance, names=["rows"])
    assert value == pytest.approx(before, rel=1e-12)
    assert not found["ct"]["rows"][3].any()
    assert found["ct"]["rows"][:3].all()


@pytest.mark.parametrize("half", [False, True])
def test_the_stale_pull_is_the_pair_with_the_mean_of_what_others_told(half):
    data = hospitals()
    method = strategy(half=half)
    rows = {site: soft_labels(*data[site]) for site in SITES}
    bank = {}
    for _ in range(2):
        told = {}
        for site in SITES:
            m = method._soft_confusion(as_pass(*data[site]))
            told[site] = {
                "rows": m.values["rows"].detach().exp(),
                "present": m.facts["present"],
            }
        bank = updated_bank(bank, told, momentum=0.9)
    sent = method._target(bank, "mr", dict.fromkeys(SITES, 1.0))
    # Of the mean over 3 pairs, a site is in 2: 2 / K of one pair with their mean.
    assert sent["pull"] == pytest.approx(WEIGHT * 2 / 3, rel=1e-12)
    goal = {c: (rows["ct"][c] + rows["mr2"][c]) / 2 for c in (0, 1, 2)}
    goal[3] = rows["ct"][3]
    for c, row in goal.items():
        np.testing.assert_allclose(sent["target"]["rows"][c], row, rtol=1e-12)
    value = method._pull(method._tallied(*_batch(data["mr"])), sent["target"])
    own = rows["mr"]
    terms = [kl(own[c], goal[c]) + kl(goal[c], own[c]) for c in (0, 1, 2)]
    expected = (0.5 if half else 1.0) * sum(terms) / 3
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_with_two_hospitals_stale_is_the_exact_loss_if_nothing_has_moved():
    data = {site: hospitals()[site] for site in ("ct", "mr")}
    method = strategy()
    told = {}
    for site, batch in data.items():
        m = method._soft_confusion(as_pass(*batch))
        told[site] = {
            "rows": m.values["rows"].detach().exp(),
            "present": m.facts["present"],
        }
    bank = updated_bank({}, told, momentum=0.9)
    sent = method._target(bank, "mr", {"ct": 1.0, "mr": 1.0})
    pull = sent["pull"] * method._pull(
        method._tallied(*_batch(data["mr"])), sent["target"]
    )
    exact = distillation(data, half=True, divide_by="present")
    assert pull.item() == pytest.approx(exact, rel=1e-12)


def _batch(site):
    passed = as_pass(*site)
    return passed.logits, passed.labels


def test_a_round_tells_the_mean_of_sums_over_all_of_its_batches():
    """Sums over the round, not means of batches; each voxel counted once per pass."""
    options = {"min_count": 1, "sync": "round"}
    study = runs.make_study(
        runs.IMAGE, "ummkd", strategy=options, train={"precision": "float64"}
    )
    ward = runs.Ward(study)
    (request,) = [next(ward.strategy.run_round(ward.server, ward.cohort()))]
    seen = {site: [] for site in ward.site_ids}
    for site, bench in ward.benches.items():
        task = bench.trainer.loss

        def noting(logits, labels, site=site, task=task):
            seen[site].append((logits.detach().numpy(), labels.numpy()))
            return task(logits, labels)

        bench.trainer = dataclasses.replace(bench.trainer, loss=noting)
    replies = ward.answer(request)
    for site, payload in replies.items():
        logits = np.concatenate([np.moveaxis(z, 1, -1) for z, _ in seen[site]])
        labels = np.concatenate([y for _, y in seen[site]])
        told = payload.extra[CLASS_STATISTIC]
        for c in range(2):
            row = softmax(logits[labels == c].mean(axis=0) / TEMPERATURE)
            np.testing.assert_allclose(told["rows"][c].exp(), row, rtol=1e-12)
        passes = -(-len(labels) // payload.num_examples)
        assert payload.min_count == min(np.bincount(labels.ravel())) // passes
