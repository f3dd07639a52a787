"""Content hashes of input files, remembered as long as a file looks untouched.

A file is believed unchanged if size, modification time and change time are; then its
hash comes from the index and the file is not read. A file touched within the last two
seconds is hashed again each time: it could be rewritten without a visible trace.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from fedmed.errors import CaseError

RACY_S = 2.0
"""Coarsest time stamp among usual file systems."""

HASH_BYTES = 20

_SPARE_LINES = 1000
"""Replaced lines that the index may hold before it is written anew."""


class FileHashes:
    """The index of one cache folder; several processes and threads may use it at once.

    A file of lines that only grows: what others added since is read from where the
    last look ended, so a thousand sites of one cache do not read it a thousand times.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "files.jsonl"
        self._lock = FileLock(folder / "files.lock")
        self._known: dict[str, list[object]] = {}
        self._new: dict[str, list[object]] = {}
        self._seen = _NOTHING
        self._num_lines = 0
        self.refresh()

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(folder: Path) -> FileHashes:
        """Give this process's only index of a folder."""
        return FileHashes(folder)

    def refresh(self) -> None:
        """Read what other processes added."""
        try:
            with self._path.open("rb") as file:
                seen = _Seen.of(file)
                if seen == self._seen:
                    return
                if not seen.continues(self._seen):
                    self._forget()
                file.seek(self._seen.size)
                self._add(file.read(seen.size - self._seen.size))
                self._seen = seen
        except OSError:
            self._forget()

    def _forget(self) -> None:
        self._known, self._num_lines, self._seen = dict(self._new), 0, _NOTHING

    def combined(self, files: Sequence[Path]) -> str:
        """Hash the content of several files, in the order given.

        Args:
            files: The files; their names do not count.

        Returns:
            Hexadecimal digest.

        Raises:
            CaseError: If a file cannot be opened; its name is not in the message.
        """
        digest = hashlib.blake2b(digest_size=HASH_BYTES)
        for file in files:
            digest.update(self._one(file).encode())
        return digest.hexdigest()

    def save(self) -> None:
        """Write what is new; other processes' entries are kept.

        Losing the index costs time only, so a failure to write it is no error.
        """
        new, self._new = self._new, {}
        if not new:
            return
        with contextlib.suppress(OSError), self._lock:
            self.refresh()
            self._known |= new
            if self._num_lines > 2 * len(self._known) + _SPARE_LINES:
                self._rewrite()
                return
            with self._path.open("ab") as file:
                # The first line break ends the half line of a process that died.
                file.write(b"\n" + _as_lines(new))

    def _rewrite(self) -> None:
        """Drop lines that later lines replaced."""
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".files-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_as_lines(self._known))
            os.replace(name, self._path)
        except OSError:
            os.unlink(name)
            raise

    def _one(self, path: Path) -> str:
        # The index holds no paths: their names may be patients'.
        name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=HASH_BYTES)
        try:
            mark = _mark(path.stat())
            entry = self._known.get(name.hexdigest())
            if entry is not None and entry[:-1] == mark:
                return str(entry[-1])
            with path.open("rb") as file:
                content = hashlib.file_digest(file, _blake2b).hexdigest()
                after = _mark(os.fstat(file.fileno()))
        except OSError as error:
            raise CaseError(
                f"a file cannot be read: {error.strerror or 'input/output error'}"
            ) from None
        if after != mark:
            raise CaseError("a file changed while it was read", hint="Try again later.")
        if time.time() - max(mark[1:]) / 1e9 > RACY_S:
            self._new[name.hexdigest()] = self._known[name.hexdigest()] = [
                *mark,
                content,
            ]
        return content

    def _add(self, content: bytes) -> None:
        """Take lines in; a damaged one is passed over."""
        lines = [line for line in content.split(b"\n") if line]
        self._num_lines += len(lines)
        try:
            entries = json.loads(b"[" + b",".join(lines) + b"]")
        except ValueError:
            entries = [_parsed(line) for line in lines]
        for entry in entries:
            if isinstance(entry, list) and len(entry) == 5:
                self._known[str(entry[0])] = entry[1:]


@dataclass(frozen=True)
class _Seen:
    """How far, and in which file, the index was read."""

    inode: int = 0
    size: int = 0
    changed_ns: int = 0

    @classmethod
    def of(cls, file: BinaryIO) -> _Seen:
        stat = os.fstat(file.fileno())
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def continues(self, before: _Seen) -> bool:
        return self.inode == before.inode and self.size > before.size


_NOTHING = _Seen()


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _as_lines(entries: dict[str, list[object]]) -> bytes:
    lines = (json.dumps([name, *entry]) for name, entry in entries.items())
    return "".join(f"{line}\n" for line in lines).encode()


def _mark(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _blake2b() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=HASH_BYTES)
