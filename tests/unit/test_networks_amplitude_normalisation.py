from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.amplitude_normalisation import (
    REFERENCE,
    AmplitudeNormalisation,
    normalise_amplitude,
)
from fedmed.networks.unet import UNet
from fedmed.training.amplitude import amplitude_centre


def images_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("half", [0, 2])
@pytest.mark.parametrize("shape", [(3, 2, 12, 9), (3, 2, 12, 9, 4)])
def test_images_get_the_reference_amplitude_and_keep_their_phase(half, shape):
    layer = AmplitudeNormalisation(2, half).double()
    reference = amplitude_centre(images_of(1, 2, 12, 9, seed=1), half)[0]
    layer.reference.copy_(reference)
    images = images_of(*shape)
    found = layer(images)
    flat = found if found.ndim == 4 else found[..., 0]
    torch.testing.assert_close(
        amplitude_centre(flat, half), reference.expand(3, -1, -1, -1)
    )
    phases = [torch.fft.fft2(x, dim=(2, 3)).angle().cos() for x in (images, found)]
    torch.testing.assert_close(*phases, rtol=0, atol=1e-9)


def test_without_a_reference_nothing_changes():
    images = images_of(2, 1, 8, 8)
    assert torch.equal(AmplitudeNormalisation(1, 3).double()(images), images)


def test_the_network_keeps_its_names_and_gets_one_entry_more():
    network = UNet(2, 2, base_width=2, levels=2).double()
    names = set(network.state_dict())
    plain = network(images_of(2, 2, 8, 8))
    normalise_amplitude(network, half_width=1)
    assert set(network.state_dict()) == names | {REFERENCE}
    assert torch.equal(network(images_of(2, 2, 8, 8)), plain)
    network.get_buffer(REFERENCE).fill_(0.5)
    changed = network(images_of(2, 2, 8, 8))
    assert not torch.equal(changed, plain)
    assert not any(name == REFERENCE for name, _ in network.named_parameters())


def test_a_copy_has_a_reference_of_its_own():
    network = normalise_amplitude(UNet(1, 2, base_width=2, levels=1), half_width=0)
    other = copy.deepcopy(network)
    images = torch.ones(1, 1, 4, 4)
    before = network(images)
    other.get_buffer(REFERENCE).fill_(3.0)
    assert torch.equal(network(images), before)
    network.get_buffer(REFERENCE).fill_(3.0)
    assert torch.equal(network(images), other(images))


@pytest.mark.parametrize("shape", [(2, 1, 4, 9), (2, 5)])
def test_images_that_are_too_small_and_tables_are_refused(shape):
    with pytest.raises(ConfigError, match="amplitudes"):
        AmplitudeNormalisation(1, 2)(torch.zeros(shape))


def test_a_network_without_convolution_and_a_negative_width_are_refused():
    with pytest.raises(ConfigError, match="no convolution"):
        normalise_amplitude(nn.Linear(2, 2), half_width=1)
    with pytest.raises(ConfigError, match="half_width"):
        AmplitudeNormalisation(1, -1)
