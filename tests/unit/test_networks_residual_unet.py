from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network
from fedmed.networks.normalisation import Norm
from fedmed.networks.residual_unet import Doubling, ResidualBlock, ResidualUNet

BATCH = nn.modules.batchnorm._BatchNorm


def counts(module):
    """Kernel weights, and channels that a batch normalisation works on."""
    channels = sum(m.num_features for m in module.modules() if isinstance(m, BATCH))
    return sum(p.numel() for p in module.parameters()) - 2 * channels, channels


@pytest.fixture(scope="module")
def published():
    """Base 32, 5 levels, three slices, two classes."""
    return build_network(
        "residual_unet", preset="paper", in_channels=3, num_classes=2, seed=0
    )


def test_the_published_network_has_its_published_number_of_weights(published):
    encoder, decoder, head = map(
        counts, (published.encoder, published.decoder, published.head)
    )
    assert encoder == (12_571_488, 3_008)
    assert (decoder[0] + head[0], decoder[1] + head[1]) == (4_700_736, 1_952)
    assert counts(published) == (17_272_224, 9_920 // 2)


def test_the_published_network_is_normalised_as_in_the_publication(published):
    layers = [m for m in published.modules() if isinstance(m, BATCH)]
    assert {(m.eps, m.momentum, m.affine) for m in layers} == {(1e-3, 0.1, True)}


def test_no_layer_has_a_bias(published):
    kernels = [m for m in published.modules() if hasattr(m, "kernel_size")]
    assert all(m.bias is None for m in kernels)


@pytest.mark.parametrize(
    ("levels", "base", "dims"), [(1, 3, 2), (2, 4, 2), (4, 2, 2), (3, 2, 3)]
)
def test_parameters_are_as_many_as_the_docstring_says(levels, base, dims):
    model = ResidualUNet(3, 5, base_width=base, levels=levels, spatial_dims=dims)
    width = [base * 2**level for level in range(levels)]
    kernel, last = 3**dims, levels - 1
    encoder = sum(
        kernel * ((width[n - 1] if n else 3) * w + 2 * w * w)
        for n, w in enumerate(width)
    )
    encoder += 2 * kernel * width[last] ** 2
    decoder = sum(
        kernel * (width[n + 1] * width[n] + 4 * width[n] ** 2) for n in range(last)
    )
    assert counts(model.encoder) == (encoder, 2 * sum(width) + 2 * width[last])
    channels = sum(width[n + 1] + 2 * width[n] for n in range(last))
    assert counts(model.decoder) == (decoder, channels)
    assert counts(model.head) == (kernel * base * 5, base)


@pytest.mark.parametrize("shape", [(5, 7), (16, 24), (8, 1)])
def test_logits_have_the_size_of_any_2d_image(shape):
    model = ResidualUNet(2, 3, base_width=2, levels=4)
    assert model(torch.zeros(2, 2, *shape)).shape == (2, 3, *shape)


def test_logits_have_the_size_of_any_3d_image():
    model = ResidualUNet(1, 2, base_width=2, levels=3, spatial_dims=3)
    assert model(torch.zeros(2, 1, 5, 7, 3)).shape == (2, 2, 5, 7, 3)


def test_a_block_adds_to_what_came_in():
    block = ResidualBlock(3, spatial_dims=2, norm=Norm())
    nn.init.zeros_(block.conv2.weight)
    features = torch.randn(2, 3, 4, 4)
    assert torch.equal(block(features), features)


def test_a_level_below_is_doubled_in_place():
    """A position lands on its own 2x2 square, not beside it."""
    doubling = Doubling(1, 1, spatial_dims=2, norm=Norm("none"))
    nn.init.ones_(doubling.conv.weight)
    features = torch.zeros(1, 1, 4, 4)
    features[0, 0, 1, 2] = 1.0
    lit = torch.nonzero(doubling(features)[0, 0])
    assert lit.min(0).values.tolist() == [1, 3]
    assert lit.max(0).values.tolist() == [3, 5]


def test_the_site_reaches_every_normalisation():
    model = build_network(
        "residual_unet",
        in_channels=1,
        num_classes=2,
        seed=0,
        base_width=2,
        levels=3,
        norm="batch_per_site",
        site_ids=("a", "b"),
    )
    model(torch.randn(2, 1, 8, 8), site="a")
    counters = {
        name: int(tensor)
        for name, tensor in model.named_buffers()
        if name.endswith("num_batches_tracked")
    }
    assert all((number == 1) == ("site-a" in n) for n, number in counters.items())
    with pytest.raises(ConfigError, match="site"):
        model(torch.zeros(2, 1, 8, 8))


def test_parts_compose_to_the_network():
    model = ResidualUNet(1, 2, base_width=2, levels=3).eval()
    images = torch.randn(1, 1, 8, 12)
    decoded = model.decoder(model.encoder(images))
    assert torch.equal(model.head(decoded), model(images))


@pytest.mark.parametrize(
    "wrong", [{"levels": 0}, {"base_width": 0}, {"spatial_dims": 1}, {"levels": 20}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError):
        ResidualUNet(1, 2, **wrong)
