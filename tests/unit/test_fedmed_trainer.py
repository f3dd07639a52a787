from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedmed.errors import SiteError
from fedmed.optimizer import OptimizerSpec
from fedmed.training.trainer import Trainer


class Linear(nn.Module):
    """Notes which site it was asked for."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3, generator=generator))
        self.unused = nn.Parameter(torch.ones(1))
        self.asked = []

    def forward(self, images, site=None):
        self.asked.append(site)
        return images @ self.weight.T


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        SimpleNamespace(
            images=torch.randn(5, 3, generator=generator),
            labels=torch.randint(0, 2, (5,), generator=generator),
        )
        for _ in range(count)
    ]


def trainer(**options):
    spec = OptimizerSpec("sgd", lr=0.1, momentum=0.9)
    options = {"optimizer": spec, **options}
    return Trainer(functional.cross_entropy, site_id="a", **options)


def by_hand(start, data, *, shift=0.0, mu=0.0, max_norm=None):
    """SGD with momentum 0.9, written out; gives the weights and the mean loss."""
    weight, velocity, losses = start.clone(), torch.zeros_like(start), []
    for batch in data:
        leaf = weight.clone().requires_grad_()
        loss = functional.cross_entropy(batch.images @ leaf.T, batch.labels)
        loss.backward()
        losses.append(loss.item())
        gradient = leaf.grad + mu * weight + shift
        if max_norm is not None:
            gradient = gradient * min(1.0, max_norm / float(gradient.norm()))
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * velocity
    return weight, sum(losses) / len(losses)


@pytest.mark.parametrize(
    "changes", [{}, {"shift": 0.3}, {"mu": 0.5}, {"max_norm": 0.2}]
)
def test_training_is_the_loop_written_out(changes):
    model, data = Linear(), batches(4)
    expected, loss = by_hand(model.weight.detach(), data, **changes)
    shift, mu = changes.get("shift"), changes.get("mu")
    result = trainer(clip_norm=changes.get("max_norm")).train(
        model,
        data,
        correction={"weight": torch.full((2, 3), shift)} if shift else None,
        penalty=(lambda m: mu / 2 * m.weight.square().sum()) if mu else None,
    )
    torch.testing.assert_close(model.weight.detach(), expected)
    assert result.loss == pytest.approx(loss)  # without the penalty
    assert result.steps == 4
    assert model.asked == ["a"] * 4
    assert torch.equal(model.unused, torch.ones(1))


def test_training_goes_on_from_its_memory():
    data = batches(4)
    whole, halves = Linear(), Linear()
    trainer().train(whole, data)
    memory = trainer().train(halves, data[:2]).memory
    trainer().train(halves, data[2:], memory=memory)
    assert torch.equal(whole.weight, halves.weight)
    fresh = Linear()
    trainer().train(fresh, data[:2])
    trainer().train(fresh, data[2:])
    assert not torch.equal(whole.weight, fresh.weight)


def test_a_gradient_leaves_the_network_as_it_is():
    model = Linear()
    start = model.weight.detach().clone()
    (batch,) = batches(1)
    gradient, loss = trainer().gradient(model, batch)
    again, _ = trainer().gradient(model, batch)
    assert set(gradient) == {"weight"}
    assert torch.equal(gradient["weight"], again["weight"])  # nothing accumulates
    leaf = start.clone().requires_grad_()
    expected = functional.cross_entropy(batch.images @ leaf.T, batch.labels)
    expected.backward()
    torch.testing.assert_close(gradient["weight"], leaf.grad)
    assert loss == pytest.approx(expected.item())
    assert torch.equal(model.weight, start)


def test_precision_is_that_of_the_weights():
    (batch,) = batches(1)
    gradient, _ = trainer(precision="float64").gradient(Linear().double(), batch)
    assert gradient["weight"].dtype == torch.float64
    half, _ = trainer(precision="bfloat16").gradient(Linear(), batch)
    full, _ = trainer().gradient(Linear(), batch)
    assert half["weight"].dtype == torch.float32
    assert not torch.equal(half["weight"], full["weight"])
    torch.testing.assert_close(half["weight"], full["weight"], rtol=0.05, atol=0.02)


def test_a_loss_that_is_not_finite_names_the_site():
    model = Linear()
    model.weight.data.fill_(float("nan"))
    with pytest.raises(SiteError, match="site a: the training loss became nan"):
        trainer().gradient(model, batches(1)[0])
    with pytest.raises(SiteError, match="site a"):
        trainer().train(model, batches(2))
