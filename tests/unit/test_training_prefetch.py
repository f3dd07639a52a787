"""Batches drawn ahead: the same ones, in order, and no thread is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fedmed.training import prefetch
from fedmed.training.augment import Augmentation
from fedmed.training.examples import Batch, ExampleIndex
from fedmed.training.prefetch import prefetched


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the thread whatever a batch costs and however many cores there are."""
    monkeypatch.setattr(prefetch, "WORTH_A_THREAD_S", -1.0)
    monkeypatch.setattr(prefetch, "available_cores", lambda: 1000)
    yield
    assert not running()


def running() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "fedmed-batches"]


class Source:
    """Numbered batches, and who drew them."""

    def __init__(self, fail_at: int = -1) -> None:
        self.drawn: list[int] = []
        self.threads: list[str] = []
        self.fail_at = fail_at

    def __call__(self, number: int) -> Batch:
        if number == self.fail_at:
            raise KeyError(number)
        self.drawn.append(number)
        self.threads.append(threading.current_thread().name)
        return Batch(torch.full((1, 1), float(number)), torch.zeros(1))


def numbers(batches: Iterator[Batch]) -> list[int]:
    return [int(batch.images[0, 0]) for batch in batches]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
@pytest.mark.usefixtures("always_ahead")
def test_batches_come_once_and_in_order(depth: int, count: int) -> None:
    source = Source()
    found = numbers(prefetched(source, 4, count, depth=depth))
    assert found == source.drawn == list(range(4, 4 + count))
    assert set(source.threads[1:]) <= {"fedmed-batches" if depth else "MainThread"}
    assert source.threads[:1] in ([], ["MainThread"])


@pytest.mark.usefixtures("always_ahead")
def test_batches_are_those_that_are_drawn_without_a_thread() -> None:
    class Scan:
        case_id = "a"
        image_CIJK = np.random.default_rng(0).normal(size=(2, 9, 8, 5)).astype("f4")
        label_IJK = np.random.default_rng(1).integers(3, size=(9, 8, 5)).astype("u1")

    changes = Augmentation("IJ", 10, 0.1, 0.2, 0.1, 0.1)
    index = ExampleIndex([Scan()], "slice", augmentation=changes)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ahead = list(prefetched(lambda step: index.batch(3, step, 4), 0, 12))
    assert torch.equal(torch.get_rng_state(), before)
    for step, batch in enumerate(ahead):
        wanted = index.batch(3, step, 4)
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.labels, wanted.labels)


@pytest.mark.usefixtures("always_ahead")
def test_no_more_than_depth_batches_wait() -> None:
    source = Source()
    batches = prefetched(source, 0, 50, depth=3)
    next(batches)
    for _ in range(4):
        next(batches)
        time.sleep(0.02)
    assert 5 <= len(source.drawn) <= 5 + 3
    batches.close()


@pytest.mark.parametrize("fail_at", [0, 1, 5])
@pytest.mark.usefixtures("always_ahead")
def test_an_error_comes_where_the_batch_would_have_come(fail_at: int) -> None:
    batches = prefetched(Source(fail_at), 0, 9)
    for _ in range(fail_at):
        next(batches)
    with pytest.raises(KeyError, match=str(fail_at)):
        next(batches)
    assert list(batches) == []


@pytest.mark.usefixtures("always_ahead")
def test_a_consumer_that_stops_or_raises_leaves_no_thread() -> None:
    batches = prefetched(Source(), 0, 100)
    next(batches)
    next(batches)
    assert len(running()) == 1
    batches.close()
    assert not running()

    def consume() -> None:
        for batch in prefetched(Source(), 0, 100):
            if batch.images[0, 0] == 3:
                raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - our own, without a text
        consume()


def test_cheap_batches_need_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "WORTH_A_THREAD_S", 60.0)
    monkeypatch.setattr(prefetch, "available_cores", lambda: 1000)
    source = Source()
    assert numbers(prefetched(source, 0, 5)) == list(range(5))
    assert set(source.threads) == {"MainThread"}


def test_a_full_machine_gets_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "WORTH_A_THREAD_S", -1.0)
    monkeypatch.setattr(prefetch, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    full, spare = Source(), Source()
    numbers(prefetched(full, 0, 5, processes=4))
    numbers(prefetched(spare, 0, 5, processes=3))
    assert set(full.threads) == {"MainThread"}
    assert "fedmed-batches" in spare.threads
