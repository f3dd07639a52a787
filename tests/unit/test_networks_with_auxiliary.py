from __future__ import annotations

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network, known_networks
from fedmed.networks.with_auxiliary import WithAuxiliary
from fedmed.partition import StatePartition

SMALL = {"base_width": 2, "levels": 3, "in_channels": 1, "num_classes": 2}
KINDS = [name for name in ("unet", "residual_unet") if name in known_networks()]


def build(name, seed=0, **options):
    return build_network(name, **{**SMALL, **options}, seed=seed)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 1, 9, 6), (2, 1, 7, 8, 5)])
def test_called_as_a_network_it_is_the_plain_one(name, shape):
    options = {"spatial_dims": len(shape) - 2}
    plain = build(name, **options)
    network = WithAuxiliary(build(name, **options), build(name, 1, **options))
    x = images(*shape)
    assert torch.equal(network(x), plain(x))
    assert network(x).shape == (2, 2, *shape[2:])
    entries = network.state_dict()
    assert list(plain.state_dict()) == [n for n in entries if "auxiliary" not in n]
    # The branch took no part: its statistics have counted nothing.
    counted = [t for n, t in entries.items() if "auxiliary" in n and "num_batches" in n]
    assert counted
    assert not any(counted)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("dilated_residual", {"maps_per_class": 1}, (2, 1, 30, 21)),
        ("unet_3d_pairs", {}, (2, 1, 12, 9, 6)),
    ],
)
def test_networks_of_eighths_take_any_size_too(name, options, shape):
    given = {"in_channels": 1, "num_classes": 2, "base_width": 2, **options}
    plain, other = (build_network(name, **given, seed=seed) for seed in (0, 1))
    network = WithAuxiliary(build_network(name, **given, seed=0), other)
    x = images(*shape)
    logits, branch = network.both(x)
    assert torch.equal(logits, plain(x))
    assert branch.shape == logits.shape == (2, 2, *shape[2:])


@pytest.mark.parametrize("name", KINDS)
def test_the_branch_is_a_network_of_the_same_features(name):
    other = build(name, 1)
    network = WithAuxiliary(build(name), build(name, 1))
    other.encoder = build(name).encoder
    x = images(2, 1, 9, 6)
    assert torch.equal(network.auxiliary_logits(x), other(x))


@pytest.mark.parametrize("name", KINDS)
def test_both_of_one_forward_with_gradient_for_the_network_alone(name):
    network = WithAuxiliary(build(name), build(name, 1))
    other = WithAuxiliary(build(name), build(name, 1))
    x = images(2, 1, 8, 8)
    logits, branch = network.both(x)
    assert torch.equal(logits, other(x))
    fresh = WithAuxiliary(build(name), build(name, 1))
    assert torch.equal(branch, fresh.auxiliary_logits(x))
    assert not branch.requires_grad
    (logits.sum() + branch.sum()).backward()
    moved = {
        n.partition(".")[0] for n, p in network.named_parameters() if p.grad is not None
    }
    assert moved == {"encoder", "decoder", "head"}


@pytest.mark.parametrize("name", KINDS)
def test_statistics_are_counted_once_in_each_forward(name):
    network = WithAuxiliary(build(name), build(name, 1))
    x = images(2, 1, 8, 8)
    network.auxiliary_logits(x)
    network.both(x)
    counted = {
        n.rpartition(".norm")[0]: int(t)
        for n, t in network.state_dict().items()
        if "num_batches" in n
    }
    for place, count in counted.items():
        once = place.startswith(("decoder", "head"))
        assert count == (1 if once else 2), place


def test_a_network_without_these_parts_is_refused():
    with pytest.raises(ConfigError, match="encoder, decoder, head; Linear has none"):
        WithAuxiliary(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))


@pytest.mark.skipif("residual_unet" not in KINDS, reason="no such network")
def test_the_published_network_has_the_published_numbers():
    paper = {"in_channels": 3, "base_width": 32, "levels": 5, "norm": "batch"}
    network = WithAuxiliary(*(build("residual_unet", n, **paper) for n in (0, 1)))
    partition = StatePartition.of(network, ("norm", "auxiliary"))
    state, trainable = network.state_dict(), dict(network.named_parameters())

    def count(names, *, of=state):
        return sum(of[n].numel() for n in names if n in of and "num_batches" not in n)

    assert count(partition.shared) == 17_272_224
    assert count([n for n in partition.shared if n.startswith("encoder")]) == 12_571_488
    norms = [n for n in partition.kept if not n.startswith("auxiliary")]
    assert count(norms) == 19_840
    assert count(norms, of=trainable) == 9_920
    branch = [n for n in partition.kept if n.startswith("auxiliary")]
    assert count(branch, of=trainable) == 4_704_640
    assert count(branch) - count(branch, of=trainable) == 3_904
