from __future__ import annotations

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network
from fedmed.training.coupled import captured
from fedmed.training.latent import latent_vectors, latent_width

NETWORKS = {
    "unet": ({"base_width": 2, "levels": 3}, (2, 1, 9, 8)),
    "residual_unet": ({"base_width": 2, "levels": 3}, (2, 1, 9, 8)),
    "dilated_residual": ({"base_width": 2, "maps_per_class": 1}, (2, 1, 9, 8)),
    "unet_3d_pairs": ({"base_width": 1}, (2, 1, 8, 8, 8)),
    "classifier": ({"base_width": 2, "levels": 2}, (2, 1, 9, 8)),
    "mlp": ({"widths": (7, 5)}, (2, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_ours_has_a_latent_vector_of_the_width_it_tells(name):
    options, shape = NETWORKS[name]
    network = build_network(name, in_channels=1, num_classes=2, seed=0, **options)
    network.eval()
    with captured(network, ("encoder",)) as outputs:
        network(torch.ones(shape))
    vectors = latent_vectors(outputs["encoder"])
    assert vectors.shape == (2, latent_width(network, "encoder"))


def test_the_mean_is_over_all_positions_of_the_last():
    features = torch.arange(12.0).reshape(1, 2, 2, 3)
    wanted = torch.tensor([[2.5, 8.5]])
    assert torch.equal(latent_vectors(features), wanted)
    assert torch.equal(latent_vectors((torch.zeros(1, 9, 4), features)), wanted)
    assert torch.equal(latent_vectors(wanted), wanted)


def test_what_is_no_encoder_is_refused():
    network = build_network("mlp", in_channels=3, num_classes=2, seed=0, widths=())
    with pytest.raises(ConfigError, match="holds no convolution"):
        latent_width(network, "encoder")
    with pytest.raises(ConfigError, match="'body', which is no module"):
        latent_width(network, "body")
