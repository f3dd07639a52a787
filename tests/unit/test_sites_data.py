"""A hospital's data as its host uses it: listed once, opened by name, small to hold."""

from __future__ import annotations

import functools
import gc
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.case import UNKNOWN_LABEL, Case, CaseRef
from fedmed.errors import DataError
from fedmed.imaging.cache import PreparedCache, prepare_cases
from fedmed.imaging.preprocess import Prepared, Preprocessing, cut_fraction, prepare
from fedmed.study import Study, study_from_dict
from fedmed.training.examples import ExampleIndex, _known_slices
from sites import data as module
from sites.catalogue import open_dataset
from sites.data import SiteList, SliceView, list_sites, open_site

SHAPE = (1, 10, 9, 6)


def table_study(num_sites: int) -> Study:
    return study_from_dict(
        {
            "name": "tables",
            "rounds": 1,
            "sites": {
                "dataset": "benchmarks.synthetic_sites",
                "num_sites": num_sites,
                "num_rows": 8,
            },
            "model": {"name": "mlp", "mode": "row"},
            "train": {"batch_size": 4, "local_steps": 1},
            "strategy": {"name": "fedavg"},
        }
    )


def scan(case_id: str, seed: int) -> Case:
    """A scan with an organ off its centre and two slices that nobody annotated."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE[1:], np.uint8)
    label[1:4, 2:6, 1:5] = 1
    label[..., (0, 3)] = UNKNOWN_LABEL
    image = rng.normal(size=SHAPE).astype(np.float32)
    return Case(case_id, image, label, (1.0, 1.0, 2.0))


def scan_refs(folder: Path, count: int, first: int = 0) -> list[CaseRef]:
    refs = []
    for number in range(first, first + count):
        path = folder / f"c{number:05}"
        path.write_text(str(number))
        read = functools.partial(scan, path.name, number)
        refs.append(CaseRef(path.name, path.name, (path,), read))
    return refs


# --- listing --------------------------------------------------------------------------


def test_sites_are_listed_once_however_many_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return open_dataset(*arguments)

    monkeypatch.setattr(module, "open_dataset", counted)
    listed = SiteList(table_study(30), tmp_path)
    names = [source.site_id for source in listed.sources]
    assert names == [f"site{n:05}" for n in range(30)]
    opened = [listed.open(name) for name in names]
    assert [data.site_id for data in opened] == names
    assert len(calls) == 1


def test_a_site_from_the_list_is_the_site_that_is_opened_alone(tmp_path: Path) -> None:
    study = table_study(4)
    one = SiteList(study, tmp_path).open("site00002")
    other = open_site(study, "site00002", tmp_path)
    assert one.num_cases == other.num_cases
    for split, cases in one.splits.items():
        for case, twin in zip(cases, other.splits[split], strict=True):
            assert case.content == twin.content
            np.testing.assert_array_equal(case.image_CIJK, twin.image_CIJK)
    with pytest.raises(DataError, match="no site 'nowhere'"):
        SiteList(study, tmp_path).open("nowhere")


def test_unknown_site_is_told_beside_a_few_known_ones(tmp_path: Path) -> None:
    study = table_study(200)
    study = study.model_copy(
        update={"split": study.split.model_copy(update={"held_out": ("x",)})}
    )
    with pytest.raises(Exception, match=r"'x'.*site00019 and 180 more"):
        list_sites(study, tmp_path)


# --- what a site costs to hold --------------------------------------------------------


def test_a_site_with_a_small_table_is_small_to_hold(tmp_path: Path) -> None:
    """A thousand of them must fit beside the model: at most 100 kB each."""
    listed = SiteList(table_study(30), tmp_path)
    held = [_index(listed, "site00000")]  # what is loaded once
    gc.collect()
    tracemalloc.start()
    try:
        held += [_index(listed, f"site{n:05}") for n in range(10, 30)]
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(held) == 21
    assert used / 20 < 100_000
    assert not list(tmp_path.glob("prepared/entries/*/*"))  # no file for a row


def _index(listed: SiteList, name: str) -> ExampleIndex:
    index = ExampleIndex(listed.open(name).splits["train"], "row")
    index.batch(0, 0, 4)
    return index


def test_mapped_arrays_hold_no_file_handles(tmp_path: Path) -> None:
    handles = Path("/proc/self/fd")
    if not handles.exists():
        pytest.skip("no /proc here")
    cache = PreparedCache(tmp_path / "cache")
    before = len(os.listdir(handles))
    prepared = prepare_cases(
        scan_refs(tmp_path, 40), Preprocessing(), cache, budget=0.0
    )
    arrays = [(case.image_CIJK, case.label_IJK) for case in prepared.cases]
    assert len(arrays) == 40
    assert len(os.listdir(handles)) <= before + 2


# --- facts measured once --------------------------------------------------------------


def test_facts_of_a_prepared_case_are_those_of_its_arrays(tmp_path: Path) -> None:
    settings = Preprocessing(size=(4, 4))
    ref = scan_refs(tmp_path, 1)[0]
    for _ in range(2):  # as built, as found
        case = PreparedCache(tmp_path / "cache").open(ref, settings)
        fresh: Prepared = prepare(ref.read(), settings)
        assert case.known_slices == (1, 2, 4, 5)
        assert case.label_shape == (4, 4, 6)
        assert cut_fraction(case) == cut_fraction(fresh) > 0.1


def test_slices_of_the_network_grid_lie_side_by_side(tmp_path: Path) -> None:
    case = PreparedCache(tmp_path / "cache").open(
        scan_refs(tmp_path, 1)[0], Preprocessing()
    )
    label = case.label_IJK
    assert label is not None
    assert case.image_CIJK[..., 2].flags.c_contiguous
    assert label[..., 2].flags.c_contiguous
    native = case.label_native_IJK
    assert native is not None
    assert native.flags.c_contiguous
    assert not native.flags.writeable
    np.testing.assert_array_equal(native, label)


def test_examples_are_listed_without_opening_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PreparedCache(tmp_path / "cache")
    cases = prepare_cases(
        scan_refs(tmp_path, 3), Preprocessing(), cache, budget=0.0
    ).cases

    def refuse(*_: Any) -> np.ndarray:
        raise AssertionError

    # Not through the class: its checked annotations look at every attribute.
    with monkeypatch.context() as patched:
        patched.setattr("fedmed.imaging.prepared_case._map_array", refuse)
        assert [_known_slices(case, "slice") for case in cases] == [(1, 2, 4, 5)] * 3
    index = ExampleIndex(cases, "slice")
    assert index.examples == [(n, k) for n in range(3) for k in (1, 2, 4, 5)]


def test_a_part_of_a_volume_knows_its_own_slices(tmp_path: Path) -> None:
    case = PreparedCache(tmp_path / "cache").open(
        scan_refs(tmp_path, 1)[0], Preprocessing(size=(4, 4))
    )
    parts = [SliceView(case, 0.0, 0.5), SliceView(case, 0.5, 1.0)]
    assert [part.known_slices for part in parts] == [(1, 2), (4, 5)]
    for part in parts:
        label = part.label_IJK
        assert label is not None
        known = (label != UNKNOWN_LABEL).any(axis=(0, 1))
        assert tuple(np.flatnonzero(known)) == part.known_slices
        assert part.cut is None
        assert 0 < cut_fraction(part) < 1
