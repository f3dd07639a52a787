from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.unet_3d_pairs import UNet3DPairs

BATCH = nn.modules.batchnorm._BatchNorm


def test_the_published_network_has_its_published_number_of_weights():
    model = UNet3DPairs(1, 5, base_width=16)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, BATCH))
    kernels = sum(p.numel() for p in model.parameters()) - 2 * channels
    assert (kernels, channels) == (2_198_613, 1_488)


def test_kernels_are_flat_in_the_two_lower_levels():
    model = UNet3DPairs(1, 5, base_width=2)
    kernels = [level.conv1.kernel_size[2] for level in model.encoder.levels]
    assert kernels == [3, 3, 1, 1]
    assert [level.conv2.kernel_size[2] for level in model.decoder.levels] == [3, 3, 1]


@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 8, 8), (9, 9, 1)])
def test_logits_have_the_size_of_any_image(shape):
    model = UNet3DPairs(2, 3, base_width=2)
    assert model(torch.zeros(2, 2, *shape)).shape == (2, 3, *shape)


def test_parts_compose_to_the_network():
    model = UNet3DPairs(1, 2, base_width=2).eval()
    images = torch.randn(1, 1, 8, 8, 8)
    features = model.encoder(images)
    assert [f.shape[1] for f in features] == [4, 8, 16, 32]
    assert torch.equal(model.head(model.decoder(features)), model(images))


@pytest.mark.parametrize("wrong", [{"spatial_dims": 2}, {"base_width": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError):
        UNet3DPairs(1, 2, **wrong)
