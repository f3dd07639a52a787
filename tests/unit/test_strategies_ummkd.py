"""UMMKD: its limits, what it sends, and what it refuses."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.message import Message
from fedmed.resolve import load_strategy

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = ("a", "b", "c")
NUM_CLASSES = 2
STATISTIC_BYTES = 4 * (NUM_CLASSES**2 + NUM_CLASSES)


def study_of(method, sync, *, options=None, **changes):
    return runs.make_study(
        runs.IMAGE, method, strategy={"sync": sync, **(options or {})}, **changes
    )


@pytest.mark.parametrize("decay", [None, {"factor": 0.5, "every_steps": 3}])
@pytest.mark.parametrize("sync", ["round", "step"])
def test_without_distillation_it_is_fedbn_bit_for_bit(tmp_path, sync, decay):
    options = {"kd_weight": 0.0, "site_reduction": "mean", "min_count": 1}
    train = {"lr_decay": decay}
    study = study_of("ummkd", sync, options=options, train=train)
    found = runs.run(study, tmp_path / "kd")
    expected = runs.run(study_of("fedbn", sync, train=train), tmp_path / "bn")
    torch.testing.assert_close(
        found.everything(SITES), expected.everything(SITES), rtol=0, atol=0
    )


@pytest.mark.parametrize("sync", ["round", "step"])
def test_without_distillation_the_sum_over_sites_is_dsbn_bit_for_bit(tmp_path, sync):
    options = {"kd_weight": 0.0, "min_count": 1}
    found = runs.run(study_of("ummkd", sync, options=options), tmp_path / "kd")
    expected = runs.run(study_of("dsbn", sync), tmp_path / "dsbn")
    torch.testing.assert_close(
        found.everything(SITES), expected.everything(SITES), rtol=0, atol=0
    )


@pytest.mark.parametrize("sync", ["round", "step"])
def test_one_hospital_has_nobody_to_learn_from(tmp_path, sync):
    alone = {"sites": {"include": ["b"]}}
    found = runs.run(
        study_of("ummkd", sync, options={"min_count": 1}, **alone), tmp_path / "kd"
    )
    expected = runs.run(study_of("fedbn", sync, **alone), tmp_path / "bn")
    torch.testing.assert_close(
        found.everything(("b",)), expected.everything(("b",)), rtol=0, atol=0
    )


def test_a_step_of_distillation_brings_the_soft_confusions_together():
    """So heavy that segmentation hardly counts, and so short that the slope decides."""
    study = study_of(
        "ummkd",
        "step",
        options={"min_count": 1, "kd_weight": 1e3},
        train={"local_steps": 1, "optimizer": {"name": "sgd", "lr": 1e-4}},
    )
    ward = runs.Ward(study)
    apart = []
    for _ in range(3):
        half = ward.strategy.run_round(ward.server, ward.cohort())
        told = ward.answer(next(half))
        states = {site: reply.state for site, reply in told.items()}
        apart.append(float(ward.strategy._distance(states)))
        replies = ward.answer(half.send(told))
        with pytest.raises(StopIteration) as end:
            half.send(replies)
        ward.server = end.value.value
    assert apart[0] > apart[1] > apart[2]


def test_in_rounds_distillation_pulls_from_the_second_round_on(tmp_path):
    servers = {}
    for weight in (0.0, 5.0):
        options = {"kd_weight": weight, "min_count": 1}
        study = study_of("ummkd", "round", options=options)
        servers[weight] = runs.run(study, tmp_path / str(weight))
    name = "head.weight"
    first, second = ([s.server(n)[name] for s in servers.values()] for n in (1, 2))
    assert torch.equal(*first)
    assert not torch.equal(*second)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_an_exchange_adds_at_most_a_matrix_and_a_vector_of_classes(tmp_path, sync):
    """Both ways, in float32, beside what FedBN's exchange carries."""
    sent = {}
    for method, options in (("fedbn", {}), ("ummkd", {"min_count": 1})):
        transport = runs.Recorder()
        study = study_of(method, sync, options=options)
        runs.run(study, tmp_path / method, transport=transport)
        sent[method] = {
            "down": [m for _, m in transport.down],
            "up": [m for _, m in transport.up],
        }
    noise = {"join", "end_round", "Card", "Metrics"}
    most = {}
    for method, ways in sent.items():
        for way, messages in ways.items():
            sizes = {m.num_bytes for m in messages if m.kind not in noise}
            most[method, way] = max(sizes)
    for way in ("down", "up"):
        assert most["ummkd", way] <= most["fedbn", way] + STATISTIC_BYTES
    assert most["ummkd", "down"] > most["fedbn", "down"]
    statistics = [m for m in sent["ummkd"]["up"] if m.kind == "ClassStatistic"]
    assert {m.num_bytes for m in statistics} == (
        {STATISTIC_BYTES} if sync == "step" else set()
    )


@pytest.mark.parametrize("sync", ["round", "step"])
def test_no_entry_of_a_normalisation_layer_travels(tmp_path, sync):
    transport = runs.Recorder()
    study = study_of("ummkd", sync, options={"min_count": 1})
    result = runs.run(study, tmp_path, transport=transport)
    kept = set(result.private("a").states["kept"])
    names = [n for _, m in (*transport.down, *transport.up) for n in m.tensors]
    assert len(names) > 100
    assert not [n for n in names if n.partition("/")[2] in kept]


def test_a_site_lost_between_the_halves_leaves_the_step_to_the_others():
    study = study_of(
        "ummkd", "step", options={"min_count": 1}, train={"local_steps": 1}
    )
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    told = ward.answer(next(half))
    request = half.send(told)
    assert request.action == "gradient"
    replies = ward.answer(request)
    lost = {site: reply for site, reply in replies.items() if site != "b"}
    with pytest.raises(StopIteration) as end:
        half.send(lost)
    after, before = end.value.value.shared, ward.server.shared
    lr = ward.server.optimizer.lr
    for name in ward.server.trainable():
        step = sum(reply.state[name] for reply in lost.values())
        torch.testing.assert_close(
            after[name], before[name] - lr * step, rtol=0, atol=1e-6
        )


def test_a_site_that_is_silent_in_the_first_half_is_in_no_pair():
    study = study_of("ummkd", "step", options={"min_count": 1})
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    told = ward.answer(next(half))
    told.pop("b")
    request = half.send(told)
    assert request.site_ids == ("a", "c")
    assert sorted(request.content_by_site) == ["a", "c"]


@pytest.mark.parametrize(
    "options",
    [
        {"kd_weight": -0.1},
        {"temperature": 0.0},
        {"min_count": 0},
        {"bank_momentum": 1.0},
        {"site_reduction": "median"},
        {"divide_by": "none"},
    ],
)
def test_impossible_constants_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_strategy("ummkd", options)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_a_batch_too_small_for_any_class_is_said_and_not_passed_over(sync):
    ward = runs.Ward(study_of("ummkd", sync, options={"min_count": 1000}))
    request = next(ward.strategy.run_round(ward.server, ward.cohort()))
    with pytest.raises(ConfigError, match="min_count is 1000, and a batch holds 128"):
        ward.answer(request)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_a_policy_has_nothing_to_refuse_where_no_class_is_told(tmp_path, sync):
    """Of 128 pixels no class has 120, and a policy asks for more than there are."""
    policy = tmp_path / "policy.yaml"
    kinds = "Card, Metrics, Weights, Gradient, ClassStatistic"
    policy.write_text(f"allowed_kinds: [{kinds}]\nmin_count: 10000\n")
    few = {"sites": {"policy": str(policy)}, "train": {"local_steps": 1}}
    study = study_of("ummkd", sync, options={"min_count": 120}, rounds=1, **few)
    (record,) = runs.run(study, tmp_path / "run").rounds
    assert not record["failed"]


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_rows_that_a_policy_noised_are_used_as_they_come(tmp_path, multiplier):
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "allowed_kinds: [Card, Metrics, Weights, ClassStatistic]\nmin_count: 0\n"
        f"noise: {{clip_norm: 1.0, noise_multiplier: {multiplier}}}\n"
    )
    sites = {"policy": str(policy)}
    study = study_of("ummkd", "round", options={"min_count": 1}, sites=sites)
    for record in runs.run(study, tmp_path / "run").rounds:
        assert not record["refused"]
        assert not record["failed"]


@dataclass
class Impossible(runs.Recorder):
    """What site c tells of its classes, no hospital could have computed."""

    def exchange(self, messages, **how):
        answers = super().exchange(messages, **how)
        answer = answers.get("c")
        if isinstance(answer, Message) and answer.kind == "ClassStatistic":
            rows = torch.full_like(answer.tensors["state/rows"], -1e30)
            rows[:, 0] = 0.0
            tensors = {"state/rows": rows, "state/present": torch.ones(len(rows))}
            answers["c"] = replace(answer, tensors=tensors, norms=None)
        return answers


def test_impossible_rows_cost_their_site_the_round_and_nobody_else(tmp_path):
    options = {"min_count": 1}
    tolerance = {"quorum": 0.5}
    study = study_of("ummkd", "step", options=options, tolerance=tolerance, rounds=1)
    result = runs.run(study, tmp_path / "bad", transport=Impossible())
    for record in result.rounds:
        assert record["refused"] == {"c": "rows are no log-probabilities"}
    silent = runs.Faulty(site="c", fault="silent")
    without = runs.run(study, tmp_path / "silent", transport=silent)
    torch.testing.assert_close(result.shared, without.shared, rtol=0, atol=0)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_it_trains_classifiers_with_cases_in_the_place_of_voxels(tmp_path, sync):
    study = runs.make_study(
        runs.TABLE, "ummkd", strategy={"sync": sync, "min_count": 1}
    )
    result = runs.run(study, tmp_path)
    assert [record["round"] for record in result.rounds] == [1, 2]
