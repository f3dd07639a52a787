"""Content hashes of input files, remembered as long as a file looks untouched.

A file is believed unchanged if size, modification time and change time are; then its
hash comes from the index and the file is not read. A file touched within the last two
seconds is hashed again each time: it could be rewritten without a visible trace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from fedmed.errors import CaseError

RACY_S = 2.0
"""Coarsest time stamp among usual file systems."""

HASH_BYTES = 20


class FileHashes:
    """The index of one cache folder; several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "files.json"
        self._lock = FileLock(folder / "files.lock")
        self._known = self._load()
        self._new: dict[str, list[object]] = {}

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
        if not self._new:
            return
        with contextlib.suppress(OSError), self._lock:
            self._known = self._load() | self._new
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".files-")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(self._known, file)
                os.replace(name, self._path)
            except OSError:
                os.unlink(name)
                raise
            self._new = {}

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

    def _load(self) -> dict[str, list[object]]:
        """Read the index; a damaged or missing one is an empty one."""
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {k: v for k, v in known.items() if isinstance(v, list) and len(v) == 4}


def _mark(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _blake2b() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=HASH_BYTES)
