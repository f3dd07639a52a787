"""Messages as arrays: each distinct tensor once, and nothing of it is lost."""

from __future__ import annotations

import pickle

import torch

from fedmed.message import Message
from fedmed.transports.packing import Bundle, own_tensors, unpack

TENSORS = {
    "weights/b": torch.randn(3, 4).T,
    "weights/a": torch.arange(5),
    "weights/none": torch.zeros(0, 3),
    "weights/scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "weights/mask": torch.tensor([True, False, True]),
}


def same(one: Message, other: Message) -> bool:
    return (
        (one.kind, one.header) == (other.kind, other.header)
        and list(one.tensors) == list(other.tensors)
        and all(
            tensor.dtype == other.tensors[name].dtype
            and torch.equal(tensor, other.tensors[name])
            for name, tensor in one.tensors.items()
        )
    )


def test_messages_come_back_and_common_tensors_travel_once() -> None:
    own = torch.full((2, 2), 7.0)
    messages = [
        Message("train", {"round": 1}, TENSORS),
        Message("train", {"round": 2}, TENSORS),
        Message("train", {"round": 3}, {**TENSORS, "share/x": own}),
        Message("bye"),
    ]
    bundle = Bundle()
    sheets = [bundle.add(message) for message in messages]
    assert len(bundle.arrays) == len(TENSORS) + 1
    assert sheets[0].table is sheets[1].table
    arrived = own_tensors(bundle.arrays)
    for message, sheet in zip(
        messages, pickle.loads(pickle.dumps(sheets)), strict=True
    ):
        assert same(unpack(sheet, arrived), message)


def test_a_sheet_of_some_arrays_finds_them_in_their_new_places() -> None:
    bundle = Bundle()
    bundle.add(Message("first", {}, {"x": torch.zeros(9)}))
    message = Message("second", {}, TENSORS)
    sheet = bundle.add(message)
    place = {number: new for new, (_, number) in enumerate(reversed(sheet.table))}
    arrays = {new: bundle.arrays[number] for number, new in place.items()}
    moved = own_tensors([arrays[number] for number in sorted(arrays)])
    assert same(unpack(sheet.moved(place), moved), message)


def test_what_arrived_is_no_view_of_what_was_sent() -> None:
    tensor = torch.zeros(4)
    bundle = Bundle()
    sheet = bundle.add(Message("m", {}, {"x": tensor}))
    arrived = unpack(sheet, own_tensors(bundle.arrays))
    arrived.tensors["x"].fill_(3.0)
    assert tensor.tolist() == [0.0] * 4
