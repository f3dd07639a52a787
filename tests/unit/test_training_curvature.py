from __future__ import annotations

import torch
from torch import nn

from fedmed.losses.build import build_loss
from fedmed.optimizer import OptimizerSpec
from fedmed.training.curvature import hessian_vector
from fedmed.training.examples import Batch
from fedmed.training.trainer import Trainer


class Tiny(nn.Module):
    """Smooth, with a parameter that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(1, 2, 3, padding=1).double()
        self.second = nn.Conv2d(2, 3, 1, bias=False).double()
        self.idle = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        for parameter in self.parameters():
            parameter.data = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )

    def forward(self, images, *, site=None):
        del site
        return self.second(torch.tanh(self.first(images))) + 0 * self.idle.sum()


def world():
    generator = torch.Generator().manual_seed(1)
    batch = Batch(
        torch.randn(2, 1, 5, 4, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (2, 5, 4), generator=generator).to(torch.uint8),
    )
    trainer = Trainer(
        build_loss("cross_entropy"), OptimizerSpec(), "a", precision="float64"
    )
    model = Tiny()
    vector = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
    }
    return trainer, model, batch, vector


def test_it_is_the_product_with_the_whole_hessian():
    trainer, model, batch, vector = world()
    names = list(vector)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(flat):
        parts = torch.split(flat, [shapes[name].numel() for name in names])
        weights = {n: p.view(shapes[n]) for n, p in zip(names, parts, strict=True)}
        logits = torch.func.functional_call(model, weights, (batch.images,))
        return trainer.loss(logits, batch.labels)

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = hessian @ torch.cat([vector[name].reshape(-1) for name in names])
    found = hessian_vector(trainer, model, batch, vector)
    got = torch.cat([found[name].reshape(-1) for name in names])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert float(expected.abs().max()) > 1e-3


def test_it_is_the_slope_of_the_gradient_along_the_vector():
    trainer, model, batch, vector = world()
    found = hessian_vector(trainer, model, batch, vector)
    step, sides = 1e-5, []
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for sign in (1, -1):
        for name, parameter in model.named_parameters():
            parameter.data = start[name] + sign * step * vector[name]
        sides.append(trainer.gradient(model, batch)[0])
    for name in found:
        slope = (sides[0][name] - sides[1][name]) / (2 * step)
        torch.testing.assert_close(found[name], slope, rtol=1e-6, atol=1e-8)
