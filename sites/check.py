"""Read a data set from end to end and say what is in it: `fedmed sites check`."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from fedmed.case import UNKNOWN_LABEL, Case, CaseRef, DatasetCard, SourceSite
from fedmed.errors import CaseError, FedMedError
from sites.catalogue import open_dataset
from sites.listing import split_ending

_nibabel: Any = nibabel  # its functions carry no types

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteFacts:
    """What was seen at one site.

    Attributes:
        num_cases: Cases that could be read.
        num_subjects: Subjects behind them.
        num_quarantined: Cases that could not be listed or read.
        shapes: Image shapes (C, I, J, K) with how many cases have each, most first.
        spacings_mm: Voxel sizes, to 0.01 mm; empty if none is known.
        orientations: Axes as stored, e.g. "LPS"; empty for pictures and tables.
        labels: Label values seen, with the number of voxels (or cases) of each;
            `UNKNOWN_LABEL` is voxels that nobody annotated.
        num_unlabelled: Cases without a label.
        intensity_range: Smallest and largest finite value; None without cases.
        missing_fraction: Fraction of table cells that are missing.
    """

    num_cases: int
    num_subjects: int
    num_quarantined: int
    shapes: Mapping[tuple[int, ...], int]
    spacings_mm: Mapping[tuple[float, ...], int]
    orientations: Mapping[str, int]
    labels: Mapping[int, int]
    num_unlabelled: int
    intensity_range: tuple[float, float] | None
    missing_fraction: float


@dataclass(frozen=True)
class CheckResult:
    """What a data set holds.

    Attributes:
        card: The data set's card.
        sites: Number of sites.
        cases: Number of cases that could be read.
        quarantined: (site, case, reason) of every other case.
        facts: Per site what was seen, in sorted order.
        twins: Groups of (site, case) with equal image or equal label that are said
            to be of different subjects: one patient could fall into two splits.
    """

    card: DatasetCard
    sites: int
    cases: int
    quarantined: tuple[tuple[str, str, str], ...]
    facts: Mapping[str, SiteFacts]
    twins: tuple[tuple[tuple[str, str], ...], ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether every case can be used and every site has some."""
        usable = all(fact.num_cases for fact in self.facts.values())
        return usable and not self.quarantined and not self.twins


@dataclass
class _Seen:
    """Running record of one site."""

    cases: int = 0
    subjects: set[str] = field(default_factory=set)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    spacings: Counter[tuple[float, ...]] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    unlabelled: int = 0
    low: float = np.inf
    high: float = -np.inf
    cells: int = 0
    missing: int = 0


_Twins = dict[str, list[tuple[str, str, str]]]


def check_dataset(
    name: str, root: str | Path | None, options: Mapping[str, Any]
) -> CheckResult:
    """Read every case of a data set.

    Args:
        name: As in `sites.catalogue.open_dataset`.
        root: As there.
        options: As there.

    Returns:
        What was found. A case that cannot be read, for whatever reason, is in
        `quarantined`; an unexpected error is given by its type alone, since its text
        could hold a path or a name.

    Raises:
        FedMedError: If the data set as a whole cannot be opened.
    """
    card, opened = open_dataset(name, root, options)
    quarantined: list[tuple[str, str, str]] = []
    twins: _Twins = {}
    facts = {}
    for site in opened:
        bad = [(site.site_id, case_id, why) for case_id, why in site.problems.items()]
        seen = _Seen()
        for ref in site.cases:
            try:
                case, axes = ref.read(), _orientation(ref.files)
                _require_declared(case, card)
            except FedMedError as error:
                bad.append((site.site_id, ref.case_id, error.message))
            except Exception as error:  # one bad file must not end the check
                LOGGER.debug("unexpected %s in a case", type(error).__name__)
                bad.append((site.site_id, ref.case_id, _scrub(error)))
            else:
                _note(seen, case, subject_id=ref.subject_id, axes=axes)
                _remember(twins, case, ref, site)
        quarantined += sorted(bad)
        facts[site.site_id] = _facts(seen, len(bad))
    return CheckResult(
        card=card,
        sites=len(opened),
        cases=sum(fact.num_cases for fact in facts.values()),
        quarantined=tuple(quarantined),
        facts=facts,
        twins=_across_subjects(twins),
    )


def _scrub(error: Exception) -> str:
    return f"unexpected {type(error).__name__} while reading"


def _require_declared(case: Case, card: DatasetCard) -> None:
    """Hold a case against the card, so that a study cannot trip over it later."""
    if case.image.shape[0] != card.num_channels:
        raise CaseError(
            f"{case.image.shape[0]} channel(s), the card says {card.num_channels}"
        )
    seen = [] if case.label is None else np.unique(case.label).tolist()
    undeclared = [value for value in seen if value not in (*card.labels, UNKNOWN_LABEL)]
    if undeclared:
        raise CaseError(f"label {undeclared[0]} is not in the card")


def _note(seen: _Seen, case: Case, *, subject_id: str, axes: str) -> None:
    finite = case.image[np.isfinite(case.image)]
    seen.cases += 1
    seen.subjects.add(subject_id)
    seen.shapes[tuple(case.image.shape)] += 1
    if case.spacing_known:
        seen.spacings[tuple(round(mm, 2) for mm in case.spacing_mm)] += 1
    if axes:
        seen.orientations[axes] += 1
    if case.label is None:
        seen.unlabelled += 1
    else:
        values, counts = np.unique(case.label, return_counts=True)
        seen.labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    if finite.size:
        seen.low = min(seen.low, float(finite.min()))
        seen.high = max(seen.high, float(finite.max()))
    seen.cells += case.image.size
    seen.missing += case.image.size - finite.size


def _orientation(files: tuple[Path, ...]) -> str:
    """Give the axes of a case's first file as stored; "" if it has none."""
    if not files or split_ending(files[0].name)[1] not in (".nii", ".nii.gz"):
        return ""
    affine = _nibabel.load(files[0]).affine
    return "".join(str(code) for code in _nibabel.aff2axcodes(affine))


def _remember(twins: _Twins, case: Case, ref: CaseRef, site: SourceSite) -> None:
    """File a case under its image and, if it says enough, under its label."""
    who = (site.site_id, ref.case_id, ref.subject_id)
    twins.setdefault("image" + _digest(case.image), []).append(who)
    if case.label is not None and case.label.ndim and case.label.any():
        twins.setdefault("label" + _digest(case.label), []).append(who)


def _digest(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array)
    return hashlib.blake2b(
        repr(content.shape).encode() + content.tobytes(), digest_size=16
    ).hexdigest()


def _across_subjects(twins: _Twins) -> tuple[tuple[tuple[str, str], ...], ...]:
    groups = {
        tuple(sorted((site, case_id) for site, case_id, _ in members))
        for members in twins.values()
        if len({(site, subject) for site, _, subject in members}) > 1
    }
    return tuple(sorted(groups))


def _facts(seen: _Seen, num_quarantined: int) -> SiteFacts:
    return SiteFacts(
        num_cases=seen.cases,
        num_subjects=len(seen.subjects),
        num_quarantined=num_quarantined,
        shapes=dict(seen.shapes.most_common()),
        spacings_mm=dict(seen.spacings.most_common()),
        orientations=dict(seen.orientations.most_common()),
        labels=dict(sorted(seen.labels.items())),
        num_unlabelled=seen.unlabelled,
        intensity_range=(seen.low, seen.high) if seen.low <= seen.high else None,
        missing_fraction=seen.missing / seen.cells if seen.cells else 0.0,
    )
