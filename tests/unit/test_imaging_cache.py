"""The cache of prepared cases: right, whole, shared, and quick to open again."""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedmed.case import Case, CaseRef
from fedmed.errors import CaseError, DataError, QuarantineBudgetError, StorageError
from fedmed.imaging import file_hashes
from fedmed.imaging.cache import PreparedCache, changed_cases, prepare_cases
from fedmed.imaging.prepared_case import PreparedCase
from fedmed.imaging.preprocess import Preprocessing, prepare

PLAIN = Preprocessing()
SHAPE = (1, 8, 7, 3)


def read(case_id: str, path: Path) -> Case:
    """A stand-in reader: a file holds a seed, and the seed makes the voxels."""
    seed = int(path.read_text())
    if seed < 0:
        raise CaseError(f"case {case_id}: seed {seed} is negative")
    rng = np.random.default_rng(seed)
    return Case(
        case_id=case_id,
        image=rng.normal(size=SHAPE).astype(np.float32),
        label=(rng.random(SHAPE[1:]) > 0.5).astype(np.uint8),
        spacing_mm=(1.0, 1.0, 3.0),
        region=np.ones(SHAPE[1:], np.uint8),
    )


def reread(case_id: str, path: Path) -> Case:
    return read(case_id, path)


def make_ref(folder: Path, case_id: str, seed: int, **changes: object) -> CaseRef:
    path = folder / f"{case_id}.txt"
    path.write_text(str(seed))
    age(path)
    values = {
        "case_id": case_id,
        "subject_id": case_id,
        "files": (path,),
        "read": functools.partial(read, case_id, path),
    }
    return CaseRef(**(values | changes))  # type: ignore[arg-type]


def age(path: Path, seconds: float = 100) -> None:
    """Make a file look old: fresh files are hashed again each time."""
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def cache(tmp_path: Path) -> PreparedCache:
    return PreparedCache(tmp_path / "cache")


def entries(tmp_path: Path) -> list[Path]:
    return sorted(p.parent for p in tmp_path.glob("cache/entries/*/*/meta.json"))


def indexed(tmp_path: Path) -> list[list[object]]:
    """Lines of the index of file hashes."""
    text = (tmp_path / "cache" / "files.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line]


def same(one: np.ndarray | None, other: np.ndarray | None) -> None:
    assert (one is None) == (other is None)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("settings", [PLAIN, Preprocessing((0.7, 0.7), (12, 6))])
def test_a_cached_case_is_the_prepared_case(
    tmp_path: Path, cache: PreparedCache, settings: Preprocessing
) -> None:
    ref = make_ref(tmp_path, "c1", 1)
    expected = prepare(ref.read(), settings)
    for case in (cache.open(ref, settings), cache.open(ref, settings)):
        for field in dataclasses.fields(expected):
            one, other = getattr(case, field.name), getattr(expected, field.name)
            if "IJK" in field.name:
                same(one, other)
                assert one.dtype == other.dtype
            else:
                assert one == other
        assert case.image_shape == expected.image_CIJK.shape
    assert len(entries(tmp_path)) == 1
    files = {p.name for p in entries(tmp_path)[0].iterdir()}
    assert ("label_native_IJK.npy" in files) == (settings is not PLAIN)


def test_class_labels_rows_and_missing_labels(
    tmp_path: Path, cache: PreparedCache
) -> None:
    row = Case("r", np.array([1, np.nan], np.float32), np.array(3), ())
    bare = Case("b", np.ones(SHAPE, np.float32), None, (1.0, 1.0, 1.0))
    for case in (row, bare):
        ref = make_ref(tmp_path, case.case_id, 1, read=lambda case=case: case)
        opened = cache.open(ref, PLAIN)
        same(opened.label_IJK, case.label)
        assert opened.label_native_IJK is None
    assert (
        cache.open(make_ref(tmp_path, "r", 1, read=lambda: row), PLAIN).geometry is None
    )
    same(
        cache.open(make_ref(tmp_path, "r", 1, read=lambda: row), PLAIN).image_CIJK,
        row.image,
    )


def test_arrays_are_mapped_read_only_and_pickle_by_path(
    tmp_path: Path, cache: PreparedCache
) -> None:
    case = cache.open(make_ref(tmp_path, "c1", 1), PLAIN)
    assert not case.image_CIJK.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        case.image_CIJK[0] = 0
    content = pickle.dumps(case)
    assert len(content) < 2500  # no voxels
    same(pickle.loads(content).image_CIJK, case.image_CIJK)


def test_settings_version_reader_and_id_make_other_entries(
    tmp_path: Path, cache: PreparedCache
) -> None:
    ref = make_ref(tmp_path, "c1", 1)
    other_reader = functools.partial(reread, "c1", ref.files[0])
    variants = [
        (ref, PLAIN),
        (ref, Preprocessing(intensity="unit")),
        (dataclasses.replace(ref, read_version="2"), PLAIN),
        (dataclasses.replace(ref, read=other_reader), PLAIN),
        (dataclasses.replace(ref, case_id="c2"), PLAIN),
    ]
    for count, (variant, settings) in enumerate(variants, start=1):
        cache.open(variant, settings)
        assert len(entries(tmp_path)) == count
    cache.open(ref, Preprocessing(percentiles=(0.5, 99.5)))  # equal settings
    assert len(entries(tmp_path)) == len(variants)


def test_cases_without_files_are_told_apart_by_their_voxels(
    tmp_path: Path, cache: PreparedCache
) -> None:
    """Phantoms of two seeds carry equal names and no files."""
    paths = [make_ref(tmp_path, f"seed{n}", n).files[0] for n in range(2)]
    refs = [
        CaseRef("c1", "c1", (), functools.partial(read, "c1", path)) for path in paths
    ]
    opened = [cache.open(ref, PLAIN) for ref in refs]
    for case, ref in zip(opened, refs, strict=True):
        same(case.image_CIJK, prepare(ref.read(), PLAIN).image_CIJK)
        assert cache.is_current(ref, case)
    assert not cache.is_current(refs[0], opened[1])


def test_moved_files_find_their_entry(tmp_path: Path, cache: PreparedCache) -> None:
    cache.open(make_ref(tmp_path, "c1", 1), PLAIN)
    (tmp_path / "moved").mkdir()
    cache.open(make_ref(tmp_path / "moved", "c1", 1), PLAIN)
    assert len(entries(tmp_path)) == 1


# --- changed and damaged --------------------------------------------------------------


@pytest.mark.parametrize("disguise", ["none", "mtime"])
def test_changed_file_is_seen_between_rounds(
    tmp_path: Path,
    cache: PreparedCache,
    disguise: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(file_hashes, "RACY_S", 0.01)
    refs = [make_ref(tmp_path, "c1", 1), make_ref(tmp_path, "c2", 2)]
    time.sleep(0.05)  # until the files count as untouched and are believed
    before = prepare_cases(refs, PLAIN, cache, budget=0.0)
    assert len(indexed(tmp_path)) == 2
    assert changed_cases(refs, before, cache) == ()
    path = refs[1].files[0]
    stat = path.stat()
    path.write_text("7")  # as long as before
    if disguise == "mtime":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert changed_cases(refs, before, cache) == ("c2",)
    after = prepare_cases(refs, PLAIN, cache, budget=0.0)
    same(after.cases[1].image_CIJK, prepare(refs[1].read(), PLAIN).image_CIJK)
    assert before.cases[0] == after.cases[0]
    path.unlink()
    assert changed_cases(refs, after, cache) == ("c2",)


def test_touched_file_is_not_a_changed_file(
    tmp_path: Path, cache: PreparedCache
) -> None:
    refs = [make_ref(tmp_path, "c1", 1)]
    before = prepare_cases(refs, PLAIN, cache, budget=0.0)
    age(refs[0].files[0], 500)
    assert changed_cases(refs, before, cache) == ()
    assert len(entries(tmp_path)) == 1


def test_file_rewritten_while_it_is_read_is_refused(
    tmp_path: Path, cache: PreparedCache
) -> None:
    ref = make_ref(tmp_path, "c1", 1)

    def slow_read() -> Case:
        case = read("c1", ref.files[0])
        ref.files[0].write_text("2")
        return case

    with pytest.raises(CaseError, match="changed while it was read"):
        cache.open(dataclasses.replace(ref, read=slow_read), PLAIN)
    assert entries(tmp_path) == []


def cut(entry: Path) -> None:
    os.truncate(entry / "image_CIJK.npy", 200)


def remove_array(entry: Path) -> None:
    (entry / "label_IJK.npy").unlink()


def garble_meta(entry: Path) -> None:
    (entry / "meta.json").write_text("{")


def empty_meta(entry: Path) -> None:
    (entry / "meta.json").write_text("[]")


def lie_in_meta(entry: Path) -> None:
    meta = json.loads((entry / "meta.json").read_text())
    meta["arrays"]["image_CIJK"]["shape"][1] += 1
    (entry / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage", [cut, remove_array, garble_meta, empty_meta, lie_in_meta]
)
def test_damaged_entry_is_rebuilt(tmp_path: Path, cache: PreparedCache, damage) -> None:
    ref = make_ref(tmp_path, "c1", 1)
    expected = np.array(cache.open(ref, PLAIN).image_CIJK)
    (entry,) = entries(tmp_path)
    damage(entry)
    case = cache.open(ref, PLAIN)
    same(case.image_CIJK, expected)
    assert case.label_IJK is not None
    assert list(entry.parent.iterdir()) == [entry]  # nothing left behind


def test_vanished_entry_is_a_storage_error(
    tmp_path: Path, cache: PreparedCache
) -> None:
    case = cache.open(make_ref(tmp_path, "c1", 1), PLAIN)
    shutil.rmtree(tmp_path / "cache" / "entries")
    with pytest.raises(StorageError, match="gone or damaged") as caught:
        _ = case.image_CIJK
    assert str(tmp_path) not in str(caught.value)


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`: the system refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 100, 300])
def test_full_disk_leaves_no_half_entry(
    tmp_path: Path, cache: PreparedCache, num_bytes: int
) -> None:
    ref = make_ref(tmp_path, "c1", 1)
    with full_disk(num_bytes), pytest.raises(StorageError) as caught:
        prepare_cases([ref], PLAIN, cache, budget=1.0)
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.glob("cache/entries/*/*")) == []
    same(cache.open(ref, PLAIN).label_IJK, ref.read().label)  # works once there is room


def test_unusable_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        PreparedCache(tmp_path / "file" / "cache")


def test_leftovers_of_a_killed_process_are_removed(
    tmp_path: Path, cache: PreparedCache
) -> None:
    ref = make_ref(tmp_path, "c1", 1)
    cache.open(ref, PLAIN)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    left = entry.parent / ".building-x"
    left.mkdir()
    (left / "image_CIJK.npy").write_bytes(b"half")
    cache.open(ref, PLAIN)
    assert not left.exists()


def test_folder_is_for_its_owner_only(tmp_path: Path, cache: PreparedCache) -> None:
    cache.open(make_ref(tmp_path, "c1", 1), PLAIN)
    for folder in (tmp_path / "cache" / "entries", entries(tmp_path)[0]):
        assert folder.stat().st_mode & 0o077 == 0


def checksum(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()


def _open_all(folder: Path, refs: list[CaseRef], start, queue) -> None:
    cache = PreparedCache(folder / "cache")
    start.wait()
    prepared = prepare_cases(refs, PLAIN, cache, budget=0.0)
    queue.put([checksum(c.image_CIJK) for c in prepared.cases])


def test_processes_may_build_the_same_cases_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    refs = [make_ref(tmp_path, f"c{n:02}", n) for n in range(12)]
    start, queue = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=_open_all, args=(tmp_path, refs, start, queue))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = [checksum(prepare(r.read(), PLAIN).image_CIJK) for r in refs]
    assert sums == [expected] * 3
    assert len(entries(tmp_path)) == 12
    assert not list(tmp_path.glob("cache/entries/*/.building-*"))


# --- warm start -----------------------------------------------------------------------


def test_warm_start_is_quick_and_reads_no_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "RACY_S", 0.05)
    refs = [make_ref(tmp_path, f"scan{n:03}", n) for n in range(200)]
    for ref in refs:
        os.utime(ref.files[0], (1e9, 1e9))
    time.sleep(0.06)  # until the files count as untouched
    prepare_cases(refs, PLAIN, PreparedCache(tmp_path / "cache"), budget=0.0)

    def no_read() -> Case:
        raise AssertionError

    # A reader of equal name, so that the entries are found, which must not be called.
    no_read.__qualname__, no_read.__module__ = read.__qualname__, read.__module__
    warm = [dataclasses.replace(ref, read=no_read) for ref in refs]
    os.chmod(refs[0].files[0], 0o600)
    start_s = time.process_time()
    prepared = prepare_cases(warm, PLAIN, PreparedCache(tmp_path / "cache"), budget=0.0)
    assert time.process_time() - start_s < 1.0
    assert len(prepared.cases) == 200
    index = indexed(tmp_path)
    assert len(index) == 200
    assert "scan" not in (tmp_path / "cache" / "files.jsonl").read_text()
    # Poison the index: a believed entry shows that the file itself was not read.
    poison = [json.dumps([*entry[:-1], "0" * 40]) for entry in index]
    (tmp_path / "cache" / "files.jsonl").write_text("\n".join(poison))
    poisoned = PreparedCache(tmp_path / "cache")
    assert not poisoned.is_current(refs[5], prepared.cases[5])


def test_file_rewritten_within_one_time_stamp_is_seen(
    tmp_path: Path, cache: PreparedCache
) -> None:
    """A fresh file may be rewritten without a trace, so its hash is not believed."""
    ref = make_ref(tmp_path, "c1", 1)
    prepared = prepare_cases([ref], PLAIN, cache, budget=0.0)
    assert not (tmp_path / "cache" / "files.jsonl").exists()
    assert changed_cases([ref], prepared, cache) == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"])
def test_damaged_index_costs_only_time(tmp_path: Path, content: bytes) -> None:
    ref = make_ref(tmp_path, "c1", 1)
    prepare_cases([ref], PLAIN, PreparedCache(tmp_path / "cache"), budget=0.0)
    (tmp_path / "cache" / "files.jsonl").write_bytes(content)
    cache = PreparedCache(tmp_path / "cache")
    assert len(prepare_cases([ref], PLAIN, cache, budget=0.0).cases) == 1


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    """Files that count as untouched."""
    paths = [tmp_path / f"scan{number}" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
        os.utime(path, (1e9, 1e9))
    return paths


def test_index_takes_in_what_others_added(
    tmp_path: Path, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "RACY_S", -60.0)
    one, other = file_hashes.FileHashes(tmp_path), file_hashes.FileHashes(tmp_path)
    wanted = [one.combined([path]) for path in scans[:2]]
    one.save()
    with (tmp_path / "files.jsonl").open("a") as file:
        file.write('["half a line of a process that di')
    other.combined([scans[2]])
    other.save()
    one.refresh()
    for index in (one, other, file_hashes.FileHashes(tmp_path)):
        assert len(index._known) == 3
        assert [index.combined([path]) for path in scans[:2]] == wanted
        assert index._new == {}  # believed, not read


def test_index_forgets_lines_that_were_replaced(
    tmp_path: Path, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "RACY_S", -60.0)
    monkeypatch.setattr(file_hashes, "_SPARE_LINES", 4)
    for number in range(20):
        scans[0].write_text(f"version {number}")
        index = file_hashes.FileHashes(tmp_path)
        index.combined(scans)
        index.save()
    lines = (tmp_path / "files.jsonl").read_text().splitlines()
    assert len([line for line in lines if line]) <= 2 * len(scans) + 4 + 1
    last = file_hashes.FileHashes(tmp_path)
    assert len(last._known) == len(scans)
    last.combined(scans)
    assert last._new == {}


def test_rows_without_files_are_held_in_memory(
    tmp_path: Path, cache: PreparedCache
) -> None:
    made = Case("r", np.array([1, np.nan], np.float32), np.array(3), ())
    ref = CaseRef("r", "r", (), lambda: made)
    opened = cache.open(ref, PLAIN)
    same(opened.image_CIJK, made.image)
    same(opened.label_IJK, made.label)
    assert (opened.image_shape, opened.label_shape) == ((2,), ())
    assert entries(tmp_path) == []
    assert cache.is_current(ref, opened)
    same(pickle.loads(pickle.dumps(opened)).image_CIJK, made.image)
    with pytest.raises(ValueError, match="read-only"):
        opened.image_CIJK[0] = 0


# --- all cases of a site --------------------------------------------------------------


def test_bad_cases_are_quarantined_with_their_reason(
    tmp_path: Path, cache: PreparedCache
) -> None:
    refs = [make_ref(tmp_path, f"c{n}", n) for n in range(8)]
    refs += [make_ref(tmp_path, "bad", -5), make_ref(tmp_path, "gone", 20)]
    refs[-1].files[0].unlink()
    seen = []
    prepared = prepare_cases(
        refs[::-1],
        PLAIN,
        cache,
        budget=0.3,
        problems={"listed": "image without a mask"},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [c.case_id for c in prepared.cases] == [f"c{n}" for n in range(8)]
    assert set(prepared.quarantined) == {"bad", "gone", "listed"}
    assert "seed -5 is negative" in prepared.quarantined["bad"]
    assert "No such file" in prepared.quarantined["gone"]
    assert str(tmp_path) not in "".join(prepared.quarantined.values())
    assert seen == [(n, 10) for n in range(1, 11)]


def test_reader_that_leaks_a_path_is_scrubbed(
    tmp_path: Path, cache: PreparedCache
) -> None:
    def leaky() -> Case:
        (tmp_path / "DOE_JANE.nii").read_bytes()
        raise AssertionError

    ref = make_ref(tmp_path, "c1", 1, read=leaky)
    prepared = prepare_cases([ref], PLAIN, cache, budget=1.0)
    assert prepared.cases == ()
    assert prepared.quarantined == {
        "c1": "case c1: a file cannot be read: No such file or directory"
    }


def test_reader_with_a_bug_costs_the_case_and_tells_no_text(
    tmp_path: Path, cache: PreparedCache
) -> None:
    def buggy() -> Case:
        raise KeyError("DOE_JANE")

    refs = [make_ref(tmp_path, "c1", 1, read=buggy), make_ref(tmp_path, "c2", 2)]
    prepared = prepare_cases(refs, PLAIN, cache, budget=1.0)
    assert [case.case_id for case in prepared.cases] == ["c2"]
    assert prepared.quarantined == {"c1": "case c1: its reader raised KeyError"}


@pytest.mark.parametrize(
    ("budget", "passes"), [(0.0, False), (0.24, False), (0.25, True)]
)
def test_budget_is_a_fraction_of_the_cases(
    tmp_path: Path, cache: PreparedCache, budget: float, passes: bool
) -> None:
    refs = [make_ref(tmp_path, f"c{n}", n) for n in range(3)]
    refs.append(make_ref(tmp_path, "bad", -5))
    if passes:
        assert len(prepare_cases(refs, PLAIN, cache, budget=budget).cases) == 3
        return
    with pytest.raises(QuarantineBudgetError, match=r"1 of 4 cases.*seed -5"):
        prepare_cases(refs, PLAIN, cache, budget=budget)


def test_same_image_of_two_subjects_is_quarantined(
    tmp_path: Path, cache: PreparedCache
) -> None:
    refs = [
        make_ref(tmp_path, "a", 1),
        make_ref(tmp_path, "b", 1, subject_id="a"),  # a second reader's label, say
        make_ref(tmp_path, "c", 1),
        make_ref(tmp_path, "d", 2),
    ]
    prepared = prepare_cases(refs, PLAIN, cache, budget=0.5)
    assert [c.case_id for c in prepared.cases] == ["a", "b", "d"]
    assert "same image as case a" in prepared.quarantined["c"]
    prints = prepared.fingerprints
    assert prints["a"] == prints["b"] != prints["d"]


def test_fingerprint_depends_on_voxels_only(
    tmp_path: Path, cache: PreparedCache
) -> None:
    one = cache.open(make_ref(tmp_path, "a", 1), PLAIN)
    other = cache.open(make_ref(tmp_path, "b", 1), Preprocessing(size=(4, 4)))
    assert one.fingerprint == other.fingerprint != ""
    fortran = dataclasses.replace(
        read("c", make_ref(tmp_path, "c", 1).files[0]),
        image=np.asfortranarray(read("c", tmp_path / "c.txt").image),
    )
    third = cache.open(make_ref(tmp_path, "c", 3, read=lambda: fortran), PLAIN)
    assert third.fingerprint == one.fingerprint


def test_equal_rows_of_a_table_are_no_duplicates(
    tmp_path: Path, cache: PreparedCache
) -> None:
    def row() -> Case:
        return Case("r", np.ones(4, np.float32), np.array(1), ())

    refs = [make_ref(tmp_path, case_id, 1, read=row) for case_id in "ab"]
    prepared = prepare_cases(refs, PLAIN, cache, budget=0.0)
    assert len(prepared.cases) == 2
    assert prepared.fingerprints == {}


def test_one_name_twice_is_refused(tmp_path: Path, cache: PreparedCache) -> None:
    ref = make_ref(tmp_path, "a", 1)
    with pytest.raises(DataError, match="1 cases carry"):
        prepare_cases([ref, ref], PLAIN, cache, budget=1.0)


def test_no_cases_is_an_empty_set(cache: PreparedCache) -> None:
    assert prepare_cases([], PLAIN, cache, budget=0.0).cases == ()


def test_many_cases_need_few_file_handles(tmp_path: Path, cache: PreparedCache) -> None:
    refs = [make_ref(tmp_path, f"c{n:03}", n) for n in range(80)]
    prepared = prepare_cases(refs, PLAIN, cache, budget=0.0)
    opened: list[PreparedCase] = list(prepared.cases)
    before = len(os.listdir("/proc/self/fd"))
    for case in opened:
        _ = case.image_CIJK, case.label_IJK
    assert len(os.listdir("/proc/self/fd")) - before <= 130
