"""MetaReg's gradient of the penalty, from its definition, without our engine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedmed.episodes import draw_episode
from fedmed.networks.build import build_network
from fedmed.seeds import derive

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

ALPHA, ETA, LR, PHI = 0.3, 2.0, 0.2, 0.05
HEAD = ("head.weight", "head.bias")


def study_of(**strategy):
    """Rows of a table, an MLP without normalisation, one step a round, float64."""
    options = {
        "sync": "step",
        "inner_lr": ALPHA,
        "penalty_lr": ETA,
        "initial_penalty": PHI,
        "phase_one_rounds": 1,
    }
    return runs.make_study(
        runs.TABLE,
        "meta_reg",
        strategy={**options, **strategy},
        train={"local_steps": 1, "optimizer": {"name": "sgd", "lr": LR}},
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


def loss_at(model, batch, head):
    """Cross-entropy of a batch with another head."""
    images = batch.images.double()
    logits = torch.func.functional_call(model, head, (images,))
    return functional.cross_entropy(logits, batch.labels)


def state_of_step_one(ward):
    """Features and heads after the step that comes before phi's, in plain PyTorch."""
    model, heads, total = network(), {}, {}
    for site, bench in ward.benches.items():
        own = network()
        batch = bench.batch(1, 0)
        functional.cross_entropy(own(batch.images.double()), batch.labels).backward()
        for name, p in own.named_parameters():
            total[name] = total.get(name, 0) + p.grad / len(ward.benches)
        heads[site] = {
            n: (p - LR * p.grad).detach()
            for n, p in own.named_parameters()
            if n in HEAD
        }
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.sub_(LR * total[name] * (name not in HEAD))
    return model, heads


def judged(model, heads, ward, phi, *, steps):
    """Mean loss of the sites b at beta_l, a function of phi; the whole graph."""
    episode = draw_episode(ward.cohort(), 0, num_meta_train=1, num_meta_test=1)
    (a,), (b,) = episode.meta_train.site_ids, episode.meta_test.site_ids
    beta = {name: heads[a][name].clone().requires_grad_() for name in HEAD}
    for number in range(1, 1 + steps):
        inner = loss_at(model, ward.benches[a].batch(1, number), beta)
        inner = inner + sum((phi[n] * beta[n].abs()).sum() for n in HEAD)
        slopes = torch.autograd.grad(inner, list(beta.values()), create_graph=True)
        beta = {n: beta[n] - ALPHA * g for n, g in zip(HEAD, slopes, strict=True)}
    return loss_at(model, ward.benches[b].batch(1, 1 + steps), beta)


def found_phi(study):
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    return ward, ward.finish(half)


def test_the_gradient_is_exact_for_one_inner_step():
    """phi - eta d/dphi L_b(beta_0 - alpha grad(L_a + R_phi)(beta_0)), by autograd."""
    ward, server = found_phi(study_of())
    model, heads = state_of_step_one(ward)
    phi = {n: torch.full_like(heads["a"][n], PHI).requires_grad_() for n in HEAD}
    loss = judged(model, heads, ward, phi, steps=1)
    slopes = torch.autograd.grad(loss, list(phi.values()))
    for name, slope in zip(HEAD, slopes, strict=True):
        expected = PHI - ETA * slope
        assert float(slope.abs().max()) > 1e-3
        torch.testing.assert_close(
            server.memory["penalty"][name], expected, rtol=0, atol=1e-12
        )
    torch.testing.assert_close(
        server.shared["encoder.layers.0.weight"],
        model.get_parameter("encoder.layers.0.weight").detach(),
        rtol=0,
        atol=1e-12,
    )


def test_the_gradient_is_that_of_finite_differences():
    ward, server = found_phi(study_of())
    model, heads = state_of_step_one(ward)
    step, row = 1e-6, (1, 2)

    def value(shift):
        phi = {n: torch.full_like(heads["a"][n], PHI) for n in HEAD}
        phi["head.weight"][row] += shift
        return float(judged(model, heads, ward, phi, steps=1).detach())

    slope = (value(step) - value(-step)) / (2 * step)
    found = float(server.memory["penalty"]["head.weight"][row])
    # Central differences of step 1e-6 in float64 are good to about 1e-9.
    np.testing.assert_allclose(found, PHI - ETA * slope, rtol=0, atol=1e-8)


def test_several_inner_steps_leave_the_second_derivative_out():
    """-alpha (sum_t sign beta_t) * grad L_b(beta_l), and not the exact gradient."""
    ward, server = found_phi(study_of(inner_steps=3))
    model, heads = state_of_step_one(ward)
    episode = draw_episode(ward.cohort(), 0, num_meta_train=1, num_meta_test=1)
    (a,), (b,) = episode.meta_train.site_ids, episode.meta_test.site_ids
    beta, signs = dict(heads[a]), dict.fromkeys(HEAD, 0)
    for number in range(1, 4):
        beta = {n: t.detach().requires_grad_() for n, t in beta.items()}
        inner = loss_at(model, ward.benches[a].batch(1, number), beta)
        slopes = torch.autograd.grad(inner, list(beta.values()))
        signs = {n: signs[n] + beta[n].detach().sign() for n in HEAD}
        beta = {
            n: beta[n] - ALPHA * (g + PHI * beta[n].sign())
            for n, g in zip(HEAD, slopes, strict=True)
        }
    beta = {n: t.detach().requires_grad_() for n, t in beta.items()}
    last = loss_at(model, ward.benches[b].batch(1, 4), beta)
    slopes = torch.autograd.grad(last, list(beta.values()))
    phi = {n: torch.full_like(heads["a"][n], PHI).requires_grad_() for n in HEAD}
    exact = torch.autograd.grad(
        judged(model, heads, ward, phi, steps=3), list(phi.values())
    )
    for name, slope, whole in zip(HEAD, slopes, exact, strict=True):
        found = server.memory["penalty"][name]
        expected = PHI + ETA * ALPHA * signs[name] * slope
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert float((found - (PHI - ETA * whole)).abs().max()) > 1e-4


@pytest.mark.parametrize("sync", ["step", "round"])
def test_phase_two_descends_on_loss_and_weighted_l1_norm(sync):
    ward = runs.Ward(study_of(sync=sync, phase_one_rounds=0))
    server = ward.finish(ward.strategy.run_round(ward.server, ward.cohort()))
    moved = []
    for bench in ward.benches.values():
        own = network()
        batch = bench.batch(1, 0)
        loss = functional.cross_entropy(own(batch.images.double()), batch.labels)
        norm = sum(p.abs().sum() for n, p in own.named_parameters() if n in HEAD)
        (loss + PHI * norm).backward()
        moved.append({n: (p - LR * p.grad).detach() for n, p in own.named_parameters()})
    for name, tensor in server.shared.items():
        expected = sum(state[name] for state in moved) / len(moved)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)
