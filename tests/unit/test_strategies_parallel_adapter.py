from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

NAME = "parallel_adapter"
MODELS = {
    "unet": {},
    "residual_unet": {"name": "residual_unet", "base_width": 2, "levels": 2},
}


def run(method, folder, *, transport=None, **changes):
    study = runs.make_study(runs.IMAGE, method, **changes)
    return runs.run(study, folder, transport=transport)


@pytest.mark.parametrize("model", MODELS)
def test_with_adapters_at_zero_it_is_the_shared_network(tmp_path, model):
    """In its first step, from which the adapters start: FedBN's bit for bit."""
    changes = {
        "strategy": {"sync": "step"},
        "train": {"local_steps": 1},
        "rounds": 1,
        "model": MODELS[model],
    }
    found = run(NAME, tmp_path / "adapter", **changes)
    expected = run("fedbn", tmp_path / "fedbn", **changes)
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=0)
    for site in "abc":
        kept = found.private(site).states["kept"]
        plain = expected.private(site).states["kept"]
        torch.testing.assert_close(
            {name: kept[name] for name in plain}, dict(plain), rtol=0, atol=0
        )


@pytest.mark.parametrize("sync", ["round", "step"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_of_normalisation_and_adapters_travels(tmp_path, model, sync):
    transport = runs.Recorder()
    changes = {"strategy": {"sync": sync}, "rounds": 1, "model": MODELS[model]}
    result = run(NAME, tmp_path / "adapter", transport=transport, **changes)
    names = {n for _, m in (*transport.down, *transport.up) for n in m.tensors}
    travelled = {name.partition("/")[2] for name in names}
    assert travelled == set(result.shared)
    assert not [n for n in travelled if ".adapter." in n or "norm" in n]
    plain = run("fedbn", tmp_path / "fedbn", **changes)
    assert travelled == set(plain.shared)


def test_every_site_trains_adapters_of_its_own(tmp_path):
    result = run(NAME, tmp_path)
    kept = [result.private(site).states["kept"] for site in "ab"]
    adapters = [name for name in kept[0] if name.endswith("adapter.projection.weight")]
    assert len(adapters) == 7  # six convolutions and a transposed one
    assert all(kept[0][name].abs().max() > 0 for name in adapters)
    assert all(not torch.equal(kept[0][name], kept[1][name]) for name in adapters)


def test_one_site_is_ordinary_training(tmp_path):
    study = runs.make_study(
        runs.IMAGE, NAME, strategy={"sync": "step"}, sites={"include": ["b"]}
    )
    result = runs.run(study, tmp_path)
    bench = runs.Ward(study).benches["b"]
    model = bench.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in (1, 2):
        for step in range(2):
            batch = bench.batch(number, step)
            optimizer.zero_grad()
            bench.trainer.loss(model(batch.images), batch.labels).backward()
            optimizer.step()
    found = {**result.shared, **result.private("b").states["kept"]}
    expected = dict(model.state_dict())
    assert set(found) == set(expected)
    torch.testing.assert_close(found, {n: expected[n] for n in found}, rtol=0, atol=0)
