from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError, StateMismatchError
from fedmed.networks.build import build_network
from fedmed.partition import StatePartition, describe_state


class Block(nn.Module):
    """A residual block as torchvision builds it: `downsample.1` is a batch norm."""

    def __init__(self, inputs, width):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        # Named like a normalisation and is none.
        self.bn_conv = nn.Conv2d(width, width, 1)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        )


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.encoder = nn.Sequential(Block(1, 2), Block(2, 4))
        self.project = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))


NORM_MODULES = ("bn1", "downsample.1", "project.1")


def is_of_norm(name):
    return name.rpartition(".")[0].endswith(NORM_MODULES)


def test_entries_follow_the_state_dict():
    model = SmallResNet()
    entries = describe_state(model)
    state = model.state_dict()
    assert [e.name for e in entries] == list(state)
    for entry in entries:
        assert entry.shape == tuple(state[entry.name].shape)
        assert entry.dtype == state[entry.name].dtype
    parts = dict.fromkeys(e.part for e in entries)
    assert list(parts) == ["token", "steps_seen", "encoder", "project", "head"]


def test_roles_follow_the_type_of_module_and_not_its_name():
    roles = {e.name: e.role for e in describe_state(SmallResNet())}
    assert roles["encoder.1.downsample.1.weight"] == "norm_affine"
    assert roles["encoder.1.downsample.1.running_var"] == "norm_statistic"
    assert roles["encoder.1.downsample.1.num_batches_tracked"] == "counter"
    assert roles["encoder.0.bn_conv.weight"] == "weight"
    assert roles["encoder.0.bn_conv.bias"] == "weight"
    assert roles["encoder.0.downsample.0.weight"] == "weight"
    assert roles["project.1.bias"] == "norm_affine"
    assert roles["token"] == "weight"
    assert roles["steps_seen"] == "counter"
    for name, role in roles.items():
        assert (role == "weight") == (not is_of_norm(name) and name != "steps_seen")


def test_every_kind_of_normalisation_is_known():
    layers = [
        nn.BatchNorm1d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
        nn.RMSNorm(2),
    ]
    for layer in layers:
        roles = {e.name: e.role for e in describe_state(layer)}
        assert roles["weight"] == "norm_affine", layer
        assert "weight" not in set(roles.values())
        if "running_mean" in roles:
            assert roles["running_mean"] == "norm_statistic"


class Standardise(nn.BatchNorm2d):
    """A normalisation whose name does not say so."""


class NormHead(nn.Linear):
    """Named like a normalisation and is none."""


def test_a_subclass_has_the_role_of_its_base():
    roles = {e.name: e.role for e in describe_state(Standardise(2))}
    assert roles["weight"] == "norm_affine"
    assert roles["running_var"] == "norm_statistic"
    roles = {e.name: e.role for e in describe_state(NormHead(2, 2))}
    assert set(roles.values()) == {"weight"}


def test_a_module_used_under_two_names_is_listed_under_both():
    model = nn.Module()
    model.one = nn.BatchNorm1d(2)
    model.two = model.one
    parts = {(e.part, e.role) for e in describe_state(model)}
    assert ("two", "norm_affine") in parts
    assert len(describe_state(model)) == 10


def test_sets_per_site_are_normalisation():
    model = build_network(
        "unet",
        in_channels=1,
        num_classes=2,
        base_width=4,
        levels=2,
        norm="batch_per_site",
        site_ids=("a", "b"),
        seed=0,
    )
    partition = StatePartition.of(model, ["norm"])
    assert all(
        (".sites." in name) == (name in partition.kept)
        for name in (*partition.shared, *partition.kept)
    )
    # 3 double convolutions x 2 layers x 2 sites x 5 tensors
    assert len(partition.kept) == 60


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ([], lambda _: False),
        (["none"], lambda _: False),
        (["all"], lambda _: True),
        (["norm"], lambda e: e.role != "weight"),
        (["norm_affine"], lambda e: e.role == "norm_affine"),
        (["norm_statistics"], lambda e: e.role in ("norm_statistic", "counter")),
        (["head"], lambda e: e.part == "head"),
        (["head:weight"], lambda e: e.part == "head"),
        (["encoder:weight"], lambda e: e.part == "encoder" and e.role == "weight"),
        (
            ["head", "encoder:norm"],
            lambda e: e.part == "head" or (e.part == "encoder" and e.role != "weight"),
        ),
    ],
)
def test_words_choose_what_is_kept(keep, expected):
    model = SmallResNet()
    partition = StatePartition.of(model, keep)
    entries = describe_state(model)
    assert partition.kept == tuple(e.name for e in entries if expected(e))
    assert partition.shared == tuple(e.name for e in entries if not expected(e))


def test_a_single_word_may_stand_without_a_list():
    model = SmallResNet()
    assert StatePartition.of(model, "head") == StatePartition.of(model, ["head"])


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("nrom", "norm"),
        ("heads", "head"),
        ("encoder:nrom", "encoder:norm"),
        ("encodr:norm", "encoder:norm"),
        ("weight", "head"),
    ],
)
def test_an_unknown_word_names_the_nearest_known(word, near):
    with pytest.raises(ConfigError, match="nearest is") as caught:
        StatePartition.of(SmallResNet(), [word])
    if word != "weight":
        assert f"nearest is {near!r}" in caught.value.hint


def test_split_and_merge_are_inverse():
    model = SmallResNet()
    partition = StatePartition.of(model, ["norm"])
    state = dict(model.state_dict())
    shared, kept = partition.split(state)
    assert not set(shared) & set(kept)
    merged = partition.merge(shared, kept)
    assert list(merged) == list(state)
    assert all(merged[name] is state[name] for name in state)


def test_wrong_states_are_refused_with_all_that_is_wrong():
    model = SmallResNet()
    partition = StatePartition.of(model, ["norm"])
    state = dict(model.state_dict())
    del state["token"]
    state["head.weigth"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(3)
    state["steps_seen"] = torch.zeros(())
    with pytest.raises(StateMismatchError) as caught:
        partition.check(state)
    message = caught.value.message
    assert "missing token" in message
    assert "unknown head.weigth" in message
    assert "head.bias has shape (3,), expected (2,)" in message
    assert "steps_seen is torch.float32, expected torch.int64" in message
    with pytest.raises(StateMismatchError):
        partition.split(state)


def test_kept_entries_are_refused_in_a_shared_state():
    model = SmallResNet()
    partition = StatePartition.of(model, ["norm"])
    shared, kept = partition.split(dict(model.state_dict()))
    leaked = partition.kept[1]
    with pytest.raises(StateMismatchError, match=f"unknown {leaked}"):
        partition.check({**shared, leaked: kept[leaked]}, scope="shared")
    partition.check(shared, scope="shared")
    partition.check(kept, scope="kept")
    with pytest.raises(StateMismatchError):
        partition.merge(shared, {})


def test_a_scalar_does_not_pass_for_an_array():
    partition = StatePartition.of(nn.Linear(4, 3), [])
    state = {"weight": torch.zeros(()), "bias": torch.zeros(3)}
    with pytest.raises(StateMismatchError, match=r"\(\), expected \(3, 4\)"):
        partition.check(state)


def adapted(kind="series_adapter"):
    return build_network(
        "residual_unet",
        in_channels=1,
        num_classes=2,
        base_width=2,
        levels=3,
        seed=0,
        add=kind,
    )


def test_adapters_are_found_by_their_type_whatever_they_consist_of():
    model = adapted()
    entries = {e.name: e for e in describe_state(model)}
    kept = StatePartition.of(model, ["adapter"]).kept
    assert set(kept) == {name for name in entries if ".adapter." in name}
    assert {entries[name].role for name in kept} == {
        *("weight", "norm_affine", "norm_statistic", "counter")
    }
    # 11 kernels, of 6 entries each: V and a batch normalisation
    assert len(kept) == 6 * len([n for n in kept if n.endswith("projection.weight")])


def test_no_name_makes_an_adapter():
    model = nn.Module()
    model.adapter = nn.Conv2d(1, 1, 1)
    assert StatePartition.of(model, ["adapter:weight"]).kept == tuple(
        model.state_dict()
    )
    assert not describe_state(model)[0].in_adapter


def test_norm_and_adapters_leave_the_shared_network_s_kernels():
    model = adapted()
    plain = adapted("nothing")
    shared = StatePartition.of(model, ["norm", "adapter"]).shared
    assert shared == StatePartition.of(plain, ["norm"]).shared


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("encoder.levels.0", lambda n: n.startswith("encoder.levels.0.")),
        ("encoder.levels.1.enter", lambda n: n.startswith("encoder.levels.1.enter.")),
        ("decoder:adapter", lambda n: n.startswith("decoder.") and ".adapter." in n),
        (
            "decoder.up.0:norm",
            lambda n: n.startswith("decoder.up.0.") and ".norm." in n,
        ),
    ],
)
def test_a_path_chooses_a_module_and_all_in_it(word, expected):
    model = adapted()
    kept = StatePartition.of(model, [word]).kept
    assert kept == tuple(name for name in model.state_dict() if expected(name))
    assert kept


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("encoder.level.0", "encoder.levels.0"),
        ("adaptr", "adapter"),
        ("encoder.levels.0:nrom", "encoder.levels.0:norm"),
        ("decoder.up.9.conv", "decoder.up.1.conv"),
    ],
)
def test_an_unknown_path_names_the_nearest_known(word, near):
    with pytest.raises(ConfigError) as caught:
        StatePartition.of(adapted(), [word])
    assert f"nearest is {near!r}" in caught.value.hint
    assert "parts decoder, encoder, head" in caught.value.hint
