from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.message import SiteFailure
from fedmed.prove import prove
from strategies.latreg import LatReg

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = ("a", "b", "c")
TINY = (
    f"cache={runs.CACHE}",
    "sites={dataset: tiny.hospitals, kind: image}",
    "preprocess={size: [8, 8], intensity: none}",
    "model={name: unet, base_width: 2, levels: 2, norm: batch}",
    "train.batch_size=2",
)


def study_of(sync="step", *, method="latreg", strategy=None, **changes):
    return runs.make_study(
        runs.IMAGE, method, strategy={"sync": sync, **(strategy or {})}, **changes
    )


def own(state):
    return {n: t for n, t in state.items() if n.startswith("site_classifier.")}


def same(found, expected):
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("sync", ["step", "round"])
def test_without_its_weight_the_network_is_fedavg_s_bit_for_bit(tmp_path, sync, clip):
    train = {"clip_norm": clip}
    study = study_of(sync, strategy={"latent_weight": 0.0}, train=train)
    found = runs.run(study, tmp_path / "found").shared
    plain = study_of(
        sync, method="fedavg", strategy={"weighting": "uniform"}, train=train
    )
    expected = runs.run(plain, tmp_path / "expected").shared
    same({n: found[n] for n in expected}, expected)
    start = runs.Ward(study).server.shared
    assert set(found) - set(expected) == set(own(start))
    assert all(not torch.equal(found[n], start[n]) for n in own(start))


@pytest.mark.parametrize("sync", ["step", "round"])
def test_with_its_weight_only_the_encoder_learns_of_the_site(tmp_path, sync):
    shared = {}
    for weight in (0.0, 1.0):
        options = {"latent_weight": weight, "ramp": 0.0}
        study = study_of(sync, strategy=options, rounds=1, train={"local_steps": 1})
        shared[weight] = runs.run(study, tmp_path / str(weight)).shared
    moved = {n for n, t in shared[0.0].items() if not torch.equal(t, shared[1.0][n])}
    assert moved
    assert all(name.startswith("encoder.") for name in moved)


@pytest.mark.parametrize(("sync", "rounds"), [("step", 20), ("round", 40)])
def test_the_site_classifier_learns_to_tell_sites(sync, rounds):
    study = study_of(
        sync,
        strategy={"latent_weight": 0.0, "hidden_width": 16},
        train={"optimizer": {"name": "sgd", "lr": 0.3}},
        model={"norm": "none"},
    )
    ward = runs.Ward(study)
    network, server, losses = ward.benches["a"].model, ward.server, []
    for number in range(1, rounds + 1):
        if number in {1, rounds}:
            network.load_state_dict(dict(server.shared))
            terms = []
            for site, bench in enumerate(ward.benches.values()):
                z = network.encoder(bench.batch(1, 0).images)[-1].mean((2, 3))
                terms.append(ward.strategy._recognition(network, z, site, 3))
            losses.append(float(torch.stack(terms).mean().detach()))
        server = ward.finish(ward.strategy.run_round(server, ward.cohort(number)))
    # The loss of one who cannot tell three sites apart is log 3 = 1.0986.
    assert losses[1] < min(losses[0], math.log(3)) - 0.02


def test_a_classifier_that_knows_nothing_teaches_nothing():
    study = study_of(strategy={"latent_weight": 1.0, "ramp": 0.0})
    network = runs.Ward(study).benches["a"].model
    for parameter in network.site_classifier[2].parameters():
        torch.nn.init.zeros_(parameter)
    vectors = torch.ones(4, network.site_classifier[0].in_features, requires_grad=True)
    loss = LatReg()._confusion(network, vectors, 3)
    assert float(loss.detach()) == pytest.approx(math.log(3), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert not gradient.any()


def entries(message, section):
    start = f"{section}/"
    return {n.removeprefix(start) for n in message.tensors if n.startswith(start)}


def test_the_gradient_of_the_site_classifier_is_all_that_is_added(tmp_path):
    transport = runs.Recorder()
    result = runs.run(study_of("step"), tmp_path, transport=transport)
    names = {n for n in result.shared if n.endswith(("weight", "bias"))}
    for _, message in transport.up:
        if message.kind not in {"Card", "Metrics"}:
            assert message.kind == "Gradient"
            assert entries(message, "state") == names
            assert set(message.header["values"]) == {"loss"}


def test_sites_of_a_round_send_the_classifier_as_it_came(tmp_path):
    transport = runs.Recorder()
    result = runs.run(study_of("round"), tmp_path, transport=transport)
    pairs = zip(transport.down, transport.up, strict=True)
    replies = [(a, m) for (_, a), (_, m) in pairs if m.kind == "Weights"]
    assert len(replies) == 6
    for asked, message in replies:
        for name in own(result.shared):
            sent = asked.tensors[f"weights/{name}"]
            assert torch.equal(message.tensors[f"state/{name}"], sent)
        assert entries(message, "extra/site_classifier") == set(own(result.shared))
        assert entries(message, "state") == set(result.shared)


def test_the_pull_grows_over_the_first_third_of_the_run():
    cohort = replace(runs.Ward(study_of()).cohort(), num_rounds=6, steps=2)
    strategy = LatReg(latent_weight=0.3)
    pulls = [
        strategy._pull(replace(cohort, round=number), index)
        for number in range(1, 4)
        for index in range(2)
    ]
    assert pulls == pytest.approx([0, 0.075, 0.15, 0.225, 0.3, 0.3])
    at_once = LatReg(latent_weight=0.3, ramp=0.0)
    assert at_once._pull(cohort, 0) == 0.3


def test_sites_keep_their_number_when_rounds_draw_some(tmp_path):
    study = study_of("round", rounds=6, sites_per_round=2, checkpoint={"every": 1})
    transport = runs.Recorder()
    result = runs.run(study, tmp_path, transport=transport)
    seen = {}
    for site, message in transport.down:
        if message.kind == "training":
            values = message.header["values"]
            assert values["num_sites"] == 3
            seen.setdefault(site, set()).add(values["number"])
    assert sorted(seen) == list(SITES)
    assert sorted(next(iter(n)) for n in seen.values()) == [0, 1, 2]
    assert all(len(numbers) == 1 for numbers in seen.values())
    known = result.server(6, "site_numbers")
    assert {s: {int(n)} for s, n in known.items()} == seen


class Lost(runs.InProcessTransport):
    """Site b does not answer in the first round."""

    def exchange(self, messages, **how):
        answers = super().exchange(messages, **how)
        sent = messages.get("b")
        asked = sent is not None and sent.kind in {"gradient", "training"}
        if asked and sent.header["round"] == 1:
            answers["b"] = SiteFailure("died", "it was switched off")
        return answers


@pytest.mark.parametrize("sync", ["step", "round"])
def test_a_lost_site_costs_its_own_part(tmp_path, sync):
    study = study_of(
        sync,
        strategy={"ramp": 0.0},
        tolerance={"quorum": 0.5, "retries": 0},
        checkpoint={"every": 1},
    )
    result = runs.run(study, tmp_path, transport=Lost())
    assert list(result.rounds[0]["failed"]) == ["b"]
    assert result.rounds[1]["answered"] == list(SITES)
    ward = runs.Ward(study)
    server = ward.finish(ward.strategy.run_round(ward.server, ward.cohort()), drop="b")
    same(result.server(1), server.shared)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latent_weight": -1.0}, "latent_weight"),
        ({"ramp": 1.5}, "ramp"),
        ({"hidden_width": 0}, "hidden_width"),
        ({"max_sites": 1}, "max_sites"),
        ({"max_sites": 2}, "3 sites train"),
        ({"layer": "body"}, "no module"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        runs.run(study_of(strategy=options), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ("strategy.latent_weight=3.0", "strategy.ramp=0"),
        ("strategy.weighting=examples", "train.optimizer.momentum=0.9"),
        ("strategy.layer=decoder", "train.lr_decay={factor: 0.5, every_steps: 2}"),
        (
            "sites={dataset: tiny.hospitals, kind: table}",
            "model={name: mlp, mode: row, norm: none, widths: [5]}",
            "train.loss=cross_entropy",
        ),
    ],
)
def test_it_equals_the_pooled_method(options):
    found = prove("latreg", steps=4, overrides=(*TINY, *options))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3
