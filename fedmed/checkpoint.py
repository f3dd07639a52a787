"""Checkpoints: what a run needs to go on after any death, bit for bit.

One file per round holds everything, so there is no moment at which two files disagree.
The newest ones are kept, and the best one by its score; scores are inside the files,
so that "the best" cannot point at something that is not there.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedmed import exact_json
from fedmed.errors import StorageError
from fedmed.storage import read_state, remove_leftovers, storage_errors, write_state

logger = logging.getLogger(__name__)

Tree = Mapping[str, Any]
"""Tensors in mappings in mappings, to any depth, under any names."""

_NAME = re.compile(r"round-(\d{6,})\.safetensors")

Score = tuple[float, ...]
"""Of a round: numbers of which the larger is the better, the first counting first."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after one round.

    Attributes:
        round: Number of the round; 0 is the state before training.
        states: The nested tensors, as dictionaries.
        facts: The JSON facts.
        score: The round's; None if it had none.
    """

    round: int
    states: dict[str, Any]
    facts: dict[str, Any]
    score: Score | None = None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made if absent.
        keep: How many of the newest rounds stay; the best round stays besides.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep
        self._known_scores: dict[int, Score | None] = {}
        with storage_errors(folder.name):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)

    def is_empty(self) -> bool:
        """Whether nothing was ever saved here."""
        return not self.rounds()

    def rounds(self) -> tuple[int, ...]:
        """Numbers of the rounds that have a file, ascending."""
        return numbered(self._folder, _NAME)

    def save(
        self,
        number: int,
        states: Tree,
        facts: Any = None,
        *,
        score: Score | None = None,
    ) -> Path:
        """Save a round; older ones that are no longer needed are deleted afterwards.

        Args:
            number: The round.
            states: Tensors in nested mappings; names may hold any characters.
            facts: A JSON object; floats come back exactly, NaN and infinities too.
            score: The round's; None or NaN never is the best.

        Returns:
            The file.

        Raises:
            StorageError: If it cannot be written; the previous checkpoint is intact.
        """
        path = self._path(number)
        header = {"round": number, "score": None if score is None else [*score]}
        write_tree(path, states, {"header": header, "facts": facts or {}})
        self._known_scores[number] = score
        self._prune(self._scores())
        return path

    def load(self, number: int) -> Checkpoint:
        """Read one round.

        Raises:
            StorageError: If it is missing or damaged.
        """
        states, content = read_tree(self._path(number))
        header = content["header"]
        if header["round"] != number:
            raise StorageError(f"checkpoint of round {number} holds another round")
        found = header["score"]
        score = tuple(found) if isinstance(found, list) else None
        self._known_scores[number] = score
        return Checkpoint(number, states, content["facts"], score)

    def load_newest(self) -> tuple[Checkpoint | None, tuple[int, ...]]:
        """Read the newest round that is undamaged.

        Returns:
            The checkpoint (None if nothing was ever saved), and the numbers of the
            newer rounds that were skipped because their files are damaged.

        Raises:
            StorageError: If there are checkpoints and all are damaged.
        """
        skipped: list[int] = []
        for number in reversed(self.rounds()):
            try:
                return self.load(number), tuple(skipped)
            except StorageError as error:
                logger.warning("checkpoint of round %d: %s", number, error.message)
                self._known_scores[number] = None
                skipped.append(number)
        if skipped:
            raise StorageError(
                f"all {len(skipped)} checkpoints are damaged",
                hint="Restore the folder from a copy, or start the run anew.",
            )
        return None, ()

    def best(self) -> int | None:
        """Number of the round with the largest score, the earliest of equals."""
        return best_round(self._scores())

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.safetensors"

    def _scores(self) -> dict[int, Score | None]:
        """Scores of the rounds on disk; none that was saved or loaded is opened."""
        rounds = self.rounds()
        for number in set(rounds) - set(self._known_scores):
            try:
                self.load(number)
            except StorageError:
                self._known_scores[number] = None
        return {number: self._known_scores[number] for number in rounds}

    def _prune(self, scores: Mapping[int, Score | None]) -> None:
        wanted = {*sorted(scores)[-self._keep :], best_round(scores)}
        with storage_errors(self._folder.name):
            for number in set(scores) - wanted:
                self._path(number).unlink(missing_ok=True)


def best_round(scores: Mapping[int, Score | None]) -> int | None:
    """Name the round with the largest score, the earliest of equals.

    Example:
        >>> best_round({1: (0.5,), 2: (0.7,), 3: (0.7,), 4: None, 5: (float("nan"),)})
        2
    """
    known = {
        number: score
        for number, score in sorted(scores.items())
        if score is not None and not any(map(math.isnan, score))
    }
    return max(known, key=lambda number: known[number]) if known else None


def numbered(folder: Path, pattern: re.Pattern[str]) -> tuple[int, ...]:
    """List the numbers in the names of a folder's files, ascending.

    Args:
        folder: The folder.
        pattern: Its first group is the number.
    """
    found = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return tuple(sorted(int(match[1]) for match in found if match))


def write_tree(
    path: Path,
    tree: Tree,
    facts: Mapping[str, Any],
    *,
    mode: int = 0o666,
    sync: bool = True,
) -> None:
    """Write nested tensors and JSON facts as one checksummed safetensors file.

    Args:
        path: The file, replaced atomically.
        tree: Nested mappings of tensors; empty mappings come back too.
        facts: As for `fedmed.exact_json.dumps`.
        mode: See `fedmed.storage.write_atomic`.
        sync: See `fedmed.storage.write_atomic`.

    Raises:
        StorageError: If it cannot be written.
    """
    leaves = dict(_leaves(tree, ()))
    flat = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    content = {"facts": facts, "empty": sorted(set(leaves) - set(flat))}
    try:
        text = exact_json.dumps(content)
    except ValueError as error:
        raise StorageError(f"{path.name} cannot hold these facts: {error}") from error
    write_state(path, flat, {"fedmed": text}, mode=mode, sync=sync)


def read_tree(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `write_tree` wrote: the nested tensors and the facts.

    Raises:
        StorageError: If the file is missing or damaged.
    """
    flat, metadata = read_state(path)
    if "fedmed" not in metadata:
        raise StorageError(f"{path.name} is no checkpoint: it has no facts")
    content = exact_json.loads(metadata["fedmed"])
    tree: dict[str, Any] = {}
    for name in content["empty"]:
        _branch(tree, name.split("/"))
    for name, tensor in flat.items():
        *parts, last = name.split("/")
        _branch(tree, parts)[_unescape(last)] = tensor
    return tree, content["facts"]


def _leaves(
    tree: Tree, parts: tuple[str, ...]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the tensors under joined names, and None for an empty mapping."""
    if not tree and parts:
        yield "/".join(parts), None
    for name, value in tree.items():
        path = (*parts, _escape(name))
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield "/".join(path), value


def _branch(tree: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    for part in parts:
        tree = tree.setdefault(_unescape(part), {})
    return tree


def _escape(name: str) -> str:
    """Make one part of a path out of any name; "~" can begin no other part."""
    text = "".join(
        c if c.isprintable() and c not in "/\\~" else f"~{ord(c):x};" for c in name
    )
    return (
        "~;" if not name else text.replace(".", "~2e;") if set(name) == {"."} else text
    )


def _unescape(part: str) -> str:
    return re.sub(r"~([0-9a-f]*);", lambda m: chr(int(m[1], 16)) if m[1] else "", part)
