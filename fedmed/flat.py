"""Named tensors that lie side by side in one buffer.

Replies of sites are packed once, where they are made. What is then done with them
(checks, sums over sites, travel within a machine) works on whole runs of numbers, and
a tensor by its name is made only for those who ask for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; the first number of a run starts at a multiple."""

CHUNK = 1 << 15
"""Numbers treated at a time: what a processor's own cache holds."""

MEASURED = 1 << 16
"""Numbers measured at a time: few calls, and still within that cache."""

NESTED = "extra"
"""Tensors below this name have one more part in the name of their section."""


def section_of(name: str) -> tuple[str, str]:
    """Split a tensor's name in a message.

    Example:
        >>> section_of("state/conv.weight"), section_of("extra/control/conv.weight")
        (('state', 'conv.weight'), ('extra/control', 'conv.weight'))
    """
    section, slash, entry = name.partition("/")
    if not slash:
        return "", name
    if section == NESTED:
        inner, _, entry = entry.partition("/")
        section = f"{NESTED}/{inner}"
    return section, entry


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        dtype: E.g. `torch.float32`.
        shape: Row-major.
        offset: Bytes from the start of the buffer.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @functools.cached_property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes in it."""
        return self.numel * self.dtype.itemsize

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Of the row-major tensor, in numbers."""
        found = [1]
        for size in reversed(self.shape[1:]):
            found.append(found[-1] * size)
        return tuple(reversed(found))[: len(self.shape)]

    @functools.cached_property
    def position(self) -> int:
        """Numbers of its own dtype from the start of the buffer."""
        return self.offset // self.dtype.itemsize

    def read(self, buffer: Tensor) -> Tensor:
        """View it in a buffer of bytes."""
        flat = buffer[self.offset : self.offset + self.num_bytes]
        return flat.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Run:
    """Tensors of one section and dtype, without gaps.

    Attributes:
        section: As `section_of` names it.
        dtype: Of all of them.
        offset: Bytes from the start of the buffer.
        numel: Numbers in all of them.
        names: Of the tensors, in their order.
    """

    section: str
    dtype: torch.dtype
    offset: int
    numel: int
    names: tuple[str, ...]

    def read(self, buffer: Tensor) -> Tensor:
        """View it, (numel,), in a buffer of bytes."""
        end = self.offset + self.numel * self.dtype.itemsize
        return buffer[self.offset : end].view(self.dtype)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a message lies; layouts that are equal are one object.

    Attributes:
        slots: In the order of sections, dtypes and names.
        num_bytes: Of the whole buffer.
    """

    slots: tuple[Slot, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Lay out tensors."""
        described = [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
        return _layout(tuple(described))

    @classmethod
    def interned(cls, slots: tuple[Slot, ...]) -> Layout:
        """Find the layout that arrived from another process among our own."""
        return _layout(tuple((s.name, s.dtype, s.shape) for s in slots))

    @functools.cached_property
    def content_bytes(self) -> int:
        """Bytes of the tensors, without the gaps between runs."""
        return sum(slot.num_bytes for slot in self.slots)

    @functools.cached_property
    def by_name(self) -> dict[str, Slot]:
        """Slots by name, in sorted order of the names."""
        return {s.name: s for s in sorted(self.slots, key=lambda s: s.name)}

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbours of equal section and dtype together."""
        runs = []
        for (section, dtype), group in groupby(self.slots, key=_kind):
            slots = tuple(group)
            numel = sum(slot.numel for slot in slots)
            names = tuple(slot.name for slot in slots)
            runs.append(Run(section, dtype, slots[0].offset, numel, names))
        return tuple(runs)

    @functools.cached_property
    def sections(self) -> dict[str, Section]:
        """What each section holds, under the names within it."""
        found = {}
        for name in sorted({run.section for run in self.runs}):
            slots = {
                section_of(s.name)[1]: s
                for s in self.by_name.values()
                if section_of(s.name)[0] == name
            }
            runs = tuple(run for run in self.runs if run.section == name)
            found[name] = Section(name, slots, runs)
        return found

    def __hash__(self) -> int:
        """By identity: equal layouts are one object."""
        return id(self)

    def __eq__(self, other: object) -> bool:
        """By identity."""
        return self is other


@dataclass(frozen=True)
class Section:
    """One section of a layout: names within it, and its runs in the buffer."""

    name: str
    slots: Mapping[str, Slot]
    runs: tuple[Run, ...]

    @functools.cached_property
    def alone(self) -> Layout:
        """The layout of a buffer that holds nothing else, with the same runs."""
        return _layout(tuple((s.name, s.dtype, s.shape) for s in self.slots.values()))


@runtime_checkable
class Adder(Protocol):
    """Whoever has the replies of an exchange, and may add them where they are."""

    def mean(
        self, section: Section, rows: Sequence[FlatTensors], shares: Sequence[float]
    ) -> FlatTensors | None:
        """Do what `fedmed.reduce.mean_of_rows` does, or say None to leave it to it."""

    def bring(self, rows: Sequence[FlatTensors], names: tuple[str, ...]) -> None:
        """Get ready to read these tensors of all these replies, and no others."""


class FlatTensors(Mapping[str, Tensor]):
    """Named tensors in one buffer; a view is made when it is asked for.

    Args:
        layout: Where each lies.
        buffer: (num_bytes,) of uint8; it may hold more behind them.
        adder: Who can add such buffers faster than this process alone.

    Attributes:
        squares: Sums of squares of the runs that were measured when they were packed.
    """

    __slots__ = ("_typed", "_views", "adder", "buffer", "layout", "squares")

    def __init__(
        self, layout: Layout, buffer: Tensor, adder: Adder | None = None
    ) -> None:
        self.layout = layout
        self.buffer = buffer
        self.adder = adder
        self.squares: dict[Run, float] = {}
        self._views: dict[str, Tensor] = {}
        self._typed: dict[torch.dtype, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """View one tensor."""
        if name not in self._views:
            slot = self.layout.by_name[name]
            numbers = self._numbers(slot.dtype)
            self._views[name] = numbers.as_strided(
                slot.shape, slot.strides, numbers.storage_offset() + slot.position
            )
        return self._views[name]

    def joined(self, names: Sequence[str]) -> Tensor:
        """Copy some tensors of one dtype, one behind the other, to (N,)."""
        slots = [self.layout.by_name[name] for name in names]
        numbers = self._numbers(slots[0].dtype)
        return torch.cat([numbers[s.position : s.position + s.numel] for s in slots])

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        """View the whole buffer as numbers of one dtype."""
        if dtype not in self._typed:
            self._typed[dtype] = self.buffer[: self.layout.num_bytes].view(dtype)
        return self._typed[dtype]

    def __iter__(self) -> Iterator[str]:
        """Names in sorted order."""
        return iter(self.layout.by_name)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.layout.slots)

    @property
    def content_bytes(self) -> int:
        """Bytes of the tensors, without the gaps between runs."""
        return self.layout.content_bytes

    def state(self, section: str) -> dict[str, Tensor]:
        """The tensors of one section, under their names within it."""
        found = self.layout.sections.get(section)
        if found is None:
            return {}
        return {name: self[slot.name] for name, slot in found.slots.items()}


Origin = Callable[[Run], "Tensor | None"]
"""Gives what a run is measured from, (numel,), or None for zero."""


def pack(
    tensors: Mapping[str, Tensor],
    buffer: Tensor | None = None,
    *,
    origin: Origin | None = None,
    layout: Layout | None = None,
) -> FlatTensors:
    """Copy tensors side by side.

    Args:
        tensors: Of any shapes, dtypes, devices and strides.
        buffer: Where to; at least `Layout.of(tensors).num_bytes` of uint8.
        origin: Measure the floating runs too, while they are at hand.
        layout: `Layout.of(tensors)`, if it is known.

    Returns:
        The copies: dense, row-major, on the CPU; with their `squares` if measured.
    """
    layout = layout or Layout.of(tensors)
    if buffer is None:
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
    packed = FlatTensors(layout, buffer)
    with torch.no_grad():
        for run in layout.runs:
            target = run.read(buffer)
            measured = origin is not None and run.dtype.is_floating_point
            start = origin(run) if measured and origin else None
            squares = _fill(
                target, [tensors[name] for name in run.names], start, measured
            )
            if measured:
                packed.squares[run] = squares
    return packed


def lazy_clone(tensor: Tensor) -> Tensor:
    """Copy a tensor when somebody writes to it or to the copy, not before.

    Memory that torch does not own (an array behind `from_numpy`) is copied at once.
    The one gap: a NumPy view taken of the tensor before, and written to afterwards.
    """
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:
        return tensor.clone()


def sum_of_squares(values: Tensor, origin: Tensor | None = None) -> float:
    r"""Sum $\sum_i (x_i - o_i)^2$ of a run, (N,) each.

    Differences and products have the dtype of the run (float32 at least), in chunks
    that are added in float64: enough for a bound, and read at the speed of memory.

    Returns:
        The sum; NaN or infinite if any number is, or if its square is out of range.
    """
    values = values.detach()
    if len(values) <= MEASURED:
        return _squares(values, origin)
    room = torch.empty(MEASURED, dtype=values.dtype)
    total = 0.0
    for start in range(0, len(values), MEASURED):
        part = slice(start, start + MEASURED)
        own = None if origin is None else origin[part]
        total += _squares(values[part], own, room[: len(values) - start])
    return total


def _squares(
    values: Tensor, origin: Tensor | None, room: Tensor | None = None
) -> float:
    """Sum the squares of a few numbers; `room`, as long, is for the differences."""
    if origin is not None:
        values = torch.sub(values, origin, out=room)
    if values.dtype.itemsize < torch.float32.itemsize:
        values = values.float()
    return float(torch.dot(values, values))


def run_of(state: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """Give tensors of one dtype as one run: a view if they lie side by side.

    Args:
        state: Holds the names.
        names: In their order.

    Returns:
        (numel,) in the order of the names, maybe sharing memory.
    """
    tensors = [state[name].detach() for name in names]
    first = tensors[0]
    if len(tensors) == 1:
        return first.reshape(-1)
    at = first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if (
            not tensor.is_contiguous()
            or tensor.data_ptr() != at
            or tensor.untyped_storage().data_ptr() != storage
        ):
            return torch.cat([tensor.reshape(-1) for tensor in tensors])
        at += tensor.numel() * tensor.element_size()
    total = (at - first.data_ptr()) // first.element_size()
    return first.as_strided((total,), (1,), first.storage_offset())


def _fill(
    run: Tensor, tensors: list[Tensor], origin: Tensor | None, measured: bool
) -> float:
    """Fill a run; give its sum of squares if it is to be measured."""
    if origin is not None and origin.numel() != run.numel():
        origin = None  # its names or shapes are wrong, which the gate will say
    total, start, end = 0.0, 0, 0
    small: list[Tensor] = []
    for tensor in (tensor.detach() for tensor in tensors):
        if small and (end - start >= MEASURED or tensor.numel() > MEASURED):
            total += _join(run[start:end], small, _part(origin, start, end), measured)
            small, start = [], end
        end += tensor.numel()
        if tensor.numel() > MEASURED:
            total += _copy(run[start:end], tensor, _part(origin, start, end), measured)
            start = end
        else:
            small.append(tensor)
    if small:
        total += _join(run[start:end], small, _part(origin, start, end), measured)
    return total


def _part(origin: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if origin is None else origin[start:end]


def _join(
    target: Tensor, tensors: list[Tensor], origin: Tensor | None, measured: bool
) -> float:
    """Lay small tensors side by side, in one call; they are still in the cache then."""
    if len({tensor.device for tensor in tensors}) == 1 and not tensors[0].is_cpu:
        target.copy_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    else:
        torch.cat([tensor.cpu().reshape(-1) for tensor in tensors], out=target)
    return sum_of_squares(target, origin) if measured else 0.0


def _copy(
    target: Tensor, tensor: Tensor, origin: Tensor | None, measured: bool
) -> float:
    """Copy one large tensor."""
    if measured and tensor.is_contiguous() and tensor.device.type == "cpu":
        return _copy_measured(target, tensor.view(-1), origin)
    target.view(tensor.shape).copy_(tensor)
    return sum_of_squares(target, origin) if measured else 0.0


def _copy_measured(target: Tensor, values: Tensor, origin: Tensor | None) -> float:
    """Copy (N,) and sum its squares, block by block: each is read from memory once."""
    targets, parts = torch.split(target, MEASURED), torch.split(values, MEASURED)
    if origin is None:
        return sum(
            _squares(place.copy_(part), None)
            for place, part in zip(targets, parts, strict=True)
        )
    total = 0.0
    origins = torch.split(origin, MEASURED)
    for place, part, own in zip(targets, parts, origins, strict=True):
        # The place of the copy is in the cache next, so the differences go there.
        total += _squares(part, own, place)
        place.copy_(part)
    return total


def _kind(slot: Slot) -> tuple[str, torch.dtype]:
    return section_of(slot.name)[0], slot.dtype


@functools.lru_cache(maxsize=1024)
def _layout(described: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> Layout:
    def order(item: tuple[str, torch.dtype, Any]) -> tuple[str, str, str]:
        return section_of(item[0])[0], str(item[1]), item[0]

    ordered = tuple(sorted(described, key=order))
    if ordered != described:
        return _layout(ordered)
    slots, offset = [], 0
    for _, group in groupby(ordered, key=lambda item: order(item)[:2]):
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        for name, dtype, shape in group:
            slots.append(Slot(name, dtype, shape, offset))
            offset += slots[-1].num_bytes
    return Layout(tuple(slots), -(-offset // ALIGNMENT) * ALIGNMENT)
