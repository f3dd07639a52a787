"""The ledger: what left the hospital, line by line, in a chain nobody can quietly edit.

    ledger/
        ledger.jsonl   one JSON object a line; each holds the hash of the one before
        head           number of entries and hash of the last one, rewritten in place

Editing, deleting or reordering lines breaks the chain; cutting off its end disagrees
with `head`. Whoever can write to both files can still forge a shorter history, so note
`head` elsewhere from time to time (`verify(path, head=...)`). A process that dies while
it writes leaves half a line, which is removed and reported in the chain when the
ledger is opened again.

What an entry costs: about 20 microseconds, and 1 ms for each 1 MB of tensors, whose
BLAKE2b hash is recorded unless `digests=False`; `sync=True` adds the disk's own time.
A process has the files of few ledgers open (256 under the usual limit of 1,024 files),
however many sites it plays; others are opened when they are written to, which costs as
much again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedmed import exact_json
from fedmed.errors import StorageError
from fedmed.message import Message
from fedmed.storage import storage_errors

LEDGER_FILE = "ledger.jsonl"
HEAD_FILE = "head"

_START = "0" * 32
_HASH_KEY = ',"hash":"'
_TAIL_BYTES = len(_HASH_KEY) + 32 + len('"}')
_HEAD_FORMAT = "{:016d} {}\n"
_CHUNK = 2**16
_MAX_OPEN = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1024), 4096) // 4
_encode = json.JSONEncoder(separators=(",", ":")).encode

Head = tuple[int, str]
"""Number of entries, and hash of the last one."""


@dataclass(frozen=True)
class LedgerReport:
    """What `verify` found.

    Attributes:
        num_entries: Whole lines that were read.
        head: Number of entries and hash of the last one, to be noted elsewhere.
        problems: What is wrong, one sentence each; empty = nothing was tampered with.
        partial_bytes: Length of a half-written last line: a death, no tampering.
    """

    num_entries: int
    head: Head
    problems: tuple[str, ...] = ()
    partial_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the ledger is whole."""
        return not self.problems


class Ledger:
    """Appends to the ledger of one site; several processes may take turns.

    Args:
        folder: Where it lies; made, and closed to other users.
        sync: Force every entry to disk before the message leaves. False is for
            simulations: safe if the process dies, not if the machine does.
        digests: Hash the content of every message. False is for simulations: an
            entry says what left by kind, names, shapes and size, and its "digest"
            is null.

    Raises:
        StorageError: If the folder cannot be written, or the end of the ledger is
            missing.
    """

    def __init__(
        self, folder: Path, *, sync: bool = False, digests: bool = True
    ) -> None:
        self._folder = folder
        self._sync = sync
        self._digests = digests
        self._layouts: set[str] = set()
        self._size = -1
        self._count, self._hash = 0, _START
        with storage_errors(LEDGER_FILE):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            _close(folder)  # the files of an earlier folder of this name
            try:
                with self._opened():
                    pass
            except StorageError:
                self.close()
                raise

    @property
    def head(self) -> Head:
        """Number of entries and hash of the last one."""
        return self._count, self._hash

    def append(
        self,
        *,
        action: str,
        server_round: int,
        reply: Message,
        exchange: str = "",
        digest: str | None = None,
    ) -> str:
        """Record a message before it leaves.

        Args:
            action: What the server had asked for.
            server_round: The round.
            reply: The message.
            exchange: The token of the server's message.
            digest: Hash of the bytes that leave, if they were hashed already; recorded
                even if `digests` is False.

        Returns:
            The entry's own hash.

        Raises:
            StorageError: If it cannot be written; then the message must not leave.
        """
        if digest is None and self._digests:
            digest = message_digest(reply)
        shapes = tuple(
            (name, tensor.dtype, tensor.shape) for name, tensor in reply.tensors.items()
        )
        layout = _layout(shapes)
        entry: dict[str, Any] = {
            "action": action,
            "round": server_round,
            "exchange": exchange,
            "kind": reply.kind,
            "num_bytes": reply.num_bytes,
            "num_tensors": len(reply.tensors),
            "digest": digest,
            "layout": layout,
        }
        if layout not in self._layouts:
            # Names and shapes are written out once, then named by their hash.
            entry["tensors"] = _described(reply.tensors)
        with storage_errors(LEDGER_FILE), self._opened() as files:
            own = self._write(files, entry)
        self._layouts.add(layout)
        return own

    def close(self) -> None:
        """Release the files; may be called twice."""
        _close(self._folder)

    def __enter__(self) -> Ledger:
        """Enter."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[_Files]:
        """Give the open files, locked, and read up to their end."""
        files = _files_of(self._folder)
        fcntl.flock(files[0], fcntl.LOCK_EX)
        try:
            self._catch_up(files)
            yield files
        finally:
            fcntl.flock(files[0], fcntl.LOCK_UN)

    def _write(self, files: _Files, entry: Mapping[str, Any]) -> str:
        content = {
            "number": self._count + 1,
            "time": _now(),
            **entry,
            "previous": self._hash,
        }
        body = _encode(content)[:-1]
        own = _hash(body.encode())
        line = f'{body}{_HASH_KEY}{own}"}}\n'.encode()
        _write_all(files[0], line, self._size)
        if self._sync:
            os.fsync(files[0])
        self._size += len(line)
        self._count, self._hash = self._count + 1, own
        self._write_head(files)
        return own

    def _write_head(self, files: _Files) -> None:
        os.pwrite(files[1], _HEAD_FORMAT.format(*self.head).encode(), 0)
        if self._sync:
            os.fsync(files[1])

    def _catch_up(self, files: _Files) -> None:
        """Read the end of the file, if it is not as this object left it."""
        size = os.fstat(files[0]).st_size
        if size == self._size:
            return
        text = _last_lines(files[0], size)
        whole = text[: text.rfind(b"\n") + 1]
        partial = len(text) - len(whole)
        self._count, self._hash = _end_of(whole) if whole else (0, _START)
        self._size = size - partial
        count = _read_head(files[1])[0]
        if count > self._count:
            raise StorageError(
                f"the ledger ends at entry {self._count}, but {count} were written",
                hint="Its end was cut off. Keep the folder as it is, show it to "
                "whoever is responsible, and give the site a new ledger folder.",
            )
        if count < self._count:  # a death between the line and the head
            self._write_head(files)
        if partial:
            os.ftruncate(files[0], self._size)
            self._write(files, {"action": "repair", "lost_bytes": partial})


_Files = tuple[int, int]
"""Descriptors of a ledger and of its head."""

_open_files: OrderedDict[Path, _Files] = OrderedDict()
"""Of this process, the least recently used first."""


def _files_of(folder: Path) -> _Files:
    files = _open_files.get(folder)
    if files is not None:
        _open_files.move_to_end(folder)
        return files
    while len(_open_files) >= _MAX_OPEN:
        _close(next(iter(_open_files)))
    ledger = _open(folder / LEDGER_FILE, os.O_RDWR | os.O_APPEND)
    try:
        files = (ledger, _open(folder / HEAD_FILE, os.O_RDWR))
    except OSError:
        os.close(ledger)
        raise
    _open_files[folder] = files
    return files


def _close(folder: Path) -> None:
    for descriptor in _open_files.pop(folder, ()):
        os.close(descriptor)


def _close_all() -> None:
    for folder in list(_open_files):
        _close(folder)


# A child would share its parent's locks, so it opens the files anew.
os.register_at_fork(after_in_child=_close_all)


def verify(path: Path, *, head: Head | None = None) -> LedgerReport:
    """Check a ledger from its first to its last line.

    Args:
        path: The ledger's folder, or its `ledger.jsonl`.
        head: A head that was noted elsewhere: that entry must be in the chain.

    Returns:
        What was found; it never stops at the first problem.

    Raises:
        StorageError: If the file cannot be read.
    """
    path = path / LEDGER_FILE if path.is_dir() else path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path.name} cannot be read: {error.strerror}") from None
    *lines, partial = data.split(b"\n")
    problems: list[str] = []
    hashes = [_START]
    for number, line in enumerate(lines, start=1):
        problems += _check_line(line, number, hashes[-1])
        hashes.append(_own_hash(line))
    problems += _check_heads(path.with_name(HEAD_FILE), hashes, head)
    last = (len(lines), hashes[-1])
    return LedgerReport(len(lines), last, tuple(problems), len(partial))


def message_digest(message: Message) -> str:
    """Hash a message: its kind, header, and names, shapes, dtypes and bytes of tensors.

    About 1 ms per MB. Equal messages have equal digests on every machine.
    """
    state = hashlib.blake2b(digest_size=16)
    described = {
        "kind": message.kind,
        "header": message.header,
        "tensors": _described(message.tensors),
    }
    state.update(exact_json.dumps(described).encode())
    for name in sorted(message.tensors):
        flat = message.tensors[name].detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def _described(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {
        name: [str(tensors[name].dtype).removeprefix("torch."), *tensors[name].shape]
        for name in sorted(tensors)
    }


@functools.lru_cache(maxsize=1024)
def _layout(shapes: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> str:
    """Hash of names, dtypes and shapes; thousands of messages have the same ones."""
    described = {
        name: [str(dtype).removeprefix("torch."), *shape]
        for name, dtype, shape in sorted(shapes, key=lambda one: one[0])
    }
    return _hash(json.dumps(described).encode())[:16]


def _now() -> str:
    """The time in UTC, to milliseconds."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    return f"{_second(seconds)}.{rest // 10**6:03d}+00:00"


@functools.lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _own_hash(line: bytes) -> str:
    """Recompute a line's hash from all of it but its own hash."""
    return _hash(line[:-_TAIL_BYTES])


def _check_line(line: bytes, number: int, previous: str) -> list[str]:
    try:
        entry = exact_json.loads(line)
        found, before, own = entry["number"], entry["previous"], entry["hash"]
    except (ValueError, KeyError, TypeError):
        return [f"line {number} is no entry"]
    problems = []
    if own != _own_hash(line):
        problems.append(f"line {number} was changed")
    if found != number:
        problems.append(f"line {number} holds entry {found}")
    if before != previous:
        problems.append(f"line {number} does not follow the line before")
    return problems


def _check_heads(path: Path, hashes: list[str], noted: Head | None) -> list[str]:
    problems = []
    try:
        stored = _parse_head(path.read_bytes())
    except OSError:
        problems.append("the head file is missing")
        stored = None
    # A death between the line and the head leaves the head one entry behind.
    if stored is not None and len(hashes) - 1 - stored[0] > 1:
        problems.append(f"the head file stops at entry {stored[0]}")
    for name, head in (("the head file", stored), ("the noted head", noted)):
        if head is None:
            continue
        if head[0] >= len(hashes):
            problems.append(
                f"{name} knows {head[0]} entries, {len(hashes) - 1} are there"
            )
        elif hashes[head[0]] != head[1]:
            problems.append(f"{name} knows another entry {head[0]}")
    return problems


def _parse_head(data: bytes) -> Head:
    try:
        count, own = data.decode().split()
        return int(count), own
    except ValueError:
        return 0, _START


def _read_head(descriptor: int) -> Head:
    return _parse_head(os.pread(descriptor, 256, 0))


def _end_of(whole_lines: bytes) -> Head:
    last = whole_lines[:-1].rpartition(b"\n")[2]
    try:
        entry = exact_json.loads(last)
        return entry["number"], entry["hash"]
    except (ValueError, KeyError, TypeError):
        raise StorageError("the last line of ledger.jsonl is no entry") from None


def _last_lines(descriptor: int, size: int) -> bytes:
    """Read back from the end until two line ends (or the start) are there."""
    start, text = size, b""
    while start > 0 and text.count(b"\n") < 2:
        step = min(_CHUNK, start)
        start -= step
        text = os.pread(descriptor, step, start) + text
    return text


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)


def _write_all(descriptor: int, line: bytes, size: int) -> None:
    """Append a line whole, or (disk full) leave the file as it was."""
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, size)
        raise
