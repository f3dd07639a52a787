from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.normalisation import Norm
from fedmed.networks.unet import UNet, halve, halve_by_slices, pad_to_multiple


def convolution_weights(*, channels, classes, base, levels, dims):
    """Weights of a U-Net without its normalisation, counted layer by layer."""
    widths = [base * 2**level for level in range(levels)]
    inputs = [channels, *widths[:-1]]
    count = sum(3**dims * (a * w + w * w) for a, w in zip(inputs, widths, strict=True))
    for low, high in itertools.pairwise(widths):
        count += 2**dims * high * low + low  # transposed convolution and its bias
        count += 3**dims * (2 * low * low + low * low)
    return count + base * classes + classes


def norm_weights(*, base, levels):
    widths = [base * 2**level for level in range(levels)]
    return 2 * (2 * sum(widths) + 2 * sum(widths[:-1]))


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("base", "levels"), [(16, 4), (8, 1), (4, 3)])
def test_parameters_are_as_many_as_the_docstring_says(dims, base, levels):
    model = UNet(3, 2, spatial_dims=dims, base_width=base, levels=levels)
    kernels = convolution_weights(
        channels=3, classes=2, base=base, levels=levels, dims=dims
    )
    assert num_parameters(model) == kernels + norm_weights(base=base, levels=levels)


def test_published_unet_of_base_32_has_its_published_size():
    # HarmoFL (Jiang et al., AAAI 2022) counts 7,757,186 without normalisation.
    model = UNet(3, 2, base_width=32, levels=5)
    kernels = num_parameters(model) - norm_weights(base=32, levels=5)
    assert kernels == 7_757_186


def test_top_level_parts_are_encoder_decoder_and_head():
    names = [name for name, _ in UNet(1, 2).named_children()]
    assert names == ["encoder", "decoder", "head"]


@pytest.mark.parametrize("shape", [(5, 7), (16, 24), (1, 9)])
def test_logits_have_the_size_of_any_2d_image(shape):
    model = UNet(2, 3, base_width=4, levels=4)
    assert model(torch.zeros(2, 2, *shape)).shape == (2, 3, *shape)


@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 8), (9, 4, 1)])
def test_logits_have_the_size_of_any_3d_image(shape):
    model = UNet(1, 2, spatial_dims=3, base_width=2, levels=3)
    assert model(torch.zeros(2, 1, *shape)).shape == (2, 2, *shape)


def test_padding_appends_zeros_and_leaves_the_image_in_place():
    images = torch.arange(15.0).reshape(1, 1, 3, 5) + 1
    padded = pad_to_multiple(images, 4)
    assert padded.shape == (1, 1, 4, 8)
    assert torch.equal(padded[..., :3, :5], images)
    assert padded.sum() == images.sum()


def test_image_of_fitting_size_is_not_copied():
    images = torch.ones(1, 1, 8, 4)
    assert pad_to_multiple(images, 4) is images


def test_a_pixel_reaches_the_pixel_it_came_from():
    # A crop at the wrong end or swapped axes would move the field of influence.
    model = UNet(1, 1, base_width=8, levels=2, norm=Norm("none")).eval()
    with torch.no_grad():
        images = torch.zeros(1, 1, 61, 51)
        empty = model(images)
        images[0, 0, 37, 20] = 100.0
        change = (model(images) - empty).abs()[0, 0]
    rows, columns = torch.nonzero(change > 0, as_tuple=True)
    assert abs((rows.min() + rows.max()) / 2 - 37) <= 1.5
    assert abs((columns.min() + columns.max()) / 2 - 20) <= 1.5


def test_no_bias_stands_before_a_normalisation():
    for kind, expected in (("batch", False), ("none", True)):
        model = UNet(1, 2, base_width=4, levels=2, norm=Norm(kind))
        blocks = [m for n, m in model.named_modules() if n.endswith(("conv1", "conv2"))]
        assert len(blocks) == 6
        assert all((block.bias is not None) == expected for block in blocks)


def test_channels_last_stays_channels_last():
    model = UNet(4, 4, base_width=4, levels=3).to(memory_format=torch.channels_last)
    kept = []

    def look(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.shape[1] > 1:
            kept.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    images = torch.randn(2, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    model(images.to(memory_format=torch.channels_last))
    assert len(kept) > 20
    assert all(kept)


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 6, 8, 4)])
def test_both_ways_to_halve_agree_in_value_and_gradient(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gradients, values = [], []
    for function in (halve, halve_by_slices):
        leaf = features.clone().requires_grad_()
        value = function(leaf)
        value.square().sum().backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    assert torch.equal(*values)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "changes", [{"spatial_dims": 1}, {"levels": 0}, {"base_width": 0}]
)
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ConfigError):
        UNet(1, 2, **changes)


def test_parts_can_be_called_by_themselves():
    model = UNet(1, 2, base_width=4, levels=3)
    features = model.encoder(torch.zeros(1, 1, 8, 8))
    assert [f.shape[1:] for f in features] == [(4, 8, 8), (8, 4, 4), (16, 2, 2)]
    decoded = model.decoder(features)
    assert decoded.shape == (1, 4, 8, 8)
    assert isinstance(model.head, nn.Conv2d)


def test_a_network_that_would_fill_the_memory_is_refused():
    with pytest.raises(ConfigError, match="deepest level"):
        UNet(1, 2, levels=20)
