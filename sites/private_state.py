"""What a hospital keeps for itself between messages, versioned by round.

The state after round 7 is one file. While round 8 goes on, the state after each
answer is staged under the token of the message; the server's next message names the
token it goes on from, and the end of the round makes one state version 8. A round that
is tried again, a server that falls back to an older checkpoint and a process that dies
at any instant all find the state they need.

    private/                                   0700
        round-000007.safetensors               0600, version 7
        stage-000012-<hash of token>.safetensors     (durable hosts only)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedmed.checkpoint import numbered, read_tree, write_tree
from fedmed.errors import StorageError
from fedmed.message import State
from fedmed.storage import remove_leftovers, storage_errors, sync_folder
from fedmed.strategy import Private

_VERSION = re.compile(r"round-(\d{6,})\.safetensors")
_STAGE = re.compile(r"stage-(\d{6,})-([0-9a-f]{16})\.safetensors")
_KEPT_STAGES = 2
"""The answer the server may go on from, and the newer one it may never have got."""


class PrivateStore:
    """The private state of one site on its own disk.

    Values are copied on their way in and out: a network that trains on does not
    change what was staged.

    Args:
        folder: The site's own folder; made, and closed to other users.
        keep: How many versions stay; the server may fall back by `keep - 1` rounds.
        durable: The process may change between two messages: stages are written to
            disk at once and read from there. Otherwise they stay in memory.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = PrivateStore(pathlib.Path(folder))
        ...     store.stage("1.0.0", Private(facts={"steps": 5}))
        ...     store.commit(1, store.staged("1.0.0"))
        ...     store.committed(1).facts
        {'steps': 5}
    """

    def __init__(self, folder: Path, keep: int = 3, *, durable: bool = False) -> None:
        self._folder = folder
        self._keep = keep
        self._durable = durable
        self._stages: dict[str, Private] = {}
        self._newest: tuple[int, Private] | None = None
        with storage_errors(folder.name):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)  # the umask, or an older folder, may say otherwise
            remove_leftovers(folder)

    def versions(self) -> tuple[int, ...]:
        """Rounds that left a version on disk, ascending."""
        return numbered(self._folder, _VERSION)

    def committed(self, version: int) -> Private:
        """Give the private state after a round; empty if nothing was kept so far.

        Raises:
            StorageError: See `load`.
        """
        return self.load(version) or Private()

    def load(self, version: int) -> Private | None:
        """Give the private state as it was after a round.

        A round in which the site kept nothing new leaves no version; the state after
        it is that of the round before.

        Args:
            version: Number of the round; 0 is before training.

        Returns:
            The state, or None if nothing was committed up to that round.

        Raises:
            StorageError: If the file is damaged, or so old that it was deleted.
        """
        older = [number for number in self.versions() if number <= version]
        if not older:
            self._refuse_if_pruned(version)
            return None
        if self._newest is not None and self._newest[0] == older[-1]:
            return _copy(self._newest[1])
        private, header = self._read(self._version_path(older[-1]))
        if header["round"] != older[-1]:
            raise StorageError(f"private version {older[-1]} holds another round")
        if not self._durable and older[-1] == self.versions()[-1]:
            self._newest = (older[-1], _copy(private))
        return private

    def stage(self, token: str, private: Private) -> None:
        """Note the state after one answer that may not count.

        Args:
            token: Names the message that was answered; the newest two are kept.
            private: The state.

        Raises:
            StorageError: If it cannot be written (durable stores only).
        """
        if self._durable:
            # Without fsync: a stage need not survive the machine, only the process.
            self._write(self._new_stage(token), {"token": token}, private, sync=False)
            with storage_errors(self._folder.name):
                for path in self._stage_paths()[:-_KEPT_STAGES]:
                    path.unlink(missing_ok=True)
            return
        self._stages.pop(token, None)
        self._stages[token] = _copy(private)
        for old in list(self._stages)[:-_KEPT_STAGES]:
            del self._stages[old]

    def staged(self, token: str) -> Private | None:
        """Give the state after the answer to one message.

        Returns:
            The state, or None if it is not there: the process that had it is gone, or
            two newer ones were staged.

        Raises:
            StorageError: If the file is damaged.
        """
        if not self._durable:
            private = self._stages.get(token)
            return None if private is None else _copy(private)
        for path in reversed(self._stage_paths()):
            if path.stem.endswith(_hash(token)):
                private, header = self._read(path)
                return private if header["token"] == token else None
        return None

    def commit(self, number: int, private: Private) -> None:
        """Make a state the version of a round; older ones beyond `keep` are deleted.

        Raises:
            StorageError: If it cannot be written; what was there is intact.
        """
        earlier = [version for version in self.versions() if version < number]
        header = {"round": number, "previous": earlier[-1] if earlier else None}
        self._write(self._version_path(number), header, private, sync=True)
        self._newest = None if self._durable else (number, _copy(private))
        with storage_errors(self._folder.name):
            for old in self.versions()[: -self._keep]:
                self._version_path(old).unlink(missing_ok=True)

    def discard_after(self, number: int) -> None:
        """Forget every stage, and every version newer than a round.

        Raises:
            StorageError: If a file cannot be deleted.
        """
        self._stages.clear()
        self._newest = None
        with storage_errors(self._folder.name):
            for path in self._stage_paths():
                path.unlink(missing_ok=True)
            for newer in [v for v in self.versions() if v > number]:
                self._version_path(newer).unlink(missing_ok=True)
            sync_folder(self._folder)

    def _stage_paths(self) -> list[Path]:
        """Files of stages, oldest first; another process may have written them."""
        return sorted(
            (path for path in self._folder.iterdir() if _STAGE.fullmatch(path.name)),
            key=lambda path: int(path.name.split("-")[1]),
        )

    def _new_stage(self, token: str) -> Path:
        """Name a stage; the token comes from the server and never names a file."""
        paths = self._stage_paths()
        sequence = int(paths[-1].name.split("-")[1]) + 1 if paths else 0
        return self._folder / f"stage-{sequence:06d}-{_hash(token)}.safetensors"

    def _refuse_if_pruned(self, version: int) -> None:
        versions = self.versions()
        if not versions:
            return
        _, header = self._read(self._version_path(versions[0]))
        if header["previous"] is not None and header["previous"] <= version:
            raise StorageError(
                f"private version {version} is gone; the oldest is {versions[0]}",
                hint="Resume from a newer checkpoint, or start the run anew.",
            )

    def _write(
        self, path: Path, header: Mapping[str, Any], private: Private, *, sync: bool
    ) -> None:
        content = {"header": header, "facts": private.facts}
        write_tree(path, private.states, content, mode=0o600, sync=sync)

    def _read(self, path: Path) -> tuple[Private, dict[str, Any]]:
        states, content = read_tree(path)
        return Private(states=states, facts=content["facts"]), content["header"]

    def _version_path(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.safetensors"


def _copy(private: Private) -> Private:
    states: dict[str, State] = {
        name: {key: _own(tensor) for key, tensor in state.items()}
        for name, state in private.states.items()
    }
    return replace(private, states=states, facts=_copy_json(private.facts))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _copy_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_json(item) for item in value]
    return value


def _hash(token: str) -> str:
    return hashlib.blake2b(token.encode(), digest_size=8).hexdigest()
