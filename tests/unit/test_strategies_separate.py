from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

ADAM = {"optimizer": {"name": "adam", "lr": 0.01}}


def ordinary_training(study, site):
    """A plain torch loop; one optimiser, from the first round to the last."""
    bench = runs.Ward(study).benches[site]
    model = bench.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for number in range(1, study.rounds + 1):
        for step in range(study.train.local_steps):
            batch = bench.batch(number, step)
            optimizer.zero_grad()
            bench.trainer.loss(model(batch.images), batch.labels).backward()
            optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("sync", ["round", "step"])
def test_it_is_one_training_per_site_with_the_optimiser_running_on(tmp_path, sync):
    study = runs.make_study(
        runs.IMAGE, "separate", rounds=3, strategy={"sync": sync}, train=ADAM
    )
    result = runs.run(study, tmp_path)
    assert result.shared == {}
    for site in "abc":
        expected = ordinary_training(study, site)
        found = result.private(site).states["kept"]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_site_does_not_notice_the_others(tmp_path):
    alone = runs.make_study(runs.IMAGE, "separate", sites={"include": ["b"]})
    together = runs.make_study(runs.IMAGE, "separate")
    found, expected = (
        runs.run(study, tmp_path / study_name).private("b").states["kept"]
        for study_name, study in (("all", together), ("alone", alone))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_tensor_travels_in_either_direction(tmp_path):
    transport = runs.Recorder()
    result = runs.run(
        runs.make_study(runs.IMAGE, "separate"), tmp_path, transport=transport
    )
    assert not [m for _, m in (*transport.down, *transport.up) if m.tensors]
    assert set(result.rounds[0]["bytes_up"].values()) == {0}
    assert set(result.rounds[0]["loss"]) == {"a", "b", "c"}
