from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.adapter import (
    Adapter,
    ParallelAdapter,
    SeriesAdapter,
    add_adapters,
)
from fedmed.networks.build import build_network
from fedmed.networks.normalisation import Norm

NETWORKS = {
    "unet": {"base_width": 2, "levels": 3},
    "residual_unet": {"base_width": 2, "levels": 3},
    "dilated_residual": {"base_width": 2, "maps_per_class": 1},
    "unet_3d_pairs": {"base_width": 2},
    "classifier": {"base_width": 2, "levels": 2},
}
KINDS = ("series", "parallel")


def build(name, **more):
    options = NETWORKS[name] | more
    return build_network(name, in_channels=1, num_classes=2, seed=3, **options)


def images_for(name):
    return torch.randn(2, 1, 8, 8, *([8] if name == "unet_3d_pairs" else []))


def kernels(module):
    return [
        m
        for m in module.modules()
        if isinstance(m, nn.modules.conv._ConvNd) and math.prod(m.kernel_size) > 1
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_at_zero_it_is_the_shared_network_bit_for_bit(name, kind):
    plain, adapted = build(name), build(name, add=f"{kind}_adapter")
    images = images_for(name)
    for mode in (True, False):
        plain.train(mode)
        adapted.train(mode)
        assert torch.equal(adapted(images), plain(images))
    state = adapted.state_dict()
    for entry, tensor in plain.state_dict().items():
        assert torch.equal(state.pop(entry), tensor)
    assert state
    assert all(".adapter." in entry for entry in state)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_shared_kernels_are_the_shared_network_s(kind):
    plain, adapted = build("unet"), build("unet", add=f"{kind}_adapter")
    images = images_for("unet")
    for model in (plain, adapted):
        model(images).square().sum().backward()
    found = dict(adapted.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name].grad, parameter.grad), name
    adapters = [n for n in found if n.endswith("adapter.projection.weight")]
    assert all(found[name].grad.abs().max() > 0 for name in adapters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kernel_larger_than_one_position_has_an_adapter(name, kind):
    model = build(name, add=f"{kind}_adapter")
    assert all(isinstance(m.adapter, Adapter) for m in kernels(model))
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert len(adapters) == len(kernels(model))


def test_parallel_adapters_cost_a_ninth_of_the_published_kernels():
    model = build_network(
        "residual_unet",
        preset="paper",
        in_channels=3,
        num_classes=2,
        seed=0,
        add="parallel_adapter",
    )
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    weights = sum(p.numel() for m in adapters for p in m.parameters())
    assert weights == 17_272_224 // 9 == 1_919_136


def test_series_is_what_the_equation_says():
    """Out = u + V BN'(u)."""
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    adapter = SeriesAdapter(convolution, Norm(eps=1e-3)).double()
    nn.init.normal_(adapter.projection.weight)
    u = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    mean = u.mean((0, 2, 3), keepdim=True)
    variance = u.var((0, 2, 3), keepdim=True, correction=0)
    normalised = (u - mean) / (variance + 1e-3).sqrt()
    matrix = adapter.projection.weight[:, :, 0, 0]
    expected = u + torch.einsum("oc,bcij->boij", matrix, normalised)
    torch.testing.assert_close(adapter(torch.zeros(0), u), expected)


def test_parallel_is_what_the_equation_says():
    """Out = W a + V a."""
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    adapter = ParallelAdapter(convolution)
    nn.init.normal_(adapter.projection.weight)
    a = torch.randn(4, 2, 5, 5)
    u = convolution(a)
    matrix = adapter.projection.weight[:, :, 0, 0]
    expected = u + torch.einsum("oc,bcij->boij", matrix, a)
    torch.testing.assert_close(adapter(a, u), expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.Conv3d(2, 3, (3, 3, 1), padding="same"),
        nn.Conv2d(2, 3, 5, padding=4, dilation=2),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose3d(2, 3, (3, 3, 1), 2, (1, 1, 0), 1),
    ],
)
def test_a_parallel_adapter_has_the_size_of_its_convolution(layer):
    size = (6, 5, 4)[: len(layer.kernel_size)]
    inputs = torch.randn(1, 2, *size)
    output = layer(inputs)
    adapter = ParallelAdapter(layer)
    nn.init.normal_(adapter.projection.weight)
    corrected = adapter(inputs, output)
    assert corrected.shape == output.shape
    torch.testing.assert_close(corrected, output + adapter.projection(inputs))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 4, stride=2)]
)
def test_a_convolution_without_room_for_one_is_refused(layer):
    with pytest.raises(ConfigError, match="another size"):
        ParallelAdapter(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_adapters_survive_copies(kind, again):
    model = build("residual_unet", add=f"{kind}_adapter").eval()
    images = images_for("residual_unet")
    copied = again(model)
    assert torch.equal(copied(images), model(images))
    nn.init.ones_(copied.head.conv.adapter.projection.weight)
    assert not torch.equal(copied(images), model(images))


def test_networks_that_cannot_have_adapters_are_refused_with_what_to_set():
    with pytest.raises(ConfigError, match="no convolution") as caught:
        build_network("mlp", in_channels=2, num_classes=2, seed=0, add="series_adapter")
    assert "model.name" in caught.value.hint
    with pytest.raises(ConfigError, match="batch_per_site"):
        add_adapters(
            build("unet"), "series", norm=Norm("batch_per_site", site_ids=("a",))
        )
