"""The public site: whom it concerns, and what of it is seen."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError, DataError, ResumeError
from fedmed.legs import data_hash
from fedmed.message import Message
from fedmed.run import transport_sites
from fedmed.runfolder import RunFolder
from fedmed.transports.inprocess import InProcessTransport
from sites.context import HospitalContext, Workbench, Workshop
from sites.data import SiteList, list_sites
from sites.public import PublicImages

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
hospitals = importlib.import_module("tiny.hospitals")
modules_are_listed_once = runs.modules_are_listed_once

BASES = {"slices": runs.IMAGE, "rows": runs.TABLE}


def study_of(name="feddf", base=runs.IMAGE, *, sites=None, **changes):
    """Three hospitals and the public site "p"."""
    where = {"with_public": True, "public": "p", **(sites or {})}
    return runs.make_study(base, name, sites=where, **changes)


@pytest.mark.parametrize("name", ["joint", "feddf"])
def test_it_is_no_hospital(name, tmp_path):
    study = study_of(name)
    _, found = list_sites(study, runs.CACHE)
    assert [source.site_id for source in found] == ["a", "b", "c"]
    pooled = Workbench(study, "pooled", runs.CACHE)
    assert {data.site_id for data in pooled.pool} == {"a", "b", "c"}
    result = runs.run(study, tmp_path)
    lock = result.folder.read_lock()
    assert set(lock["data"]) == {"a", "b", "c"}
    rows = result.folder.cases_file.read_text().splitlines()[1:]
    sites = {line.split(",")[rows_column(result, "site")] for line in rows}
    assert sites == {"a", "b", "c"}
    assert bool(lock["public"]) == (name == "feddf")
    assert "p" not in result.rounds[0]["answered"]


def rows_column(result, name):
    header = result.folder.cases_file.read_text().splitlines()[0]
    return header.split(",").index(name)


@pytest.mark.parametrize("name", ["fedavg", "separate"])
def test_naming_one_changes_nothing_for_methods_that_need_none(name, tmp_path):
    with_public = runs.run(study_of(name), tmp_path / "with")
    without = runs.run(runs.make_study(runs.IMAGE, name), tmp_path / "without")
    torch.testing.assert_close(
        with_public.everything(("a", "b", "c")),
        without.everything(("a", "b", "c")),
        rtol=0,
        atol=0,
    )


def test_it_is_asked_only_by_methods_that_need_it():
    assert transport_sites(study_of("feddf")) == ("a", "b", "c", "p")
    assert transport_sites(study_of("fedmd")) == ("a", "b", "c", "p")
    assert transport_sites(study_of("fedavg")) == ("a", "b", "c")
    listed = study_of("feddf", sites={"include": ["a", "b", "p"]})
    assert transport_sites(listed) == ("a", "b", "p")


@pytest.mark.parametrize("name", ["feddf", "fedmd"])
def test_a_study_without_one_is_told_which_sites_there_are(name, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"'{name}' distils on public images"
    ) as seen:
        runs.run(runs.make_study(runs.IMAGE, name), tmp_path)
    assert "sites.public to one of a, b, c" in seen.value.hint


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"'sit00001', .*mean 'site00001'"):
        runs.run(synthetic("sit00001"), tmp_path)
    with pytest.raises(ConfigError, match=r"'q', which the data set does not have\n"):
        runs.run(study_of(sites={"public": "q"}), tmp_path)


def synthetic(public):
    where = {"dataset": "benchmarks.synthetic_sites", "num_sites": 3, "num_rows": 8}
    content = {**runs.TABLE, "sites": {}}
    return runs.make_study(content, "feddf", sites={**where, "public": public})


def test_it_cannot_be_tested_too_nor_be_the_only_site(tmp_path):
    with pytest.raises(ConfigError, match=r"'p' is named in .*held_out"):
        runs.run(study_of(split={"held_out": ["p"]}), tmp_path)
    with pytest.raises(DataError, match="no site beside the public one"):
        runs.run(study_of(sites={"include": ["p"]}), tmp_path)


@pytest.mark.parametrize("kind", BASES)
def test_every_hospital_sees_the_same_images_and_no_label(kind):
    study = study_of("fedmd", BASES[kind])
    drawn = []
    for site in "abc":
        bench = Workbench(study, site, runs.CACHE, Workshop(study, runs.CACHE))
        context = HospitalContext(bench, runs.Private(), number=int("abc".index(site)))
        drawn.append(list(context.public_batches(3, 4)))
    for other in drawn[1:]:
        for one, same in zip(drawn[0], other, strict=True):
            assert torch.equal(one.images, same.images)
    for batch in drawn[0]:
        assert batch.labels.shape[0] == study.train.batch_size
        assert (batch.labels == UNKNOWN_LABEL).all()
    assert not torch.equal(drawn[0][0].images, drawn[0][1].images)


def test_every_image_is_seen_once_in_a_pass():
    study = study_of("fedmd", runs.TABLE, train={"batch_size": 5})
    images = Workshop(study, runs.CACHE).public_images
    assert len(images) == hospitals.NUM_PUBLIC
    passes = [images.batch(number).images for number in range(2)]
    ordered = [rows[rows[:, 0].argsort()] for rows in passes]
    assert torch.equal(*ordered)
    assert len(ordered[0].unique(dim=0)) == hospitals.NUM_PUBLIC
    assert not torch.equal(*passes)


def test_images_need_no_label_to_be_public():
    """Slices that nobody annotated are examples like all others."""
    study = study_of("fedmd")
    cases = SiteList(study, runs.CACHE).open("p").splits["public"]
    bare = [Bare(case) for case in cases]
    with_labels, without = PublicImages(study, cases), PublicImages(study, bare)
    assert len(without) == len(with_labels) == hospitals.NUM_PUBLIC
    for number in range(3):
        one, other = with_labels.batch(number), without.batch(number)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


MODES = {
    "slice": ({"mode": "slice", "slices": 3}, (3, 5, 5), (5, 5), 2 * 4),
    "patch": (
        {"mode": "patch", "patch_size": [4, 4, 4], "patches_per_case": 3},
        (1, 4, 4, 4),
        (4, 4, 4),
        2 * 3,
    ),
    "image": ({"mode": "image"}, (1, 5, 5, 4), (), 2),
}


@pytest.mark.parametrize("mode", MODES)
def test_examples_are_those_of_training_whatever_their_kind(mode):
    model, image, label, count = MODES[mode]
    study = study_of("fedmd", model=model, train={"batch_size": 6})
    voxels = np.arange(100, dtype=np.float32).reshape(1, 5, 5, 4)
    cases = [Bare(Plain(name, voxels)) for name in ("one", "two")]
    images = PublicImages(study, cases)
    assert len(images) == count
    batch = images.batch(0)
    assert batch.images.shape == (6, *image)
    assert batch.labels.shape == (6, *label)
    assert (batch.labels == UNKNOWN_LABEL).all()


@dataclasses.dataclass
class Plain:
    case_id: str
    image_CIJK: np.ndarray

    @property
    def image_shape(self):
        return self.image_CIJK.shape


@dataclasses.dataclass
class Bare:
    """A case whose label must not be asked for."""

    case: object

    @property
    def case_id(self):
        return self.case.case_id

    @property
    def image_CIJK(self) -> np.ndarray:
        return self.case.image_CIJK

    @property
    def image_shape(self):
        return self.case.image_shape


def test_its_images_lie_at_no_hospital_as_well(tmp_path):
    study = study_of(sites={"public_copies": True})
    with pytest.raises(DataError, match=r"more than one site \(c and p\)"):
        runs.run(study, tmp_path)


class OtherCopy(InProcessTransport):
    """Hospital b has other public images than the rest."""

    def exchange(self, messages, **how):
        answers = super().exchange(messages, **how)
        for site, message in messages.items():
            if message.kind == "join" and site == "b":
                card = answers[site]
                values = {**card.header["values"], "public_fingerprint": "other"}
                header = {**card.header, "values": values}
                answers[site] = Message(card.kind, header, card.tensors)
        return answers


def test_a_hospital_with_another_copy_is_named(tmp_path):
    with pytest.raises(DataError, match="public images at b are not those"):
        runs.run(study_of("fedmd"), tmp_path, transport=OtherCopy())


@pytest.mark.parametrize(("name", "have_it"), [("fedmd", "abp"), ("feddf", "p")])
def test_only_who_needs_the_images_has_to_have_them(name, have_it):
    study = study_of(name)
    cards = {s: Workbench(study, s, runs.CACHE).card() for s in ("a", "b", "p")}
    told = {site: card["public_fingerprint"] for site, card in cards.items()}
    assert [site for site in told if told[site]] == list(have_it)
    assert len(set(told.values()) - {""}) == 1


def test_a_run_goes_on_with_the_public_images_that_it_began_with(tmp_path):
    asked = iter([False, True])
    runs.run(study_of(), tmp_path, should_stop=lambda: next(asked))
    folder = RunFolder(tmp_path)
    lock = folder.read_lock()
    folder.write_lock({**lock, "public": {**lock["public"], "fingerprint": "other"}})
    with pytest.raises(ResumeError, match="labels or splits of the public site are"):
        runs.run(study_of(), tmp_path, resume=True)


def test_a_comparison_does_not_take_a_run_on_other_public_images_for_its_own():
    assert data_hash(study_of("fedavg")) != data_hash(
        runs.make_study(runs.IMAGE, "fedavg")
    )
