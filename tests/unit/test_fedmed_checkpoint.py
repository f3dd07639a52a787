"""Checkpoints survive kills, damage and odd names; the newest and the best stay."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.checkpoint import Checkpoint, Checkpoints, read_tree, write_tree
from fedmed.errors import StorageError


def states(number: int) -> dict[str, Any]:
    return {
        "shared": {"conv.weight": torch.full((3, 2), float(number))},
        "memory/prostate/rumc": {"step": torch.tensor(number)},
        "nested": {"optimizer": {"moment": {"w": torch.ones(2).double()}}, "none": {}},
    }


def test_round_trip(tmp_path: Path) -> None:
    facts = {"loss": 0.1, "nan": math.nan, "best": None, "sites": ["a", "b"]}
    path = Checkpoints(tmp_path).save(3, states(3), facts, score=(0.5,))
    assert path.name == "round-000003.safetensors"
    loaded, skipped = Checkpoints(tmp_path).load_newest()
    assert loaded is not None
    assert skipped == ()
    assert (loaded.round, loaded.score) == (3, (0.5,))
    torch.testing.assert_close(loaded.states, states(3), rtol=0, atol=0)
    assert math.isnan(loaded.facts.pop("nan"))
    assert loaded.facts == {"loss": 0.1, "best": None, "sites": ["a", "b"]}


def test_nothing_saved_yet(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.is_empty()
    assert checkpoints.load_newest() == (None, ())
    assert checkpoints.best() is None


def test_the_newest_two_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    scores = [None, 0.1, 0.8, 0.3, math.nan, 0.8, 0.2]
    kept = []
    for number, score in enumerate(scores):
        checkpoints.save(number, states(number), score=score and (score,))
        kept.append(checkpoints.rounds())
    assert kept[:4] == [(0,), (0, 1), (1, 2), (2, 3)]
    assert kept[4:] == [(2, 3, 4), (2, 4, 5), (2, 5, 6)]
    assert checkpoints.best() == 2


def test_the_first_number_of_a_score_counts_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for number, score in enumerate([(2.0, 0.9), (3.0, 0.1), (3.0, 0.1), (2.0, 1.0)]):
        checkpoints.save(number, states(number), score=score)
    assert checkpoints.rounds() == (1, 3)
    assert Checkpoints(tmp_path).best() == 1


def test_p4_a_damaged_newest_is_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        path = checkpoints.save(number, states(number))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    loaded, skipped = checkpoints.load_newest()
    assert isinstance(loaded, Checkpoint)
    assert (loaded.round, skipped) == (1, (2,))
    assert "checkpoint of round 2: round-000002.safetensors is damaged" in caplog.text
    checkpoints.save(2, states(2))
    assert checkpoints.load_newest()[1] == ()


def test_all_damaged_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, states(1)).write_bytes(b"")
    with pytest.raises(StorageError, match="all 1 checkpoints are damaged"):
        Checkpoints(tmp_path).load_newest()


def test_a_renamed_checkpoint_is_not_another_round(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, states(1))
    path.rename(tmp_path / "round-000007.safetensors")
    with pytest.raises(StorageError, match="holds another round"):
        Checkpoints(tmp_path).load(7)


def test_facts_that_are_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="facts"):
        Checkpoints(tmp_path).save(1, {}, {"x": object()})
    assert not list(tmp_path.iterdir())


names = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    [".", "..", "", "/", "a/b", "~", "~2f;", "~;", "\0", "\\"]
)
trees = st.recursive(
    st.just(torch.ones(1)), lambda inner: st.dictionaries(names, inner), max_leaves=5
)


@given(st.dictionaries(names, trees, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "tree"
    write_tree(path, tree, {}, sync=False)
    back, _ = read_tree(path)
    assert back == tree


def write_for_ever(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    newest, _ = checkpoints.load_newest()
    first = newest.round + 1 if newest else 0
    for number in range(first, 10**6):
        state = {"shared": {"w": torch.full((20_000,), float(number))}}
        checkpoints.save(number, state, {"n": number}, score=(float(number % 7),))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_p1_killed_at_any_instant_something_whole_remains(tmp_path: Path) -> None:
    rng = random.Random(0)
    reached = -1
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(tmp_path)
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.05 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        checkpoints = Checkpoints(tmp_path)
        loaded, skipped = checkpoints.load_newest()
        if loaded is None:
            continue
        assert skipped == ()
        assert loaded.round >= reached
        assert loaded.facts == {"n": loaded.round}
        assert torch.all(loaded.states["shared"]["w"] == loaded.round)
        assert not list(tmp_path.glob(".*"))
        reached = loaded.round
    assert reached > 0


@pytest.mark.parametrize("step", ["open", "fsync", "replace", "unlink"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_p1_death_at_every_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A child dies just before the n-th call of one kind, for every n there is."""
    for nth in range(1, 20):
        folder = tmp_path / str(nth)
        Checkpoints(folder).save(1, states(1), score=(1.0,))
        Checkpoints(folder).save(2, states(2))
        pid = os.fork()
        if pid == 0:
            try:
                die_before(step, nth)
                Checkpoints(folder).save(3, states(3), score=(2.0,))
                os._exit(7)
            finally:
                os._exit(1)
        finished = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        loaded, skipped = Checkpoints(folder).load_newest()
        assert loaded is not None
        assert skipped == ()
        assert loaded.round in ({3} if finished else {2, 3})
        torch.testing.assert_close(loaded.states, states(loaded.round), rtol=0, atol=0)
        if finished:
            assert nth > 1
            return
    pytest.fail("the child never finished")


def die_before(step: str, nth: int) -> None:
    """Make this (child) process die just before the n-th system call of one kind."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            os._exit(9)

    def counted_fsync(descriptor: int) -> None:
        count()
        real_fsync(descriptor)

    real_fsync, os.fsync = os.fsync, counted_fsync
    event = {"open": "open", "replace": "os.rename", "unlink": "os.remove"}.get(step)
    if event:
        os.fsync = real_fsync
        sys.addaudithook(lambda seen, _: count() if seen == event else None)
