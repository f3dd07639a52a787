"""Replies: sums over packed replies are those over plain ones, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.errors import SiteError, StateMismatchError, WireError
from fedmed.flat import CHUNK, FlatTensors, Section, pack
from fedmed.message import Message, State
from fedmed.partition import describe_state
from fedmed.payload import Gradient, Metrics, Weights, to_message
from fedmed.reduce import mean_of_rows, merge_states, weighted_mean
from fedmed.replies import Replies, SiteStates, section, states_of

SEED = int(np.random.SeedSequence().generate_state(1)[0])
"""Other numbers in every run; a failure shows it."""


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.PReLU(),
        nn.Conv2d(5, 2, 1),
        nn.BatchNorm2d(2, affine=False),
        nn.Linear(300, 250),
    )


def random_state(rng: np.random.Generator, scale: float) -> State:
    state = {}
    for name, tensor in network().state_dict().items():
        if tensor.dtype == torch.int64:
            state[name] = torch.tensor(int(rng.integers(1000)))
            continue
        values = rng.normal(size=tuple(tensor.shape)) * scale
        values = np.abs(values) if name.endswith("running_var") else values
        state[name] = torch.from_numpy(np.asarray(values)).to(tensor.dtype)
    return state


def random_replies(count: int, seed: int = SEED) -> dict[str, Message]:
    rng = np.random.default_rng(seed)
    return {
        f"site{k:02d}": to_message(
            Weights(
                num_examples=k + 1,
                state=random_state(rng, 10.0 ** rng.integers(-3, 4)),
                extra={"control": {"w": torch.from_numpy(rng.normal(size=4))}},
            )
        )
        for k in range(count)
    }


def packed(messages: Mapping[str, Message]) -> dict[str, Message]:
    return {
        site: dataclasses.replace(message, tensors=pack(message.tensors))
        for site, message in messages.items()
    }


def weights_of(sites: Mapping[str, object], seed: int = SEED) -> dict[str, float]:
    rng = np.random.default_rng(seed + 1)
    return {
        site: float(w)
        for site, w in zip(sites, rng.random(len(sites)) * 50, strict=True)
    }


def plain(messages: Mapping[str, Message], name: str = "state") -> dict[str, State]:
    """One state by site, as plain dictionaries."""
    return {site: dict(section(message, name)) for site, message in messages.items()}


def assert_same_bits(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        expected = other[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        bits = [
            t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, expected)
        ]
        assert torch.equal(*bits), f"{name}, seed {SEED}"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_means_of_packed_and_plain_states_are_bit_equal(count: int) -> None:
    messages = random_replies(count)
    states = Replies(packed(messages)).states("state")
    assert states.rows() is not None
    weights = weights_of(messages)
    assert_same_bits(
        weighted_mean(states, weights), weighted_mean(plain(messages), weights)
    )
    extra = Replies(packed(messages)).states("extra/control")
    assert_same_bits(
        weighted_mean(extra, weights),
        weighted_mean(plain(messages, "extra/control"), weights),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("num_passes", [None, 1, 3])
def test_merges_of_packed_and_plain_states_are_bit_equal(
    count: int, num_passes: int | None
) -> None:
    messages, entries = random_replies(count), describe_state(network())
    weights, rows = weights_of(messages), packed(messages)
    names = [e.name for e in entries if e.momentum is not None]
    assert names
    how = {"passes": dict.fromkeys(names, num_passes) if num_passes else None}
    merged = merge_states(Replies(rows).states("state"), weights, entries, **how)
    assert_same_bits(merged, merge_states(plain(messages), weights, entries, **how))


def test_a_site_of_weight_zero_does_not_take_part() -> None:
    messages, entries = random_replies(4), describe_state(network())
    for name, tensor in messages["site01"].tensors.items():
        fill = float("nan") if tensor.is_floating_point() else 10**6
        messages["site01"].tensors[name].fill_(fill)
    weights = weights_of(messages) | {"site01": 0.0}
    fewer = {site: w for site, w in weights.items() if w}
    states = Replies(packed(messages)).states("state")
    without = {site: state for site, state in plain(messages).items() if site in fewer}
    assert_same_bits(
        merge_states(states, weights, entries), merge_states(without, fewer, entries)
    )


def test_means_and_merges_beside_float64() -> None:
    messages, entries = random_replies(6), describe_state(network())
    weights = weights_of(messages)
    states = plain(messages)
    merged = merge_states(Replies(packed(messages)).states("state"), weights, entries)
    total = np.array([weights[site] for site in states])
    share = total / total.sum()

    def stack(name: str) -> np.ndarray:
        return np.stack([s[name].double().numpy() for s in states.values()])

    for name, tensor in merged.items():
        values = stack(name)
        if tensor.dtype == torch.int64:
            expected = values.max(0)
        else:
            expected = np.tensordot(share, values, 1)
        if name.endswith("running_var"):
            means = stack(name.replace("running_var", "running_mean"))
            centre = np.tensordot(share, means, 1)
            expected = np.tensordot(share, values + (means - centre) ** 2, 1)
        # Rounding is to float32 once, at the end.
        bound = np.spacing(np.abs(expected).astype(np.float32)) * 0.51 + 1e-12
        assert np.all(np.abs(tensor.double().numpy() - expected) <= bound), name


def test_runs_longer_than_a_chunk() -> None:
    rng = torch.Generator().manual_seed(SEED % 2**31)
    messages = {
        site: Message(
            "Weights", {}, {"state/w": torch.randn(2 * CHUNK + 5, generator=rng)}
        )
        for site in "abcde"
    }
    weights = weights_of(messages)
    states = Replies(packed(messages)).states("state")
    assert_same_bits(
        weighted_mean(states, weights), weighted_mean(plain(messages), weights)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(SEED % 2**31)
    messages = {
        site: Message(
            "Weights", {}, {"state/w": torch.randn(99, generator=rng).to(dtype)}
        )
        for site in "abc"
    }
    weights = weights_of(messages)
    states = Replies(packed(messages)).states("state")
    assert_same_bits(
        weighted_mean(states, weights), weighted_mean(plain(messages), weights)
    )


def test_results_are_new_and_replies_stay_as_they_are() -> None:
    messages = packed(random_replies(3))
    before = {site: m.tensors.buffer.clone() for site, m in messages.items()}
    weights = dict.fromkeys(messages, 1.0)
    states = Replies(messages).states("state")
    for merged in (
        weighted_mean(states, weights),
        merge_states(states, weights, describe_state(network())),
        weighted_mean(Replies(messages).states("state"), weights | {"site00": 0.0}),
    ):
        for tensor in merged.values():
            tensor.zero_()
    for site, message in messages.items():
        assert torch.equal(message.tensors.buffer, before[site])


def test_a_mixture_of_packed_and_plain_replies_is_summed_all_the_same() -> None:
    messages = random_replies(4)
    mixed = {**packed(messages), "site02": messages["site02"]}
    states = Replies(mixed).states("state")
    assert states.rows() is None
    weights = weights_of(messages)
    assert_same_bits(
        weighted_mean(states, weights), weighted_mean(plain(messages), weights)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"state/3.weight": torch.ones(3)},
        {"state/3.weight": torch.ones(2, 5, 1, 1).double()},
        {"state/more": torch.ones(1)},
    ],
)
def test_packed_states_that_differ_are_refused(change: State) -> None:
    messages = random_replies(3)
    tensors = {**messages["site01"].tensors, **change}
    messages["site01"] = dataclasses.replace(messages["site01"], tensors=tensors)
    states = Replies(packed(messages)).states("state")
    with pytest.raises(StateMismatchError, match="site01"):
        weighted_mean(states, dict.fromkeys(messages, 1.0))


def test_impossible_weights_are_refused_as_for_plain_states() -> None:
    messages = packed(random_replies(3))
    states = Replies(messages).states("state")
    for weights, words in (
        ({"site00": 1.0, "site01": 1.0}, "different sites: site02"),
        (dict.fromkeys(messages, 0.0), "no weight is positive"),
        (dict.fromkeys(messages, 1.0) | {"site01": float("nan")}, "site 'site01'"),
        (dict.fromkeys(messages, 1.0) | {"site01": -1.0}, "site 'site01'"),
    ):
        with pytest.raises(SiteError, match=words):
            weighted_mean(states, weights)
        with pytest.raises(SiteError, match=words):
            merge_states(states, weights, describe_state(network()))


def test_names_the_model_does_not_have_are_refused() -> None:
    messages = packed(random_replies(2))
    entries = [e for e in describe_state(network()) if e.name != "3.bias"]
    states = Replies(messages).states("state")
    with pytest.raises(StateMismatchError, match=r"site00.*3\.bias"):
        merge_states(states, dict.fromkeys(messages, 1.0), entries)


def test_a_variance_without_its_mean_is_refused() -> None:
    alone = {
        site: Message("Weights", {}, {"state/1.running_var": torch.ones(5)})
        for site in "ab"
    }
    states = Replies(packed(alone)).states("state")
    with pytest.raises(StateMismatchError, match=r"without 1\.running_mean"):
        merge_states(states, {"a": 1, "b": 1}, describe_state(network()))


def test_replies_are_payloads_in_sorted_order() -> None:
    messages = packed(random_replies(3))
    replies = Replies(dict(reversed(messages.items())))
    assert list(replies) == sorted(messages)
    assert len(replies) == 3
    reply = replies["site01"]
    assert isinstance(reply, Weights)
    assert reply.num_examples == 2
    assert replies["site01"] is reply
    assert_same_bits(reply.state, plain(messages)["site01"])
    assert_same_bits(
        dict(reply.extra["control"]), plain(messages, "extra/control")["site01"]
    )
    assert "site09" not in replies


def test_an_undeclared_tensor_is_refused_when_somebody_looks() -> None:
    bad = Message("Metrics", {}, pack({"state/w": torch.ones(1)}))
    with pytest.raises(WireError, match="undeclared"):
        Replies({"a": bad})["a"]


def test_states_of_replies_and_of_payloads_are_alike() -> None:
    messages = packed(random_replies(3))
    replies = Replies(messages)
    payloads = dict(replies)
    for name in ("state", "extra/control"):
        ours, theirs = states_of(replies, name), states_of(payloads, name)
        assert isinstance(ours, SiteStates)
        assert list(ours) == list(theirs)
        for site in ours:
            assert_same_bits(dict(ours[site]), dict(theirs[site]))
    gradient = Gradient(num_examples=1, buffers={"m": torch.ones(2)})
    assert states_of({"a": gradient}, "buffers")["a"]["m"].tolist() == [1.0, 1.0]


def test_a_section_nobody_sent_is_empty() -> None:
    for messages in (random_replies(2), packed(random_replies(2))):
        states = Replies(messages).states("buffers")
        assert {site: dict(state) for site, state in states.items()} == {
            "site00": {},
            "site01": {},
        }
        assert weighted_mean(states, dict.fromkeys(messages, 1.0)) == {}
        assert merge_states(states, dict.fromkeys(messages, 1.0), ()) == {}
    metrics = Replies({"a": to_message(Metrics(num_examples=1))})
    assert isinstance(metrics["a"], Metrics)


def test_the_bytes_of_a_packed_message_are_those_of_its_tensors() -> None:
    messages = random_replies(1)
    assert packed(messages)["site00"].num_bytes == messages["site00"].num_bytes


class CountingAdder:
    """Does what `fedmed.reduce.mean_of_rows` does, or leaves it to it."""

    def __init__(self, *, willing: bool) -> None:
        self.willing = willing
        self.asked = 0
        self.brought: list[tuple[int, tuple[str, ...]]] = []

    def mean(
        self, section: Section, rows: Sequence[FlatTensors], shares: Sequence[float]
    ) -> FlatTensors | None:
        self.asked += 1
        return mean_of_rows(section, rows, shares) if self.willing else None

    def bring(self, rows: Sequence[FlatTensors], names: tuple[str, ...]) -> None:
        self.brought.append((len(rows), names))


def helped_by(adder: CountingAdder, messages: Mapping[str, Message]) -> Replies:
    flat = packed(messages)
    for message in flat.values():
        assert isinstance(message.tensors, FlatTensors)
        message.tensors.adder = adder
    return Replies(flat)


@pytest.mark.parametrize("willing", [True, False])
def test_an_adder_may_help_or_refuse(willing: bool) -> None:
    messages = random_replies(5)
    adder = CountingAdder(willing=willing)
    weights = weights_of(messages)
    mean = weighted_mean(helped_by(adder, messages).states("state"), weights)
    assert (adder.asked, adder.brought) == (1, [])
    assert_same_bits(mean, weighted_mean(plain(messages), weights))


def test_a_merge_reads_the_statistics_of_those_who_take_part_and_nothing_else() -> None:
    messages, entries = random_replies(5), describe_state(network())
    adder = CountingAdder(willing=True)
    weights = weights_of(messages) | {"site02": 0.0}
    merged = merge_states(helped_by(adder, messages).states("state"), weights, entries)
    assert_same_bits(merged, merge_states(plain(messages), weights, entries))
    statistics = {f"state/{e.name}" for e in entries if e.role == "norm_statistic"}
    assert [(rows, set(names)) for rows, names in adder.brought] == [(4, statistics)]
