"""Files that are whole or absent: atomic writes, checksummed states, the run lock.

A process that dies at any instant, or a disk that fills up, leaves the previous
version of a file. What was damaged afterwards is found by its checksum when read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from filelock import FileLock, Timeout

from fedmed import exact_json, tensor_codec
from fedmed.errors import RunLockedError, StorageError
from fedmed.message import State

CHECKSUM_KEY = "fedmed.sha256"
"""Metadata entry: SHA-256 of the whole file with this entry's 64 digits set to "0"."""

_LEFTOVER = ".*.fedmed-tmp"
_NO_DIGEST = "0" * 64
_MAX_TENSORS = 10**7
_LARGE = 2**22
"""Bytes from which on a second thread that hashes pays."""
_HINTS = {
    errno.ENOSPC: "Free some space on that disk; what was there before is intact.",
    errno.EDQUOT: "Your quota is used up; what was there before is intact.",
    errno.EROFS: "The disk is read-only; choose another folder.",
    errno.EACCES: "Give this user the right to write there, or choose another folder.",
}

Buffer = bytes | bytearray | memoryview


def write_atomic(
    path: Path, data: Buffer | Iterable[Buffer], *, mode: int = 0o666, sync: bool = True
) -> None:
    """Replace a file by new content, or leave it as it was.

    The content goes to a temporary file beside it, which then takes its name; both
    file and folder are forced to disk.

    Args:
        path: The file; its folder must exist.
        data: All of the content, in one piece or in several.
        mode: Permissions of a new file, before the umask.
        sync: False leaves the moment of writing to the operating system: safe if the
            process dies, not if the machine does.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    chunks = [data] if isinstance(data, Buffer) else data
    with _replaced(path, mode=mode, sync=sync) as file:
        for chunk in chunks:
            _write_all(file, chunk)


def write_once(path: Path, data: Buffer, *, mode: int = 0o666) -> None:
    """Write a file that is not there; if another process was first, leave its file.

    Args:
        path: The file; its folder must exist.
        data: All of the content.
        mode: Permissions of the new file, before the umask.

    Raises:
        StorageError: As `write_atomic`.
    """
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.fedmed-tmp")
    try:
        write_atomic(own, data, mode=mode)
        try:
            os.link(own, path)
        except FileExistsError:
            return
        except OSError:  # a disk without hard links
            own.replace(path)
        sync_folder(path.parent)
    finally:
        own.unlink(missing_ok=True)


@contextlib.contextmanager
def _replaced(path: Path, *, mode: int, sync: bool) -> Iterator[FileIO]:
    """Give a temporary file that takes the name of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.fedmed-tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield file
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left behind."""
    for path in folder.glob(_LEFTOVER):
        path.unlink(missing_ok=True)


def write_state(
    path: Path,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    mode: int = 0o666,
    sync: bool = True,
) -> None:
    """Write named tensors as a safetensors file with a checksum in its metadata.

    Equal content gives equal bytes. Any reader of safetensors opens the file.

    Args:
        path: The file, replaced atomically.
        state: Names of at most 512 bytes, without "..", and any tensors.
        metadata: Texts kept with them.
        mode: See `write_atomic`.
        sync: See `write_atomic`.

    Raises:
        StorageError: If it cannot be written.
    """
    try:
        chunks = tensor_codec.pack(
            state, {**(metadata or {}), CHECKSUM_KEY: _NO_DIGEST}
        )
    except ValueError as error:
        raise StorageError(f"{path.name} cannot hold this state: {error}") from error
    with _replaced(path, mode=mode, sync=sync) as file:
        digest = _write_and_hash(file, chunks)
        place = len(chunks[0]) + _place_of_digest(bytes(chunks[1]))
        os.pwrite(file.fileno(), digest.encode(), place)


def _write_and_hash(file: FileIO, chunks: Sequence[Buffer]) -> str:
    """Write chunks while another thread hashes them: each alone takes as long."""
    if sum(map(len, chunks)) < _LARGE:
        for chunk in chunks:
            _write_all(file, chunk)
        return _digest_of(chunks)
    with ThreadPoolExecutor(1) as hasher:
        digest = hasher.submit(_digest_of, chunks)
        for chunk in chunks:
            _write_all(file, chunk)
        return digest.result()


def _digest_of(chunks: Sequence[Buffer]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def read_state(path: Path) -> tuple[State, dict[str, str]]:
    """Read what `write_state` wrote.

    Returns:
        The tensors in sorted order of their names, and the metadata.

    Raises:
        StorageError: If the file is missing, was not written by `write_state`, or is
            damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path.name} cannot be read: {error.strerror}") from None
    try:
        state, metadata = tensor_codec.unpack(
            memoryview(data), max_tensors=_MAX_TENSORS, max_index_bytes=len(data)
        )
        if metadata.pop(CHECKSUM_KEY, "") != _file_digest(data):
            raise ValueError("its checksum does not fit")
    except ValueError as error:
        raise StorageError(
            f"{path.name} is damaged: {error}",
            hint="Restore it from a copy, or go on from an older one.",
        ) from error
    return state, metadata


class RunLock:
    """Keeps a second process away from a folder while the first one works in it.

    The operating system lets go of it when the process ends, however it ends; so does
    Python when this object is no longer referenced.

    Args:
        folder: The folder; it must exist.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with RunLock(pathlib.Path(folder)) as lock:
        ...         lock.is_held
        True
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owner = folder / "run.pid"
        self._lock = FileLock(folder / "run.lock")

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return bool(self._lock.is_locked)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunLockedError: If another process has it; the message names that process.
            StorageError: If the folder cannot be written.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunLockedError(
                f"run folder {self._folder.name} is in use by {self._owner_name()}",
                hint="Wait until it ends, or choose another folder with --out.",
            ) from None
        except (OSError, NotImplementedError) as error:
            raise StorageError(
                f"run folder {self._folder.name} cannot be locked: "
                f"{getattr(error, 'strerror', None) or type(error).__name__}"
            ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        write_atomic(self._owner, exact_json.dumps(owner).encode(), sync=False)

    def release(self) -> None:
        """Let go of the lock; may be called twice."""
        if self.is_held:
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _owner_name(self) -> str:
        try:
            owner = exact_json.loads(self._owner.read_bytes())
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def __enter__(self) -> RunLock:
        """Acquire."""
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release."""
        self.release()


@contextlib.contextmanager
def storage_errors(name: str) -> Iterator[None]:
    """Turn an `OSError` in the block into a `StorageError` about the named file."""
    try:
        yield
    except OSError as error:
        raise _storage_error(Path(name), error) from None


def _write_all(file: FileIO, chunk: Buffer) -> None:
    rest = memoryview(chunk).cast("B")
    while len(rest):
        rest = rest[file.write(rest) :]


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path.name} cannot be written: {error.strerror or type(error).__name__}",
        hint=_HINTS.get(error.errno or 0, ""),
    )


def _place_of_digest(index: bytes) -> int:
    """Where the digest stands in an index; keys are sorted, its place is unique."""
    key = f'"{CHECKSUM_KEY}":"'.encode()
    place = index.index(key) + len(key)
    if index[place : place + 64] != _NO_DIGEST.encode():
        raise ValueError("its checksum is not where it should be")
    return place


def _file_digest(data: bytes) -> str:
    # The first occurrence is the entry itself: a metadata text that held the same
    # characters would hold its quotes escaped.
    key = f'"{CHECKSUM_KEY}":"'.encode()
    start = data.find(key)
    if start < 0:
        raise ValueError("it has no checksum")
    start += len(key)
    digest = hashlib.sha256(data[:start])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(data)[start + 64 :])
    return digest.hexdigest()
