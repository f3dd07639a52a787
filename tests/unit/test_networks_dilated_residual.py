from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network
from fedmed.networks.dilated_residual import (
    DilatedResidual,
    SymmetricConvolution,
    Unfolding,
    WideningBlock,
    mirrored,
)
from fedmed.networks.normalisation import Norm

BATCH = nn.modules.batchnorm._BatchNorm


def test_the_published_network_has_its_published_number_of_weights():
    model = DilatedResidual(3, 5, base_width=16, maps_per_class=8)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, BATCH))
    kernels = sum(p.numel() for p in model.parameters()) - 2 * channels
    assert (kernels, channels) == (39_302_456, 10_096)
    assert all(getattr(m, "bias", None) is None for m in model.modules()
               if isinstance(m, nn.Conv2d))  # fmt: skip


def test_the_paper_preset_drops_a_quarter_and_has_tensorflow_s_constants():
    model = build_network(
        "dilated_residual",
        preset="paper",
        base_width=2,
        in_channels=3,
        num_classes=5,
        seed=0,
    )
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    # 14 blocks of two convolutions, and two more
    assert [m.p for m in dropouts] == [0.25] * 30
    layers = [m for m in model.modules() if isinstance(m, BATCH)]
    assert {(m.eps, m.momentum) for m in layers} == {(1e-3, 0.1)}


@pytest.mark.parametrize("shape", [(5, 7), (16, 24), (8, 9)])
def test_logits_have_the_size_of_any_image(shape):
    model = DilatedResidual(2, 3, base_width=2, maps_per_class=1)
    assert model(torch.zeros(2, 2, *shape)).shape == (2, 3, *shape)


@pytest.mark.parametrize("border", [1, 2])
def test_the_border_is_numpy_s_symmetric_one(border):
    features = torch.randn(2, 3, 4, 5)
    pad = ((0, 0), (0, 0), (border, border), (border, border))
    expected = np.pad(features.numpy(), pad, mode="symmetric")
    assert np.array_equal(mirrored(features, border).numpy(), expected)


def test_a_constant_image_has_no_border():
    layer = SymmetricConvolution(2, 3, kernel_size=5)
    logits = layer(torch.ones(1, 2, 6, 6))
    torch.testing.assert_close(logits, logits[..., :1, :1].expand_as(logits))


@pytest.mark.parametrize(("before", "width"), [(2, 4), (3, 6), (3, 8), (4, 4)])
def test_a_widening_skip_lies_in_the_middle_of_zeros(before, width):
    block = WideningBlock(before, width, dropout=0.0, norm=Norm())
    nn.init.zeros_(block.second.conv.weight)
    features = torch.randn(1, before, 3, 3)
    widened = block(features)
    first = (width - before) // 2
    assert torch.equal(widened[:, first : first + before], features)
    assert torch.count_nonzero(widened) == torch.count_nonzero(features)


def test_channels_become_positions():
    layer = Unfolding(3, 2, norm=Norm()).eval()
    assert layer(torch.randn(1, 3, 2, 4)).shape == (1, 2, 16, 32)


def test_dilation_widens_the_field_and_keeps_the_size():
    block = WideningBlock(2, 2, dilation=2, dropout=0.0, norm=Norm("none"))
    assert block.first.conv.dilation == (2, 2)
    assert block(torch.zeros(1, 2, 5, 5)).shape == (1, 2, 5, 5)


@pytest.mark.parametrize(
    "wrong",
    [{"spatial_dims": 3}, {"base_width": 0}, {"dropout": 1.0}, {"base_width": 1000}],
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError):
        DilatedResidual(1, 2, **wrong)
