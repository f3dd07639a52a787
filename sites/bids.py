"""A BIDS data set: sub-*/[ses-*/]anat, labels in derivatives, sites in a table.

    <root>/participants.tsv            with a column `site`
    <root>/sub-01/[ses-1/]anat/sub-01_[ses-1_]T2w.nii.gz
    <root>/derivatives/<pipeline>/sub-01/[ses-1/]anat/sub-01_[ses-1_]T2w_seg.nii.gz

or one such data set per site, `<root>/<site>/sub-01/...`; participants.tsv is then not
needed. Of that table nothing but the two columns participant_id and site is kept.

A label belongs to an image if it lies in the same place under derivatives, if it ends
in the label suffix, and if its entities (sub, ses, run, acq...) are the image's;
`desc`, `label`, `space`, `res`, `den`, `seg` and `atlas` may be added.

Units:
    Intensities as stored. Spacing in mm, RAS+.

Source:
    Gorgolewski et al., The brain imaging data structure, Scientific Data 3, 2016.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedmed.case import CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.pairs import read_image_label
from sites.folder import first_layout
from sites.listing import (
    OUTSIDE,
    as_site_id,
    is_inside,
    make_site,
    site_folders,
    split_ending,
)
from sites.miniature import write_nifti_case
from sites.options import parse_options, reader_version

LABEL_ENTITIES = ("desc", "label", "space", "res", "den", "seg", "atlas")
"""Entities that a label may have beside its image's."""


@dataclass(frozen=True)
class BidsOptions:
    """Options of the BIDS reader.

    Attributes:
        suffix: Last word of an image's name, e.g. "T2w", "T2starw", "FLAIR".
        label_suffix: Last word of a label's name, e.g. "seg", "dseg", "mask".
        datatype: Folder of the images inside a subject or session.
        pipeline: Folder inside derivatives; None: the only one there is.
        site_column: Column of participants.tsv; upper and lower case are equal.
        labels: Label value -> class name, after `merge`.
        merge: Label value in the files -> label value wanted.
        unlabelled: True: an image without a label is a case without a label.
        intensity_unit: For the card.
    """

    suffix: str = "T2w"
    label_suffix: str = "seg"
    datatype: str = "anat"
    pipeline: str | None = None
    site_column: str = "site"
    labels: Mapping[int, str] = field(
        default_factory=lambda: {0: "background", 1: "foreground"}
    )
    merge: Mapping[int, int] = field(default_factory=dict)
    unlabelled: bool = False
    intensity_unit: str = "arbitrary"


@dataclass(frozen=True)
class BidsName:
    """A BIDS file name taken apart: entities such as sub and ses, and the last word."""

    entities: Mapping[str, str]
    words: tuple[str, ...]

    @property
    def suffix(self) -> str:
        """The last word that is no entity, or ""."""
        return self.words[-1] if self.words else ""


def card(root: Path | None = None, **options: Any) -> DatasetCard:
    """Describe the data set as the options and its first image say.

    Args:
        root: The data folder; None: nothing is read, 1 channel and 3D are assumed.
        options: Fields of `BidsOptions`.

    Returns:
        The card.
    """
    chosen = parse_options(BidsOptions, options)
    opened = open_sites(root, **options) if root else ()
    firsts = [case.files[0] for site in opened for case in site.cases]
    channels, dims = first_layout(firsts) if firsts else (1, 3)
    return DatasetCard(
        name="bids",
        title="A BIDS data set",
        version="local",
        licence="as the owner says",
        source_url="",
        citation="",
        modality=chosen.suffix,
        intensity_unit=chosen.intensity_unit,
        kind="segmentation",
        labels=chosen.labels,
        num_channels=channels,
        spatial_dims=dims,
        sites=tuple(site.site_id for site in opened),
    )


def open_sites(root: Path, **options: Any) -> tuple[SourceSite, ...]:
    """List the images with one suffix, site by site; no image is opened.

    Args:
        root: The data folder.
        options: Fields of `BidsOptions`.

    Returns:
        Sites in sorted order.

    Raises:
        ConfigError: If an option is unknown, or `pipeline` has to be named.
        DataError: If there is no subject or no image with this suffix, or a subject
            has no site or two.
    """
    chosen = parse_options(BidsOptions, options)
    if any(root.glob("sub-*")):
        site_of = read_site_column(root / "participants.tsv", chosen.site_column)
        opened = _open_shared(root, site_of, chosen)
    else:
        folders = site_folders(
            root, holding="sub-*", layout="sub-<name>, or <site>/sub-<name>"
        )
        opened = tuple(
            _open_site(site, _subjects(folder), folder, root=root, options=chosen)
            for site, folder in folders.items()
        )
    if not any(site.cases or site.problems for site in opened):
        raise DataError(
            f"no image ends in _{chosen.suffix}", hint="name another suffix"
        )
    return opened


def parse_name(stem: str) -> BidsName:
    """Take a BIDS file name apart.

    Args:
        stem: The name without its ending.

    Returns:
        Its entities and its other words.

    Example:
        >>> name = parse_name("sub-01_ses-2_T2w_label-GM_seg")
        >>> dict(name.entities), name.suffix
        ({'sub': '01', 'ses': '2', 'label': 'GM'}, 'seg')
    """
    entities, words = {}, []
    for part in stem.split("_"):
        key, dash, value = part.partition("-")
        if dash:
            entities[key] = value
        else:
            words.append(part)
    return BidsName(entities, tuple(words))


def belongs(label: BidsName, image: BidsName) -> bool:
    """Say whether a label's name fits an image's name.

    Args:
        label: The label's.
        image: The image's.

    Returns:
        True if the label has all entities of the image and no other but
        `LABEL_ENTITIES`, and names no other kind of image.

    Example:
        >>> image = parse_name("sub-01_T2w")
        >>> belongs(parse_name("sub-01_T2w_label-GM_seg"), image)
        True
        >>> belongs(parse_name("sub-01_T1w_seg"), image)
        False
        >>> belongs(parse_name("sub-01_run-2_T2w_seg"), image)
        False
    """
    extra = {k: v for k, v in label.entities.items() if k not in image.entities}
    return (
        all(label.entities.get(k) == v for k, v in image.entities.items())
        and set(extra) <= set(LABEL_ENTITIES)
        and label.words[:-1] in ((), image.words)
    )


def read_site_column(path: Path, column: str) -> dict[str, str]:
    """Read which subject comes from which site.

    Args:
        path: participants.tsv.
        column: Name of the site column.

    Returns:
        participant_id -> site id; subjects whose site is n/a are left out.

    Raises:
        DataError: If the table or a column is missing, or a subject has two sites.
    """
    if not path.is_file():
        raise DataError(
            f"{path.name} is missing: nothing says which subject is from which site",
            hint="add it with the columns participant_id and site, or give every site "
            "its own folder",
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    known = {name.lower(): name for name in (rows[0] if rows else {}) if name}
    if "participant_id" not in known or column.lower() not in known:
        raise DataError(
            f"{path.name} needs the columns participant_id and {column}",
            hint="site_column names another column",
        )
    site_of: dict[str, str] = {}
    for row in rows:
        subject, site = row[known["participant_id"]], row[known[column.lower()]]
        if not site or site.strip().lower() in ("", "n/a"):
            continue
        if site_of.setdefault(subject, as_site_id(site)) != as_site_id(site):
            raise DataError(f"{path.name} gives {subject} two sites")
    return site_of


def write_miniature(root: Path, seed: int) -> None:
    """Write three tiny subjects at two sites, with the traps this reader handles.

    Traps: two sessions of one subject, an image of another kind, two runs, a
    site column in upper case, a subject in the table that has no files.

    Args:
        root: Where to write.
        seed: Seed of the pixels.
    """
    names = (
        "sub-01/ses-1/anat/sub-01_ses-1_T2w",
        "sub-01/ses-2/anat/sub-01_ses-2_T2w",
        "sub-02/anat/sub-02_run-1_T2w",
        "sub-02/anat/sub-02_run-2_T2w",
        "sub-03/anat/sub-03_T2w",
    )
    for offset, name in enumerate(names):
        write_nifti_case(
            root / f"{name}.nii.gz",
            root / "derivatives" / "labels" / f"{name}_seg.nii.gz",
            seed=seed + offset,
            axes="LAS" if offset else "LPS",
        )
    write_nifti_case(root / "sub-03/anat/sub-03_T1w.nii.gz", None, seed=seed)
    rows = ["participant_id\tsex\tSite", "sub-01\tF\tAlpha", "sub-02\tM\tBeta"]
    rows += ["sub-03\tn/a\tAlpha", "sub-04\tF\tBeta"]
    (root / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


CARD = card()


def _subjects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("sub-*") if path.is_dir())


def _open_shared(
    root: Path, site_of: Mapping[str, str], options: BidsOptions
) -> tuple[SourceSite, ...]:
    by_site: dict[str, list[Path]] = {}
    for subject in _subjects(root):
        if subject.name not in site_of:
            raise DataError(
                f"participants.tsv gives subject {subject.name} no site",
                hint="fill in the site column, or move the subject away",
            )
        by_site.setdefault(site_of[subject.name], []).append(subject)
    return tuple(
        _open_site(site_id, subjects, root, root=root, options=options)
        for site_id, subjects in sorted(by_site.items())
    )


def _open_site(
    site_id: str,
    subjects: list[Path],
    dataset: Path,
    *,
    root: Path,
    options: BidsOptions,
) -> SourceSite:
    derivative = _pipeline(dataset, options)
    version = reader_version("1", options)
    refs, problems = [], {}
    for image in (path for folder in subjects for path in _images(folder, options)):
        stem = split_ending(image.name)[0]
        case_id = stem.removesuffix(f"_{options.suffix}")
        found = _labels(image, dataset=dataset, derivative=derivative, options=options)
        problem = _problem(image, found, root=root, options=options)
        if problem:
            problems[case_id] = problem
            continue
        label = found[0] if found else None
        read = partial(
            read_image_label,
            case_id,
            image,
            label,
            labels=options.labels,
            merge=options.merge,
        )
        refs.append(
            CaseRef(
                case_id=case_id,
                subject_id=f"sub-{parse_name(stem).entities['sub']}",
                files=(image, *found),
                read=read,
                read_version=version,
            )
        )
    site_card = SiteCard(
        title=site_id, modality=options.suffix, intensity_unit=options.intensity_unit
    )
    return make_site(site_id, refs, card=site_card, problems=problems)


def _pipeline(dataset: Path, options: BidsOptions) -> Path | None:
    folder = dataset / "derivatives"
    names = (
        sorted(path.name for path in folder.iterdir() if path.is_dir())
        if folder.is_dir()
        else []
    )
    if options.pipeline is not None:
        names = [name for name in names if name == options.pipeline]
    if len(names) > 1:
        raise ConfigError(
            "derivatives holds several folders", hint=f"set pipeline to one of {names}"
        )
    return folder / names[0] if names else None


def _images(subject: Path, options: BidsOptions) -> Iterator[Path]:
    for pattern in (f"{options.datatype}/*", f"ses-*/{options.datatype}/*"):
        for path in sorted(subject.glob(pattern)):
            stem, ending = split_ending(path.name)
            name = parse_name(stem)
            if ending and name.suffix == options.suffix and "sub" in name.entities:
                yield path


def _labels(
    image: Path, *, dataset: Path, derivative: Path | None, options: BidsOptions
) -> list[Path]:
    if derivative is None:
        return []
    folder = derivative / image.parent.relative_to(dataset)
    wanted = parse_name(split_ending(image.name)[0])
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        stem, ending = split_ending(path.name)
        name = parse_name(stem)
        if ending and name.suffix == options.label_suffix and belongs(name, wanted):
            found.append(path)
    return found


def _problem(
    image: Path, labels: list[Path], *, root: Path, options: BidsOptions
) -> str:
    outside = [path for path in (image, *labels) if not is_inside(path, root)]
    if outside:
        return f"{outside[0].name} {OUTSIDE}"
    if len(labels) > 1:
        return f"{len(labels)} labels fit this image: " + ", ".join(
            re.sub(r"\.nii(\.gz)?$", "", path.name) for path in labels
        )
    return "" if labels or options.unlabelled else "no label fits this image"
