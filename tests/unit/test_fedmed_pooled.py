from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from fedmed.training.pooled import (
    PooledTraining,
    distinct_parameters,
    optimizer_change,
    pooled_gradient,
    pooled_step,
    tied,
)

SITES = ("a", "b")
WEIGHTS = {"a": 0.75, "b": 0.25}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, images, site=None):  # noqa: ARG002
        return self.norm(self.body(images))


def batches(index):
    generator = torch.Generator().manual_seed(index)
    return {
        site: SimpleNamespace(
            images=torch.randn(4, 3, generator=generator),
            labels=torch.randint(0, 2, (4,), generator=generator),
        )
        for site in SITES
    }


def pool():
    models = tied(Network(), SITES, ("body.weight", "body.bias"))
    parameters = distinct_parameters(models)
    return PooledTraining(
        models=models,
        batches=batches,
        loss=functional.cross_entropy,
        weights=WEIGHTS,
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        lr=0.1,
        make_optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5),
    )


def test_shared_parameters_are_one_and_kept_ones_are_each_sites_own():
    pooled = pool()
    first, second = (pooled.models[site] for site in SITES)
    assert first.body.weight is second.body.weight
    assert first.norm.weight is not second.norm.weight
    assert first.norm.running_mean is not second.norm.running_mean
    assert len(distinct_parameters(pooled.models)) == 2 + 2 * 2
    assert pooled.model is first


def test_the_gradient_is_that_of_the_weighted_sum_of_losses():
    found = pooled_gradient(pool(), 5)
    alone = {}
    for site, batch in batches(5).items():
        model = Network()
        functional.cross_entropy(model(batch.images), batch.labels).backward()
        alone[site] = model
    shared = sum(WEIGHTS[site] * alone[site].body.weight.grad for site in SITES)
    torch.testing.assert_close(found["body.weight"], shared)
    pooled = pool()
    pooled_gradient(pooled, 4)
    pooled_gradient(pooled, 5)  # nothing accumulates
    for site in SITES:
        torch.testing.assert_close(
            pooled.models[site].norm.weight.grad,
            WEIGHTS[site] * alone[site].norm.weight.grad,
        )


def test_a_step_moves_every_parameter_and_says_how_far():
    pooled, other = pool(), pool()
    start = pooled.model.body.weight.detach().clone()
    kept = pooled.models["b"].norm.weight.detach().clone()
    gradient = {n: g.clone() for n, g in pooled_gradient(pooled, 0).items()}
    pooled_step(pooled, 0)
    torch.testing.assert_close(
        pooled.model.body.weight.detach(), start - 0.1 * gradient["body.weight"]
    )
    assert not torch.equal(pooled.models["b"].norm.weight, kept)
    before, change = optimizer_change(other, 0)["body.weight"]
    assert torch.equal(before, start)
    torch.testing.assert_close(before + change, pooled.model.body.weight.detach())


def test_each_phase_has_an_optimiser_of_its_own_with_the_rate_of_the_day():
    pooled = pool()
    first = pooled.optimizer_of("first")
    pooled.set_lr(0.3)
    second = pooled.optimizer_of("second")
    assert pooled.optimizer_of("first") is first
    assert second is not first
    for optimizer in (pooled.optimizer, first, second):
        assert [group["lr"] for group in optimizer.param_groups] == [0.3]
        (group,) = optimizer.param_groups
        assert len(group["params"]) == 2 + 2 * 2
    pooled_gradient(pooled, 0)
    first.step()
    assert first.state
    assert not second.state
    pooled.forget_gradients()
    assert not any(p.grad is not None for p in pooled.model.parameters())


def test_shares_of_a_sum_add_up_to_the_number_of_sites():
    assert pool().shares == {"a": 1.5, "b": 0.5}
