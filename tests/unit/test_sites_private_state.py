"""A hospital's private state: versions, stages, rollback, damage and deaths."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from fedmed.errors import StorageError
from fedmed.strategy import Private
from sites.private_state import PrivateStore


def private(value: float) -> Private:
    kept = {"bn.running_mean": torch.full((3,), value), "n": torch.tensor(int(value))}
    return Private(states={"kept": kept, "optimizer": {}}, facts={"value": value})


def value(state: Private | None) -> float | None:
    if state is None:
        return None
    assert torch.all(state.states["kept"]["bn.running_mean"] == state.facts["value"])
    return float(state.facts["value"])


@pytest.fixture(params=[False, True], ids=["memory", "durable"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PrivateStore:
    return PrivateStore(tmp_path / "private", durable=request.param)


def reopened(store: PrivateStore) -> PrivateStore:
    return PrivateStore(store._folder, durable=store._durable)


def run_round(store: PrivateStore, number: int) -> None:
    store.stage(f"{number}.0.0", private(number + 0.25))
    store.stage(f"{number}.0.1", private(float(number)))
    staged = store.staged(f"{number}.0.1")
    assert staged is not None
    store.commit(number, staged)


def test_a_new_site_has_nothing(store: PrivateStore) -> None:
    assert store.load(0) is None
    assert store.load(5) is None
    assert store.staged("1.0.0") is None
    assert store.committed(5) == Private()


def test_a_committed_round_comes_back_bit_for_bit(store: PrivateStore) -> None:
    facts = {"x": 0.1, "nan": math.nan, "list": [1, None]}
    before = Private(states={"kept": private(2.0).states["kept"], "e": {}}, facts=facts)
    store.commit(1, before)
    for one in (store, reopened(store)):
        after = one.load(1)
        assert after is not None
        torch.testing.assert_close(after.states, before.states, rtol=0, atol=0)
        assert after.facts["x"] == 0.1
        assert math.isnan(after.facts["nan"])


def test_a_staged_round_does_not_count_yet(store: PrivateStore) -> None:
    run_round(store, 1)
    store.stage("2.0.0", private(2.0))
    assert value(store.load(2)) == 1.0
    assert value(store.staged("2.0.0")) == 2.0
    assert value(reopened(store).load(2)) == 1.0


def test_the_server_names_the_answer_it_goes_on_from(store: PrivateStore) -> None:
    for exchange in range(4):
        store.stage(f"1.0.{exchange}", private(float(exchange)))
    assert value(store.staged("1.0.3")) == 3.0
    assert value(store.staged("1.0.2")) == 2.0
    assert store.staged("1.0.1") is None
    store.stage("1.0.3", private(33.0))
    assert value(store.staged("1.0.3")) == 33.0
    assert store.staged("1.0") is None


def test_a_token_never_names_a_file(store: PrivateStore) -> None:
    token = "../../evil\0"
    store.stage(token, private(1.0))
    assert value(store.staged(token)) == 1.0
    assert {p.name for p in store._folder.parent.iterdir()} <= {"private"}


def test_a_round_without_news_keeps_the_version_before(store: PrivateStore) -> None:
    run_round(store, 1)
    run_round(store, 3)
    assert [value(store.load(v)) for v in (1, 2, 3, 4)] == [1.0, 1.0, 3.0, 3.0]
    assert store.load(0) is None


def test_commit_may_be_repeated(store: PrivateStore) -> None:
    run_round(store, 1)
    store.commit(1, private(1.0))
    assert value(reopened(store).load(1)) == 1.0


def test_only_three_versions_stay_and_older_ones_are_not_guessed(
    store: PrivateStore,
) -> None:
    for number in range(1, 6):
        run_round(store, number)
    assert store.versions() == (3, 4, 5)
    assert [value(store.load(v)) for v in (3, 4, 5)] == [3.0, 4.0, 5.0]
    with pytest.raises(StorageError, match="private version 2 is gone"):
        store.load(2)


def test_discard_after_rolls_back(store: PrivateStore) -> None:
    for number in (1, 2, 3):
        run_round(store, number)
    store.stage("4.0.0", private(4.0))
    store.discard_after(1)
    for one in (store, reopened(store)):
        assert one.staged("4.0.0") is None
        assert one.versions() == (1,)
        assert value(one.load(3)) == 1.0


def test_a_site_that_joined_late_rolls_back_to_nothing(store: PrivateStore) -> None:
    run_round(store, 5)
    assert store.load(4) is None
    store.discard_after(4)
    assert store.load(5) is None


def test_a_site_that_keeps_nothing_has_no_folder(store: PrivateStore) -> None:
    assert not store.keeps(Private())
    assert store.keeps(private(1.0))
    store.discard_after(3)
    assert store.committed(4) == Private()
    store.file()
    assert not store._folder.exists()
    store.commit(1, private(1.0))
    assert store.keeps(Private())  # an empty state would replace one that is there


def test_a_version_that_is_not_filed_serves_until_one_is(store: PrivateStore) -> None:
    store.commit(4, private(4.0))
    for number in (5, 6, 7):
        store.commit(number, private(float(number)), durable=False)
        assert value(store.load(number)) == number
    assert store.versions() == (4,)
    assert value(store.load(9)) == 7.0
    assert value(store.load(4)) == 4.0
    store.file()
    store.file()
    assert store.versions() == (4, 7)
    assert value(reopened(store).load(9)) == 7.0
    assert not list(store._folder.glob("unfiled-*"))
    store.commit(8, private(8.0), durable=False)
    store.commit(10, private(10.0))
    assert store.versions() == (4, 7, 10)
    assert value(store.load(9)) == 7.0


def test_only_filed_versions_count_for_what_stays(store: PrivateStore) -> None:
    for number in range(1, 31):
        store.commit(number, private(float(number)), durable=number % 10 == 0)
    assert store.versions() == (10, 20, 30)
    store.discard_after(20)
    assert value(store.load(25)) == 20.0


def test_discard_after_forgets_what_was_not_filed(store: PrivateStore) -> None:
    store.commit(2, private(2.0))
    store.commit(3, private(3.0), durable=False)
    store.discard_after(2)
    assert value(store.load(9)) == 2.0
    store.file()
    assert store.versions() == (2,)


def test_a_lost_memory_is_no_older_state(store: PrivateStore) -> None:
    """The process that had round 5 in memory is gone: round 4 must not stand in."""
    store.commit(4, private(4.0))
    store.commit(5, private(5.0), durable=False)
    assert value(store.committed(7, at_least=5)) == 5.0
    again = reopened(store)
    if store._durable:
        assert value(again.committed(7, at_least=5)) == 5.0
        return
    with pytest.raises(StorageError, match="round 5 was not filed"):
        again.committed(7, at_least=5)
    assert value(again.committed(7)) == 4.0


def test_a_store_in_memory_lists_its_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PrivateStore(tmp_path / "private").commit(1, private(1.0))
    store = PrivateStore(tmp_path / "private")
    store.committed(1)
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("listed"))
    for number in range(2, 6):
        run_round(store, number)
        assert value(store.committed(number)) == number
    assert store.versions() == (3, 4, 5)


def test_what_was_stored_does_not_change_with_its_owner(store: PrivateStore) -> None:
    network = {"w": torch.ones(2)}
    facts = {"list": [1]}
    store.stage("t", Private(states={"kept": network}, facts=facts))
    network["w"] += 1
    facts["list"].append(2)
    staged = store.staged("t")
    assert staged is not None
    store.commit(1, staged)
    staged.states["kept"]["w"] += 1
    loaded = store.load(1)
    assert loaded is not None
    loaded.states["kept"]["w"] += 5
    again = store.load(1)
    assert again is not None
    assert again.states["kept"]["w"].tolist() == [1.0, 1.0]
    assert again.facts == {"list": [1]}


def test_durable_stages_survive_a_change_of_process(tmp_path: Path) -> None:
    one, two = (PrivateStore(tmp_path, durable=True) for _ in range(2))
    one.stage("a", private(1.0))
    two.stage("b", private(2.0))
    assert value(one.staged("b")) == 2.0
    assert value(two.staged("a")) == 1.0
    one.commit(1, private(2.0))
    assert value(two.load(1)) == 2.0
    one.discard_after(0)
    one.commit(1, private(7.0))
    assert value(two.load(1)) == 7.0


def test_files_are_for_the_owner_only(store: PrivateStore) -> None:
    store.commit(1, private(1.0))
    store._folder.chmod(0o755)
    reopened(store)
    store.stage("t", private(1.0))
    store.commit(2, private(2.0))
    store.commit(3, private(3.0), durable=False)
    assert store._folder.stat().st_mode & 0o777 == 0o700
    for path in store._folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_version_is_a_storage_error(store: PrivateStore) -> None:
    run_round(store, 1)
    path = store._folder / "round-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="is damaged: its checksum"):
        reopened(store).load(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_death_before_every_rename_leaves_a_whole_version(tmp_path: Path) -> None:
    for durable in (False, True):
        for nth in range(1, 9):
            folder = tmp_path / f"{durable}-{nth}"
            first = PrivateStore(folder, durable=durable)
            run_round(first, 1)
            pid = os.fork()
            if pid == 0:
                try:
                    die_before_rename(nth)
                    run_round(PrivateStore(folder, durable=durable), 2)
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            after = PrivateStore(folder, durable=durable)
            assert value(after.load(1)) == 1.0
            assert value(after.load(2)) in (1.0, 2.0)
            after.discard_after(1)
            run_round(after, 2)
            assert value(after.load(2)) == 2.0


def die_before_rename(nth: int) -> None:
    calls = 0
    real = os.replace

    def counted(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            os._exit(9)
        real(source, target)

    os.replace = counted  # type: ignore[assignment]


def test_what_is_selected_stays(store: PrivateStore) -> None:
    for number in range(1, 4):
        run_round(store, number)
    store.select(2)
    for number in range(4, 9):
        run_round(store, number)
        store.select(2)  # said again every round
    for one in (store, reopened(store)):
        assert value(one.selected(2)) == 2.0
        assert value(one.selected(7)) == 7.0  # never selected, but new enough
        with pytest.raises(StorageError, match="version 3 is gone"):
            one.selected(3)
    store.select(8)
    run_round(store, 9)
    assert value(store.selected(8)) == 8.0
    with pytest.raises(StorageError, match="is gone"):
        store.selected(2)


def test_of_a_round_without_anything_new_the_state_before_is_selected(
    store: PrivateStore,
) -> None:
    run_round(store, 1)
    store.select(3)
    for number in range(4, 9):
        run_round(store, number)
    assert value(store.selected(3)) == 1.0


def test_where_nothing_was_kept_nothing_is_selected(store: PrivateStore) -> None:
    store.select(1)
    assert store.selected(1) == Private()
    run_round(store, 2)
    assert store.selected(1) == Private()


def test_what_was_selected_of_rounds_taken_back_is_forgotten(
    store: PrivateStore,
) -> None:
    for number in (1, 2, 3):
        run_round(store, number)
    store.select(2)
    store.select(3)
    store.discard_after(2)
    assert value(store.selected(2)) == 2.0
    assert not [*store._folder.glob("selected-*")]


def test_a_damaged_selection_is_named(store: PrivateStore) -> None:
    run_round(store, 1)
    store.select(1)
    (file,) = store._folder.glob("selected-*")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"damaged")
    with pytest.raises(StorageError):
        store.selected(1)


def test_a_server_may_go_back_to_what_was_selected(store: PrivateStore) -> None:
    """Both newer checkpoints are damaged: the best one is all that is left."""
    for number in (1, 2, 3):
        run_round(store, number)
    store.select(2)
    for number in range(4, 9):
        run_round(store, number)
    again = reopened(store)
    again.discard_after(2)
    assert value(again.committed(2)) == 2.0
    assert again.versions() == (2,)
    for number in range(3, 8):
        run_round(again, number)
    with pytest.raises(StorageError, match="version 1 is gone"):
        again.load(1)


def test_a_server_that_goes_back_too_far_is_told_and_nothing_is_lost(
    store: PrivateStore,
) -> None:
    for number in range(1, 9):
        run_round(store, number)
    for one in (store, reopened(store)):
        with pytest.raises(StorageError, match="version 3 is gone; the oldest is 6"):
            one.discard_after(3)
        assert value(one.load(8)) == 8.0
    store.discard_after(0)  # from the start
    assert store.versions() == ()


def test_a_site_that_began_later_has_nothing_to_lose(store: PrivateStore) -> None:
    for number in range(5, 9):
        run_round(store, number)
    assert store.load(4) is None
    store.discard_after(4)
    assert store.committed(4) == Private()


def test_what_an_older_program_left_is_not_taken_for_the_beginning(
    store: PrivateStore,
) -> None:
    """It noted no beginning, so nobody knows what was before the oldest version."""
    for number in range(4, 7):
        run_round(store, number)
    (mark,) = store._folder.glob("began-*")
    mark.unlink()
    older = reopened(store)
    run_round(older, 7)
    with pytest.raises(StorageError, match="version 3 is gone; the oldest is 5"):
        older.discard_after(3)
    older.discard_after(0)
    assert not [*store._folder.glob("*")]


def test_no_commit_reads_what_was_kept_before(store: PrivateStore) -> None:
    for number in range(1, 5):
        run_round(store, number)
    (store._folder / "round-000002.safetensors").write_bytes(b"damaged")
    again = reopened(store)
    run_round(again, 5)
    assert again.versions() == (3, 4, 5)
    assert value(again.load(5)) == 5.0
