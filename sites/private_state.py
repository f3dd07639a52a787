"""What a hospital keeps for itself between messages, versioned by round.

The state after round 7 is one file; while round 8 goes on, its exchanges are staged
beside it, and become version 8 when the server says that the round counts. A round
that is tried again, a server that falls back to an older checkpoint and a process
that dies at any instant all find the version they need.

    private/                      0700
        round-000007.safetensors  0600, version 7
        stage-000008-000001.safetensors   round 8 after exchange 1 (durable hosts)
"""

from __future__ import annotations

import os
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
_STAGE = re.compile(r"stage-(\d{6,})-(\d{6,})\.safetensors")
_KEPT_STAGES = 2

Stamp = tuple[int, int]
"""Round and index of an exchange in it."""


class PrivateStore:
    """The private state of one site on its own disk.

    Values are copied on their way in and out: a network that trains on does not
    change what was staged.

    Args:
        folder: The site's own folder; made, and closed to other users.
        keep: How many versions stay; the server may fall back by `keep - 1` rounds.
        durable: The process may change between two exchanges: stages are written to
            disk at once and read from there. Otherwise they stay in memory.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = PrivateStore(pathlib.Path(folder))
        ...     store.stage(1, 0, Private(facts={"steps": 5}))
        ...     store.commit(1)
        ...     store.load(1).facts
        {'steps': 5}
    """

    def __init__(self, folder: Path, keep: int = 3, *, durable: bool = False) -> None:
        self._folder = folder
        self._keep = keep
        self._durable = durable
        self._stages: dict[Stamp, Private] = {}
        self._newest: tuple[int, Private] | None = None
        with storage_errors(folder.name):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)  # the umask, or an older folder, may say otherwise
            remove_leftovers(folder)

    def versions(self) -> tuple[int, ...]:
        """Rounds that left a version on disk, ascending."""
        return numbered(self._folder, _VERSION)

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

    def stage(self, number: int, exchange: int, private: Private) -> None:
        """Note the state after one exchange of a round that does not count yet.

        Args:
            number: The round.
            exchange: Index of the exchange; a repeated one replaces its first result.
            private: The state.

        Raises:
            StorageError: If it cannot be written (durable stores only).
        """
        stamp = (number, exchange)
        for other in self._stamps():
            if other[0] != number or other[1] > exchange:
                self._forget(other)
        if self._durable:
            # Without fsync: a stage need not survive the machine, only the process.
            self._write(self._stage_path(stamp), stamp, private, sync=False)
        else:
            self._stages[stamp] = _copy(private)
        for other in self._stamps()[:-_KEPT_STAGES]:
            self._forget(other)

    def staged(self, number: int, *, before: int | None = None) -> Private | None:
        """Give the newest staged state of a round.

        Args:
            number: The round.
            before: Only stages of earlier exchanges: the server repeats an exchange
                whose reply was lost, and its first result must not count twice.

        Returns:
            The state, or None if nothing was staged: the round starts from
            `load(number - 1)`.

        Raises:
            StorageError: If the file is damaged.
        """
        stamps = [
            stamp
            for stamp in self._stamps()
            if stamp[0] == number and (before is None or stamp[1] < before)
        ]
        if not stamps:
            return None
        if not self._durable:
            return _copy(self._stages[stamps[-1]])
        private, header = self._read(self._stage_path(stamps[-1]))
        if (header["round"], header["exchange"]) != stamps[-1]:
            raise StorageError(f"private stage {stamps[-1]} holds another exchange")
        return private

    def commit(self, number: int) -> None:
        """Make the newest stage of a round its version; without one, nothing changes.

        May be repeated. Older versions beyond `keep` are deleted.

        Raises:
            StorageError: If it cannot be written; what was there is intact.
        """
        stamps = [stamp for stamp in self._stamps() if stamp[0] == number]
        if stamps:
            self._commit(stamps[-1])
        for stamp in self._stamps():
            if stamp[0] <= number:
                self._forget(stamp)
        with storage_errors(self._folder.name):
            for old in self.versions()[: -self._keep]:
                self._version_path(old).unlink(missing_ok=True)

    def discard_after(self, number: int) -> None:
        """Forget every stage, and every version newer than a round.

        Raises:
            StorageError: If a file cannot be deleted.
        """
        for stamp in self._stamps():
            self._forget(stamp)
        self._newest = None
        with storage_errors(self._folder.name):
            for newer in [v for v in self.versions() if v > number]:
                self._version_path(newer).unlink(missing_ok=True)
            sync_folder(self._folder)

    def _commit(self, stamp: Stamp) -> None:
        path = self._version_path(stamp[0])
        if self._durable:
            stage = self._stage_path(stamp)
            with storage_errors(path.name):
                _sync_file(stage)
                os.replace(stage, path)
                sync_folder(self._folder)
        else:
            self._write(path, stamp, self._stages[stamp], sync=True)
            self._newest = (stamp[0], self._stages[stamp])

    def _stamps(self) -> list[Stamp]:
        """Stages in ascending order; the disk knows what another process staged."""
        if not self._durable:
            return sorted(self._stages)
        found = (_STAGE.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def _forget(self, stamp: Stamp) -> None:
        self._stages.pop(stamp, None)
        with storage_errors(self._folder.name):
            self._stage_path(stamp).unlink(missing_ok=True)

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

    def _write(self, path: Path, stamp: Stamp, private: Private, *, sync: bool) -> None:
        earlier = [number for number in self.versions() if number < stamp[0]]
        header = {
            "round": stamp[0],
            "exchange": stamp[1],
            "previous": earlier[-1] if earlier else None,
        }
        content = {"header": header, "facts": private.facts}
        write_tree(path, private.states, content, mode=0o600, sync=sync)

    def _read(self, path: Path) -> tuple[Private, dict[str, Any]]:
        states, content = read_tree(path)
        return Private(states=states, facts=content["facts"]), content["header"]

    def _version_path(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.safetensors"

    def _stage_path(self, stamp: Stamp) -> Path:
        return self._folder / f"stage-{stamp[0]:06d}-{stamp[1]:06d}.safetensors"


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


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
