"""Flower's records as a message of ours within one machine, and back.

Arrays become tensors, which travel in shared memory; everything else becomes one text
of the header. The text is a pickle: it never comes from another machine.
"""

from __future__ import annotations

import base64
import functools
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmed.flat import FlatTensors
from fedmed.flower.shared_array import (
    NUMPY_DTYPES,
    SharedArray,
    numbers_of,
)

Entry = tuple[str, str, Any]
"""A record: its name, "arrays", "metrics" or "config", and what it holds but numbers.

Of arrays: pairs of a name and how to read the tensor: None, or dtype, shape and
serialisation of the bytes that the tensor holds. Of the others: their items.
"""

ArraySlots = tuple[tuple[str, tuple[str, tuple[int, ...], str] | None], ...]


def pickled(value: Any) -> str:
    """Write plain Python values as a text."""
    return base64.b64encode(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)).decode()


def unpickled(text: str) -> Any:
    """Read what `pickled` wrote."""
    return pickle.loads(base64.b64decode(text))


@functools.lru_cache(maxsize=4)
def unpickled_once(text: str) -> Any:
    """Read what is written in many messages; the object must not be changed."""
    return unpickled(text)


def slot_name(record: int, array: int) -> str:
    """Name a tensor so that names sort in the order of arrays.

    Example:
        >>> slot_name(0, 12)
        '0/000012'
    """
    return f"{record}/{array:06d}"


def tensors_of(
    records: list[ArrayRecord],
) -> tuple[list[ArraySlots], dict[str, Tensor]]:
    """Give the tensors of some records, and how to make arrays of them again."""
    slots, tensors = [], {}
    for index, record in enumerate(records):
        found = []
        for number, (name, array) in enumerate(record.items()):
            tensor = numbers_of(array)
            how = None
            if tensor is None:
                how = (array.dtype, tuple(array.shape), array.stype)
                tensor = torch.from_numpy(np.frombuffer(array.data, np.uint8))
            tensors[slot_name(index, number)] = tensor
            found.append((name, how))
        slots.append(tuple(found))
    return slots, tensors


def arrays_in(records: RecordDict) -> list[ArrayRecord]:
    """Give the records of arrays, in their order."""
    return [record for record in records.values() if isinstance(record, ArrayRecord)]


def form_of(records: RecordDict, slots: list[ArraySlots]) -> str:
    """Write all of some records but the numbers of their arrays."""
    entries: list[Entry] = []
    coming = iter(slots)
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            entries.append((name, "arrays", next(coming)))
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            items = {key: _builtin(value) for key, value in record.items()}
            entries.append((name, kind, items))
    return pickled(entries)


def _builtin(value: Any) -> Any:
    """Make NumPy's scalars, which pass as Python's, what Flower's wire makes them."""
    if isinstance(value, list):
        return [_builtin(item) for item in value]
    kind: Any
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    return value


def to_records(entries: list[Entry], tensors: Mapping[str, Tensor]) -> RecordDict:
    """Put records together again; arrays are views of the tensors."""
    records = RecordDict()
    views = views_of(tensors)
    index = 0
    for name, kind, content in entries:
        if kind == "arrays":
            records[name] = _array_record(index, content, views)
            index += 1
        else:
            items = {k: v[:] if isinstance(v, list) else v for k, v in content.items()}
            make = MetricRecord if kind == "metrics" else ConfigRecord
            records[name] = make(items)
    return records


def _array_record(
    index: int, slots: ArraySlots, views: Mapping[str, np.ndarray]
) -> ArrayRecord:
    record = ArrayRecord()
    # One by one: Flower copies the arrays of a dictionary that it is given.
    for number, (name, how) in enumerate(slots):
        values = views[slot_name(index, number)]
        record[name] = (
            SharedArray(values) if how is None else Array(*how, values.tobytes())
        )
    return record


def views_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """View tensors as arrays; of one buffer, without a tensor for each."""
    if not isinstance(tensors, FlatTensors):
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    base = tensors.buffer.numpy()
    return {
        slot.name: np.ndarray(slot.shape, NUMPY_DTYPES[slot.dtype], base, slot.offset)
        for slot in tensors.layout.slots
    }
