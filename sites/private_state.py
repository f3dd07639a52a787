"""What a hospital keeps for itself between messages, versioned by round.

The state after round 7 is one file. While round 8 goes on, the state after each
answer is staged under the token of the message; the server's next message names the
token it goes on from, and the end of the round makes one state version 8. A round that
is tried again, a server that falls back to an older checkpoint and a process that dies
at any instant all find the state they need.

    private/                                   0700
        round-000007.safetensors               0600, version 7
        stage-000012-<hash of token>.safetensors     (durable hosts only)
        unfiled-000008.safetensors                   (durable hosts only)
        selected-000004.safetensors            0600, the state after round 4
        began-000002                           empty: before round 2 nothing was kept

Versions are filed in the rounds that the server checkpoints too. Between them the
newest one is unfiled: in memory, or (durable hosts) in a file that is not forced to
disk. The state after the round that validation picks stays when versions of its age
go. A site that keeps nothing has no folder.
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
from fedmed.flat import lazy_clone
from fedmed.message import State
from fedmed.storage import remove_leftovers, storage_errors, sync_folder
from fedmed.strategy import Private

_VERSION = re.compile(r"round-(\d{6,})\.safetensors")
_UNFILED = re.compile(r"unfiled-(\d{6,})\.safetensors")
_SELECTED = re.compile(r"selected-(\d{6,})\.safetensors")
_BEGAN = re.compile(r"began-(\d{6,})")
_STAGE = re.compile(r"stage-(\d{6,})-([0-9a-f]{16})\.safetensors")
_KEPT_STAGES = 2
"""The answer the server may go on from, and the newer one it may never have got."""


class PrivateStore:
    """The private state of one site on its own disk.

    Values are copied on their way in and out: a network that trains on does not
    change what was staged.

    Args:
        folder: The site's own folder; made when there is something to keep, and
            closed to other users.
        keep: How many filed versions stay; the server may fall back by `keep - 1`
            checkpoints.
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
        self._unfiled: tuple[int, Private] | None = None
        self._versions: tuple[int, ...] | None = None
        self._has_begun = False
        self._is_made = folder.is_dir()
        with storage_errors(folder.name):
            if self._is_made:
                folder.chmod(0o700)  # an older folder may be open
                remove_leftovers(folder)
            else:
                # The site's other secrets lie there.
                folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            remove_leftovers(folder.parent)

    def versions(self) -> tuple[int, ...]:
        """Rounds that left a filed version on disk, ascending."""
        if self._durable:
            return self._listed(_VERSION)
        if self._versions is None:
            self._versions = self._listed(_VERSION)
            self._has_begun = bool(self._listed(_BEGAN))
        return self._versions

    def keeps(self, private: Private) -> bool:
        """Whether there is anything to keep: in this state, or from an earlier round.

        If not, `committed` gives an empty state as well, and nothing need be staged.
        """
        is_empty = not private.states and not private.facts
        return not is_empty or bool(self.versions()) or self._unfiled_number() > 0

    def committed(self, version: int, *, at_least: int = 0) -> Private:
        """Give the private state after a round; empty if nothing was kept so far.

        Args:
            version: Number of the round.
            at_least: The last round after which the server knows that something new
                was kept; 0 if it does not know.

        Raises:
            StorageError: See `load`; or if that newest state is lost, because it was
                not filed and the process that had it is gone.
        """
        known = [self._unfiled_number(), *self.versions()] if at_least else []
        if at_least and not any(at_least <= number <= version for number in known):
            raise StorageError(
                f"what was kept after round {at_least} was not filed yet, and the "
                "process that had it is gone",
                hint="Go on with --resume: it starts from the last checkpoint.",
            )
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
        unfiled = self._unfiled_number()
        if max(older, default=0) < unfiled <= version:
            return self._load_unfiled(unfiled)
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

    def commit(self, number: int, private: Private, *, durable: bool = True) -> None:
        """Make a state the version of a round.

        Args:
            number: The round.
            private: The state.
            durable: File it; older filed ones beyond `keep` are deleted. False: the
                server will not resume here, it need not survive the machine. At most
                one such version exists.

        Raises:
            StorageError: If it cannot be written; what was there is intact.
        """
        if not durable:
            self._commit_unfiled(number, private)
            return
        known = self.versions()
        self._note_beginning(number)
        header = {"round": number}
        self._write(self._version_path(number), header, private, sync=True)
        self._newest = None if self._durable else (number, _copy(private))
        known = tuple(sorted({*known, number}))
        with storage_errors(self._folder.name):
            for old in known[: -self._keep]:
                self._version_path(old).unlink(missing_ok=True)
        self._versions = known[-self._keep :]
        self._forget_unfiled(number)

    def file(self) -> None:
        """File the newest version if that was not done yet; may be called twice.

        Raises:
            StorageError: If it cannot be written.
        """
        number = self._unfiled_number()
        if number:
            self.commit(number, self._load_unfiled(number))

    def select(self, number: int) -> None:
        """Keep the state after a round, and no longer the one selected before.

        Args:
            number: The round; its version is filed, and among the newest.

        Raises:
            StorageError: If it cannot be written, or is no longer there.
        """
        known = self._listed(_SELECTED)
        if number in known:
            return
        private = self.load(number)
        if private is None:
            return  # nothing was kept so far
        header = {"round": number}
        self._write(self._selected_path(number), header, private, sync=True)
        with storage_errors(self._folder.name):
            for old in known:
                self._selected_path(old).unlink(missing_ok=True)

    def selected(self, number: int) -> Private:
        """Give the state after a round that was selected; empty if there was none.

        Raises:
            StorageError: If the file is damaged, or the round was not selected and is
                too old.
        """
        if number not in self._listed(_SELECTED):
            return self.load(number) or Private()
        private, header = self._read(self._selected_path(number))
        if header["round"] != number:
            raise StorageError(f"what was selected of round {number} is of another")
        return private

    def _commit_unfiled(self, number: int, private: Private) -> None:
        self._note_beginning(number)
        if not self._durable:
            self._unfiled, self._newest = (number, _copy(private)), None
            return
        header = {"round": number}
        self._write(self._unfiled_path(number), header, private, sync=False)
        self._forget_unfiled(number - 1)

    def _unfiled_number(self) -> int:
        """Round of the unfiled version; 0 = there is none."""
        if self._durable:
            return max(self._listed(_UNFILED), default=0)
        return self._unfiled[0] if self._unfiled else 0

    def _load_unfiled(self, number: int) -> Private:
        if self._unfiled is not None:
            return _copy(self._unfiled[1])
        return self._read(self._unfiled_path(number))[0]

    def _forget_unfiled(self, up_to: int) -> None:
        if self._unfiled is not None and self._unfiled[0] <= up_to:
            self._unfiled = None
        if self._durable:
            with storage_errors(self._folder.name):
                for number in self._listed(_UNFILED):
                    if number <= up_to:
                        self._unfiled_path(number).unlink(missing_ok=True)

    def discard_after(self, number: int) -> None:
        """Forget every stage, and every version newer than a round.

        Raises:
            StorageError: If a file cannot be deleted; or if something was kept up to
                that round and is no longer there, in which case all stays.
        """
        self._versions = None
        self._require(number)
        self._stages.clear()
        self._newest = None
        if self._unfiled is not None and self._unfiled[0] > number:
            self._unfiled = None
        if not self._folder.is_dir():
            return
        with storage_errors(self._folder.name):
            gone = self._stage_paths()
            gone += [self._version_path(v) for v in self.versions() if v > number]
            newer = (n for n in self._listed(_UNFILED) if n > number)
            gone += [self._unfiled_path(n) for n in newer]
            chosen = (n for n in self._listed(_SELECTED) if n > number)
            gone += [self._selected_path(n) for n in chosen]
            began = (n for n in self._listed(_BEGAN) if n > number)
            gone += [self._began_path(n) for n in began]
            for path in gone:
                path.unlink(missing_ok=True)
            if gone:
                sync_folder(self._folder)
        self._versions, self._has_begun = None, False

    def _listed(self, pattern: re.Pattern[str]) -> tuple[int, ...]:
        try:
            return numbered(self._folder, pattern)
        except FileNotFoundError:  # nothing was ever kept
            return ()

    def _stage_paths(self) -> list[Path]:
        """Files of stages, oldest first; another process may have written them."""
        if not self._folder.is_dir():
            return []
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
        began = min(self._listed(_BEGAN), default=None)
        if began is None or began > version:
            return
        known = self.versions()
        oldest = f"the oldest is {known[0]}" if known else "none is left"
        raise StorageError(
            f"private version {version} is gone; {oldest}",
            hint="Resume from a newer checkpoint, or start the run anew.",
        )

    def _note_beginning(self, number: int) -> None:
        """Note the first round after which anything was kept.

        By the name of a file: no reading, and nothing in it can be damaged.
        """
        if self._has_begun or self._listed(_BEGAN):
            self._has_begun = True
            return
        self._make_folder()
        # Versions without a beginning are of a program that noted none.
        path = self._began_path(1 if self.versions() else number)
        with storage_errors(self._folder.name):
            path.touch(mode=0o600)
        self._has_begun = True

    def _require(self, number: int) -> None:
        """Make sure that the state after a round is there; if selected, make it so.

        Raises:
            StorageError: If there was one, and it is gone.
        """
        known = (self._unfiled_number() or number + 1, *self.versions())
        if number == 0 or any(version <= number for version in known):
            return
        if number not in self._listed(_SELECTED):
            self._refuse_if_pruned(number)
            return
        private = self.selected(number)
        self._write(self._version_path(number), {"round": number}, private, sync=True)
        self._versions = None

    def _write(
        self, path: Path, header: Mapping[str, Any], private: Private, *, sync: bool
    ) -> None:
        content = {"header": header, "facts": private.facts}
        self._make_folder()
        write_tree(path, private.states, content, mode=0o600, sync=sync)

    def _make_folder(self) -> None:
        if self._is_made:
            return
        with storage_errors(self._folder.name):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.chmod(0o700)  # the umask may say otherwise
        self._is_made = True

    def _read(self, path: Path) -> tuple[Private, dict[str, Any]]:
        states, content = read_tree(path)
        return Private(states=states, facts=content["facts"]), content["header"]

    def _version_path(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.safetensors"

    def _unfiled_path(self, number: int) -> Path:
        return self._folder / f"unfiled-{number:06d}.safetensors"

    def _began_path(self, number: int) -> Path:
        return self._folder / f"began-{number:06d}"

    def _selected_path(self, number: int) -> Path:
        return self._folder / f"selected-{number:06d}.safetensors"


def _copy(private: Private) -> Private:
    states: dict[str, State] = {
        name: {key: _own(tensor) for key, tensor in state.items()}
        for name, state in private.states.items()
    }
    return replace(private, states=states, facts=_copy_json(private.facts))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor; memory of its own is copied when somebody writes to it."""
    tensor = tensor.detach()
    is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    if tensor.is_cpu and is_whole and tensor.is_contiguous():
        return lazy_clone(tensor)
    return tensor.to("cpu", copy=True).contiguous()


def _copy_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_json(item) for item in value]
    return value


def _hash(token: str) -> str:
    return hashlib.blake2b(token.encode(), digest_size=8).hexdigest()
