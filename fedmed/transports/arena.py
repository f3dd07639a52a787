"""Memory that the processes of one machine share, without files and without leaks.

A segment is anonymous memory behind a file descriptor; the other process gets the
descriptor. The operating system takes it back when the last process that has it ends,
however it ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

GRAIN = 1 << 16
"""Bytes; sizes are rounded up, so that segments fit again."""

KEPT_FREE = 4
"""Free segments that stay mapped for the next exchange."""


class Segment:
    """A piece of shared memory as one process sees it.

    Args:
        number: Names it among those of the process that made it.
        descriptor: Of the memory; closed with the segment.
        size: Bytes.
    """

    def __init__(self, number: int, descriptor: int, size: int) -> None:
        self.number = number
        self.descriptor = descriptor
        self.size = size
        self._map = mmap.mmap(descriptor, size)
        self._guarded: mmap.mmap | None = None
        self._lent: list[weakref.ref[np.ndarray]] = []
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data

    def tensor(self) -> tuple[Tensor, np.ndarray]:
        """View all of it, and give what lives as long as any view of the view."""
        base = np.frombuffer(self._map, np.uint8)
        return torch.from_numpy(base), base

    def guarded(self) -> Tensor:
        """View all of it; what is written to the view, no other process sees."""
        if self._guarded is None:
            self._guarded = mmap.mmap(
                self.descriptor, self.size, access=mmap.ACCESS_COPY
            )
        base = np.frombuffer(self._guarded, np.uint8)
        self._lent.append(weakref.ref(base))
        return torch.from_numpy(base)

    def renew_guard(self) -> None:
        """Forget what was written to the guarded view: it hides what is new there."""
        self._guarded = None

    def end_loan(self) -> bool:
        """Let those who still look at guarded views keep what these show now.

        To be called before the memory is written to by another process.

        Returns:
            Whether anybody does.
        """
        kept = [base for lent in self._lent if (base := lent()) is not None]
        self._lent = []
        for base in kept:
            # The system copies a page of such a view when it is first written to.
            pages = base[:: mmap.PAGESIZE]
            np.bitwise_or(pages, 0, out=pages)
        if kept:
            self.renew_guard()
        return bool(kept)

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last view."""
        os.close(self.descriptor)


class Pool:
    """Segments that this process makes and uses again.

    Attributes:
        made: Segments that the other side has not been told of yet.
        dropped: Numbers of segments that the other side should forget.
    """

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self.dropped: list[int] = []
        self._free: list[int] = []
        self._released: deque[int] = deque()
        self._count = 0

    def take(self, num_bytes: int) -> Segment:
        """Give a segment of at least so many bytes that nobody uses."""
        self._collect()
        fitting = [n for n in self._free if self.segments[n].size >= num_bytes]
        if fitting:
            number = min(fitting, key=lambda n: self.segments[n].size)
            if self.segments[number].size <= 2 * num_bytes + GRAIN:
                self._free.remove(number)
                return self.segments[number]
        size = -(-max(num_bytes, 1) // GRAIN) * GRAIN
        self._count += 1
        segment = Segment(self._count, anonymous_memory(size), size)
        self.segments[segment.number] = segment
        return segment

    def allocate(self, num_bytes: int) -> Tensor:
        """Give memory that is free again when no view of it is left."""
        segment = self.take(num_bytes)
        whole, base = segment.tensor()
        weakref.finalize(base, self._released.append, segment.number)
        return whole[:num_bytes]

    def release(self, numbers: list[int]) -> None:
        """Note that nobody uses these segments any more."""
        self._released.extend(numbers)

    def _collect(self) -> None:
        while self._released:
            self._free.append(self._released.popleft())
        while len(self._free) > KEPT_FREE:
            number = self._free.pop(0)
            self.segments.pop(number).close()
            self.dropped.append(number)

    def close(self) -> None:
        """Give all descriptors back."""
        for segment in self.segments.values():
            segment.close()
        self.segments = {}
        self._free = []


def anonymous_memory(size: int) -> int:
    """Make shared memory without a name and give its descriptor."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fedmed", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
