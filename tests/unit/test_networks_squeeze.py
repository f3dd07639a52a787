from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.networks.block import Block
from fedmed.networks.build import build_network
from fedmed.networks.squeeze import SqueezeGate

NETWORKS = {
    "unet": ({"base_width": 4, "levels": 3}, 5),
    "residual_unet": ({"base_width": 4, "levels": 3}, 5),
    "dilated_residual": ({"base_width": 2, "maps_per_class": 1}, 14),
    "unet_3d_pairs": ({"base_width": 2}, 7),
    "classifier": ({"base_width": 4, "levels": 3}, 3),
}


def build(name, **more):
    options = NETWORKS[name][0] | more
    return build_network(name, in_channels=1, num_classes=2, seed=3, **options)


def test_it_is_the_published_gate():
    r"""Hu et al., eq. (2) and (3): $\sigma(W_2 \delta(W_1 z))$, z the channel means."""
    gate = SqueezeGate(6, reduction=2).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    first, second = (w.detach().numpy() for w in gate.parameters())
    assert (first.shape, second.shape) == ((3, 6), (6, 3))
    means = x.numpy().mean(axis=(2, 3))
    scale = 1 / (1 + np.exp(-np.maximum(means @ first.T, 0) @ second.T))
    expected = x.numpy() * scale[:, :, None, None]
    assert np.abs(gate(x).detach().numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gate_stands_after_every_block_and_nothing_else_changes(name):
    plain, gated = build(name), build(name, add="squeeze", squeeze_reduction=2)
    gates = [m for m in gated.modules() if isinstance(m, SqueezeGate)]
    blocks = [m for m in gated.modules() if isinstance(m, Block)]
    assert len(gates) == len(blocks) == NETWORKS[name][1]
    state = gated.state_dict()
    for entry, tensor in plain.state_dict().items():
        assert torch.equal(state.pop(entry), tensor)
    assert {entry.rsplit(".", 2)[0].rsplit(".", 1)[1] for entry in state} == {"gate"}
    assert len(state) == 2 * len(gates)


def test_the_published_gates_have_a_sixteenth_of_the_channels():
    model = build("residual_unet", base_width=16, add="squeeze")
    shapes = [tuple(level.gate.squeeze.weight.shape) for level in model.encoder.levels]
    assert shapes == [(1, 16), (2, 32), (4, 64)]


def test_narrow_gates_can_have_more():
    model = build("residual_unet", base_width=16, add="squeeze", squeeze_least_hidden=3)
    shapes = [tuple(level.gate.squeeze.weight.shape) for level in model.encoder.levels]
    assert shapes == [(3, 16), (3, 32), (4, 64)]


def test_the_gates_are_used():
    model = build("residual_unet", add="squeeze").eval()
    images = torch.randn(1, 1, 8, 8)
    before = model(images)
    for module in model.modules():
        if isinstance(module, SqueezeGate):
            torch.nn.init.zeros_(module.excite.weight)  # a gate of 1/2
    plain = build("residual_unet").eval()
    level = plain.encoder.levels[0]
    assert not torch.equal(model(images), before)
    assert torch.equal(model.encoder.levels[0](images), level(images) / 2)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_gates_survive_copies(again):
    model = build("unet", add="squeeze").eval()
    images = torch.randn(1, 1, 8, 8)
    copied = again(model)
    assert torch.equal(copied(images), model(images))
    torch.nn.init.zeros_(copied.encoder.levels[0].gate.excite.weight)
    assert not torch.equal(copied(images), model(images))


def test_a_network_without_blocks_is_refused_with_what_to_set():
    with pytest.raises(ConfigError, match="no block") as caught:
        build_network("mlp", in_channels=2, num_classes=2, seed=0, add="squeeze")
    assert "residual_unet" in caught.value.hint
    for option in ("squeeze_reduction", "squeeze_least_hidden"):
        with pytest.raises(ConfigError, match=option):
            build("unet", add="squeeze", **{option: 0})
