from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError, QuorumError
from fedmed.message import SiteFailure
from fedmed.strategy import Private
from fedmed.transports.inprocess import InProcessTransport
from sites.context import HospitalContext

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once
feddf = importlib.import_module("strategies.feddf")

PUBLIC = {"with_public": True, "public": "p"}


def study_of(name="feddf", base=runs.IMAGE, **changes):
    return runs.make_study(base, name, sites=PUBLIC, **changes)


def num_bytes(states):
    return sum(t.numel() * t.element_size() for t in states.values())


def test_without_distillation_it_is_fedavg_bit_for_bit(tmp_path):
    plain = runs.run(study_of("fedavg"), tmp_path / "fedavg")
    study = study_of(strategy={"distillation_steps": 0})
    found = runs.run(study, tmp_path / "feddf")
    torch.testing.assert_close(found.shared, plain.shared, rtol=0, atol=0)
    for one, other in zip(found.rounds, plain.rounds, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_hospitals_send_what_fedavg_sends_and_the_public_site_gets_all_of_it(tmp_path):
    recorder = runs.Recorder()
    result = runs.run(study_of(), tmp_path, transport=recorder)
    model = num_bytes(result.shared)
    for record in result.rounds:
        ends = model if record["round"] == 2 else 0
        assert {s: record["bytes_up"][s] for s in "abc"} == dict.fromkeys("abc", model)
        assert all(record["bytes_down"][s] == model + ends for s in "abc")
        assert record["bytes_down"]["p"] == (1 + 3) * model
        assert record["bytes_up"]["p"] == model
    kinds = {message.kind for _, message in recorder.up} - {"Card", "Metrics"}
    assert kinds == {"Weights"}
    actions = {site: set() for site in "abcp"}
    for site, message in recorder.down:
        actions[site].add(message.kind)
    assert actions["a"] == {"join", "training", "end_round"}
    assert actions["p"] == {"join", "distillation"}


def disagreement(ward, states, merged):
    """KL from the ensemble to a network in evaluation mode, on public images."""
    context = HospitalContext(ward.benches["p"], Private(), 1)
    model = context.load(merged)
    teachers = feddf.Ensemble(model, states, context)
    total = 0.0
    for batch in context.public_batches(0, 4):
        model.eval()
        with torch.no_grad():
            student, _ = context.trainer.logits(model, batch)
        total += float(feddf.softened_kl(student, teachers.logits(batch)))
    return total


def test_the_average_comes_closer_to_the_ensemble():
    study = study_of(
        strategy={"distillation_steps": 60, "distillation_lr": 0.002},
        model={"norm": "group"},
        train={"local_steps": 20, "optimizer": {"name": "adam", "lr": 0.02}},
    )
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    trained = ward.answer(next(half))
    distilling = half.send(trained)
    states = [trained[site].state for site in "abc"]
    before = disagreement(ward, states, distilling.content["weights"])
    with pytest.raises(StopIteration) as end:
        half.send(ward.answer(distilling))
    after = disagreement(ward, states, end.value.value.shared)
    assert after < 0.5 * before


def test_each_member_of_the_ensemble_has_its_own_statistics():
    ward = runs.Ward(study_of())
    half = ward.strategy.run_round(ward.server, ward.cohort())
    states = [reply.state for reply in ward.answer(next(half)).values()]
    bench = ward.benches["p"]
    context = HospitalContext(bench, Private(), 1)
    (batch,) = context.public_batches(0, 1)
    model = context.load(ward.server.shared)
    found = feddf.Ensemble(model, states, context).logits(batch)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), dict(ward.server.shared))
    alone = []
    for state in states:
        with torch.no_grad():
            alone.append(context.load(state).eval()(batch.images))
    torch.testing.assert_close(found, sum(alone) / 3)


def test_teachers_keep_their_names_whatever_the_sites_are_called():
    states = {f"city/{s}": {"head.weight": torch.full((2,), v)} for s, v in BOTH}
    joined = feddf.side_by_side(states)
    assert list(joined) == ["0/head.weight", "1/head.weight"]
    first, second = feddf.one_by_one(joined)
    assert first["head.weight"][0] == 1.0
    assert second["head.weight"][0] == 2.0


BOTH = (("b", 2.0), ("a", 1.0))


class PublicFails(InProcessTransport):
    """The public site does not answer in the rounds given."""

    tries = 0

    def exchange(self, messages, **how):
        answers = super().exchange(messages, **how)
        if "p" in messages and messages["p"].kind == "distillation":
            self.tries += 1
            if self.tries <= self.count:
                answers["p"] = SiteFailure("timeout", "no answer")
        return answers


def test_a_round_is_tried_again_if_the_public_site_is_silent(tmp_path):
    transport = PublicFails()
    transport.count = 1
    tolerance = {"retries": 1, "quorum": 0.5}
    found = runs.run(
        study_of(tolerance=tolerance), tmp_path / "again", transport=transport
    )
    plain = runs.run(study_of(tolerance=tolerance), tmp_path / "plain")
    assert [record["retries"] for record in found.rounds] == [1, 0]
    torch.testing.assert_close(found.shared, plain.shared, rtol=0, atol=0)


def test_without_the_public_site_the_run_stops_and_says_so(tmp_path):
    transport = PublicFails()
    transport.count = 9
    with pytest.raises(QuorumError, match=r"the public site p is needed \(timeout"):
        runs.run(study_of(), tmp_path, transport=transport)


@pytest.mark.parametrize("option", ["distillation_steps", "distillation_lr"])
def test_impossible_constants_are_refused(option, tmp_path):
    with pytest.raises(ConfigError, match=rf"strategy\.{option} must be"):
        runs.run(study_of(strategy={option: -1}), tmp_path)


def statistics(state):
    return {name: t for name, t in state.items() if "running" in name}


@pytest.mark.parametrize("which", ["own", "public"])
def test_normalisation_stays_that_of_the_hospitals_unless_asked(tmp_path, which):
    study = study_of(rounds=1, strategy={"statistics": which})
    found = statistics(runs.run(study, tmp_path / "feddf").shared)
    plain = runs.run(study_of("fedavg", rounds=1), tmp_path / "fedavg")
    expected = statistics(plain.shared)
    same = [torch.equal(found[name], expected[name]) for name in expected]
    assert len(same) > 5
    assert all(same) if which == "own" else not any(same)
