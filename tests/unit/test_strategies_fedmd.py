from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fedmed.errors import ConfigError, QuorumError
from fedmed.strategy import Private
from sites.context import HospitalContext

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
hospitals = importlib.import_module("tiny.hospitals")
modules_are_listed_once = runs.modules_are_listed_once
fedmd = importlib.import_module("strategies.fedmd")

PUBLIC = {"with_public": True, "public": "p"}
SITES = ("a", "b", "c")


def study_of(name="fedmd", base=runs.IMAGE, *, sites=None, **changes):
    return runs.make_study(base, name, sites={**PUBLIC, **(sites or {})}, **changes)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_who_digests_nothing_trains_alone_bit_for_bit(tmp_path, optimizer):
    train = {"optimizer": {"name": optimizer, "lr": 0.01}}
    study = study_of(strategy={"digest_weight": 0}, train=train, rounds=3)
    found = runs.run(study, tmp_path / "fedmd")
    alone = runs.run(study_of("separate", train=train, rounds=3), tmp_path / "alone")
    torch.testing.assert_close(
        found.everything(SITES), alone.everything(SITES), rtol=0, atol=0
    )
    assert {n for r in found.rounds for n in r["bytes_up"].values()} == {0}


def test_the_first_round_is_everybodys_own_training(tmp_path):
    found = runs.run(study_of(rounds=1), tmp_path / "fedmd")
    alone = runs.run(study_of("separate", rounds=1), tmp_path / "alone")
    torch.testing.assert_close(
        found.everything(SITES), alone.everything(SITES), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("options", "num_bytes", "back"),
    [
        ({"wire": "float32"}, 4, 4),
        ({}, 2, 2),
        ({"wire": "uint8"}, 1, 2),
        ({"coarseness": 4}, 2 / 16, 2 / 16),
        ({"public_batches": 2}, 2 / 2, 2 / 2),
    ],
)
def test_what_travels_is_as_large_as_the_docstring_says(
    tmp_path, options, num_bytes, back
):
    recorder = runs.Recorder()
    private = {"size": 16}
    study = study_of(sites=private, strategy=options)
    result = runs.run(study, tmp_path, transport=recorder)
    batches, classes, voxels = 4, 2, hospitals.PUBLIC_SIZE**2
    numbers = batches * study.train.batch_size * classes * voxels
    first, second = result.rounds
    for record in (first, second):
        assert record["bytes_up"] == dict.fromkeys(SITES, numbers * num_bytes)
    assert first["bytes_down"] == dict.fromkeys(SITES, 0)
    assert second["bytes_down"] == dict.fromkeys(SITES, numbers * back)
    kinds = {message.kind for _, message in recorder.up} - {"Card", "Metrics"}
    assert kinds == {"PublicLogits"}
    names = {
        n for _, message in (*recorder.up, *recorder.down) for n in message.tensors
    }
    assert {name.split("/")[0] for name in names} == {"state", "consensus"}
    assert all(name.split("/")[1].isdigit() for name in names)
    assert result.shared == {}


def test_the_public_site_is_asked_who_it_is_and_nothing_else(tmp_path):
    recorder = runs.Recorder()
    runs.run(study_of(), tmp_path, transport=recorder)
    assert [m.kind for site, m in recorder.down if site == "p"] == ["join"]


def predictions(ward):
    """What every hospital predicts for the public images, likelihoods."""
    told = {}
    for site in SITES:
        context = HospitalContext(ward.benches[site], ward.privates[site], 9)
        model = context.load({}).eval()
        with torch.no_grad():
            told[site] = torch.cat(
                [
                    context.trainer.logits(model, batch)[0].softmax(dim=1)
                    for batch in context.public_batches(0, 4)
                ]
            )
    return told


def spread(ward):
    told = torch.stack(list(predictions(ward).values()))
    return float((told - told.mean(dim=0)).abs().mean())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"digest": "mae"},
        {"wire": "uint8"},
        {"coarseness": 2},
        {"temperature": 3.0},
    ],
)
def test_hospitals_come_to_agree_on_public_images(options):
    spreads = []
    for weight in (0, 1):
        strategy = {"digest_weight": weight, "digest_epochs": 4, **options}
        study = study_of(
            strategy=strategy,
            model={"norm": "group"},
            train={"local_steps": 1, "optimizer": {"name": "adam", "lr": 0.01}},
        )
        ward = runs.Ward(study)
        server = ward.server
        for number in range(1, 7):
            server = ward.finish(ward.strategy.run_round(server, ward.cohort(number)))
        spreads.append(spread(ward))
    assert spreads[1] < 0.7 * spreads[0]


def test_a_site_that_was_not_drawn_digests_when_it_is(tmp_path):
    result = runs.run(study_of(sites_per_round=2, rounds=4), tmp_path)
    for record in result.rounds:
        assert len(record["answered"]) == 2
        told = [site for site, count in record["bytes_up"].items() if count]
        assert told == record["answered"]


def write_policy(folder, **content):
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump({"min_count": 0, **content}))
    return str(path)


KINDS = ["Card", "Metrics", "Weights"]


def test_a_hospital_may_refuse_to_tell_what_it_predicts(tmp_path):
    policy = write_policy(tmp_path, allowed_kinds=KINDS)
    with pytest.raises(QuorumError, match="a PublicLogits message may not leave"):
        runs.run(study_of(sites={"policy": policy}), tmp_path / "run")


@pytest.mark.parametrize("wire", ["float16", "uint8"])
def test_noise_that_covers_updates_does_not_let_predictions_pass(tmp_path, wire):
    noise = {"clip_norm": 1.0, "noise_multiplier": 0.1}
    policy = write_policy(tmp_path, allowed_kinds=[*KINDS, "PublicLogits"], noise=noise)
    study = study_of(sites={"policy": policy}, strategy={"wire": wire})
    with pytest.raises(QuorumError, match="would leave without noise"):
        runs.run(study, tmp_path / "run")


def test_a_prediction_that_overflows_16_bits_is_cut_off():
    strategy = fedmd.FedMD()
    (told,) = strategy._encoded(torch.tensor([[1e30, -1e30]]))
    assert torch.isfinite(told).all()
    assert told.dtype == torch.float16
    assert told[0] > told[1]


def test_blocks_at_the_far_end_average_what_is_there():
    logits = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert fedmd.coarse(logits, 2).tolist() == [[[[2.5, 4.5], [8.5, 10.5]]]]
    solid = torch.ones(1, 2, 5, 4, 3)
    assert fedmd.coarse(solid, 2).shape == (1, 2, 3, 2, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"public_batches": 0}, "public_batches must be >= 1"),
        ({"digest_weight": -1}, "digest_weight must be >= 0"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"digest": "mae", "wire": "uint8"}, "digest must be kl with wire: uint8"),
        ({"wire": "int4"}, "wire must be one of"),
    ],
)
def test_impossible_constants_are_refused(options, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        runs.run(study_of(strategy=options), tmp_path)


def test_a_case_with_one_prediction_has_no_coarser_one(tmp_path):
    study = study_of(base=runs.TABLE, strategy={"coarseness": 2})
    with pytest.raises(QuorumError, match="coarseness is 2, and a case has one"):
        runs.run(study, tmp_path)


def test_it_digests_in_the_networks_own_precision():
    ward = runs.Ward(study_of(base=runs.TABLE))
    server = ward.finish(ward.strategy.run_round(ward.server, ward.cohort()))
    ward.finish(ward.strategy.run_round(server, ward.cohort(2)))
    kept = ward.privates["a"].states["kept"]
    assert {tensor.dtype for tensor in kept.values()} == {torch.float64}
    assert isinstance(ward.privates["a"], Private)


def test_what_is_digested_is_what_was_told_before():
    ward = runs.Ward(study_of(strategy={"public_batches": 3}))
    asked, server = [], ward.server
    for number in (1, 2, 3):
        cohort = ward.cohort(number)
        (exchange,) = [next(ward.strategy.run_round(server, cohort))]
        asked.append(exchange.content)
        server = ward.finish(ward.strategy.run_round(server, cohort))
    for before, after in itertools.pairwise(asked):
        assert after["digest_first"] == before["tell_first"]
        assert after["tell_first"] == before["tell_first"] + 3
        assert list(after["consensus"]) == ["0", "1", "2"]


def test_it_tells_what_the_network_as_it_is_kept_predicts():
    ward = runs.Ward(study_of(strategy={"wire": "float32"}))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    replies = ward.answer(next(half))
    for site in SITES:
        context = HospitalContext(ward.benches[site], ward.privates[site], 1)
        model = context.load({}).eval()
        for number, batch in enumerate(context.public_batches(0, 4)):
            with torch.no_grad():
                expected = fedmd.centred(model(batch.images))
            assert torch.equal(replies[site].state[str(number)], expected)


@pytest.mark.parametrize("which", ["own", "public"])
def test_normalisation_stays_the_sites_own_unless_asked(which):
    ward = runs.Ward(study_of(strategy={"statistics": which}))
    server = ward.finish(ward.strategy.run_round(ward.server, ward.cohort()))
    context = HospitalContext(ward.benches["a"], ward.privates["a"], 2)
    model = context.load({})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ward.strategy._digest(context, model, server.memory["consensus"], 0)
    after = model.state_dict()
    assert all(module.training for module in model.modules())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("weight") for name in moved)
    assert any("running" in name for name in moved) == (which == "public")
