from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError, PolicyError
from fedmed.payload import AmplitudeStatistic, to_message
from fedmed.prove import prove
from fedmed.training.amplitude import amplitude_centre, independent_half
from fedmed.training.examples import Batch
from sites.policy import Policy, enforce
from strategies.feddg import FedDG

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

PLAIN = {"model": {"norm": "group"}}


def study_of(name="feddg", sync="round", **changes):
    strategy = {"sync": sync, **changes.pop("strategy", {})}
    return runs.make_study(runs.IMAGE, name, strategy=strategy, **changes)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_without_outer_loss_and_contrast_it_is_fedavg_bit_for_bit(sync, tmp_path):
    off = {"outer_weight": 0.0, "boundary_weight": 0.0}
    found = runs.run(study_of(sync=sync, strategy=off), tmp_path / "a")
    expected = runs.run(study_of("fedavg", sync), tmp_path / "b")
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=0)
    assert found.rounds[0]["exchanges"] == expected.rounds[0]["exchanges"]


@pytest.mark.parametrize("sync", ["step", "round"])
def test_without_contrast_styles_and_inner_step_it_is_fedavg_at_twice_the_rate(
    sync, tmp_path
):
    """L(x; w) + L(x; w): both gradients are one, and doubling is exact."""
    off = {"boundary_weight": 0.0, "interpolation": 0.0, "inner_lr": 0.0}
    slow = {"optimizer": {"name": "sgd", "lr": 0.05}}
    fast = {"optimizer": {"name": "sgd", "lr": 0.1}}
    found = runs.run(
        study_of(sync=sync, strategy=off, train=slow, **PLAIN), tmp_path / "a"
    )
    expected = runs.run(study_of("fedavg", sync, train=fast, **PLAIN), tmp_path / "b")
    torch.testing.assert_close(found.shared, expected.shared, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bank", ["distribution", "examples"])
def test_what_leaves_once(bank, tmp_path):
    recorder = runs.Recorder()
    study = study_of(strategy={"bank": bank, "bank_share": 0.5})
    result = runs.run(study, tmp_path, transport=recorder)
    told = [(s, m) for s, m in recorder.up if m.kind == "AmplitudeStatistic"]
    assert [site for site, _ in told] == ["a", "b", "c"]
    numbers = (3 * 3 + 1) // 2
    for _, message in told:
        shapes = {name: tuple(t.shape) for name, t in message.tensors.items()}
        if bank == "distribution":
            assert shapes == {
                "state/mean": (numbers,),
                "state/covariance": (numbers, numbers),
            }
            assert message.num_bytes == 4 * (numbers + numbers**2)
            assert message.header["min_count"] == 1  # that there is a count, not which
        else:
            count = max(1, round(0.5 * message.header["num_examples"]))
            assert shapes == {"state/centres": (count, 1, numbers)}
            assert message.header["min_count"] == 1
    rounds = [record["exchanges"] for record in result.rounds]
    assert rounds == [2, 1 + 1]  # the bank; the end of the run


def test_sites_get_the_others_banks_without_names(tmp_path):
    recorder = runs.Recorder()
    result = runs.run(study_of(), tmp_path, transport=recorder)
    bank = result.server(1, "amplitude_bank")
    asked = [(s, m) for s, m in recorder.down if m.kind == "training"]
    assert {site for site, _ in asked} == {"a", "b", "c"}
    for site, message in asked:
        styles = {
            name.partition("/")[2]: tensor
            for name, tensor in message.tensors.items()
            if name.startswith("styles/")
        }
        others = [other for other in "abc" if other != site]
        assert set(styles) == {
            f"{n}|{x}" for n in (0, 1) for x in ("mean", "covariance")
        }
        for number, other in enumerate(others):
            assert torch.equal(styles[f"{number}|mean"], bank[f"{other}|mean"])


def test_a_hospital_that_wants_many_images_behind_a_number_refuses_single_ones():
    policy = Policy(allowed_kinds=("AmplitudeStatistic",), case_ids="keep")
    context = {"site_id": "a", "round": 1}
    for count, passes in ((12, True), (1, False)):
        payload = AmplitudeStatistic(12, state={"mean": torch.ones(5)}, min_count=count)
        expected = (
            contextlib.nullcontext()
            if passes
            else pytest.raises(PolicyError, match="min_count")
        )
        with expected:
            enforce(policy, to_message(payload), context=context)


def test_the_bank_is_of_every_training_example_once():
    ward = runs.Ward(study_of(strategy={"bank": "examples", "bank_share": 1.0}))
    (request,) = [next(ward.strategy.run_round(ward.server, ward.cohort()))]
    told = ward.answer(request)
    for site, payload in told.items():
        index = ward.benches[site].indices[0]
        images = [index.cases[case].image_CIJK[..., k] for case, k in index.examples]
        stacked = torch.stack([torch.tensor(image) for image in images])
        expected = independent_half(amplitude_centre(stacked, 1)).reshape(-1, 5)
        found = payload.state["centres"].reshape(-1, 5)
        assert len(found) == len(expected)
        torch.testing.assert_close(
            found.sort(dim=0).values, expected.sort(dim=0).values, rtol=1e-5, atol=1e-7
        )


def test_a_new_site_is_asked_when_it_first_takes_part():
    ward = runs.Ward(study_of())
    first = ward.cohort().select(("a", "b"))
    server = ward.finish(ward.strategy.run_round(ward.server, first))
    half = ward.strategy.run_round(server, ward.cohort(2))
    request = next(half)
    assert (request.action, request.site_ids) == ("amplitudes", ("c",))
    request = half.send(ward.answer(request))
    assert (request.action, request.site_ids) == ("training", ("a", "b", "c"))


def test_the_inner_step_clamps_values_not_the_norm():
    """One weight each: w' = w - alpha clamp(g, -c, c), entry by entry."""
    strategy = FedDG(inner_lr=0.5, clamp=1.0, boundary_weight=0.0)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    slope = torch.tensor([30.0, 0.25])
    seen = []

    def forward(named, batch):
        seen.append(named["w"].detach().clone())
        logits = (named["w"] * slope * batch.images).sum()
        return logits, batch.labels, logits

    batch = Batch(torch.ones(2), torch.zeros(2))
    total, own = strategy.objective(
        forward, {"w": w}, batch, batch, loss=lambda logits, _: logits
    )
    assert seen[1].tolist() == [1.0 - 0.5 * 1.0, 2.0 - 0.5 * 0.25]
    total.backward()
    # First order: the slope once for L(x; w) and once for L(x'; w').
    assert torch.equal(w.grad, 2 * slope)
    assert float(own.detach()) == 30.5


@pytest.mark.parametrize(
    "options",
    [
        "{bank: examples, bank_share: 1.0}",
        "{inner_lr: 0.5, boundary_weight: 1.0, weighting: uniform}",
        "{band: 0.1, clamp: 0.001, inner_lr: 10.0}",
    ],
)
def test_it_equals_the_pooled_method(options):
    override = f"strategy={options}".replace("{", "{name: feddg, sync: step, ")
    found = prove("feddg", steps=2, overrides=(override, "model.norm=group"))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [("band", 0.5), ("interpolation", 1.5), ("clamp", 0.0), ("bank_share", 0.0)],
)
def test_impossible_constants_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        FedDG(**{name: value})


def test_tables_are_refused():
    ward = runs.Ward(runs.make_study(runs.TABLE, "feddg"))
    with pytest.raises(ConfigError, match="table"):
        ward.answer(next(ward.strategy.run_round(ward.server, ward.cohort())))


def test_a_site_that_never_told_its_amplitudes_is_asked_once_a_round(tmp_path):
    study = study_of(sync="step", rounds=2, tolerance={"quorum": 0.5})
    faulty = runs.Faulty(site="b", round=1, fault="silent")
    first, second = runs.run(study, tmp_path, transport=faulty).rounds
    assert first["failed"].keys() == {"b"}
    assert first["exchanges"] == 1 + 2
    assert second["answered"] == ["a", "b", "c"]
    assert second["exchanges"] == 1 + 2 + 1
