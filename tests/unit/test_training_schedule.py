from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import FedMedError
from fedmed.optimizer import OptimizerSpec
from fedmed.task import build_optimizer
from fedmed.training.schedule import StepDecay

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

DECAY = {"factor": 0.5, "every_steps": 3}


def test_the_optimiser_at_a_step_differs_in_its_learning_rate_alone():
    spec = OptimizerSpec("adam", lr=0.2, eps=1e-6, decay=StepDecay(0.1, 10))
    assert spec.at(9) == OptimizerSpec("adam", lr=0.2, eps=1e-6)
    assert spec.at(10).lr == pytest.approx(0.02, rel=1e-15)
    constant = OptimizerSpec("sgd", lr=0.2)
    assert constant.at(10**6) is constant


def test_a_study_without_one_has_a_constant_rate():
    study = runs.make_study(runs.IMAGE, "fedavg")
    assert build_optimizer(study).decay is None
    study = runs.make_study(runs.IMAGE, "fedavg", train={"lr_decay": DECAY})
    assert build_optimizer(study).decay == StepDecay(0.5, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0.0, "every_steps": 3},
        {"factor": 1.5, "every_steps": 3},
        {"factor": 0.5, "every_steps": 0},
        {"factor": 0.5},
        {"factor": 0.5, "every": 3},
    ],
)
def test_an_impossible_one_is_refused(wrong):
    with pytest.raises(FedMedError, match="lr_decay"):
        runs.make_study(runs.IMAGE, "fedavg", train={"lr_decay": wrong})


@pytest.mark.parametrize("method", ["fedavg", "fedbn"])
@pytest.mark.parametrize("sync", ["step", "round"])
def test_one_site_follows_the_scheduler_of_torch(tmp_path, sync, method):
    """Two rounds of two steps: the rate falls in the middle of the second."""
    train = {"lr_decay": DECAY, "precision": "float64"}
    study = runs.make_study(
        runs.IMAGE,
        method,
        strategy={"sync": sync},
        sites={"include": ["b"]},
        train=train,
    )
    result = runs.run(study, tmp_path)
    bench = runs.Ward(study).benches["b"]
    model = bench.model.double().train()
    model.load_state_dict(bench.initial)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    rates = []
    for number in (1, 2):
        for step in range(2):
            batch = bench.batch(number, step)
            optimizer.zero_grad()
            logits = model(batch.images.double())
            bench.trainer.loss(logits, batch.labels).backward()
            optimizer.step()
            rates += schedule.get_last_lr()
            schedule.step()
    assert rates == [0.05, 0.05, 0.05, 0.025]
    kept = result.private("b").states.get("kept", {})
    for name, tensor in model.named_parameters():
        found = (result.shared | kept)[name]
        torch.testing.assert_close(found, tensor.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_a_resumed_run_goes_on_where_the_rate_was(tmp_path, sync):
    study = runs.make_study(
        runs.IMAGE, "fedbn", strategy={"sync": sync}, train={"lr_decay": DECAY}
    )
    whole = runs.run(study, tmp_path / "whole")
    asked = iter([False, True])
    runs.run(study, tmp_path / "parts", should_stop=lambda: next(asked))
    parts = runs.run(study, tmp_path / "parts", resume=True)
    sites = ("a", "b", "c")
    torch.testing.assert_close(
        parts.everything(sites), whole.everything(sites), rtol=0, atol=0
    )


def test_steps_are_counted_over_rounds_of_different_length(tmp_path):
    """One site a round, each with as many steps as its own examples ask for."""
    study = runs.make_study(
        runs.IMAGE,
        "fedavg",
        rounds=6,
        sites_per_round=1,
        train={"local_steps": None, "local_epochs": 1},
    )
    transport = runs.Recorder()
    runs.run(study, tmp_path, transport=transport)
    benches = runs.Ward(study).benches
    asked = [(site, m) for site, m in transport.down if m.kind == "training"]
    expected = 0
    for site, message in asked:
        assert message.header["first_step"] == expected
        expected += math.ceil(benches[site].num_examples / 2)
    assert len(asked) == 6
    assert len({site for site, _ in asked}) > 1
