"""Case, Site and card: the words in which a hospital speaks of its data.

A `Case` holds voxels in memory; a `CaseRef` is a promise to read one. Neither carries
a patient's name, and only the hospital's own code sees the files behind a `CaseRef`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

UNKNOWN_LABEL = 255
"""Label of a voxel that nobody annotated: no part of any loss or metric."""


@dataclass(frozen=True)
class Case:
    """One subject at one visit, as read from the files, orientation made canonical.

    Attributes:
        case_id: Name inside the site, unique there. No path, no patient name.
        image: float32. Images: (C, I, J, K) in NIfTI axis order, RAS+, K = 1 for a
            2D image. Tables: (F,), NaN = missing.
        label: Images: uint8 (I, J, K), `UNKNOWN_LABEL` where nobody annotated.
            Classification: 0-d int64 array. None: no label.
        spacing_mm: Voxel size in I, J, K order, mm. Images without a physical scale
            (photographs) have (1, 1, 1) and `spacing_known=False`. Tables: ().
        spacing_known: False if `spacing_mm` is only a pixel unit.
        region: Optional uint8 (I, J, K): 1 where the image holds anything (field of
            view of a retina camera). Metrics and losses use it as known/unknown.
    """

    case_id: str
    image: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, ...]
    spacing_known: bool = True
    region: np.ndarray | None = None


@dataclass(frozen=True)
class CaseRef:
    """A case that has not been opened yet.

    Attributes:
        case_id: As in `Case`.
        subject_id: Cases of one subject never fall into different splits.
        files: The files read by `read`; their content is hashed for the cache.
        read: Opens the files. Raises `CaseError` if the case cannot be used.
        read_version: Bump when the reader's result changes for equal files.
    """

    case_id: str
    subject_id: str
    files: tuple[Path, ...]
    read: Callable[[], Case]
    read_version: str = "1"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteCard:
    """What a hospital says publicly about itself and its scanner.

    Attributes:
        modality: "T2w MRI", "CT", "fundus photograph", "table"...
        intensity_unit: "arbitrary", "HU", "8-bit grey", ...
        facts: Further public facts: vendor, field_T, coil, country...
    """

    title: str = ""
    modality: str = "unknown"
    intensity_unit: str = "arbitrary"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceSite:
    """One hospital as a dataset module opens it: a card and unopened cases.

    Attributes:
        site_id: E.g. "a" or "rumc"; unique in the study, [a-z0-9_.-]+.
        cases: In sorted `case_id` order.
        problems: Cases that could not even be listed (image without a mask...):
            case_id -> reason. Counted as quarantined.
    """

    site_id: str
    card: SiteCard
    cases: tuple[CaseRef, ...]
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetCard:
    """What a dataset module says about its data set.

    Attributes:
        labels: Label value -> class name, 0 is the background (segmentation) or the
            first class (classification).
        kind: "segmentation" or "classification".
    """

    name: str
    title: str
    version: str
    licence: str
    source_url: str
    citation: str
    modality: str
    intensity_unit: str
    kind: str
    labels: Mapping[int, str]
    num_channels: int
    spatial_dims: int
    sites: tuple[str, ...]
