"""Two halves at the sites are one gradient of a loss that couples them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import SiteError, StateMismatchError
from fedmed.payload import (
    CLASS_STATISTIC,
    ClassStatistic,
    Embedding,
    Gradient,
    Weights,
)
from fedmed.training.coupled import (
    Measured,
    Statistic,
    cotangent_outcome,
    cotangents,
    coupled_training,
    gradient_sum,
    statistic_outcome,
    trained_outcome_with,
)
from fedmed.training.local import local_gradient, local_training
from sites.context import HospitalContext

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = ("a", "b", "c")
DROPPING = {"name": "tiny.dropping:Dropping"}


def ward_of(method="fedbn", **changes):
    """Three hospitals with dropout in a network of float64."""
    model = changes.pop("model", DROPPING)
    study = runs.make_study(
        {**runs.IMAGE, "model": model}, method, train={"precision": "float64"}
    )
    return runs.Ward(study)


def context(ward, site, number=1):
    return HospitalContext(ward.benches[site], ward.privates[site], number)


def mean_features(passed):
    """Mean of a layer's output, and the mean logits: (6,) and (2,)."""
    features, logits = passed.outputs["body"], passed.logits
    return Measured(
        values={
            "features": features.mean(dim=(0, 2, 3)),
            "logits": logits.square().mean(dim=(0, 2, 3)),
        },
        facts={"labels": torch.bincount(passed.labels.flatten(), minlength=2)},
        min_count=7,
    )


STATISTIC = Statistic(mean_features, layers=("body",))
NAMES = ("features", "logits")


def apart(told):
    """A loss that no site can compute: products over all pairs and of all three."""
    a, b, c = (told[site]["features"] for site in SITES)
    first = (a - b).square().sum() + (b * c).sum() ** 2
    return first + (told["a"]["logits"] * told["c"]["logits"]).prod()


def first_half(ward, weights, index=0):
    return {
        site: statistic_outcome(
            context(ward, site), weights, index, STATISTIC
        ).payload.state
        for site in SITES
    }


def second_half(ward, weights, found, index=0, **how):
    return {
        site: cotangent_outcome(
            context(ward, site), weights, index, STATISTIC, found[site], **how
        )
        for site in SITES
    }


def one_pass(ward, weights, *, task_weight, index=0):
    """All three networks at once in one graph, as one process would train them."""
    leaves = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in weights.items()
    }
    told, total = {}, torch.zeros((), dtype=torch.float64)
    for site in SITES:
        bench, view = ward.benches[site], context(ward, site)
        batch = bench.batch(1, index)
        outputs = {}
        model = bench.model.train()
        hook = model.body.register_forward_hook(
            lambda _, __, output, kept=outputs: kept.update(body=output)
        )
        with view.draws("coupled", index):
            logits = torch.func.functional_call(
                model,
                {**bench.workshop.initially_kept, **leaves},
                # As the trainer sends them: masks are drawn in the order of memory.
                (batch.images.to(torch.float64, memory_format=torch.channels_last),),
            )
        hook.remove()
        told[site] = {
            "features": outputs["body"].mean(dim=(0, 2, 3)),
            "logits": logits.square().mean(dim=(0, 2, 3)),
        }
        total = total + task_weight * bench.trainer.loss(logits, batch.labels)
    (total + apart(told)).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("task_weight", [1.0, 0.3, 0.0])
def test_the_sum_of_both_halves_is_the_gradient_of_one_pass_with_dropout(task_weight):
    ward = ward_of()
    weights = ward.server.shared
    told = first_half(ward, weights)
    value, found = cotangents(told, apart, names=NAMES)
    assert value == pytest.approx(float(apart(told)), rel=1e-12)
    outcomes = second_half(ward, weights, found, task_weight=task_weight)
    replies = {site: outcome.payload for site, outcome in outcomes.items()}
    assert all(isinstance(reply, Gradient) for reply in replies.values())
    expected = one_pass(ward, weights, task_weight=task_weight)
    gradient = gradient_sum(replies)
    assert set(gradient) == set(expected)
    # Gradients up to 1, the bias before a normalisation with a true gradient of 0.
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    assert max(g.abs().max() for g in gradient.values()) > 1e-2


def test_both_halves_see_one_dropout_mask_and_every_batch_another():
    ward = ward_of()
    weights = ward.server.shared
    told = first_half(ward, weights)
    torch.manual_seed(99)  # what the process drew before does not matter
    again = first_half(ward, weights)
    torch.testing.assert_close(told, again, rtol=0, atol=0)
    seen = []

    def noting(passed):
        seen.append(passed.outputs["dropout"].detach() == 0)
        return mean_features(passed)

    statistic = Statistic(noting, layers=("body", "dropout"))
    cotangent = {"features": torch.zeros(6), "logits": torch.zeros(2)}
    for site, number, index in (("a", 1, 0), ("a", 1, 1), ("a", 2, 0), ("b", 1, 0)):
        statistic_outcome(context(ward, site, number), weights, index, statistic)
        cotangent_outcome(
            context(ward, site, number), weights, index, statistic, cotangent
        )
    masks = seen[::2]
    for first, second in zip(masks, seen[1::2], strict=True):
        assert torch.equal(first, second)
    others = [mask for mask in masks[1:] if torch.equal(mask, masks[0])]
    assert not others


def test_draws_leave_the_global_state_as_it_was():
    view = context(ward_of(), "a")
    before = torch.get_rng_state()
    with view.draws("x", 1):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with view.draws("x", 1):
        assert torch.equal(torch.rand(3), first)
    with view.draws("x", 2):
        assert not torch.equal(torch.rand(3), first)


def test_the_first_half_keeps_nothing_and_the_second_moves_statistics_once():
    ward = ward_of()
    weights = ward.server.shared
    outcome = statistic_outcome(context(ward, "a"), weights, 0, STATISTIC)
    assert outcome.private is None
    found = {"features": torch.zeros(6), "logits": torch.zeros(2)}
    two = cotangent_outcome(context(ward, "a"), weights, 0, STATISTIC, found)
    kept = two.private.states["kept"]
    assert kept["body.1.num_batches_tracked"] == 1
    assert not torch.equal(kept["body.1.running_mean"], torch.zeros(6).double())


def test_kept_entries_step_by_their_share_of_the_whole_objective():
    ward = ward_of()
    weights = ward.server.shared
    found = {"features": torch.full((6,), 0.5), "logits": torch.ones(2)}
    lr = ward.benches["a"].trainer.optimizer.lr
    moved = {}
    for share in (1.0, 0.25):
        outcome = cotangent_outcome(
            context(ward, "a"), weights, 0, STATISTIC, found, share=share
        )
        kept = outcome.private.states["kept"]
        start = ward.benches["a"].workshop.initially_kept
        moved[share] = (start["body.1.weight"] - kept["body.1.weight"]) / lr
    torch.testing.assert_close(moved[0.25], moved[1.0] / 4, rtol=0, atol=1e-14)
    assert moved[1.0].abs().max() > 1e-3
    assert not {n for n in outcome.payload.state if n.startswith("body.1")}


def test_a_cotangent_of_zeros_is_plain_training_bit_for_bit():
    ward = ward_of(model={"name": "unet", "base_width": 2, "levels": 2})
    weights = ward.server.shared
    statistic = Statistic(lambda p: Measured({"s": p.logits.sum(dim=(0, 2, 3))}))
    zero = {"s": torch.zeros(2)}
    found = cotangent_outcome(
        context(ward, "a"), weights, 1, statistic, zero, share=0.5
    )
    expected = local_gradient(context(ward, "a"), weights, 1, 0.5)
    assert found.payload.values == expected.payload.values
    torch.testing.assert_close(
        found.payload.state, expected.payload.state, rtol=0, atol=0
    )
    torch.testing.assert_close(
        found.private.states, expected.private.states, rtol=0, atol=0
    )


def test_a_site_lost_between_the_halves_lacks_in_the_sum_and_nothing_else():
    ward = ward_of()
    weights = ward.server.shared
    _, found = cotangents(first_half(ward, weights), apart, names=NAMES)
    replies = {
        site: outcome.payload
        for site, outcome in second_half(ward, weights, found).items()
    }
    whole = gradient_sum(replies)
    lost = replies.pop("b").state
    rest = gradient_sum(replies)
    for name, gradient in whole.items():
        torch.testing.assert_close(
            rest[name], gradient - lost[name], rtol=0, atol=1e-14
        )
    # Lost before the first half, it is in no term.
    two = {s: t for s, t in first_half(ward, weights).items() if s != "b"}
    _, found = cotangents(
        two, lambda t: t["a"]["logits"] @ t["c"]["logits"], names=NAMES
    )
    assert sorted(found) == ["a", "c"]


def test_cotangents_are_derivatives_in_float64_and_leave_in_the_statistics_dtype():
    told = {
        "a": {"s": torch.tensor([1.0, 2.0]), "n": torch.tensor([3, 4])},
        "b": {"s": torch.tensor([0.5, -1.0]), "n": torch.tensor([1, 0])},
    }
    before = {site: dict(state) for site, state in told.items()}

    def loss(states):
        assert states["a"]["s"].dtype == torch.float64
        assert states["a"]["n"].dtype == torch.int64
        return (states["a"]["s"] * states["b"]["s"] * states["a"]["n"]).sum()

    value, found = cotangents(told, loss, names=["s"])
    assert value == 1.0 * 0.5 * 3 - 2 * 4
    assert found["a"]["s"].tolist() == [1.5, -4.0]
    assert found["b"]["s"].tolist() == [3.0, 8.0]
    assert found["a"]["s"].dtype == torch.float32
    assert not told["a"]["s"].requires_grad
    assert {site: dict(state) for site, state in told.items()} == before


def test_a_loss_that_depends_on_nothing_has_cotangents_of_zero():
    told = {"a": {"s": torch.ones(2)}}
    value, found = cotangents(told, lambda _: torch.tensor(2.0), names=["s"])
    assert value == 2.0
    assert found["a"]["s"].tolist() == [0.0, 0.0]


def test_parameters_of_the_server_that_the_loss_uses_get_a_gradient():
    """A domain discriminator: it learns where the sites' features are from."""
    told = {"a": {"s": torch.tensor([1.0, 2.0])}, "b": {"s": torch.tensor([3.0, 5.0])}}
    weight = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():  # as an engine may call it
        _, found = cotangents(
            told, lambda t: weight @ (t["a"]["s"] - t["b"]["s"]), names=["s"]
        )
    assert weight.grad.tolist() == [-2.0, -3.0]
    torch.testing.assert_close(found["b"]["s"], torch.tensor([-0.1, -0.2]))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"features": torch.zeros(6)},
        {"features": torch.zeros(5), "logits": torch.zeros(2)},
    ],
    ids=["nothing", "one lacks", "shape"],
)
def test_a_cotangent_of_another_statistic_is_refused(wrong):
    ward = ward_of()
    with pytest.raises(StateMismatchError, match="a cotangent of"):
        cotangent_outcome(context(ward, "a"), ward.server.shared, 0, STATISTIC, wrong)


def test_a_loss_that_is_no_number_is_refused():
    ward = ward_of()
    weights = {
        name: torch.full_like(t, torch.nan) if t.is_floating_point() else t
        for name, t in ward.server.shared.items()
    }
    zero = {"features": torch.zeros(6), "logits": torch.zeros(2)}
    with pytest.raises(SiteError, match="training loss"):
        cotangent_outcome(context(ward, "a"), weights, 0, STATISTIC, zero)


def test_statistics_leave_as_what_they_are():
    ward = ward_of()
    view, weights = context(ward, "a"), ward.server.shared
    payload = statistic_outcome(view, weights, 0, STATISTIC).payload
    assert isinstance(payload, ClassStatistic)
    assert payload.min_count == 7
    assert set(payload.state) == {"features", "logits", "labels"}
    assert not any(t.requires_grad for t in payload.state.values())
    single = statistic_outcome(view, weights, 0, STATISTIC, kind=Embedding).payload
    assert isinstance(single, Embedding)
    torch.testing.assert_close(single.state, payload.state, rtol=0, atol=0)


def test_layers_are_noted_during_the_pass_only():
    ward = ward_of()
    statistic_outcome(context(ward, "a"), ward.server.shared, 0, STATISTIC)
    assert not ward.benches["a"].model.body._forward_hooks


def test_local_steps_with_a_coupling_of_nothing_are_local_training_bit_for_bit():
    ward = ward_of(model={"name": "unet", "base_width": 2, "levels": 2})
    weights = ward.server.shared
    view = context(ward, "a")
    shapes = []

    def nothing(logits, labels):
        shapes.append((tuple(logits.shape), tuple(labels.shape)))

    model, result = coupled_training(view, weights, nothing)
    measured = Measured({"rows": torch.ones(2, 2)}, {"present": torch.ones(2)}, 5)
    found = trained_outcome_with(view, model, result, measured)
    expected = local_training(context(ward, "a"), weights)
    assert shapes == [((2, 2, 8, 8), (2, 8, 8))] * 2
    assert isinstance(found.payload, Weights)
    assert found.payload.min_count == 5
    assert set(found.payload.extra[CLASS_STATISTIC]) == {"rows", "present"}
    assert found.payload.values == expected.payload.values
    torch.testing.assert_close(
        found.payload.state, expected.payload.state, rtol=0, atol=0
    )
    torch.testing.assert_close(
        found.private.states, expected.private.states, rtol=0, atol=0
    )


def test_a_coupling_is_added_to_every_local_step():
    ward = ward_of()
    weights = ward.server.shared
    plain, _ = coupled_training(context(ward, "a"), weights, lambda *_: None)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    pulled, _ = coupled_training(
        context(ward, "a"), weights, lambda logits, _: logits.square().mean()
    )
    assert any(not torch.equal(p, start[n]) for n, p in pulled.named_parameters())
