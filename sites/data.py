"""A hospital's data as its host uses it: prepared cases, split by subject.

The same code serves a simulated and a real hospital; only the study's `sites` section
says where the files are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fedmed.case import UNKNOWN_LABEL, DatasetCard, SourceSite
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.cache import PreparedCache, prepare_cases
from fedmed.imaging.prepared_case import PreparedCase, known_slices
from fedmed.imaging.preprocess import Preprocessing
from fedmed.message import SiteId
from fedmed.study import Study, expand
from fedmed.task import Task, check_fit
from sites.catalogue import open_dataset
from sites.public import find_public, public_splits
from sites.splits import read_assignment, split_by_subject

SPLITS = ("train", "validation", "test")

MAX_NAMED = 20
"""Sites that a message names."""


@dataclass(frozen=True)
class SiteData:
    """Prepared cases of one site.

    Attributes:
        site_id: The site.
        card: What the data set is.
        source: The site's own card and unopened cases.
        splits: Prepared cases by split.
        quarantined: case_id -> reason.
        fingerprints: case_id -> content hash of the image.
    """

    site_id: SiteId
    card: DatasetCard
    source: SourceSite
    splits: Mapping[str, tuple[AnyCase, ...]]
    quarantined: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_cases(self) -> dict[str, int]:
        """Number of cases by split."""
        return {name: len(self.splits[name]) for name in SPLITS}


def list_sites(study: Study, cache: Path) -> tuple[DatasetCard, tuple[SourceSite, ...]]:
    """Open the study's data set and give the hospitals that the study includes.

    Raises:
        ConfigError: If the study names a site that does not exist, or its model is
            none for these data.
        DataError: If the data set has no site.
    """
    listed = _list(study, cache)
    return listed.card, listed.hospitals


class _Listed(NamedTuple):
    card: DatasetCard
    hospitals: tuple[SourceSite, ...]
    public: SourceSite | None


def _list(study: Study, cache: Path) -> _Listed:
    section = study.sites
    options = dict(section.options)
    if section.dataset == "phantom":
        options.setdefault("cache_dir", str(cache / "phantoms"))
    root = expand(section.root) if section.root else None
    card, found = open_dataset(section.dataset, root, options)
    check_fit(study, Task.of(card))
    known = {site.site_id for site in found}
    for name in (*section.include, *study.split.held_out):
        if name not in known:
            raise ConfigError(
                f"the study names site {name!r}, the data set has {_shown(known)}"
            )
    public = find_public(study, found)
    included = set(section.include) or known
    hospitals = [s for s in found if s.site_id in included and s is not public]
    if not hospitals:
        besides = " beside the public one" if public else ""
        raise DataError(f"data set {section.dataset!r} holds no site{besides}")
    return _Listed(
        card, tuple(sorted(hospitals, key=lambda site: site.site_id)), public
    )


def _shown(names: Iterable[str]) -> str:
    """Name sites in a message, which a thousand of them would drown."""
    ordered = sorted(names)
    rest = len(ordered) - MAX_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(ordered[:MAX_NAMED]) + more


class SiteList:
    """The sites of a study, listed once and found by name.

    What serves many sites in one process makes one of these and opens each site from
    it: listing a data set again for each of its sites costs the square of their number.

    Args:
        study: The study.
        cache: Folder of prepared cases.
    """

    def __init__(self, study: Study, cache: Path) -> None:
        self._study = study
        self._cache = cache

    @functools.cached_property
    def _listed(self) -> _Listed:
        return _list(self._study, self._cache)

    @functools.cached_property
    def _by_id(self) -> dict[SiteId, SourceSite]:
        return {site.site_id: site for site in self.everybody}

    @property
    def card(self) -> DatasetCard:
        """What the data set is."""
        return self._listed.card

    @property
    def sources(self) -> tuple[SourceSite, ...]:
        """The study's hospitals in sorted order."""
        return self._listed.hospitals

    @property
    def everybody(self) -> tuple[SourceSite, ...]:
        """The hospitals, and behind them the public site if there is one."""
        public = self._listed.public
        return self.sources if public is None else (*self.sources, public)

    def source(self, site_id: SiteId) -> SourceSite:
        """Find one site.

        Raises:
            DataError: If there is none of this name.
        """
        source = self._by_id.get(site_id)
        if source is None:
            raise DataError(f"the data set has no site {site_id!r}")
        return source

    def open(self, site_id: SiteId) -> SiteData:
        """Open one site: read, check, prepare and split its cases.

        Raises:
            DataError: If the site does not exist or has no usable case.
        """
        source = self.source(site_id)
        return prepare_site(self._study, self.card, source, self._cache)


def open_site(study: Study, site_id: SiteId, cache: Path) -> SiteData:
    """Open one site: read, check, prepare and split its cases.

    Raises:
        DataError: If the site does not exist or has no usable case.
    """
    return SiteList(study, cache).open(site_id)


def prepare_site(
    study: Study, card: DatasetCard, source: SourceSite, cache: Path
) -> SiteData:
    """Prepare and split the cases of an opened site."""
    prepared = prepare_cases(
        source.cases,
        preprocessing_of(study),
        PreparedCache(cache / "prepared"),
        budget=study.tolerance.quarantine_budget,
        problems=source.problems,
    )
    quarantined = dict(prepared.quarantined)
    _require_cases(source.site_id, prepared.cases, quarantined)
    by_id: dict[str, Any] = {case.case_id: case for case in prepared.cases}
    if study.model.mode == "row":
        by_id = {case_id: RowView(case) for case_id, case in by_id.items()}
    usable = tuple(ref for ref in source.cases if ref.case_id in by_id)
    if source.site_id == study.sites.public:
        splits = public_splits([by_id[ref.case_id] for ref in usable])
    else:
        refs = split_by_subject(usable, **_split_arguments(study, source.site_id))
        splits = {name: tuple(by_id[r.case_id] for r in refs[name]) for name in SPLITS}
    return SiteData(
        source.site_id,
        card,
        source,
        splits,
        quarantined,
        prepared.fingerprints,
    )


def preprocessing_of(study: Study) -> Preprocessing:
    """Read how the study prepares cases.

    Raises:
        ConfigError: If a value is impossible.
    """
    given = study.preprocess.model_dump()
    return Preprocessing(**{key: v for key, v in given.items() if v is not None})


def _require_cases(
    site_id: SiteId, cases: Sequence[PreparedCase], quarantined: Mapping[str, str]
) -> None:
    if not cases:
        told = next(iter(quarantined.items()), None)
        seen = f"; the first: {told[0]}: {told[1]}" if told else ""
        raise DataError(
            f"site {site_id} has no usable case ({len(quarantined)} quarantined{seen})"
        )


def _split_arguments(study: Study, site_id: SiteId) -> dict[str, Any]:
    split = study.split
    if site_id in split.held_out:
        fractions = {"test": 1.0}
    elif split.by == "slices":
        fractions = {"train": 1.0}
    else:
        fractions = {name: getattr(split, name) for name in SPLITS}
    seed = study.seed if split.seed is None else split.seed
    arguments = {"fractions": fractions, "seed": seed, "site_id": site_id}
    if split.file and site_id not in split.held_out:
        arguments["assignment"] = _read_table(split.file, site_id)
    return arguments


def _read_table(file: str, site_id: SiteId) -> dict[str, str]:
    path = expand(file)
    try:
        return read_assignment(path, site_id=site_id)
    except OSError as error:
        raise ConfigError(
            f"split.file {path.name} cannot be read: {error.strerror}"
        ) from None


@dataclass(frozen=True, slots=True)
class RowView:
    """A table's row in the words of `fedmed.training.examples`."""

    case: PreparedCase

    def __getattr__(self, name: str) -> Any:
        """Everything else is the case's."""
        return getattr(self.case, name)

    @property
    def features_F(self) -> np.ndarray:
        """float32 (F,), NaN = missing."""
        return self.case.image_CIJK

    @property
    def label(self) -> int | None:
        """The class."""
        return self.case.class_label


@dataclass(frozen=True, slots=True)
class SliceView:
    """A case of which only some slices are known: a part of one volume.

    Everything but the label is the case's own. Slices outside the part are unknown:
    they enter no loss and no metric.
    """

    case: AnyCase
    first_fraction: float
    last_fraction: float

    cut: ClassVar[None] = None
    """What was measured of the whole case says nothing of a part."""

    def __getattr__(self, name: str) -> Any:
        """Everything else is the case's."""
        return getattr(self.case, name)

    @property
    def label_IJK(self) -> np.ndarray | None:
        """Label on the network's grid."""
        return self._masked(self.case.label_IJK)

    @property
    def label_native_IJK(self) -> np.ndarray | None:
        """Label on the case's own grid."""
        return self._masked(self.case.label_native_IJK)

    @property
    def known_slices(self) -> tuple[int, ...] | None:
        """The slices of this part on the network's grid."""
        known = self.case.known_slices
        return None if known is None else tuple(self._part(known))

    def _part(self, known: Sequence[int]) -> Sequence[int]:
        # Only labelled slices are divided, or a part could end up without any.
        first = math.floor(self.first_fraction * len(known) + 0.5)
        last = math.floor(self.last_fraction * len(known) + 0.5)
        return known[first:last]

    def _masked(self, label_IJK: np.ndarray | None) -> np.ndarray | None:
        if label_IJK is None:
            return None
        mine = self._part(known_slices(label_IJK) or ())
        masked = np.full_like(label_IJK, UNKNOWN_LABEL)
        masked[:, :, mine] = label_IJK[:, :, mine]
        return masked


AnyCase = PreparedCase | RowView | SliceView
"""A prepared case, or a view of one that knows less or says it in other words."""


def divided_by_slices(data: SiteData, study: Study) -> SiteData:
    """Divide every volume into blocks of slices: train, validation, test.

    The same patient is then on all sides: such results describe a scanner and a
    reader, not new patients. Meant for sites with one subject.
    """
    edges, start = {}, 0.0
    for name in SPLITS:
        end = start + float(getattr(study.split, name))
        edges[name] = (start, end)
        start = end
    splits = {
        name: tuple(
            SliceView(case, first, last)
            for case in data.splits["train"]
            if last > first
        )
        for name, (first, last) in edges.items()
    }
    return SiteData(
        data.site_id,
        data.card,
        data.source,
        splits,
        data.quarantined,
        data.fingerprints,
    )
