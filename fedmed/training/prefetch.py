"""Batches prepared in a thread while the last one trains.

Which batches come, and in which order, does not depend on whether a thread made them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

import torch

from fedmed.training.examples import Batch

WORTH_A_THREAD_S = 1e-3
"""A batch that is drawn faster than this is drawn when it is asked for."""


def prefetched(
    draw: Callable[[int], Batch],
    first: int,
    count: int,
    *,
    depth: int = 2,
    processes: int = 1,
) -> Iterator[Batch]:
    """Draw batches number `first`... in order, ahead of their use where that pays.

    The first batch is drawn when it is asked for, and timed; the others are drawn ahead
    by one thread if a batch costs more than `WORTH_A_THREAD_S` and there is a core to
    spare. The thread has ended when the iterator is exhausted, closed or has raised.

    Args:
        draw: Gives batch number t. Called for one batch at a time, and never twice.
        first: Number of the first batch.
        count: Number of batches.
        depth: Batches that wait at most, 0: none is drawn ahead.
        processes: Processes of this machine that train at the same time.

    Yields:
        `draw(first)`, `draw(first + 1)`, ...

    Raises:
        Exception: What `draw` raised, where its batch would have come.
    """
    if count < 1:
        return
    start_s = time.perf_counter()
    batch = draw(first)
    cost_s = time.perf_counter() - start_s
    yield batch
    del batch
    rest = range(first + 1, first + count)
    if rest and depth and cost_s > WORTH_A_THREAD_S and has_spare_core(processes):
        yield from _ahead(draw, rest, depth)
    else:
        yield from map(draw, rest)


def has_spare_core(processes: int = 1) -> bool:
    """Say whether a thread beside the training would find a core of its own.

    Where one process per core trains, a second thread only takes turns with the
    training, and both lose at the changes.
    """
    return available_cores() > processes * torch.get_num_threads()


def available_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ahead(draw: Callable[[int], Batch], numbers: range, depth: int) -> Iterator[Batch]:
    waiting: queue.Queue[Batch | BaseException] = queue.Queue()
    # A place is free once a batch was taken: at most `depth` wait at any time.
    places = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        for number in numbers:
            places.acquire()
            if stopped.is_set():
                return
            try:
                waiting.put(draw(number))
            except BaseException as error:
                waiting.put(error)
                return

    thread = threading.Thread(target=work, name="fedmed-batches", daemon=True)
    thread.start()
    try:
        for _ in numbers:
            drawn = waiting.get()
            places.release()
            if isinstance(drawn, BaseException):
                raise drawn
            yield drawn
            del drawn
    finally:
        stopped.set()
        places.release()
        thread.join()
