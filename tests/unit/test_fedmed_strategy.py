from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fedmed.message import State
from fedmed.optimizer import OptimizerSpec
from fedmed.partition import StatePartition
from fedmed.payload import Payload
from fedmed.strategy import (
    Cohort,
    Member,
    Outcome,
    Private,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    at_site,
)

MEMBERS = tuple(Member(site, count) for site, count in (("a", 3), ("b", 1), ("c", 4)))
COHORT = Cohort(MEMBERS, steps=3, round=2, rng_seed=0)


@dataclass(frozen=True)
class Counting(Strategy):
    paper: ClassVar[str] = "none"

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        yield cohort.ask(self.act, index=index)
        return server.remember(seen={"index": torch.tensor(index)})

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        yield cohort.ask(self.act, weights=server.shared, by_site={"b": {"index": 9}})
        return server

    @at_site
    def act(self, site: SiteContext, weights: State, index: int) -> Outcome:
        del site, weights, index
        return Outcome(Payload())

    def private(self) -> None:
        """Not addressed by the server."""


def server(**options):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    partition = StatePartition.of(model, ["norm_statistics"])
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    shared, _ = partition.split(state)
    spec = OptimizerSpec("sgd", lr=0.5, momentum=0.5)
    return Server(shared, {}, partition.entries, partition, spec, **options)


def exchanges(half):
    asked = []
    try:
        asked.append(next(half))
        while True:
            asked.append(half.send({}))
    except StopIteration as end:
        return asked, end.value


def test_a_round_is_one_exchange_or_one_a_step():
    asked, _ = exchanges(Counting().run_round(server(), COHORT))
    assert [e.action for e in asked] == ["act"]
    assert asked[0].site_ids == ("a", "b", "c")
    assert asked[0].content_by_site == {"b": {"index": 9}}
    asked, after = exchanges(Counting(sync="step").run_round(server(), COHORT))
    assert [e.content for e in asked] == [{"index": 0}, {"index": 1}, {"index": 2}]
    assert after.memory["seen"]["index"] == 2


def test_only_marked_methods_are_addressed():
    with pytest.raises(TypeError, match="private is not marked at_site"):
        COHORT.ask(Counting().private)


def test_weights_are_examples_or_equal():
    assert Counting().weights_of(COHORT) == {"a": 3.0, "b": 1.0, "c": 4.0}
    assert Counting(weighting="uniform").weights_of(COHORT) == dict.fromkeys("abc", 1.0)
    assert COHORT.select(("c", "a")).num_examples == {"a": 3, "c": 4}


def test_a_server_is_a_value():
    first = server()
    noted = copy.deepcopy((first.shared, first.memory))
    gradient = {name: torch.ones_like(t) for name, t in first.trainable().items()}
    second = first.descend(gradient).remember(x={"y": torch.ones(1)})
    third = second.descend(gradient)
    assert (first.memory, noted[1]) == ({}, {})
    for name, tensor in noted[0].items():
        assert torch.equal(first.shared[name], tensor)
        assert torch.equal(second.shared[name], tensor - 0.5)
        torch.testing.assert_close(third.shared[name], tensor - 0.5 - 0.75)
    assert set(third.memory) == {"optimizer", "x"}


def test_phases_have_optimisers_and_memories_of_their_own():
    start = server()
    part = {"0.bias": torch.ones(2)}
    after = start.descend(part, optimizer=OptimizerSpec("adam"), memory="second")
    assert set(after.memory) == {"second"}
    assert {n.rpartition("|")[0] for n in after.memory["second"]} == {"0.bias"}
    assert torch.equal(after.shared["0.weight"], start.shared["0.weight"])


def test_gradients_are_clipped_before_the_step():
    start = server(clip_norm=1.0)
    after = start.descend({"0.bias": torch.tensor([30.0, 40.0])})
    step = start.shared["0.bias"] - after.shared["0.bias"]
    torch.testing.assert_close(step, torch.tensor([0.3, 0.4]))


def test_trainable_entries_are_shared_parameters():
    found = server()
    assert set(found.trainable()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(found.trainable(part="1")) == {"1.weight", "1.bias"}


def test_private_values_are_replaced_and_never_changed():
    first = Private({"kept": {"w": torch.ones(1)}}, {"steps": 3})
    second = first.with_states(control={"w": torch.zeros(1)})
    assert set(first.states) == {"kept"}
    assert set(second.states) == {"kept", "control"}
    assert second.facts == {"steps": 3}
