"""Prepared cases on disk, memory-mapped, named by the content that they came from.

An entry is a folder of `.npy` files and a `meta.json`; it appears whole (one rename) or
not at all. Its name is a hash of the input files' content, the preprocessing settings,
the reader and its version, and `CACHE_FORMAT`: a changed scan or setting is another
entry, never a stale one. What every start asks of every case (its slices with a known
label, how much of its organs is cut off) is measured once and stands in `meta.json`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fedmed.case import Case, CaseRef
from fedmed.errors import (
    CaseError,
    DataError,
    FedMedError,
    QuarantineBudgetError,
    StorageError,
)
from fedmed.imaging.file_hashes import HASH_BYTES, FileHashes
from fedmed.imaging.prepared_case import (
    PreparedCase,
    forget_open_arrays,
    held_row,
    open_entry,
    write_entry,
)
from fedmed.imaging.preprocess import Preprocessing, prepare

CACHE_FORMAT = 3
"""Raise when `prepare`, a reader or the layout of an entry gives other numbers."""

_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of cases done and of all cases."""

_SHOWN_REASONS = 3

MAX_THREADS = 4
"""Cases that one process prepares at the same time, at most."""

MAX_PACKED_BYTES = 256 << 20
"""What the files of the cases that are prepared at once may hold, about."""

_WORTH_THREADS = 4


@dataclass(frozen=True)
class PreparedSet:
    """A site's cases.

    Attributes:
        cases: The usable ones, in sorted `case_id` order.
        quarantined: case_id -> why it is not used. For the hospital and counts.
    """

    cases: tuple[PreparedCase, ...]
    quarantined: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, str]:
        """case_id -> hash of the image as read; equal hashes are equal images."""
        return {c.case_id: c.fingerprint for c in self.cases if c.fingerprint}


class PreparedCache:
    """A folder of prepared cases; several processes may use it at once.

    Args:
        folder: Made if it does not exist, for its owner only: it holds voxels.

    Raises:
        StorageError: If the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        try:
            for part in ("entries", "locks"):
                (self._folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _storage_error(error) from None
        self._hashes = FileHashes.of(self._folder)
        self._hashes.refresh()

    def open(self, ref: CaseRef, preprocessing: Preprocessing) -> PreparedCase:
        """Give the prepared case, from its entry or by reading and preparing it.

        Args:
            ref: The case. Its files are stat'ed, and hashed if they look changed. One
                without files is read each time; a row without files is not stored.
            preprocessing: The settings.

        Returns:
            The case; its arrays are not opened yet.

        Raises:
            CaseError: If the case cannot be used.
            StorageError: If the entry cannot be written.
        """
        if not ref.files:
            made = _read(ref)
            content = _hash_of_case(made)
            if made.image.ndim == 1:
                return held_row(prepare(made, preprocessing), ref, content=content)
        else:
            content = self._content(ref)
        found = self._found(ref, preprocessing, content)
        return found or self._built(ref, preprocessing, content)

    def find(self, ref: CaseRef, preprocessing: Preprocessing) -> PreparedCase | None:
        """Give the prepared case if that is quick: no image is read.

        Args:
            ref: The case.
            preprocessing: The settings.

        Returns:
            None if `open` would have to prepare it.

        Raises:
            CaseError: If a file cannot be read.
        """
        if not ref.files:
            return None
        return self._found(ref, preprocessing, self._content(ref))

    def _found(
        self, ref: CaseRef, preprocessing: Preprocessing, content: str
    ) -> PreparedCase | None:
        return open_entry(self._entry(ref, preprocessing, content), ref, content)

    def _built(
        self, ref: CaseRef, preprocessing: Preprocessing, content: str
    ) -> PreparedCase:
        entry = self._entry(ref, preprocessing, content)
        lock = self._folder / "locks" / f"{entry.parent.name}.lock"
        try:
            with FileLock(lock):
                case = open_entry(entry, ref, content)
                if case is None:
                    self._build(entry, ref, preprocessing, content)
                    case = open_entry(entry, ref, content)
        except OSError as error:
            raise _storage_error(error) from None
        if case is None:
            raise StorageError(
                f"case {ref.case_id}: its cache entry is damaged right after writing",
                hint="Check the disk that holds the cache.",
            )
        return case

    def _entry(self, ref: CaseRef, preprocessing: Preprocessing, content: str) -> Path:
        key = _key(ref, preprocessing, content)
        return self._folder / "entries" / key[:2] / key

    def is_current(self, ref: CaseRef, case: PreparedCase) -> bool:
        """Tell whether the files still hold what the case was prepared from.

        Args:
            ref: The case's promise.
            case: What `open` gave for it earlier.

        Returns:
            False if a file's content changed or a file cannot be opened any more.
        """
        try:
            return self._content(ref) == case.content
        except CaseError:
            return False

    def save_index(self) -> None:
        """Remember the files' hashes for the next start."""
        self._hashes.save()

    def _content(self, ref: CaseRef) -> str:
        if not ref.files:
            # Made, not read (a phantom): only the voxels tell two of them apart.
            return _hash_of_case(_read(ref))
        try:
            return self._hashes.combined(ref.files)
        except CaseError as error:
            raise CaseError(
                f"case {ref.case_id}: {error.message}", hint=error.hint
            ) from None

    def _build(
        self, entry: Path, ref: CaseRef, preprocessing: Preprocessing, content: str
    ) -> None:
        """Build an entry; the caller holds the lock of the folder it goes into."""
        case = _read(ref)
        prepared = prepare(case, preprocessing)
        if self._content(ref) != content:
            raise CaseError(
                f"case {ref.case_id}: a file changed while it was read",
                hint="Try again when nobody writes there.",
            )
        entry.parent.mkdir(mode=0o700, exist_ok=True)
        # Whoever left these died: the lock is ours.
        for left in entry.parent.glob(".building-*"):
            shutil.rmtree(left, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=entry.parent))
        try:
            write_entry(building, prepared, fingerprint=_fingerprint(case))
            if entry.exists():
                os.rename(entry, building / "damaged")
                forget_open_arrays()
            os.rename(building, entry)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        shutil.rmtree(entry / "damaged", ignore_errors=True)


def _read(ref: CaseRef) -> Case:
    try:
        return ref.read()
    except OSError as error:
        # The message of an OSError holds the whole path.
        raise CaseError(
            f"case {ref.case_id}: a file cannot be read: "
            f"{error.strerror or 'input/output error'}"
        ) from None
    except (FedMedError, MemoryError):
        raise
    except Exception as error:
        # One case that a reader was not written for must not cost the site its study.
        raise CaseError(
            f"case {ref.case_id}: its reader raised {type(error).__name__}"
        ) from None


def _key(ref: CaseRef, preprocessing: Preprocessing, content: str) -> str:
    facts = {
        "format": CACHE_FORMAT,
        "content": content,
        "case_id": ref.case_id,
        "reader": _reader_name(ref.read),
        "read_version": ref.read_version,
        "preprocessing": _settings(preprocessing),
    }
    text = json.dumps(facts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=HASH_BYTES).hexdigest()


@functools.lru_cache(maxsize=8)
def _settings(preprocessing: Preprocessing) -> str:
    """Write settings down; every case of a site asks for the same."""
    return json.dumps(_as_floats(asdict(preprocessing)), sort_keys=True)


def _as_floats(value: Any) -> Any:
    """Make 1 and 1.0 one setting."""
    if isinstance(value, dict):
        return {name: _as_floats(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) else value


def _reader_name(read: Callable[..., Any]) -> str:
    while isinstance(read, functools.partial):
        read = read.func
    return f"{read.__module__}:{getattr(read, '__qualname__', type(read).__name__)}"


def prepare_cases(
    refs: Sequence[CaseRef],
    preprocessing: Preprocessing,
    cache: PreparedCache,
    *,
    budget: float,
    problems: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> PreparedSet:
    """Open or build every case.

    An image that two SUBJECTS share could fall into both training and test set: the
    case that comes first by `case_id` stays, the later ones are quarantined. Several
    cases of one subject may share an image (several readers' labels): they always fall
    into the same split and all stay.

    Args:
        refs: The site's cases.
        preprocessing: The settings.
        cache: Where prepared cases lie.
        budget: Largest fraction of the cases that may be unusable, 0 to 1.
        problems: Cases that could not even be listed; they count as quarantined.
        progress: Called after each case.

    Returns:
        Usable and quarantined cases.

    Raises:
        DataError: If two cases carry the same `case_id`.
        QuarantineBudgetError: If more cases are unusable than `budget` allows.
        StorageError: If the cache cannot be written.
    """
    twice = len(refs) - len({ref.case_id for ref in refs})
    if twice:
        raise DataError(
            f"{twice} cases carry the case_id of another case of the site",
            hint="A case_id must be unique in its site: repair the dataset module.",
        )
    opened: list[PreparedCase] = []
    quarantined = dict(problems or {})
    try:
        results = _open_all(sorted(refs, key=lambda r: r.case_id), preprocessing, cache)
        for done, (ref, result) in enumerate(results, start=1):
            if isinstance(result, CaseError):
                quarantined[ref.case_id] = str(result)
            else:
                opened.append(result)
            if progress is not None:
                progress(done, len(refs))
    finally:
        cache.save_index()
    duplicates = _duplicates(opened)
    quarantined |= duplicates
    _check_budget(quarantined, len(refs) + len(problems or {}), budget)
    if quarantined:
        _LOG.warning("%d cases are quarantined", len(quarantined))
    return PreparedSet(
        cases=tuple(c for c in opened if c.case_id not in duplicates),
        quarantined=quarantined,
    )


def _open_all(
    refs: Sequence[CaseRef], preprocessing: Preprocessing, cache: PreparedCache
) -> Iterator[tuple[CaseRef, PreparedCase | CaseError]]:
    """Open every case, in order; those that must be read and prepared in threads."""
    found = [_caught(cache.find, ref, preprocessing) for ref in refs]
    missing = [ref for ref, case in zip(refs, found, strict=True) if case is None]
    opened: Iterator[PreparedCase | CaseError | None]
    with ThreadPoolExecutor(_num_threads(missing)) as pool:
        if sum(bool(ref.files) for ref in missing) < _WORTH_THREADS:
            opened = (_caught(cache.open, ref, preprocessing) for ref in missing)
        else:
            opened = pool.map(
                lambda ref: _caught(cache.open, ref, preprocessing), missing
            )
        try:
            for ref, case in zip(refs, found, strict=True):
                result = next(opened) if case is None else case
                assert result is not None  # open gives a case or raises
                yield ref, result
        finally:
            pool.shutdown(cancel_futures=True)


def _caught(
    call: Callable[[CaseRef, Preprocessing], PreparedCase | None],
    ref: CaseRef,
    preprocessing: Preprocessing,
) -> PreparedCase | CaseError | None:
    try:
        return call(ref, preprocessing)
    except CaseError as error:
        return error


def _num_threads(refs: Sequence[CaseRef]) -> int:
    """Unpacking and writing leave Python's lock; memory bounds how many go at once."""
    sizes = [_num_bytes(ref) for ref in refs]
    room = MAX_PACKED_BYTES // max([1, *sizes])
    return max(1, min(MAX_THREADS, room, os.cpu_count() or 1))


def _num_bytes(ref: CaseRef) -> int:
    try:
        return sum(file.stat().st_size for file in ref.files)
    except OSError:
        return 0


def changed_cases(
    refs: Sequence[CaseRef], prepared: PreparedSet, cache: PreparedCache
) -> tuple[str, ...]:
    """Name the prepared cases whose files hold something else by now.

    Args:
        refs: The site's cases.
        prepared: What `prepare_cases` gave for them.
        cache: The same cache.

    Returns:
        Sorted `case_id`s; files that look untouched are not read.
    """
    by_id = {ref.case_id: ref for ref in refs}
    return tuple(
        case.case_id
        for case in prepared.cases
        if case.case_id in by_id and not cache.is_current(by_id[case.case_id], case)
    )


def _duplicates(cases: Sequence[PreparedCase]) -> dict[str, str]:
    first: dict[str, PreparedCase] = {}
    reasons = {}
    for case in cases:
        if not case.fingerprint:
            continue
        earlier = first.setdefault(case.fingerprint, case)
        if earlier.subject_id != case.subject_id:
            reasons[case.case_id] = (
                f"case {case.case_id}: the same image as case {earlier.case_id}, "
                "which belongs to another subject"
            )
    return reasons


def _check_budget(reasons: Mapping[str, str], num_cases: int, budget: float) -> None:
    if len(reasons) <= budget * num_cases:
        return
    shown = "; ".join(
        why if case_id in why else f"case {case_id}: {why}"
        for case_id, why in sorted(reasons.items())[:_SHOWN_REASONS]
    )
    raise QuarantineBudgetError(
        f"{len(reasons)} of {num_cases} cases cannot be used, allowed are "
        f"{budget:.0%}: {shown.replace(chr(10), ' ')}",
        hint="Repair or remove these cases, or raise the quarantine budget.",
    )


def _hash_of_case(case: Case) -> str:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for array in (case.image, case.label, case.region):
        digest.update(b"none" if array is None else str(array.shape).encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(repr((case.spacing_mm, case.spacing_known)).encode())
    return digest.hexdigest()


def _fingerprint(case: Case) -> str:
    if case.image.ndim == 1:
        return ""
    digest = hashlib.blake2b(str(case.image.shape).encode(), digest_size=HASH_BYTES)
    digest.update(np.ascontiguousarray(case.image).data)
    return digest.hexdigest()


def _storage_error(error: OSError) -> StorageError:
    return StorageError(
        f"the cache of prepared cases cannot be written: "
        f"{error.strerror or 'the disk took only a part'}",
        hint="Free some space, or give the cache another folder.",
    )
