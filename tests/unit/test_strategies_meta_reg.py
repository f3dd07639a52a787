from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.message import SiteFailure
from fedmed.prove import prove

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = ("a", "b", "c")
HEAD = {"head.weight", "head.bias"}
TINY = (
    f"cache={runs.CACHE}",
    "sites={dataset: tiny.hospitals, kind: image}",
    "preprocess={size: [8, 8], intensity: none}",
    "model={name: unet, base_width: 2, levels: 2, norm: batch}",
    "train.batch_size=2",
)
LARGE = {"penalty_lr": 100.0, "inner_lr": 0.1}
"""So that two rounds are enough to see phi."""


def study_of(sync="step", *, method="meta_reg", strategy=None, **changes):
    return runs.make_study(
        runs.IMAGE, method, strategy={"sync": sync, **(strategy or {})}, **changes
    )


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_without_phase_one_and_penalty_it_is_fedavg_bit_for_bit(tmp_path, sync):
    found = runs.run(
        study_of(sync, strategy={"phase_one_rounds": 0}), tmp_path / "found"
    )
    plain = study_of(sync, method="fedavg", strategy={"weighting": "uniform"})
    expected = runs.run(plain, tmp_path / "expected")
    same(found.shared, expected.shared)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_a_penalty_from_the_start_moves_the_head_towards_zero(tmp_path, sync):
    start = runs.Ward(study_of()).server.shared
    sizes = {}
    for phi in (0.0, 0.5):
        options = {"phase_one_rounds": 0, "initial_penalty": phi}
        shared = runs.run(study_of(sync, strategy=options), tmp_path / str(phi)).shared
        sizes[phi] = float(shared["head.weight"].abs().sum())
    # At lr 0.05, four steps against a slope of 0.5 shrink each weight by 0.1.
    count = start["head.weight"].numel()
    assert sizes[0.5] == pytest.approx(sizes[0.0] - 0.1 * count, rel=0.2)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_the_penalty_changes_nothing_before_phase_two(tmp_path, sync):
    after = {}
    for name, options in {"some": LARGE, "none": {"inner_lr": 0.0}}.items():
        study = study_of(sync, strategy=options, checkpoint={"every": 1})
        after[name] = runs.run(study, tmp_path / name)
    same(after["some"].server(1), after["none"].server(1))
    phi = {name: run.server(1, "penalty") for name, run in after.items()}
    assert set(phi["some"]) == HEAD
    assert all(not tensor.any() for tensor in phi["none"].values())
    assert all(tensor.any() for tensor in phi["some"].values())
    same(after["some"].server(2, "penalty"), phi["some"])
    heads = [run.shared["head.weight"] for run in after.values()]
    assert float((heads[0] - heads[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("sync", ["step", "round"])
def test_the_head_of_phase_two_is_fresh(tmp_path, sync):
    study = study_of(sync, checkpoint={"every": 1})
    result = runs.run(study, tmp_path)
    start = runs.Ward(study).server.shared
    first, last = result.server(1), result.shared
    same({n: first[n] for n in HEAD}, {n: start[n] for n in HEAD})
    assert all(not torch.equal(last[n], start[n]) for n in HEAD)
    own = [result.private(site).states["head"] for site in SITES]
    assert all(set(head) == HEAD for head in own)
    assert not torch.equal(own[0]["head.weight"], own[1]["head.weight"])
    assert not torch.equal(own[0]["head.weight"], start["head.weight"])


def entries(message, section):
    start = f"{section}/"
    return {n.removeprefix(start) for n in message.tensors if n.startswith(start)}


def test_what_leaves_in_each_exchange_of_phase_one(tmp_path):
    """The head here holds a level of the decoder, with running statistics."""
    words = ["head", "decoder.levels.0"]
    transport = runs.Recorder()
    study = study_of(strategy={"head": words, "phase_one_rounds": 1})
    result = runs.run(study, tmp_path, transport=transport)
    head = {n for n in result.shared if n.startswith(tuple(words))}
    weights = {n for n in head if n.endswith(("weight", "bias"))}
    assert len(head) > len(weights) > 2
    up = {}
    for (site, asked), (_, answer) in zip(transport.down, transport.up, strict=True):
        if asked.header.get("round") == 1:
            up.setdefault(asked.kind, []).append((site, answer))
    for _, answer in up["feature_gradient"]:
        assert answer.kind == "Gradient"
        assert not (entries(answer, "state") | entries(answer, "buffers")) & head
    assert len(up["inner"]) == len(up["judgement"]) == 2  # steps
    for (giver, answer), (judge, slope) in zip(
        up["inner"], up["judgement"], strict=True
    ):
        assert giver != judge
        assert answer.kind == "Weights"
        assert entries(answer, "state") == entries(answer, "extra/signs") == weights
        assert slope.kind == "Gradient"
        assert entries(slope, "state") == weights
        assert not entries(slope, "buffers")
    assert "gradient" not in up


def test_the_site_keeps_its_head_as_it_was_when_it_shows_it():
    ward = runs.Ward(study_of(strategy=LARGE))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    request = half.send(ward.answer(next(half)))
    (site,) = request.site_ids
    before = ward.privates[site]
    told = ward.answer(request)[site]
    assert ward.privates[site] is before
    own = before.states["head"]
    same(told.extra["signs"], {n: own[n].sign() for n in HEAD})
    assert not torch.equal(told.state["head.weight"], own["head.weight"])


class LostIn(runs.InProcessTransport):
    """Whoever is asked for one kind of answer in round 1 is gone."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def exchange(self, messages, **how):
        answers = super().exchange(messages, **how)
        for site, sent in messages.items():
            if sent.kind == self.kind and sent.header["round"] == 1:
                answers[site] = SiteFailure("died", "it was switched off")
        return answers


@pytest.mark.parametrize("sync", ["step", "round"])
@pytest.mark.parametrize("kind", ["inner", "judgement"])
def test_a_site_lost_in_the_middle_costs_one_step_of_phi_only(tmp_path, sync, kind):
    study = study_of(
        sync,
        strategy=LARGE,
        train={"local_steps": 1},
        tolerance={"quorum": 0.3, "retries": 0},
        checkpoint={"every": 1},
    )
    result = runs.run(study, tmp_path / "lost", transport=LostIn(kind))
    assert len(result.rounds[0]["failed"]) == 1
    assert len(result.rounds[1]["answered"]) == 3
    assert all(not phi.any() for phi in result.server(1, "penalty").values())
    whole = runs.run(study, tmp_path / "whole")
    same(result.server(1), whole.server(1))


def test_a_lost_judge_leaves_the_other_to_judge():
    study = study_of(
        "round", strategy={**LARGE, "num_meta_test": 2}, train={"local_steps": 1}
    )
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    request = half.send(ward.answer(next(half)))
    told = ward.answer(request)
    request = half.send(told)
    replies = ward.answer(request)
    assert len(replies) == 2
    replies.pop(min(replies))
    with pytest.raises(StopIteration) as end:
        half.send(replies)
    (signs,) = (reply.extra["signs"] for reply in told.values())
    (slope,) = (reply.state for reply in replies.values())
    expected = {n: 10.0 * signs[n] * slope[n] for n in HEAD}
    found = end.value.value.memory["penalty"]
    torch.testing.assert_close(dict(found), expected)


def test_a_head_of_a_site_of_weight_zero_is_not_judged():
    options = {**LARGE, "weighting": "examples"}
    ward = runs.Ward(study_of("round", strategy=options))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    (site,) = half.send(ward.answer(next(half))).site_ids
    half = ward.strategy.run_round(ward.server, ward.cohort(**{site: 0}))
    request = half.send(ward.answer(next(half)))
    with pytest.raises(StopIteration) as end:
        half.send(ward.answer(request))
    assert not end.value.value.memory["penalty"]["head.weight"].any()


def test_one_site_alone_learns_no_penalty(tmp_path):
    study = study_of(strategy=LARGE, sites={"include": ["a"]}, checkpoint={"every": 1})
    result = runs.run(study, tmp_path)
    assert all(not phi.any() for phi in result.server(2, "penalty").values())


@pytest.mark.parametrize(("sync", "keep"), [("step", ""), ("round", "keep")])
def test_the_head_s_optimiser_is_remembered(tmp_path, sync, keep):
    """In steps as the rest of the pooled optimiser is; in rounds if the study asks."""
    train = {"optimizer": {"name": "adam", "lr": 0.01}}
    train |= {"optimizer_state": keep} if keep else {}
    study = study_of(sync, strategy={"phase_one_rounds": 2}, rounds=3, train=train)
    states = runs.run(study, tmp_path).private("b").states
    memory = states["head_optimizer"]
    assert float(memory["head.weight|step"]) == 4.0
    features = {n for n in memory if n.startswith("encoder")}
    assert bool(features) == (sync == "round")
    # Phase 2 has a memory of its own.
    if sync == "round":
        assert float(states["optimizer"]["head.weight|step"]) == 2.0


@pytest.mark.parametrize("sync", ["step", "round"])
def test_phases_are_counted_in_rounds(tmp_path, sync):
    study = study_of(sync, rounds=3, strategy={"phase_one_rounds": 2})
    exchanges = [r["exchanges"] for r in runs.run(study, tmp_path).rounds]
    steps = 2 if sync == "step" else 1
    # And one at each round's end, where sites file what they keep.
    assert exchanges == [3 * steps + 1, 3 * steps + 1, steps + 1]


def test_half_of_the_run_is_phase_one_to_the_step(tmp_path):
    study = study_of(rounds=1, train={"local_steps": 5})
    (record,) = runs.run(study, tmp_path).rounds
    assert record["exchanges"] == 3 * 3 + 2 + 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inner_steps": 0}, "inner_steps"),
        ({"inner_lr": -1.0}, "inner_lr"),
        ({"penalty_lr": -1.0}, "penalty_lr"),
        ({"num_meta_test": 0}, "num_meta_test"),
        ({"phase_one_rounds": 2}, "never be trained"),
        ({"head": ["tail"]}, "unknown word 'tail'"),
        ({"head": ["all"]}, "some must be the head"),
        ({"head": ["none"]}, "names 0"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        runs.run(study_of(strategy=options), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ("strategy.inner_steps=3",),
        ("strategy.weighting=examples", "strategy.num_meta_test=2"),
        (
            "strategy.head=[head, decoder.levels.0]",
            "train.lr_decay={factor: 0.5, every_steps: 2}",
        ),
        ("strategy.initial_penalty=0.1", "train.optimizer.momentum=0.9"),
        ("strategy.phase_one_rounds=0", "strategy.initial_penalty=0.1"),
    ],
)
def test_it_equals_the_pooled_method(options):
    strong = ("strategy.penalty_lr=100", "strategy.inner_lr=0.1")
    found = prove("meta_reg", steps=4, overrides=(*TINY, *strong, *options))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3
