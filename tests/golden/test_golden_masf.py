"""One step of MASF from its equations: loops in float64, gradients by autograd."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.episodes import draw_episode
from fedmed.strategy import Private
from fedmed.training.alignment import ROWS, Alignment, RowTally
from fedmed.training.statistic_bank import PRESENT

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

UNKNOWN = 255


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_alignment_masks_classes_and_divides_by_all_of_them():
    """1/C sum_c 1/2 [KL(p_c, q_c) + KL(q_c, p_c)] over classes of 3 voxels or more."""
    rng = np.random.default_rng(0)
    tau, least, told, rows = 2.0, 3, {}, {}
    for site in ("i", "j", "k"):
        z, y = rng.normal(size=(2, 4, 3, 3)), rng.integers(0, 4, (2, 3, 3))
        y[y == 3] = 0 if site != "k" else 3
        y[0, 0, 0] = UNKNOWN
        flat, labels = np.moveaxis(z, 1, -1).reshape(-1, 4), y.reshape(-1)
        rows[site] = {
            c: softmax(flat[labels == c].mean(axis=0) / tau)
            for c in range(4)
            if (labels == c).sum() >= least
        }
        measured = Alignment(0.7, tau, least).told(
            RowTally.of(torch.as_tensor(z), torch.as_tensor(y))
        )
        told[site] = {**measured.values, **measured.facts}
        assert measured.min_count == min((labels == c).sum() for c in rows[site])
        assert set(told[site]) == {ROWS, PRESENT}
    expected = 0.0
    for i, j in (("i", "j"), ("k", "j")):
        for c in set(rows[i]) & set(rows[j]):
            p, q = rows[i][c], rows[j][c]
            both = np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p))
            expected += 0.7 * 0.5 * both / 4 / 2
    found = Alignment(0.7, tau, least).over_pairs(told, ["i", "k"], ["j"])
    assert float(found) == pytest.approx(expected, rel=1e-12)


def leaf_losses(episode, logits, embeddings, kinds, *, tau):
    """l_global and l_local with loops, differentiable."""
    aligned = []
    for i in episode.meta_train.site_ids:
        for j in episode.meta_test.site_ids:
            total = 0.0
            for c in range(2):
                p, q = (
                    torch.softmax(logits[s][0][logits[s][1] == c].mean(0) / tau, 0)
                    for s in (i, j)
                )
                total = total + 0.5 * (p * (p / q).log() + q * (q / p).log()).sum() / 2
            aligned.append(total)
    e = torch.cat([embeddings[s] for s in sorted(embeddings)])
    y = [c for s in sorted(kinds) for c in kinds[s]]
    terms = []
    for a in range(len(e)):
        for p in range(len(e)):
            if a == p or y[a] != y[p]:
                continue
            d = (e[a] - e[p]).square().sum()
            far = [(e[a] - e[n]).square().sum() for n in range(len(e)) if y[n] != y[a]]
            beyond = [x for x in far if x > d]
            chosen = (
                min(beyond, key=torch.Tensor.item)
                if beyond
                else max(far, key=torch.Tensor.item)
            )
            terms.append(torch.relu(d - chosen + 10.0))
    return torch.stack(aligned).mean(), torch.stack(terms).mean()


def task_gradient(ward, models, batches, group):
    """Mean over a group's sites of the gradient of their losses."""
    total = {}
    for site in group:
        named = dict(models[site].named_parameters())
        x, y = batches[site].images.double(), batches[site].labels
        loss = ward.benches[site].trainer.loss(models[site](x), y)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, g in zip(named, grads, strict=True):
            if g is not None:
                total[name] = total.get(name, 0.0) + g / len(group)
    return total


def logits_and_embeddings(model, batch):
    """Logits by voxel with labels; an embedding and its class per image and class."""
    x, y = batch.images.double(), batch.labels
    features = model.decoder(model.encoder(x))
    z = model.head(features)
    rows, kinds = [], []
    for b in range(len(y)):
        for c in range(2):
            if (y[b] == c).any():
                rows.append(features[b][:, y[b] == c].mean(dim=1))
                kinds.append(c)
    e = torch.stack(rows)
    for layer in model.metric.layers:
        e = e @ layer.weight.T + layer.bias
        e = torch.where(e > 0, e, 0.2 * e)
    return (z.movedim(1, -1).reshape(-1, 2), y.reshape(-1)), e, kinds


@pytest.mark.parametrize("mode", ["joint", "split"])
def test_one_step_with_exact_clustering(mode):
    alpha, beta1, beta2, lr = 0.3, 0.8, 0.05, 0.05
    study = runs.make_study(
        runs.IMAGE,
        "masf",
        strategy={
            "sync": "step", "clustering": "exact", "inner_lr": alpha, "min_count": 1,
            "alignment_weight": beta1, "clustering_weight": beta2, "update_mode": mode,
            "meta_lr_factor": 2.0, "metric_lr_factor": 3.0,
        },
        train={"precision": "float64", "local_steps": 1, "batch_size": 4},
    )  # fmt: skip
    ward = runs.Ward(study)
    cohort = replace(ward.cohort(), rng_seed=7)
    episode = draw_episode(cohort, 0)
    shared = ward.server.shared
    found = ward.finish(ward.strategy.run_round(ward.server, cohort)).shared
    models = {s: ward.benches[s].load(shared, Private()).train() for s in "abc"}
    batches = {s: ward.benches[s].batch(1, 0) for s in "abc"}
    task = task_gradient(ward, models, batches, episode.meta_train.site_ids)
    logits, embeddings, kinds = {}, {}, {}
    for site, model in models.items():
        with torch.no_grad():
            for name, g in task.items():
                model.get_parameter(name).copy_(shared[name] - alpha * g)
        logits[site], embeddings[site], kinds[site] = logits_and_embeddings(
            model, batches[site]
        )
    lg, ll = leaf_losses(episode, logits, embeddings, kinds, tau=2.0)
    (beta1 * lg + beta2 * ll).backward()
    assert lg.item() > 1e-6
    assert ll.item() > 0.1
    for name, _ in models["a"].named_parameters():
        meta = sum(model.get_parameter(name).grad for model in models.values())
        if name.startswith("metric."):
            step = 3.0 * lr * meta
        else:
            step = lr * task[name] + (2.0 if mode == "split" else 1.0) * lr * meta
        torch.testing.assert_close(
            found[name], shared[name] - step, rtol=0, atol=1e-13, msg=name
        )
        assert meta.abs().max() > 1e-9, name
