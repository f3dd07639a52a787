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
RANDOM = {"random_head.head.weight", "random_head.head.bias"}
OFF = {"feature_weight": 0.0, "classifier_weight": 0.0, "random_weight": 0.0}
TINY = (
    f"cache={runs.CACHE}",
    "sites={dataset: tiny.hospitals, kind: image}",
    "preprocess={size: [8, 8], intensity: none}",
    "model={name: unet, base_width: 2, levels: 2, norm: group}",
    "train.batch_size=2",
)


def study_of(sync="step", *, method="epi_fcr", strategy=None, **changes):
    return runs.make_study(
        runs.IMAGE, method, strategy={"sync": sync, **(strategy or {})}, **changes
    )


def same(found, expected):
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("sync", ["step", "round"])
@pytest.mark.parametrize("options", [OFF, {"warmup_steps": 99}])
def test_without_its_terms_it_is_fedavg_bit_for_bit(tmp_path, sync, options):
    found = runs.run(study_of(sync, strategy=options), tmp_path / "found")
    plain = study_of(sync, method="fedavg", strategy={"weighting": "uniform"})
    expected = runs.run(plain, tmp_path / "expected")
    same(found.shared, expected.shared)
    per_round = 2 if sync == "step" else 1
    assert found.rounds[-1]["exchanges"] == per_round + 1  # nothing was relayed


@pytest.mark.parametrize("sync", ["step", "round"])
@pytest.mark.parametrize("term", ["feature", "classifier", "random"])
def test_each_term_alone_moves_what_it_should(tmp_path, sync, term):
    """Epi-F and Epi-R teach features, Epi-C the head."""
    options = {**OFF, f"{term}_weight": 1.0, "relay": "all"}
    # One step, so that a difference in one part cannot reach the other.
    train = {"local_steps": 1}
    study = study_of(sync, strategy=options, train=train, rounds=1)
    found = runs.run(study, tmp_path / "found").shared
    plain = study_of(sync, method="fedavg", strategy={"weighting": "uniform"},
                     train=train, rounds=1)  # fmt: skip
    expected = runs.run(plain, tmp_path / "expected").shared
    weights = {n for n in found if n.endswith(("weight", "bias"))}
    moved = {n for n in weights if not torch.equal(found[n], expected[n])}
    wanted = HEAD if term == "classifier" else weights - HEAD
    # Own networks start equal to the aggregate, so T_j and F_j are T and F here.
    assert moved == wanted
    same(
        {n: found[n] for n in found if n not in weights},
        {n: expected[n] for n in found if n not in weights},
    )


@pytest.mark.parametrize("sync", ["step", "round"])
def test_a_site_trains_its_own_network_as_if_it_were_alone(tmp_path, sync):
    """In rounds, as many as there are; the relay and the aggregate do not reach it."""
    adam = {"optimizer": {"name": "adam", "lr": 0.01}, "optimizer_state": "keep"}
    found = runs.run(study_of(sync, train=adam), tmp_path / "found")
    alone = study_of("round", method="separate", train=adam)
    expected = runs.run(alone, tmp_path / "alone")
    for site in SITES:
        own = found.private(site).states["own_network"]
        kept = expected.private(site).states["kept"]
        assert set(own) == set(kept)
        same(own, kept)
    assert not torch.equal(own["head.weight"], found.shared["head.weight"])


@pytest.mark.parametrize("sync", ["step", "round"])
def test_the_random_head_is_the_same_everywhere_and_never_moves(tmp_path, sync):
    transport = runs.Recorder()
    study = study_of(sync, strategy={"random_weight": 5.0})
    start = runs.Ward(study).benches["a"].initial
    result = runs.run(study, tmp_path, transport=transport)
    for site in SITES:
        kept = result.private(site).states["kept"]
        assert set(kept) == RANDOM
        same(kept, {n: start[n] for n in RANDOM})
    assert not torch.equal(start["random_head.head.weight"], start["head.weight"])
    for _, message in (*transport.down, *transport.up):
        assert not [name for name in message.tensors if "random" in name]


def entries(message, section):
    start = f"{section}/"
    return {n.removeprefix(start) for n in message.tensors if n.startswith(start)}


@pytest.mark.parametrize("relay", ["heads", "all"])
@pytest.mark.parametrize("sync", ["step", "round"])
def test_what_is_relayed_and_to_whom(tmp_path, sync, relay):
    transport = runs.Recorder()
    study = study_of(sync, strategy={"relay": relay, "num_pairs": 2}, rounds=1)
    result = runs.run(study, tmp_path, transport=transport)
    weights = {n for n in result.shared if n.endswith(("weight", "bias"))}
    relayed = HEAD if relay == "heads" else weights
    givers, receivers = [], []
    for (site, asked), (_, answer) in zip(transport.down, transport.up, strict=True):
        if asked.kind == "own_network":
            givers.append(site)
            assert answer.kind == "Weights"
            assert entries(answer, "state") == entries(asked, "weights") == relayed
            assert not entries(answer, "extra")
        elif asked.kind in {"gradient", "training"}:
            got = entries(asked, "foreign")
            assert got in (set(), relayed)
            receivers += [site] if got else []
            kind = "Gradient" if sync == "step" else "Weights"
            assert answer.kind == kind
            whole = weights if sync == "step" else set(result.shared)
            assert entries(answer, "state") == whole
    assert len(givers) == len(receivers) == (4 if sync == "step" else 2)


def test_the_receiving_site_gets_the_network_of_another():
    ward = runs.Ward(study_of(strategy={"relay": "all", "num_pairs": 3}))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    ward.answer(half.send(ward.answer(next(half))))
    # All own networks have taken a step by now, each its own.
    half = ward.strategy.step(ward.server, ward.cohort(), 1)
    request = half.send(ward.answer(next(half)))
    own = {s: p.states["own_network"] for s, p in ward.privates.items()}
    name = "encoder.levels.0.conv1.weight"
    given = {}
    for site, content in request.content_by_site.items():
        (giver,) = [
            s for s in own if torch.equal(own[s][name], content["foreign"][name])
        ]
        assert giver != site
        given[site] = giver
    assert set(given) == set(given.values()) == set(SITES)


class LostIn(runs.InProcessTransport):
    """Whoever gives, or receives, a foreign network in round 1 is gone."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def exchange(self, messages, **how):
        answers = super().exchange(messages, **how)
        for site, sent in messages.items():
            gives = sent.kind == "own_network"
            receives = any(name.startswith("foreign/") for name in sent.tensors)
            hit = gives if self.part == "giver" else receives
            if hit and sent.header["round"] == 1:
                answers[site] = SiteFailure("died", "it was switched off")
        return answers


@pytest.mark.parametrize("sync", ["step", "round"])
@pytest.mark.parametrize("part", ["giver", "receiver"])
def test_a_site_lost_between_the_exchanges(tmp_path, sync, part):
    """The pair's terms are missing, everything else is there; then it comes back."""
    common = {
        "train": {"local_steps": 1},
        "tolerance": {"quorum": 0.3, "retries": 0},
        "checkpoint": {"every": 1},
    }
    study = study_of(sync, **common)
    result = runs.run(study, tmp_path / "lost", transport=LostIn(part))
    (lost,) = result.rounds[0]["failed"]
    assert result.rounds[1]["answered"] == list(SITES)
    assert set(result.private(lost).states) >= {"own_network"}
    others = [site for site in SITES if site != lost]
    plain = study_of(
        sync,
        strategy={"feature_weight": 0.0},
        sites={"include": others},
        **common,
    )
    expected = runs.run(plain, tmp_path / "plain")
    found = result.server(1)
    # The running mean over two sites is the mean over two of three.
    torch.testing.assert_close(found, expected.server(1))


def test_a_foreign_site_of_weight_zero_gives_nothing():
    ward = runs.Ward(study_of(strategy={"weighting": "examples"}))
    (giver,) = next(ward.strategy.run_round(ward.server, ward.cohort())).site_ids
    half = ward.strategy.run_round(ward.server, ward.cohort(**{giver: 0}))
    request = half.send(ward.answer(next(half)))
    assert not request.content_by_site


def test_the_warm_up_counts_steps_over_all_rounds(tmp_path):
    study = study_of(strategy={"warmup_steps": 3}, rounds=3)
    exchanges = [r["exchanges"] for r in runs.run(study, tmp_path).rounds]
    # And one at each round's end, where sites file what they keep.
    assert exchanges == [2 + 1, 3 + 1, 4 + 1]


def test_one_site_alone_has_no_foreign_partner(tmp_path):
    study = study_of(sites={"include": ["a"]}, strategy={"random_weight": 0.0})
    found = runs.run(study, tmp_path / "found")
    plain = study_of(method="fedavg", sites={"include": ["a"]})
    expected = runs.run(plain, tmp_path / "plain")
    same(found.shared, expected.shared)


def test_the_head_may_be_larger(tmp_path):
    words = ["head", "decoder.levels.0"]
    result = runs.run(study_of(strategy={"head": words}, rounds=1), tmp_path)
    kept = set(result.private("a").states["kept"])
    assert "random_head.decoder-levels-0.conv1.weight" in kept
    assert kept > RANDOM


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"feature_weight": -1.0}, "feature_weight"),
        ({"random_weight": -0.1}, "random_weight"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"head": ["tail"]}, "no module"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        runs.run(study_of(strategy=options), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ("strategy.relay=all", "strategy.classifier_weight=1.0"),
        ("strategy.relay=all", "strategy.num_pairs=3", "strategy.weighting=examples"),
        ("strategy.warmup_steps=2", "train.optimizer.momentum=0.9"),
        ("strategy.head=[head, decoder.levels.0]", "strategy.random_weight=1.0"),
        ("train.lr_decay={factor: 0.5, every_steps: 2}", "model.norm=batch"),
    ],
)
def test_it_equals_the_pooled_method(options):
    found = prove("epi_fcr", steps=4, overrides=(*TINY, *options))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3
