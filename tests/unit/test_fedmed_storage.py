"""Files are whole or absent, damage is found, and one process works in a folder."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedmed import storage
from fedmed.errors import RunLockedError, StorageError
from fedmed.storage import RunLock, read_state, write_atomic, write_state

STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3)}


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")
    write_atomic(path, [b"n", memoryview(b"ew")])
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_sets_the_mode(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"", mode=0o600)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_the_old_file_survives_an_error_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def chunks():  # type: ignore[no-untyped-def]
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_p2_a_disk_that_refuses_more_bytes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomic(path, bytes(5000))
        except StorageError as error:
            os._exit(7 if error.message == "x cannot be written: File too large" else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_p2_disk_full_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def open_full(name: Path, flags: int, mode: int = 0o777) -> int:
        full = name.name.endswith("-tmp")
        return real("/dev/full", os.O_WRONLY) if full else real(name, flags, mode)

    monkeypatch.setattr(storage.os, "open", open_full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write_atomic(tmp_path / "x", b"content")
    assert "Free some space" in caught.value.hint
    assert str(tmp_path) not in str(caught.value)


def test_p3_a_missing_or_closed_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="x cannot be written"):
        write_atomic(tmp_path / "absent" / "x", b"")
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomic(Path("/proc/x"), b"")


def test_state_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_state(one, STATE, {"z": "1", "y": "2"})
    write_state(two, dict(reversed(STATE.items())), {"y": "2", "z": "1"})
    assert one.read_bytes() == two.read_bytes()
    state, metadata = read_state(one)
    assert metadata == {"y": "2", "z": "1"}
    assert list(state) == ["a", "b.weight"]
    torch.testing.assert_close(state, dict(sorted(STATE.items())), rtol=0, atol=0)


def test_a_state_file_opens_in_the_safetensors_library(tmp_path: Path) -> None:
    write_state(tmp_path / "x", STATE)
    theirs = safetensors.torch.load_file(tmp_path / "x")
    torch.testing.assert_close(theirs, STATE, rtol=0, atol=0)


def test_p4_every_bit_flip_and_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_state(path, STATE, {"a": '"fedmed.sha256":"'})
    good = path.read_bytes()
    read_state(path)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        with pytest.raises(StorageError):
            read_state(path)
    for size in (0, 7, 8, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(StorageError):
            read_state(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(StorageError):
        read_state(path)


def test_a_file_without_our_checksum_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "x")
    with pytest.raises(StorageError, match="no checksum"):
        read_state(tmp_path / "x")
    with pytest.raises(StorageError, match="cannot be read"):
        read_state(tmp_path / "absent")


def test_a_name_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not allowed"):
        write_state(tmp_path / "x", {"../x": torch.ones(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_p5_the_lock_names_the_other_process_and_dies_with_it(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with RunLock(tmp_path):
                os.write(theirs, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(ours, 4) == b"held"
        with pytest.raises(RunLockedError, match=f"process {child} on "):
            RunLock(tmp_path).acquire()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        os.close(theirs)
    with RunLock(tmp_path) as lock:
        assert lock.is_held
        assert str(os.getpid()) in (tmp_path / "run.pid").read_text()
    assert not lock.is_held


def test_a_lock_excludes_another_in_the_same_process(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunLockedError, match=str(os.getpid())):
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(StorageError, match="cannot be locked"):
        RunLock(tmp_path).acquire()
