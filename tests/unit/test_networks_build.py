from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network, initialise, known_networks
from fedmed.networks.residual_unet import PRESETS
from fedmed.networks.unet import UNet

SMALL = {"in_channels": 1, "num_classes": 2, "base_width": 4, "levels": 2}


class Foreign(nn.Module):
    """Stands for a class of somebody else's package."""

    def __init__(self, in_channels, num_classes, width=3):
        super().__init__()
        self.first = nn.Linear(in_channels, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images, site=None):  # noqa: ARG002
        return self.head(self.first(images))


class Siteless(Foreign):
    """Never heard of sites."""

    def forward(self, rows):
        return super().forward(rows)


def equal(a, b):
    return all(torch.equal(x, b[n]) for n, x in a.items()) and a.keys() == b.keys()


def test_equal_seeds_give_equal_weights_and_others_do_not():
    first = build_network("unet", **SMALL, seed=1).state_dict()
    assert equal(first, build_network("unet", **SMALL, seed=1).state_dict())
    other = build_network("unet", **SMALL, seed=2).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.fixture
def importable(monkeypatch):
    """Make this file importable by name, as an installed package would be."""
    import sys
    import types

    module = types.ModuleType("a_strangers_package")
    module.Foreign = Foreign
    module.Siteless = Siteless
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_building_neither_reads_nor_moves_the_global_random_state(importable):
    for name, options in (
        ("unet", {"base_width": 4, "levels": 2}),
        ("mlp", {"widths": (4,)}),
        (f"{importable}:Foreign", {}),
    ):
        states = []
        for global_seed in (0, 1):
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            model = build_network(name, in_channels=2, num_classes=2, seed=5, **options)
            assert torch.equal(torch.get_rng_state(), before), name
            states.append(model.state_dict())
        assert equal(*states), name


def test_a_failed_build_leaves_the_global_random_state(importable):
    before = torch.get_rng_state()
    with pytest.raises(ConfigError):
        build_network("unet", **SMALL, seed=0, spatial_dims=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_depends_on_its_name_and_not_on_the_layers_before_it():
    deep = build_network("unet", **{**SMALL, "levels": 3}, seed=1).state_dict()
    flat = build_network("unet", **SMALL, seed=1).state_dict()
    name = "encoder.levels.0.conv2.weight"
    assert torch.equal(deep[name], flat[name])
    grouped = build_network("unet", **SMALL, seed=1, norm="group").state_dict()
    assert torch.equal(grouped[name], flat[name])
    assert not torch.equal(
        flat["encoder.levels.0.conv2.weight"], flat["decoder.levels.0.conv2.weight"]
    )


def test_dtypes_start_from_the_same_weights():
    single = build_network("unet", **SMALL, seed=1)
    double = build_network("unet", **SMALL, seed=1, dtype=torch.float64)
    assert double.head.weight.dtype == torch.float64
    assert torch.equal(double.head.weight, single.head.weight.double())
    assert double.encoder.levels[0].norm1.num_batches_tracked.dtype == torch.int64


def test_weights_have_the_variance_of_he():
    # He et al. 2015, eq. (10): variance 2 / fan-in. 4 standard errors of a variance.
    model = build_network("unet", in_channels=3, num_classes=2, base_width=32, seed=0)
    fans = {
        "encoder.levels.1.conv1": 32 * 9,
        "decoder.levels.0.conv1": 64 * 9,
        "decoder.up.1": 128,
        "head": 32,
    }
    for name, fan in fans.items():
        weight = model.get_submodule(name).weight.detach().double()
        ratio = float(weight.var() / (2 / fan))
        assert abs(ratio - 1) < 4 * math.sqrt(2 / weight.numel()), name
    biases = [b for n, b in model.named_parameters() if n.endswith("bias")]
    assert all(not b.any() for b in biases)


def test_signal_keeps_its_size_through_the_depth():
    model = build_network(
        "unet", in_channels=1, num_classes=2, base_width=16, seed=0, norm="none"
    ).eval()
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.encoder(images)
    power = [float(f.square().mean()) for f in features]
    assert all(0.2 < p < 5 for p in power), power


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("unett", {}, "unet"),
        ("unet", {"base_with": 4}, "base_width"),
        ("unet", {"norm": "instanc"}, "instance"),
        ("nowhere.at_all:Net", {}, "installed"),
        ("fedmed.errors:ConfigError", {}, "not a class of torch"),
    ],
)
def test_wrong_words_are_refused_with_what_would_be_right(name, options, words):
    with pytest.raises(ConfigError, match=words):
        build_network(name, in_channels=1, num_classes=2, seed=0, **options)


def test_a_class_anywhere_can_be_named(importable):
    name = f"{importable}:Foreign"
    model = build_network(name, in_channels=2, num_classes=3, seed=0, width=5)
    assert model(torch.zeros(1, 2), site="a").shape == (1, 3)
    with pytest.raises(ConfigError, match="width"):
        build_network(name, in_channels=2, num_classes=3, seed=0, widht=5)


def test_a_network_that_knows_no_sites_is_called_like_ours(importable):
    model = build_network(
        f"{importable}:Siteless", in_channels=2, num_classes=3, seed=0
    )
    rows = torch.ones(1, 2)
    assert isinstance(model, Siteless)
    assert torch.equal(model(rows, site="a"), model(rows))
    own = Siteless(2, 3)
    own.load_state_dict(model.state_dict())
    assert torch.equal(own(rows), model(rows))
    assert list(copy.deepcopy(model).state_dict()) == list(own.state_dict())


def test_the_folder_names_its_networks():
    assert {"mlp", "unet"} <= set(known_networks())
    for name in ("build", "foreign", "monai", "normalisation", "options"):
        assert name not in known_networks()


def test_a_layer_without_known_weights_is_refused():
    with pytest.raises(ConfigError, match="Embedding"):
        initialise(nn.Sequential(nn.Embedding(3, 2)), seed=0)


def test_built_unet_is_a_unet_in_training_mode():
    model = build_network("unet", **SMALL, seed=0, norm_eps=1e-3, norm_momentum=0.01)
    assert isinstance(model, UNet)
    assert model.training
    assert model.encoder.levels[0].norm1.eps == 1e-3
    assert model.encoder.levels[0].norm1.momentum == 0.01


def test_a_preset_lies_beneath_the_other_options():
    model = build_network(
        "residual_unet", in_channels=1, num_classes=2, seed=0, preset="tiny", levels=2
    )
    assert len(model.encoder.levels) == 2
    assert model.encoder.levels[0].width == PRESETS["tiny"]["base_width"]
    assert model.head.norm.eps == PRESETS["tiny"]["norm_eps"]


@pytest.mark.parametrize("name", known_networks())
def test_every_network_has_a_tiny_preset_that_can_be_built(name):
    model = build_network(name, in_channels=2, num_classes=2, seed=0, preset="tiny")
    assert sum(p.numel() for p in model.parameters()) < 2_500_000


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("residual_unet", {"preset": "papre"}, "did you mean 'paper'.*\n.*paper, tiny"),
        ("mlp", {"preset": "paper"}, "no preset 'paper'.*\n.*known are tiny"),
        ("nowhere.at_all:Net", {"preset": "paper"}, "leave model.preset out"),
        ("unet", {"add": "squeze"}, "did you mean 'squeeze'.*\n.*series_adapter"),
    ],
)
def test_an_unknown_preset_or_addition_names_the_known(name, options, words):
    with pytest.raises(ConfigError, match=words):
        build_network(name, in_channels=1, num_classes=2, seed=0, **options)
