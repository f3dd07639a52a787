"""The poisoned-update matrix (U1-U12, U15): that site is refused, the others stay."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedmed.errors import SiteError
from fedmed.flat import pack
from fedmed.gate import (
    Expectation,
    Yardstick,
    check_reply,
    measure,
    screen,
    update_norms,
)
from fedmed.message import Message
from fedmed.payload import (
    ClassStatistic,
    Embedding,
    Gradient,
    Metrics,
    Weights,
    from_message,
    to_message,
)

REFERENCE = {
    "w": torch.zeros(4, 3),
    "b": torch.zeros(3),
    "bn.num_batches_tracked": torch.tensor(10),
}
EXPECTATION = Expectation(
    REFERENCE, {"a": 20, "b": 30, "c": 40, "d": 50}, norm_factor=100.0
)


def weights(seed: int = 0, **entries: torch.Tensor) -> Message:
    rng = torch.Generator().manual_seed(seed)
    state = {
        "w": torch.randn(4, 3, generator=rng),
        "b": torch.randn(3, generator=rng),
        "bn.num_batches_tracked": torch.tensor(11),
    }
    return to_message(
        Weights(num_examples=20, values={"loss": 0.5}, state=state | entries)
    )


def with_header(**header: Any) -> Message:
    message = weights(2)
    return dataclasses.replace(message, header={**message.header, **header})


def without(name: str) -> Message:
    message = weights(2)
    kept = {key: t for key, t in message.tensors.items() if key != name}
    return dataclasses.replace(message, tensors=kept)


def poisoned(value: float) -> torch.Tensor:
    tensor = torch.ones(4, 3)
    tensor[2, 1] = value
    return tensor


POISON: dict[str, tuple[Message, str]] = {
    "U1 NaN": (weights(w=poisoned(math.nan)), "'state/w' holds NaN"),
    "U2 +inf": (weights(w=poisoned(math.inf)), "'state/w' holds NaN or infinity"),
    "U2 -inf": (weights(w=poisoned(-math.inf)), "'state/w' holds NaN or infinity"),
    "U3 broadcastable": (weights(w=torch.ones(3)), r"shape \(3,\); expected \(4, 3\)"),
    "U4 scalar": (weights(w=torch.tensor(1.0)), r"shape \(\); expected \(4, 3\)"),
    "U5 wrong shape": (weights(w=torch.ones(5, 3)), r"shape \(5, 3\)"),
    "U6 weight 1e12": (with_header(num_examples=10**12), "registered 30"),
    "U6 values": (with_header(values={"weight": 1e12}), r"weight is 1000000000000.0"),
    "U7 weight -9": (with_header(num_examples=-9), "num_examples is -9"),
    "U7 values": (with_header(values={"weight": -9}), "weight is -9"),
    "U8 weight 0": (with_header(num_examples=0), "num_examples is 0"),
    "U8 values": (with_header(weight=0.0), "weight is 0.0"),
    "U9 weight NaN": (with_header(num_examples=math.nan), "num_examples is nan"),
    "U9 values": (with_header(values={"weight": math.nan}), "weight is nan"),
    "U9 weight inf": (with_header(weight=math.inf), "weight is inf"),
    "U10 missing key": (without("state/b"), "lacks 'state/b'"),
    "U10 unknown key": (weights(x=torch.ones(1)), "'state/x' is no shared entry"),
    "U11 float counter": (
        weights(**{"bn.num_batches_tracked": torch.tensor(10.5).double()}),
        "dtype torch.float64; expected torch.int64",
    ),
    "U12 x1e9": (weights(w=torch.full((4, 3), 1e9)), "times the median"),
    "U12 overflows float32": (weights(w=torch.full((4, 3), 3e38)), "times the median"),
    "U15 dtype swap": (weights(w=torch.ones(4, 3).half()), "dtype torch.float16"),
    "kind": (dataclasses.replace(weights(), kind="Evil"), "kind 'Evil'"),
    "other kind": (to_message(Metrics()), "a Metrics reply where the other sites"),
    "section": (
        dataclasses.replace(weights(), tensors={"secret/w": torch.ones(4, 3)}),
        "belongs to no declared state",
    ),
    "count as bool": (with_header(num_examples=True), "num_examples is True"),
    "count as text": (with_header(num_examples="20"), "num_examples is '20'"),
    "count as float": (with_header(num_examples=20.0), "num_examples is 20.0"),
    "loss as text": (with_header(values={"loss": "low"}), "loss is 'low'"),
    "values as list": (with_header(values=[1]), "values are no mapping"),
    "rows as text": (with_header(rows="x"), "rows are no list"),
}


@pytest.mark.parametrize("name", POISON)
def test_the_poisoned_site_is_refused_and_the_round_goes_on(name: str) -> None:
    message, reason = POISON[name]
    good = {"a": weights(1), "c": weights(3), "d": weights(4)}
    accepted, refused = screen({**good, "b": message}, EXPECTATION)
    assert accepted == good
    assert list(refused) == ["b"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refused["b"])


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in POISON
        if n[:3] != "U12" and n not in {"U10 missing key", "other kind"}
    ],
)
def test_check_reply_names_the_site_and_the_reason(name: str) -> None:
    message, reason = POISON[name]
    with pytest.raises(SiteError, match=rf"^site b: .*{reason}"):
        check_reply(message, EXPECTATION, site_id="b")


def test_u8_all_weights_0_leaves_nothing_to_sum() -> None:
    accepted, refused = screen(
        {site: with_header(num_examples=0) for site in "abc"}, EXPECTATION
    )
    assert accepted == {}
    assert list(refused) == ["a", "b", "c"]


def test_u12_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    screen({"a": weights(1), "b": weights(w=torch.full((4, 3), 1e9))}, EXPECTATION)
    assert "site b: the update's norm (state) is 3.46e+09" in caplog.text


def test_an_absolute_norm_bound() -> None:
    bounded = dataclasses.replace(EXPECTATION, max_norm=2.0)
    check_reply(weights(w=torch.zeros(4, 3), b=torch.ones(3)), bounded, site_id="a")
    with pytest.raises(SiteError, match=r"norm \(state\) is 6"):
        check_reply(weights(b=torch.full((3,), 40.0)), bounded, site_id="a")


def test_the_norm_is_that_of_the_update_not_of_the_weights() -> None:
    reference = {"w": torch.full((1000,), 1e4)}
    expectation = Expectation(reference, {"a": 1}, norm_factor=2.0)
    step = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    moved = torch.from_numpy(step) + reference["w"]
    expected = np.linalg.norm(moved.numpy().astype(np.float64) - 1e4)
    message = to_message(Weights(num_examples=1, state={"w": moved}))
    assert update_norms(message, expectation) == {"state": pytest.approx(expected)}
    gradient = to_message(Gradient(num_examples=1, state={"w": moved}))
    expected = np.linalg.norm(moved.numpy().astype(np.float64))
    assert update_norms(gradient, expectation)["state"] == pytest.approx(expected)


def test_the_result_does_not_depend_on_who_answered_first() -> None:
    replies = {
        "a": weights(1),
        "b": weights(w=poisoned(math.nan)),
        "c": weights(3),
        "d": without("state/b"),
    }
    results = [
        screen(dict(order), EXPECTATION)
        for order in itertools.permutations(replies.items())
    ]
    assert all(list(a) == ["a", "c"] for a, _ in results)
    assert all(refused == results[0][1] for _, refused in results)


def test_nothing_of_two_replies_is_a_majority_then_the_fuller_one_is_right() -> None:
    accepted, refused = screen({"a": without("state/w"), "b": weights(1)}, EXPECTATION)
    assert list(accepted) == ["b"]
    assert "lacks 'state/w'" in refused["a"]


def test_sites_may_play_different_parts_if_the_exchange_says_so() -> None:
    replies = {"a": without("state/w"), "b": weights(1), "c": weights(2)}
    free = dataclasses.replace(EXPECTATION, alike=False)
    assert list(screen(replies, free)[0]) == ["a", "b", "c"]


def test_an_unregistered_site_is_refused() -> None:
    assert screen({"z": weights(1)}, EXPECTATION)[1] == {
        "z": "it is not registered in this study"
    }


def test_extra_states_are_compared_with_the_network_or_with_each_other() -> None:
    def reply(shape: tuple[int, ...], scale: float = 1.0) -> Message:
        extra = {"control": {"w": torch.ones(4, 3), "own": scale * torch.ones(shape)}}
        return to_message(Weights(num_examples=5, state=dict(REFERENCE), extra=extra))

    good = {"a": reply((2,)), "b": reply((2,))}
    _, refused = screen({**good, "c": reply((7,)), "d": reply((2,), 1e9)}, EXPECTATION)
    assert "'extra/control/own' differ in shape" in refused["c"]
    assert "norm (extra/control)" in refused["d"]
    assert len(refused) == 2


def test_statistics_must_be_alike_and_embeddings_may_differ_in_number() -> None:
    def embedding(rows: int, width: int = 4) -> Message:
        return to_message(Embedding(state={"e": torch.ones(rows, width)}))

    replies = {"a": embedding(3), "b": embedding(5), "c": embedding(3, 2)}
    assert list(screen(replies, EXPECTATION)[1]) == ["c"]

    def statistic(classes: int) -> Message:
        return to_message(ClassStatistic(state={"s": torch.ones(classes, classes)}))

    replies = {"a": statistic(4), "b": statistic(4), "c": statistic(1)}
    assert list(screen(replies, EXPECTATION)[1]) == ["c"]


def test_sites_that_stand_still_do_not_make_a_moving_one_suspect() -> None:
    still = to_message(Weights(num_examples=5, state=dict(REFERENCE)))
    accepted, refused = screen({"a": still, "b": still, "c": weights(1)}, EXPECTATION)
    assert list(accepted) == ["a", "b", "c"]
    assert refused == {}


def gradient(norm: float) -> Message:
    state = {"w": torch.zeros(4, 3), "b": torch.tensor([norm, 0.0, 0.0])}
    return to_message(Gradient(num_examples=5, state=state))


class TestUsualNorms:
    """A hard batch among easy ones is no attack: its norm was usual not long ago."""

    def test_a_usual_norm_passes_among_easy_batches(self) -> None:
        usual: dict[str, float] = {}
        first = {"a": gradient(0.2), "b": gradient(0.1), "c": gradient(0.4)}
        assert screen(first, EXPECTATION, usual) == (first, {})
        assert usual == {"state": pytest.approx(0.2)}
        later = {"a": gradient(1e-4), "b": gradient(2e-4), "c": gradient(0.3)}
        assert list(screen(later, EXPECTATION)[1]) == ["c"]
        assert screen(later, EXPECTATION, usual) == (later, {})
        assert usual == {"state": pytest.approx(0.2 * 0.99)}

    def test_what_is_large_against_both_is_refused_and_changes_nothing(self) -> None:
        usual = {"state": 0.2}
        replies = {"a": gradient(1e-4), "b": gradient(2e-4), "c": gradient(21.0)}
        _, refused = screen(replies, EXPECTATION, usual)
        assert "1.4e+05 times the median of the other sites and 105" in refused["c"]
        assert usual == {"state": pytest.approx(0.2 * 0.99)}

    @pytest.mark.parametrize("honest", ["a", "ab", "abc"])
    def test_one_site_cannot_raise_what_is_usual(self, honest: str) -> None:
        usual: dict[str, float] = {}
        for power in range(40):
            # As large as passes, each time.
            evil = 99 * max(1.0, usual.get("state", 1.0))
            replies = {s: gradient(1.0) for s in honest} | {"d": gradient(evil)}
            assert screen(replies, EXPECTATION, usual)[1] == {}, power
        assert usual == {"state": pytest.approx(1.0)}

    def test_who_stands_alone_is_not_held_against_the_past(self) -> None:
        for others in ({}, {"b": gradient(0.0)}):
            usual = {"state": 1e-6}
            replies = {"a": gradient(1.0), **others}
            assert screen(replies, EXPECTATION, usual) == (replies, {})

    def test_the_usual_fades(self) -> None:
        usual = {"state": 1.0}
        still = {site: gradient(1e-9) for site in "abc"}
        for _ in range(69):
            screen(still, EXPECTATION, usual)
        assert usual["state"] == pytest.approx(0.5, rel=0.01)
        rounds = dataclasses.replace(EXPECTATION, steps=69)
        screen(still, rounds, usual)
        assert usual["state"] == pytest.approx(0.25, rel=0.01)


class TestDifferentParts:
    """Sites that play different parts in one exchange are compared within each."""

    ROLES: ClassVar = {"a": "train", "b": "train"}

    def test_norms_are_compared_within_a_role(self) -> None:
        roles = dataclasses.replace(EXPECTATION, roles=self.ROLES)
        sizes = {"a": 1e-6, "b": 1e-6, "c": 1.0, "d": 1.0}
        replies = {site: gradient(size) for site, size in sizes.items()}
        usual: dict[str, float] = {}
        assert screen(replies, roles, usual) == (replies, {})
        assert usual == {
            "state": pytest.approx(1.0),
            "train/state": pytest.approx(1e-6),
        }
        assert list(screen({**replies, "b": gradient(1.0)}, roles, usual)[1]) == ["b"]

    def test_norms_that_differ_by_nature_have_the_factor_twice(self) -> None:
        free = dataclasses.replace(EXPECTATION, comparable=False)
        usual: dict[str, float] = {}
        first = {"a": gradient(1e-9), "b": gradient(1e-9), "c": gradient(1.0)}
        # Nothing is known yet.
        assert screen(first, free, usual) == (first, {})
        usual = {"state": 1e-3}
        assert screen(first, free, dict(usual)) == (first, {})
        _, refused = screen({**first, "b": gradient(1e9)}, free, usual)
        assert list(refused) == ["b"]
        assert "at most 1e+04 times is allowed" in refused["b"]
        together = {site: gradient(50.0) for site in "abc"}
        assert screen(together, free, usual) == (together, {})


def test_a_section_can_be_checked_for_what_is_in_it() -> None:
    def no_twos(state: dict[str, torch.Tensor]) -> str:
        return "holds a 2" if bool((state["b"] == 2).any()) else ""

    asked = dataclasses.replace(EXPECTATION, checks={"state": no_twos})
    replies = {"a": weights(1), "b": weights(b=torch.full((3,), 2.0))}
    for good, bad in zip(*map(packed_too, replies.values()), strict=True):
        accepted, refused = screen({"a": good, "b": bad}, asked)
        assert list(accepted) == ["a"]
        assert refused == {"b": "holds a 2"}


def test_whatever_is_accepted_becomes_a_payload() -> None:
    accepted, _ = screen({"a": weights(1)}, EXPECTATION)
    payload = from_message(accepted["a"])
    assert isinstance(payload, Weights)
    assert payload.state["bn.num_batches_tracked"].dtype == torch.int64


def flat(message: Message, *, measured: bool = False) -> Message:
    """The same reply, packed; with its norms if they came with it."""
    packed = dataclasses.replace(message, tensors=pack(message.tensors))
    if not measured:
        return packed
    return dataclasses.replace(packed, norms=measure(packed, Yardstick(REFERENCE)))


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", POISON)
def test_packed_replies_are_refused_for_the_same_reasons(
    name: str, measured: bool
) -> None:
    message, reason = POISON[name]
    good = {
        site: flat(weights(seed), measured=measured)
        for seed, site in ((1, "a"), (3, "c"), (4, "d"))
    }
    accepted, refused = screen(
        {**good, "b": flat(message, measured=measured)}, EXPECTATION
    )
    assert accepted == good
    assert list(refused) == ["b"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refused["b"])


@pytest.mark.parametrize("name", POISON)
def test_a_mixture_of_packed_and_plain_replies_is_screened_alike(name: str) -> None:
    good = {"a": flat(weights(1)), "c": weights(3), "d": flat(weights(4))}
    for bad in (POISON[name][0], flat(POISON[name][0])):
        accepted, refused = screen({**good, "b": bad}, EXPECTATION)
        assert accepted == good
        assert list(refused) == ["b"]


@pytest.mark.parametrize("measured", [False, True])
def test_squares_out_of_range_are_not_taken_for_infinity(measured: bool) -> None:
    """Every number is finite, so an update that all sites make is one."""
    huge = {
        site: flat(weights(seed, w=torch.full((4, 3), 3e38)), measured=measured)
        for seed, site in enumerate("abcd")
    }
    check_reply(huge["a"], EXPECTATION, site_id="a")
    assert screen(huge, EXPECTATION) == (huge, {})
    bounded = dataclasses.replace(EXPECTATION, max_norm=1e30)
    with pytest.raises(SiteError, match=r"norm \(state\)"):
        check_reply(huge["a"], bounded, site_id="a")


def half(scale: float, seed: int, dtype: torch.dtype) -> Message:
    rng = torch.Generator().manual_seed(seed)
    update = scale * torch.randn(200_000, generator=rng)
    state = {"w": (update + 1).to(dtype)}
    return flat(to_message(Weights(num_examples=1, state=state)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_layers_of_low_precision_are_measured_rightly(dtype: torch.dtype) -> None:
    reference = {"w": torch.ones(200_000, dtype=dtype)}
    expectation = Expectation(reference, dict.fromkeys("abc", 5), norm_factor=100.0)
    replies = {"a": half(0.5, 1, dtype), "b": half(0.5, 2, dtype)}
    assert screen({**replies, "c": half(4.0, 3, dtype)}, expectation)[1] == {}
    for message in replies.values():
        moved = message.tensors["state/w"].double().numpy() - 1
        expected = np.linalg.norm(moved)
        found = update_norms(message, expectation)["state"]
        assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("kind", [Weights, Gradient])
def test_packed_and_plain_replies_have_the_same_norms(kind: type[Any]) -> None:
    rng = torch.Generator().manual_seed(8)
    state = {name: torch.randn(t.shape, generator=rng) for name, t in REFERENCE.items()}
    state["bn.num_batches_tracked"] = torch.tensor(3)
    extra = {"buffers": {"b": torch.full((3,), 9.0)}}
    if kind is Weights:
        extra = {"extra": {"control": {"w": torch.randn(4, 3, generator=rng)}}}
    message = to_message(kind(num_examples=3, state=state, **extra))
    found = update_norms(flat(message), EXPECTATION)
    expected = update_norms(message, EXPECTATION)
    assert found.keys() == expected.keys()
    for section, norm in expected.items():
        assert found[section] == pytest.approx(norm, rel=1e-6), section


def test_norms_of_another_layout_do_not_stand_in_for_a_look() -> None:
    """A reply that cannot be measured is checked number by number."""
    strange = dataclasses.replace(weights(2), tensors={"state/w": torch.ones(7)})
    found = measure(flat(strange), Yardstick(REFERENCE))
    assert math.isnan(found["state"])
    unknown = dataclasses.replace(weights(2), tensors={"state/new": torch.ones(3)})
    assert math.isnan(measure(flat(unknown), Yardstick(REFERENCE))["state"])


def test_the_result_for_packed_replies_does_not_depend_on_their_order() -> None:
    replies = {
        "a": flat(weights(1)),
        "b": flat(weights(w=poisoned(math.nan))),
        "c": flat(weights(3)),
        "d": flat(without("state/b")),
    }
    results = [
        screen(dict(order), EXPECTATION)
        for order in itertools.permutations(replies.items())
    ]
    assert all(list(a) == ["a", "c"] for a, _ in results)
    assert all(refused == results[0][1] for _, refused in results)


STATISTIC = {"confusion": (3, 3), "counts": (3,)}
ASKED = dataclasses.replace(EXPECTATION, sends=STATISTIC)


def statistic(
    num_classes: int = 3, *, value: float = 1.0, **more: torch.Tensor
) -> Message:
    confusion = torch.full((num_classes, num_classes), value)
    state = {"confusion": confusion, "counts": torch.ones(num_classes), **more}
    return to_message(ClassStatistic(num_examples=3, state=state, min_count=5))


def packed_too(message: Message) -> list[Message]:
    """As it is, packed, and packed and measured."""
    return [message, flat(message), flat(message, measured=True)]


BAD_STATISTICS: dict[str, tuple[Message, str]] = {
    "NaN": (statistic(value=math.nan), "'state/confusion' holds NaN"),
    "infinite": (statistic(value=math.inf), "'state/confusion' holds NaN or inf"),
    "size": (statistic(num_classes=4), r"shape \(4, 4\); expected \(3, 3\)"),
    "name": (statistic(image=torch.ones(8, 8)), "'state/image' was not asked for"),
    "lacking": (
        to_message(ClassStatistic(state={"counts": torch.ones(3)})),
        "lacks 'confusion'",
    ),
    "section": (
        dataclasses.replace(statistic(), tensors={"extra/x/confusion": torch.ones(3)}),
        "belongs to no declared state",
    ),
    "no section": (
        dataclasses.replace(statistic(), tensors={"confusion": torch.ones(3, 3)}),
        "belongs to no declared state",
    ),
}


@pytest.mark.parametrize("name", BAD_STATISTICS)
def test_a_statistic_is_no_part_of_the_network_and_checked_by_what_was_asked(
    name: str,
) -> None:
    bad, reason = BAD_STATISTICS[name]
    for good, wrong in zip(packed_too(statistic()), packed_too(bad), strict=True):
        replies = {"a": good, "b": wrong, "c": good, "d": good}
        accepted, refused = screen(replies, ASKED)
        assert accepted == {"a": good, "c": good, "d": good}
        assert list(refused) == ["b"]
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(refused["b"])


def test_what_was_asked_for_is_right_even_if_most_sites_send_something_else() -> None:
    replies = {"a": statistic(4), "b": statistic(4), "c": statistic(3)}
    assert list(screen(replies, ASKED)[0]) == ["c"]


def test_sites_may_send_different_parts_of_what_was_asked_for() -> None:
    counts = to_message(ClassStatistic(state={"counts": torch.ones(3)}))
    free = dataclasses.replace(ASKED, alike=False)
    for message in packed_too(counts):
        replies = {"a": message, "b": statistic(), "c": statistic(num_classes=4)}
        accepted, refused = screen(replies, free)
        assert list(accepted) == ["a", "b"]
        assert "expected (3, 3)" in refused["c"]


def test_sites_may_send_different_entries_of_the_network() -> None:
    def gradient(*names: str) -> Message:
        state = {name: torch.ones_like(REFERENCE[name]) for name in names}
        return to_message(Gradient(num_examples=3, state=state))

    free = dataclasses.replace(EXPECTATION, alike=False)
    for parts in zip(
        packed_too(gradient("w")),
        packed_too(gradient("w", "b")),
        packed_too(gradient("b")),
        strict=True,
    ):
        replies = dict(zip("abc", parts, strict=True))
        assert screen(replies, free) == (replies, {})
        only_w = dataclasses.replace(free, sends={"w": (4, 3)})
        accepted, refused = screen(replies, only_w)
        assert list(accepted) == ["a"]
        assert "'state/b' was not asked for" in refused["c"]
        stranger = dataclasses.replace(free, sends={"w": (4, 3), "x": (3,)})
        bad = dataclasses.replace(gradient("w"), tensors={"state/x": torch.ones(3)})
        assert "no shared entry" in screen({"a": bad}, stranger)[1]["a"]


def test_an_undeclared_statistic_may_not_have_the_size_of_images() -> None:
    def maps(count: int) -> Message:
        return to_message(ClassStatistic(state={"maps": torch.ones(count)}))

    check_reply(maps(1 << 20), EXPECTATION, site_id="a")
    with pytest.raises(SiteError, match="1048577 numbers; at most 1048576"):
        check_reply(maps((1 << 20) + 1), EXPECTATION, site_id="a")
    asked = dataclasses.replace(EXPECTATION, sends={"maps": ((1 << 20) + 1,)})
    check_reply(maps((1 << 20) + 1), asked, site_id="a")
