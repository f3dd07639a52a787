from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network
from fedmed.resolve import load_strategy

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


def modules(name="residual_unet", *, levels=5, **options):
    """Places whose entries are shared, e.g. "encoder.levels.4"."""
    sizes = {} if name == "unet_3d_pairs" else {"levels": levels}
    model = build_network(
        name, in_channels=1, num_classes=2, seed=0, base_width=1, **sizes
    )
    partition = load_strategy("dual_stream", options).partition(model)
    assert set(partition.shared) | set(partition.kept) == set(model.state_dict())
    return {place(name) for name in partition.shared}


def place(name):
    return "head" if name.startswith("head") else ".".join(name.split(".")[:3])


def deep(*levels):
    return {f"encoder.levels.{level}" for level in levels}


def first(*levels):
    return {f"decoder.{what}.{level}" for level in levels for what in ("up", "levels")}


@pytest.mark.parametrize("name", ["unet", "residual_unet"])
def test_by_default_encoder_levels_4_and_5_and_decoder_level_1_are_shared(name):
    """The decoder's first level is its deepest, number 3 from above."""
    assert modules(name) == deep(3, 4) | first(3)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (4, deep(2, 3) | first(2)),
        (3, deep(1, 2) | first(1)),
        (2, deep(1)),
        (1, set()),
    ],
)
def test_other_depths_share_as_much_below_streams_of_their_own(levels, expected):
    assert modules(levels=levels) == expected


def test_the_3d_network_has_levels_too():
    assert modules("unet_3d_pairs") == deep(2, 3) | first(2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"shared_encoder_levels": 0, "shared_decoder_levels": 2},
            first(0, 1) | {"head"},
        ),
        ({"shared_encoder_levels": 3, "shared_decoder_levels": 0}, deep(0, 1, 2)),
        ({"shared_encoder_levels": 1, "shared_decoder_levels": 1}, deep(2) | first(1)),
        (
            {"shared_encoder_levels": 3, "shared_decoder_levels": 2},
            deep(0, 1, 2) | first(0, 1) | {"head"},
        ),
    ],
)
def test_the_cut_can_be_chosen(options, expected):
    assert modules(levels=3, **options) == expected


@pytest.mark.parametrize("key", ["shared_encoder_levels", "shared_decoder_levels"])
@pytest.mark.parametrize("value", [-1, 4])
def test_more_levels_than_there_are_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"strategy.{key} must be in 0 to"):
        modules(levels=3, **{key: value})


def test_a_network_without_levels_is_refused_with_what_to_set():
    model = build_network("mlp", in_channels=1, num_classes=2, seed=0)
    with pytest.raises(ConfigError, match="dual_stream needs") as caught:
        load_strategy("dual_stream", {}).partition(model)
    assert "residual_unet" in caught.value.hint


@pytest.mark.parametrize("sync", ["round", "step"])
def test_only_the_trunk_travels_and_streams_differ(tmp_path, sync):
    transport = runs.Recorder()
    study = runs.make_study(
        runs.IMAGE, "dual_stream", strategy={"sync": sync}, model={"levels": 3}
    )
    result = runs.run(study, tmp_path, transport=transport)
    names = {n for _, m in (*transport.down, *transport.up) for n in m.tensors}
    places = {place(name.partition("/")[2]) for name in names}
    assert places == deep(1, 2) | first(1)
    kept = [result.private(site).states["kept"] for site in "ab"]
    assert {place(name) for name in kept[0]} == deep(0) | first(0) | {"head"}
    moving = [name for name in kept[0] if "num_batches" not in name]
    assert all(not torch.equal(kept[0][name], kept[1][name]) for name in moving)


def test_a_trunk_of_everything_is_fedavg(tmp_path):
    options = {"shared_encoder_levels": 2, "shared_decoder_levels": 1}
    dual = runs.make_study(runs.IMAGE, "dual_stream", strategy=options)
    fedavg = runs.make_study(
        runs.IMAGE, "fedavg", strategy={"weighting": "uniform"}
    )  # fmt: skip
    found = runs.run(dual, tmp_path / "dual").shared
    expected = runs.run(fedavg, tmp_path / "avg").shared
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
