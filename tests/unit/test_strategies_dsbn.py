from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = ("a", "b", "c")
LR = 0.02


def run(name, folder, *, sync="step", lr=LR, optimizer="sgd", **changes):
    train = {"optimizer": {"name": optimizer, "lr": lr}, "precision": "float64"}
    study = runs.make_study(
        runs.IMAGE, name, strategy={"sync": sync}, train=train, **changes
    )
    return runs.run(study, folder)


def kept_of(result, site):
    return result.private(site).states["kept"]


def assert_equal(found, expected, *, atol):
    """Shared and kept entries of two runs."""
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=atol)
    for site in SITES:
        torch.testing.assert_close(
            kept_of(found, site), kept_of(expected, site), rtol=0, atol=atol
        )


def test_steps_are_fedbn_s_with_the_sum_over_sites_in_place_of_the_mean(tmp_path):
    found = run("dsbn", tmp_path / "sum")
    expected = run("fedbn", tmp_path / "mean", lr=len(SITES) * LR)
    assert_equal(found, expected, atol=1e-13)
    unscaled = run("fedbn", tmp_path / "unscaled")
    name = "head.weight"
    assert (found.shared[name] - unscaled.shared[name]).abs().max() > 1e-3


def test_rounds_are_fedbn_s_bit_for_bit(tmp_path):
    found = run("dsbn", tmp_path / "dsbn", sync="round")
    assert_equal(found, run("fedbn", tmp_path / "fedbn", sync="round"), atol=0)


def test_adam_hardly_notices_the_sum(tmp_path):
    """As its step does not depend on the gradient's scale, but for epsilon."""
    found = run("dsbn", tmp_path / "sum", optimizer="adam", lr=1e-3)
    expected = run("fedbn", tmp_path / "mean", optimizer="adam", lr=1e-3)
    start = runs.Ward(runs.make_study(runs.IMAGE, "dsbn")).benches["a"].initial
    for name, tensor in found.shared.items():
        moved = (tensor - start[name]).abs().max()
        assert (tensor - expected.shared[name]).abs().max() < 0.01 * moved


def test_one_site_is_ordinary_training(tmp_path):
    train = {"optimizer": {"name": "adam", "lr": 0.01}}
    study = runs.make_study(
        runs.IMAGE,
        "dsbn",
        strategy={"sync": "step"},
        sites={"include": ["b"]},
        train=train,
    )
    result = runs.run(study, tmp_path)
    bench = runs.Ward(study).benches["b"]
    model = bench.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for number in (1, 2):
        for step in range(2):
            batch = bench.batch(number, step)
            optimizer.zero_grad()
            bench.trainer.loss(model(batch.images), batch.labels).backward()
            optimizer.step()
    found = {**result.shared, **kept_of(result, "b")}
    expected = dict(model.state_dict())
    assert set(found) == set(expected)
    # Torch's fused Adam rounds differently where tensors lie differently in memory.
    expected = {name: expected[name] for name in found}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_nothing_of_a_normalisation_layer_travels(tmp_path, sync):
    transport = runs.Recorder()
    model = {"name": "residual_unet", "base_width": 2, "levels": 3}
    study = runs.make_study(
        runs.IMAGE, "dsbn", strategy={"sync": sync}, rounds=1, model=model
    )
    result = runs.run(study, tmp_path, transport=transport)
    kept = set(kept_of(result, "a"))
    layers = {name.rpartition(".")[0] for name in kept}
    assert len(kept) == 5 * len(layers)
    assert all(".norm" in f".{layer}" for layer in layers)
    names = [n for _, m in (*transport.down, *transport.up) for n in m.tensors]
    assert len(names) > 50
    assert not [n for n in names if n.partition("/")[2] in kept]


def test_every_site_has_moments_and_statistics_of_its_own(tmp_path):
    result = run("dsbn", tmp_path)
    first, other = kept_of(result, "a"), kept_of(result, "b")
    same = [n for n in first if torch.equal(first[n], other[n])]
    assert all(name.endswith("num_batches_tracked") for name in same)
