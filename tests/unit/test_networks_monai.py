from __future__ import annotations

import copy
import sys

import pytest
import torch

from fedmed.errors import ConfigError, MissingDependencyError
from fedmed.networks.build import build_network
from fedmed.partition import StatePartition

BASIC = {"spatial_dims": 2, "features": (4, 4, 8, 8, 8, 4)}


def build(name="BasicUNet", seed=0, **options):
    return build_network(
        f"monai:{name}", in_channels=1, num_classes=3, seed=seed, **options
    )


def test_without_monai_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.setitem(sys.modules, "monai.networks", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fedmed\[monai\]'"):
        build(**BASIC)


@pytest.fixture
def monai():
    # MONAI's own imports warn about other packages; that is not what is tested here.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("monai", reason="MONAI is not installed")


@pytest.mark.slow
def test_a_monai_network_is_built_by_name_and_called_like_ours(monai):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = build(**BASIC)
    assert torch.equal(torch.get_rng_state(), before)
    from monai.networks.nets import BasicUNet

    assert isinstance(model, BasicUNet)
    assert model(torch.zeros(1, 1, 32, 32), site="a").shape == (1, 3, 32, 32)
    torch.manual_seed(1)
    again, other = build(**BASIC), build(seed=1, **BASIC)
    state = model.state_dict()
    assert list(state) == list(
        BasicUNet(in_channels=1, out_channels=3, **BASIC).state_dict()
    )
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in state.items())
    kept = StatePartition.of(copy.deepcopy(model), ["norm"]).kept
    assert kept
    with pytest.raises(ConfigError, match="nearest is 'BasicU"):
        build("BasicUnett")
    with pytest.raises(ConfigError, match="features"):
        build(featurs=(4,))
