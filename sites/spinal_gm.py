"""Grey matter of the cervical spinal cord: six sites, 3D T2*-weighted MRI.

    <root>/<site>/images/<subject>[Ses<n>]_T2starw.nii.gz
    <root>/<site>/masks/<subject>[Ses<n>]_T2starw_label.nii.gz

Traps, and what is done about them:

* chum has drawn the cord on 14 of its 20 slices. A slice without any voxel of cord
  outside grey matter is unknown, not background: its whole label becomes
  `UNKNOWN_LABEL`. One such slice carries a single stray voxel of grey matter; it is
  unknown too. The rule looks at the label and holds for every site; at the other five
  every slice is drawn and nothing changes.
* chum is stored with axes L, P, S, the others with L, A, S: all become RAS+.
* ceitec and milan scanned one person twice: two cases, one subject.
* Eight volumes of six people: for loaders and leave-one-site-out, not for claims.

Units:
    Intensities arbitrary, as stored. Spacing in mm, slices 2.5 to 5 mm apart.

Source:
    Prados et al., Spinal cord grey matter segmentation challenge, NeuroImage 152, 2017;
    data in BIDS form: github.com/sct-pipeline/gm-challenge-data.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.case import UNKNOWN_LABEL, Case, CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import CaseError, DataError
from fedmed.imaging.pairs import read_image_label
from fedmed.seeds import numpy_rng
from sites.folder import pair_files
from sites.listing import list_images, make_site, site_folders
from sites.miniature import write_nifti_case
from sites.options import parse_options, reader_version

FOLDER = "spinal_gm_3d"
"""Name of the data folder inside FEDMED_DATA."""

LABELS = {0: "background", 1: "white_matter", 2: "grey_matter"}

CORD = 1
"""Label of cord outside grey matter: every slice that was drawn has some."""

SITE_FACTS = {
    "ceitec": {"vendor": "Siemens", "model": "Prisma", "field_T": 3.0},
    "chum": {"vendor": "Philips", "model": "Achieva", "field_T": 3.0},
    "juntendo": {"vendor": "Siemens", "field_T": 3.0},
    "milan": {"vendor": "Siemens", "model": "Avanto", "field_T": 1.5},
    "nwu": {"vendor": "Siemens", "model": "Prisma fit", "field_T": 3.0},
    "ucl": {"vendor": "Philips", "model": "Achieva", "field_T": 3.0},
}

CARD = DatasetCard(
    name="spinal_gm",
    title="Spinal cord grey matter, six sites",
    version="dfa78f75",
    licence="CC0-1.0",
    source_url="https://github.com/sct-pipeline/gm-challenge-data",
    citation="Prados et al., NeuroImage 152:312-329, 2017",
    modality="T2*w MRI",
    intensity_unit="arbitrary",
    kind="segmentation",
    labels=LABELS,
    num_channels=1,
    spatial_dims=3,
    sites=tuple(SITE_FACTS),
)


@dataclasses.dataclass(frozen=True)
class SpinalOptions:
    """Options of this data set: none."""


def card(root: Path | None = None, **options: Any) -> DatasetCard:  # noqa: ARG001
    """Give the card, which no option changes."""
    parse_options(SpinalOptions, options)
    return CARD


def open_sites(root: Path, **options: Any) -> tuple[SourceSite, ...]:
    """List the volumes of the sites that are there; no image is opened.

    Args:
        root: The data set's folder.
        options: None are known.

    Returns:
        Sites in sorted order, at most the six of the card.

    Raises:
        ConfigError: If an option is given.
        DataError: If a folder is no site of the card, or none is there.
    """
    chosen = parse_options(SpinalOptions, options)
    folders = site_folders(root, holding="images", layout="<site>/images, e.g. chum")
    unknown = sorted(set(folders) - set(SITE_FACTS))
    if unknown:
        raise DataError(
            f"{unknown[0]!r} is no site of {CARD.name}",
            hint=f"known are {', '.join(SITE_FACTS)}; for your own data use folder",
        )
    version = reader_version("1", chosen)
    return tuple(
        _open_site(site_id, folder, root=root, version=version)
        for site_id, folder in folders.items()
    )


def read_case(case_id: str, image_path: Path, label_path: Path) -> Case:
    """Read one volume; see the module for what happens to slices nobody drew.

    Args:
        case_id: E.g. "sub-9604".
        image_path: The volume.
        label_path: Its label map.

    Returns:
        The case, RAS+.

    Raises:
        CaseError: If a file cannot be used, or no slice is drawn.
    """
    return read_image_label(
        case_id, image_path, label_path, labels=LABELS, post=without_undrawn_slices
    )


def without_undrawn_slices(case: Case) -> Case:
    """Mark the slices that nobody drew in a case; see `hide_undrawn_slices`.

    Args:
        case: A case as read, RAS+.

    Returns:
        The case with its unknown slices.

    Raises:
        CaseError: If no slice shows any cord.
    """
    assert case.label is not None  # every file pair of this set has a label
    label = hide_undrawn_slices(case.label)
    if (label == UNKNOWN_LABEL).all():
        raise CaseError("no slice of the label shows any cord")
    return dataclasses.replace(case, label=label)


def hide_undrawn_slices(label_IJK: np.ndarray) -> np.ndarray:
    """Mark every slice without cord as unknown.

    Args:
        label_IJK: uint8 label map, RAS+: K runs along the cord.

    Returns:
        A copy, `UNKNOWN_LABEL` throughout each slice that has no voxel of `CORD`.

    Example:
        >>> label = np.array([[[1, 0, 2]]], np.uint8)
        >>> hide_undrawn_slices(label).tolist()
        [[[1, 255, 255]]]
    """
    drawn_K = (label_IJK == CORD).any(axis=(0, 1))
    return np.where(drawn_K, label_IJK, np.uint8(UNKNOWN_LABEL))


def write_miniature(root: Path, seed: int) -> None:
    """Write six tiny sites in the real layout, with its traps.

    Args:
        root: Where to write.
        seed: Seed of the noise.
    """
    for site_id, names in _MINIATURE.items():
        label = np.zeros((12, 10, 6), np.uint8)
        label[3:9, 3:8] = 1
        label[5:7, 4:7] = 2
        if site_id == "chum":
            label[:, :, 4:] = 0
            label[6, 5, 5] = 2
        for offset, name in enumerate(names):
            write_nifti_case(
                root / site_id / "images" / f"{name}_T2starw.nii.gz",
                root / site_id / "masks" / f"{name}_T2starw_label.nii.gz",
                seed=seed + offset,
                axes="LPS" if site_id == "chum" else "LAS",
                label_IJK=_thinned(label, seed, name),
            )


_MINIATURE = {
    "ceitec": ("sub-10062Ses1", "sub-10062Ses2"),
    "chum": ("sub-9604",),
    "juntendo": ("sub-9669",),
    "milan": ("sub-9709Ses1", "sub-9709Ses2"),
    "nwu": ("sub-9584",),
    "ucl": ("sub-9418",),
}


def _thinned(label: np.ndarray, seed: int, name: str) -> np.ndarray:
    """Take a few voxels off the cord, so that no two people are equal."""
    kept = numpy_rng(seed, "spinal", name).uniform(size=label.shape) > 0.1
    return np.where(kept | (label != CORD), label, 0).astype(np.uint8)


def _open_site(site_id: str, folder: Path, *, root: Path, version: str) -> SourceSite:
    pairs = pair_files(
        list_images(folder / "images", root),
        list_images(folder / "masks", root),
        suffixes=("_label",),
        unlabelled=False,
    )
    refs = []
    for stem, (image, mask) in pairs.files.items():
        assert mask is not None  # unlabelled is False
        case_id = stem.removesuffix("_T2starw")
        refs.append(
            CaseRef(
                case_id=case_id,
                subject_id=re.sub(r"Ses\d+$", "", case_id),
                files=(image, mask),
                read=partial(read_case, case_id, image, mask),
                read_version=version,
            )
        )
    site_card = SiteCard(
        title=site_id.upper(),
        modality=CARD.modality,
        intensity_unit=CARD.intensity_unit,
        facts=SITE_FACTS[site_id],
    )
    return make_site(site_id, refs, card=site_card, problems=pairs.problems)
