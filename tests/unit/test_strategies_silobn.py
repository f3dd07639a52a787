from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("sync", ["round", "step"])
def test_statistics_never_travel_and_scale_and_shift_do(tmp_path, sync):
    transport = runs.Recorder()
    study = runs.make_study(runs.IMAGE, "silobn", strategy={"sync": sync})
    result = runs.run(study, tmp_path, transport=transport)
    travelled = {n for _, m in (*transport.down, *transport.up) for n in m.tensors}
    assert any("norm1.weight" in name for name in travelled)
    assert not [n for n in travelled if n.endswith(STATISTICS)]
    kept = {site: result.private(site).states["kept"] for site in "abc"}
    assert all(name.endswith(STATISTICS) for name in kept["a"])
    mean = next(name for name in kept["a"] if name.endswith("running_mean"))
    assert not torch.equal(kept["a"][mean], kept["b"][mean])
    assert kept["c"][mean.replace("running_mean", "num_batches_tracked")] == 4


@pytest.mark.parametrize("norm", ["none", "group"])
def test_without_statistics_it_is_fedavg_bit_for_bit(tmp_path, norm):
    shared = {}
    for name in ("fedavg", "silobn"):
        study = runs.make_study(runs.IMAGE, name, model={"norm": norm})
        shared[name] = runs.run(study, tmp_path / name).shared
    torch.testing.assert_close(shared["silobn"], shared["fedavg"], rtol=0, atol=0)


def test_training_is_fedavgs_only_the_statistics_are_each_sites_own(tmp_path):
    """Batch normalisation in training does not use running statistics."""
    results = {}
    for name in ("fedavg", "silobn"):
        study = runs.make_study(runs.IMAGE, name)
        results[name] = runs.run(study, tmp_path / name)
    found, expected = results["silobn"].shared, results["fedavg"].shared
    assert {n for n in expected if n not in found} == {
        n for n in expected if n.endswith(STATISTICS)
    }
    torch.testing.assert_close(
        found, {n: expected[n] for n in found}, rtol=0, atol=0
    )  # fmt: skip


def test_statistics_are_those_of_the_sites_own_batches(tmp_path):
    """One step from the initial 0 and 1: 0.9 * start + 0.1 * batch moments."""
    study = runs.make_study(runs.IMAGE, "silobn", rounds=1, train={"local_steps": 1})
    result = runs.run(study, tmp_path)
    for site, bench in runs.Ward(study).benches.items():
        model = bench.model.train()
        seen = []
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.BatchNorm2d)
        }
        name, layer = next(iter(layers.items()))
        hook = layer.register_forward_pre_hook(
            lambda _, args, to=seen: to.append(args[0])
        )
        with torch.no_grad():
            model(bench.batch(1, 0).images)
        hook.remove()
        kept = result.private(site).states["kept"]
        moments = seen[0].double().mean((0, 2, 3)), seen[0].double().var((0, 2, 3))
        torch.testing.assert_close(
            kept[f"{name}.running_mean"].double(),
            0.1 * moments[0],
            rtol=1e-5,
            atol=1e-7,
        )
        torch.testing.assert_close(
            kept[f"{name}.running_var"].double(),
            0.9 + 0.1 * moments[1],
            rtol=1e-5,
            atol=1e-7,
        )
