from __future__ import annotations

import dataclasses

import pytest
import torch

from fedmed.errors import WireError
from fedmed.message import Message
from fedmed.payload import (
    KINDS,
    Gradient,
    Metrics,
    Weights,
    expect,
    from_message,
    to_message,
)

STATE = {"conv.weight": torch.arange(4.0), "odd/name": torch.tensor(2)}


def filled(kind):
    """A payload of a kind with every field set."""
    values = {
        "num_examples": 3,
        "values": {"loss": 0.25, "steps": 2},
        "state": STATE,
        "buffers": {"norm.running_mean": torch.ones(2)},
        "extra": {"control": STATE, "moment": {"x": torch.zeros(1)}},
        "rows": ({"case_id": "1", "dice": 0.5}, {"case_id": "2", "dice": 0.75}),
        "min_count": 7,
    }
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_kind_comes_back_as_it_went(kind):
    payload = filled(kind)
    message = to_message(payload)
    assert message.kind == kind.__name__
    back = from_message(message)
    assert type(back) is kind
    for item in dataclasses.fields(kind):
        assert getattr(back, item.name) == getattr(payload, item.name), item.name


def test_tensors_are_flat_and_named_by_their_state():
    message = to_message(filled(Weights))
    assert set(message.tensors) == {
        *("state/conv.weight", "state/odd/name", "extra/moment/x"),
        *("extra/control/conv.weight", "extra/control/odd/name"),
    }
    assert set(message.header) == {"num_examples", "values", "min_count"}


@pytest.mark.parametrize(
    "path",
    ["weights/a", "state", "rows/a", "num_examples/a", "buffers/a", "extra/control"],
)
def test_a_tensor_that_the_kind_does_not_declare_is_refused(path):
    message = Message("Weights", {}, {path: torch.zeros(1)})
    with pytest.raises(WireError, match="undeclared"):
        from_message(message)


def test_an_unknown_kind_is_refused():
    with pytest.raises(WireError, match="'Images'"):
        from_message(Message("Images", {}, {}))


def test_a_reply_of_another_kind_is_refused():
    payload = filled(Gradient)
    assert expect(payload, Gradient) is payload
    with pytest.raises(WireError, match=r"Metrics.*Gradient"):
        expect(payload, Metrics)
