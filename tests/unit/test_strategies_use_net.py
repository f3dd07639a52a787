from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.resolve import load_strategy

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


@pytest.mark.parametrize("sync", ["round", "step"])
def test_it_is_fedavg_on_the_network_with_gates(tmp_path, sync):
    use_net = runs.make_study(
        runs.IMAGE, "use_net", strategy={"sync": sync, "reduction": 2}
    )
    fedavg = runs.make_study(
        runs.IMAGE,
        "fedavg",
        strategy={"sync": sync, "weighting": "uniform"},
        model={"add": "squeeze", "squeeze_reduction": 2, "squeeze_least_hidden": 8},
    )
    found = runs.run(use_net, tmp_path / "use").shared
    expected = runs.run(fedavg, tmp_path / "avg").shared
    assert len([name for name in found if ".gate." in name]) == 6
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gates_are_trained_and_nothing_is_kept(tmp_path):
    study = runs.make_study(runs.IMAGE, "use_net")
    result = runs.run(study, tmp_path)
    start = runs.Ward(study).benches["a"].initial
    gates = [name for name in start if ".gate." in name]
    moved = [n for n in gates if not torch.equal(result.shared[n], start[n])]
    assert moved == gates
    assert not result.private("a").states


def test_the_residual_network_takes_gates_too(tmp_path):
    model = {"name": "residual_unet", "base_width": 2, "levels": 2}
    study = runs.make_study(runs.IMAGE, "use_net", model=model, rounds=1)
    shared = runs.run(study, tmp_path).shared
    blocks = {name.partition(".gate.")[0] for name in shared if ".gate." in name}
    assert blocks == {"encoder.levels.0", "encoder.levels.1", "decoder.levels.0"}


@pytest.mark.parametrize("name", ["reduction", "least_hidden"])
def test_an_impossible_number_is_refused(name):
    with pytest.raises(ConfigError, match=rf"strategy\.{name} must be >= 1"):
        load_strategy("use_net", {name: 0})
