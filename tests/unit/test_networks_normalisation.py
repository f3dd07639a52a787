from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network
from fedmed.networks.normalisation import (
    BatchNormPerSite,
    Norm,
    largest_divisor,
    make_norm,
    normalise,
    site_key,
)

SITES = ("a", "prostate/b.1")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dims", [0, 2, 3])
def test_a_set_per_site_equals_a_separate_batch_norm_per_site(dims):
    norm = Norm("batch_per_site", eps=1e-3, momentum=0.3, site_ids=SITES)
    together = BatchNormPerSite(4, dims, norm)
    batch = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    apart = {site: batch(4, eps=1e-3, momentum=0.3) for site in SITES}
    for step, site in enumerate([SITES[0], SITES[1], SITES[0]]):
        features = random(6, 4, *[5] * dims, seed=step) * (1 + step)
        assert torch.equal(together(features, site), apart[site](features))
    for site in SITES:
        own = together.sites[site_key(site)].state_dict()
        for name, value in apart[site].state_dict().items():
            assert torch.equal(own[name], value), (site, name)


def test_a_network_with_sets_per_site_equals_one_network_per_site():
    common = {"in_channels": 1, "num_classes": 2, "base_width": 4, "levels": 2}
    one = build_network("unet", **common, seed=3, norm="batch_per_site", site_ids=SITES)
    for site in SITES:
        alone = build_network("unet", **common, seed=3, norm="batch")
        for step in range(2):
            images = random(3, 1, 8, 8, seed=step) + len(site)
            assert torch.equal(one(images, site=site), alone(images, site=site))


def test_a_site_leaves_the_sets_of_the_others_as_they_are():
    layer = BatchNormPerSite(2, 2, Norm("batch_per_site", site_ids=SITES))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(random(4, 2, 3, 3), "a").sum().backward()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]) == ("site-a." not in name) or (
            name.endswith(("weight", "bias"))
        )
    other = layer.sites[site_key(SITES[1])]
    assert all(parameter.grad is None for parameter in other.parameters())


def test_the_site_is_an_argument_and_no_state():
    layer = BatchNormPerSite(2, 2, Norm("batch_per_site", site_ids=SITES)).eval()
    attributes = dict(vars(layer))
    layer(random(1, 2, 3, 3), "a")
    assert dict(vars(layer)) == attributes


@pytest.mark.parametrize("site", [None, "c"])
def test_a_site_without_a_set_is_an_error_that_names_the_known(site):
    layer = BatchNormPerSite(2, 2, Norm("batch_per_site", site_ids=SITES))
    with pytest.raises(ConfigError, match=r"a, prostate/b\.1"):
        layer(random(1, 2, 3, 3), site)


def test_every_site_name_gets_a_key_of_its_own():
    names = ["a.b", "a_b", "a/b", "a-b", "a_db", "a__b", "a_.b", "keys", "a b", "ä"]
    keys = [site_key(name) for name in names]
    assert len(set(keys)) == len(names)
    nn.ModuleDict({key: nn.Identity() for key in keys})
    assert not any("/" in key or "." in key for key in keys)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("batch", nn.BatchNorm2d),
        ("instance", nn.InstanceNorm2d),
        ("group", nn.GroupNorm),
        ("none", nn.Identity),
        ("batch_per_site", BatchNormPerSite),
    ],
)
def test_each_kind_is_torchs_own_layer_with_the_given_numbers(kind, expected):
    norm = Norm(kind, eps=0.01, momentum=0.25, site_ids=SITES)
    layer = make_norm(norm, 12, spatial_dims=2)
    assert type(layer) is expected
    features = random(2, 12, 4, 4)
    assert normalise(layer, features, "a").shape == features.shape
    for module in layer.modules():
        if hasattr(module, "eps"):
            assert module.eps == 0.01
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.25


def test_groups_divide_the_channels():
    assert make_norm(Norm("group"), 12, spatial_dims=2).num_groups == 6
    assert make_norm(Norm("group"), 16, spatial_dims=2).num_groups == 8
    assert make_norm(Norm("group"), 7, spatial_dims=2).num_groups == 7
    assert make_norm(Norm("group", max_groups=1), 7, spatial_dims=2).num_groups == 1
    assert all(n % largest_divisor(n, 8) == 0 for n in range(1, 50))


def test_affine_can_be_left_out():
    for kind in ("batch", "instance", "group", "batch_per_site"):
        norm = Norm(kind, affine=False, site_ids=SITES)
        assert not list(make_norm(norm, 4, spatial_dims=2).parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "bacth"}, "'batch'"),
        ({"kind": "batch_per_site"}, "no site"),
        ({"eps": 0.0}, "eps 0.0"),
        ({"momentum": 0.0}, "momentum 0.0"),
        ({"max_groups": 0}, "max_groups 0"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Norm(**options)


def test_instance_norm_of_a_table_is_refused():
    with pytest.raises(ConfigError, match="group"):
        make_norm(Norm("instance"), 4, spatial_dims=0)
