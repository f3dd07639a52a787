from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network, known_networks
from fedmed.networks.classifier import Classifier
from fedmed.networks.normalisation import Norm
from fedmed.partition import StatePartition

SMALL = {"in_channels": 1, "num_classes": 3, "base_width": 4, "levels": 3}


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("base", "levels"), [(16, 4), (8, 1), (4, 3)])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_parameters_are_as_many_as_the_docstring_says(dims, base, levels, norm):
    model = Classifier(
        3, 5, spatial_dims=dims, base_width=base, levels=levels, norm=Norm(norm)
    )
    widths = [base * 2**level for level in range(levels)]
    inputs = [3, *widths[:-1]]
    kernels = sum(
        3**dims * (a * w + w * w) for a, w in zip(inputs, widths, strict=True)
    )
    beside = {"batch": 2 * 2 * sum(widths), "none": 2 * sum(widths)}[norm]
    assert num_parameters(model) == kernels + beside + 5 * widths[-1] + 5


def test_the_default_has_the_size_that_the_docstring_gives():
    assert num_parameters(Classifier(1, 2)) == 293_970
    assert "293,970" in (Classifier.__doc__ or "")


@pytest.mark.parametrize("shape", [(5, 7), (16, 24), (1, 9), (5, 7, 3), (8, 8, 1)])
def test_images_of_any_size_have_one_logit_per_class(shape):
    model = Classifier(2, 3, spatial_dims=len(shape), base_width=2, levels=3)
    assert model(torch.zeros(2, 2, *shape)).shape == (2, 3)


def test_logits_are_a_linear_map_of_the_mean_of_the_deepest_features():
    model = build_network("classifier", **SMALL, seed=0).eval()
    images = random(2, 1, 12, 8)
    with torch.no_grad():
        got = model(images)
        deepest = model.encoder(images)[-1].double().numpy()
    weight, bias = (p.detach().double().numpy() for p in model.head.parameters())
    expected = deepest.mean(axis=(2, 3)) @ weight.T + bias
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_parts_are_encoder_and_head_and_can_be_kept_by_a_site():
    model = Classifier(1, 2, base_width=4, levels=2)
    assert [name for name, _ in model.named_children()] == ["encoder", "head"]
    assert set(StatePartition.of(model, ["head"]).kept) == {"head.weight", "head.bias"}


def test_the_encoder_starts_as_the_unet_s_does():
    ours = build_network("classifier", **SMALL, seed=4).encoder.state_dict()
    theirs = build_network("unet", **SMALL, seed=4).encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert "classifier" in known_networks()


def test_options_of_the_normalisation_are_those_of_the_unet():
    model = build_network("classifier", **SMALL, seed=0, norm="group")
    assert any(isinstance(m, nn.GroupNorm) for m in model.modules())
    model = build_network(
        "classifier", **SMALL, seed=0, norm="batch_per_site", site_ids=("a", "b")
    )
    for _ in range(3):
        model(random(4, 1, 8, 8) * 5, site="a")
    model.eval()
    images = random(1, 1, 8, 8)
    assert not torch.allclose(model(images, site="a"), model(images, site="b"))


@pytest.mark.parametrize("dims", [2, 3])
def test_images_of_another_dimension_are_refused(dims):
    # A batch (B, C, I, J) is a single volume to torch's 3D convolution.
    model = Classifier(2, 2, spatial_dims=dims, base_width=2, levels=1)
    with pytest.raises(ConfigError, match=f"spatial_dims: {5 - dims}"):
        model(torch.zeros(2, 2, *(4,) * (5 - dims)))


@pytest.mark.parametrize(
    "changes",
    [{"spatial_dims": 1}, {"levels": 0}, {"base_width": 0}, {"num_classes": 0}],
)
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ConfigError):
        Classifier(**{"in_channels": 1, "num_classes": 2, **changes})
