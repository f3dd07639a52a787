from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.prove import prove
from fedmed.run import transport_sites

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

ADAM = {"optimizer": {"name": "adam", "lr": 0.01}}


@pytest.mark.parametrize("base", [runs.TABLE, runs.IMAGE])
def test_it_is_one_training_on_batches_of_all_sites(tmp_path, base):
    study = runs.make_study(base, "joint", rounds=3, train=ADAM)
    result = runs.run(study, tmp_path)
    # The batches of the single hospitals, side by side; one network, one optimiser.
    hospitals = runs.Ward(runs.make_study(base, "fedavg", train=ADAM)).benches
    bench = hospitals["a"]
    model = bench.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for number in (1, 2, 3):
        for step in range(study.train.local_steps):
            batches = [h.batch(number, step) for _, h in sorted(hospitals.items())]
            images = torch.cat([b.images for b in batches]).to(
                next(model.parameters()).dtype
            )
            labels = torch.cat([b.labels for b in batches])
            assert len(images) == 3 * study.train.batch_size
            optimizer.zero_grad()
            bench.trainer.loss(model(images), labels).backward()
            optimizer.step()
    expected = dict(model.state_dict())
    torch.testing.assert_close(result.shared, expected, rtol=0, atol=0)


def test_the_optimisers_memory_stays_with_the_pool(tmp_path):
    study = runs.make_study(runs.IMAGE, "joint", train=ADAM)
    result = runs.run(study, tmp_path)
    memory = result.private("pooled").states["optimizer"]
    assert {int(t) for name, t in memory.items() if name.endswith("|step")} == {4}
    assert result.private("a").states == {}


def test_held_out_sites_are_not_in_the_pool(tmp_path):
    changes = {"split": {"held_out": ["c"]}, "rounds": 1}
    with_c = runs.make_study(runs.IMAGE, "joint", **changes)
    without = runs.make_study(
        runs.IMAGE, "joint", rounds=1, sites={"include": ["a", "b"]}
    )
    found, expected = (
        runs.run(study, tmp_path / name).shared
        for name, study in (("held_out", with_c), ("without", without))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_deployment_can_pool_data_and_there_is_no_step_to_prove():
    study = runs.make_study(runs.IMAGE, "joint", transport={"name": "deployment"})
    with pytest.raises(ConfigError, match="pools the data"):
        transport_sites(study)
    with pytest.raises(ConfigError, match="does not claim"):
        prove("joint")
