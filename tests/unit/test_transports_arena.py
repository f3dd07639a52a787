"""Shared memory: used again when free, never before, and given back."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from fedmed.transports.arena import KEPT_FREE, Pool, Segment, anonymous_memory


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> object:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "memfd:fedmed" not in Path("/proc/self/maps").read_text()


def test_what_one_view_writes_another_process_reads() -> None:
    segment = Segment(1, anonymous_memory(1 << 16), 1 << 16)
    other = Segment(1, os.dup(segment.descriptor), 1 << 16)
    segment.tensor()[0][7:10] = 3
    assert other.tensor()[0][6:11].tolist() == [0, 3, 3, 3, 0]
    segment.close()
    assert other.tensor()[0][6:11].tolist() == [0, 3, 3, 3, 0]
    other.close()


def test_memory_lives_as_long_as_any_view_of_it() -> None:
    segment = Segment(1, anonymous_memory(1 << 16), 1 << 16)
    view = segment.tensor()[0][64:128].view(torch.float32)
    view.fill_(2.5)
    segment.close()
    del segment
    gc.collect()
    assert view.tolist() == [2.5] * 16


def test_writes_behind_the_guard_stay_there() -> None:
    segment = Segment(1, anonymous_memory(1 << 16), 1 << 16)
    whole = segment.tensor()[0]
    whole.fill_(1)
    guarded = segment.guarded()
    assert guarded[:3].tolist() == [1, 1, 1]
    whole[1] = 2
    assert guarded[:3].tolist() == [1, 2, 1]
    guarded[0] = 9
    assert whole[:3].tolist() == [1, 2, 1]
    segment.renew_guard()
    assert segment.guarded()[:3].tolist() == [1, 2, 1]
    segment.close()


def test_who_still_looks_at_a_guarded_view_keeps_what_it_showed() -> None:
    size = 3 << 16
    segment = Segment(1, anonymous_memory(size), size)
    whole = segment.tensor()[0]
    whole.copy_(torch.arange(size).remainder(251))
    expected = whole[70_000:190_001].clone()
    kept = segment.guarded()[70_000:190_001]
    kept[5] = expected[5] = 99
    assert segment.end_loan()
    whole.fill_(7)
    assert torch.equal(kept, expected)
    assert segment.guarded().unique().tolist() == [7]
    assert not segment.end_loan()  # nobody holds the second view
    whole.fill_(8)
    assert torch.equal(kept, expected)
    assert segment.guarded().unique().tolist() == [8]
    segment.close()


def test_free_memory_is_used_again() -> None:
    pool = Pool()
    one = pool.allocate(1000)
    address = one.data_ptr()
    assert len(one) == 1000
    del one
    for size in (1, 999, 2000):
        again = pool.allocate(size)
        assert again.data_ptr() == address
        assert len(again) == size
        del again
    assert len(pool.segments) == 1
    pool.close()


def test_memory_in_use_is_not_used_again() -> None:
    pool = Pool()
    held = [pool.allocate(100_000).view(torch.float32)[10:20] for _ in range(6)]
    for number, view in enumerate(held):
        view.fill_(float(number))
    for _ in range(20):
        pool.allocate(100_000).fill_(255)
    assert [view.unique().tolist() for view in held] == [[k] for k in range(6)]
    del held, view
    pool.close()


def test_a_small_need_does_not_take_a_large_piece() -> None:
    pool = Pool()
    large = pool.allocate(50_000_000)
    address = large.data_ptr()
    del large
    small = pool.allocate(100)
    assert small.data_ptr() != address
    del small
    pool.close()


def test_the_best_fit_is_taken() -> None:
    pool = Pool()
    held = [pool.allocate(size) for size in (900_000, 600_000, 700_000)]
    addresses = [piece.data_ptr() for piece in held]
    del held
    fitting = pool.allocate(550_000)
    assert fitting.data_ptr() == addresses[1]
    del fitting
    pool.close()


def test_only_a_few_free_segments_are_kept_and_the_rest_is_told() -> None:
    pool = Pool()
    held = [pool.allocate(100_000) for _ in range(KEPT_FREE + 5)]
    numbers = set(pool.segments)
    del held
    piece = pool.allocate(100_000)
    assert len(pool.segments) == KEPT_FREE
    assert set(pool.dropped) == numbers - set(pool.segments)
    del piece
    pool.close()


def test_numbers_are_never_given_twice() -> None:
    pool = Pool()
    seen = set()
    for size in (10**6, 10, 10**7, 10**5, 10**6, 3 * 10**6, 10**4):
        for _ in range(KEPT_FREE + 2):
            seen.add(pool.take(size).number)
    assert len(seen) == 7 * (KEPT_FREE + 2)
    pool.release(sorted(seen))
    first = pool.take(10).number
    assert first in seen or first > max(seen)
    pool.close()


def test_nothing_is_as_good_as_a_little() -> None:
    pool = Pool()
    assert len(pool.allocate(0)) == 0
    pool.close()


def test_views_outlive_the_pool() -> None:
    pool = Pool()
    view = pool.allocate(4000).view(torch.float32)
    view.fill_(4.0)
    pool.close()
    del pool
    gc.collect()
    assert float(view.sum()) == 4000.0
