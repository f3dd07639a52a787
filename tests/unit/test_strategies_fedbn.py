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


@pytest.mark.parametrize("sync", ["round", "step"])
def test_without_normalisation_it_is_fedavg_with_uniform_weights(tmp_path, sync):
    plain = {"model": {"norm": "none"}}
    fedbn = runs.make_study(runs.IMAGE, "fedbn", strategy={"sync": sync}, **plain)
    fedavg = runs.make_study(
        runs.IMAGE, "fedavg", strategy={"sync": sync, "weighting": "uniform"}, **plain
    )
    found = runs.run(fedbn, tmp_path / "bn").shared
    expected = runs.run(fedavg, tmp_path / "avg").shared
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_site_is_ordinary_training_with_the_optimiser_reset_each_round(tmp_path):
    adam = {"optimizer": {"name": "adam", "lr": 0.01}}
    study = runs.make_study(
        runs.IMAGE, "fedbn", rounds=3, sites={"include": ["b"]}, train=adam
    )
    result = runs.run(study, tmp_path)
    bench = runs.Ward(study).benches["b"]
    model = bench.model.train()
    for number in (1, 2, 3):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        for step in range(2):
            batch = bench.batch(number, step)
            optimizer.zero_grad()
            bench.trainer.loss(model(batch.images), batch.labels).backward()
            optimizer.step()
    found = result.shared | result.private("b").states["kept"]
    expected = dict(model.state_dict())
    assert set(found) == set(expected)
    torch.testing.assert_close(found, {n: expected[n] for n in found}, rtol=0, atol=0)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_no_entry_of_a_normalisation_layer_travels(tmp_path, sync):
    transport = runs.Recorder()
    study = runs.make_study(runs.IMAGE, "fedbn", strategy={"sync": sync})
    result = runs.run(study, tmp_path, transport=transport)
    kept = set(result.private("a").states["kept"])
    assert {name.rpartition(".")[2] for name in kept} == {
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    names = [n for _, m in (*transport.down, *transport.up) for n in m.tensors]
    assert len(names) > 100
    assert not [n for n in names if n.partition("/")[2] in kept]


@pytest.mark.parametrize("sync", ["round", "step"])
def test_each_site_moves_its_own_scale_and_statistics(tmp_path, sync):
    study = runs.make_study(runs.IMAGE, "fedbn", strategy={"sync": sync})
    result = runs.run(study, tmp_path)
    start = runs.Ward(study).benches["a"].initial
    for site in SITES:
        kept = result.private(site).states["kept"]
        assert all(not torch.equal(t, start[name]) for name, t in kept.items())
    first, other = (result.private(site).states["kept"] for site in "ab")
    differing = [n for n, t in first.items() if not torch.equal(t, other[n])]
    assert len(differing) == len([n for n in first if "num_batches" not in n])


def test_sites_that_are_left_share_the_steps_after_a_loss():
    """What a site keeps moves by its part of the pooled step, as what it shares."""
    ward = runs.Ward(runs.make_study(runs.IMAGE, "fedbn", strategy={"sync": "step"}))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    request = next(half)
    shares = [content["share"] for content in request.content_by_site.values()]
    assert shares == pytest.approx([1 / 3] * 3)
    replies = ward.answer(request)
    del replies["c"]
    request = half.send(replies)
    assert request.site_ids == ("a", "b")
    shares = [content["share"] for content in request.content_by_site.values()]
    assert shares == pytest.approx([1 / 2] * 2)
