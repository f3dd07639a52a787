"""Your own images: one folder per site, `images` and `masks` inside.

    <root>/<site>/images/<case>.nii.gz     or .nii, .png, .jpg, .jpeg
    <root>/<site>/masks/<case>.nii.gz      or <case>_seg.nii.gz, <case>_mask.png, ...

Units:
    Intensities as stored. NIfTI: spacing in mm, brought to RAS+. PNG and JPEG:
    photographs, spacing unknown, intensities 0 to 255.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
from PIL import Image

from fedmed.case import CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import DataError
from fedmed.imaging.pairs import read_image_label
from sites.listing import (
    Listing,
    list_images,
    make_site,
    match_subject,
    site_folders,
    split_ending,
)
from sites.miniature import write_nifti_case, write_png_case
from sites.options import parse_options, reader_version

_nibabel: Any = nibabel  # its functions carry no types

MASK_SUFFIXES = (
    "",
    "_seg",
    "_label",
    "_labels",
    "_mask",
    "_segmentation",
    "_gt",
    "-seg",
    "-label",
    "-mask",
)
"""What a mask's stem may add to its image's stem."""


@dataclass(frozen=True)
class Pairs:
    """Image and mask (None: unlabelled) by image stem, and what could not be paired."""

    files: Mapping[str, tuple[Path, Path | None]]
    problems: Mapping[str, str]


@dataclass(frozen=True)
class FolderOptions:
    """Options of the folder reader.

    Attributes:
        labels: Label value -> class name, after `merge`.
        merge: Label value in the files -> label value wanted, e.g. {255: 1} for masks
            drawn in black and white.
        unlabelled: True: an image without a mask is a case without a label. False:
            it is a problem, counted as quarantined.
        subject_pattern: Regular expression that finds the subject in a case id; see
            `sites.listing.match_subject`. None: every case is one subject.
        mask_suffixes: What a mask's stem may add to its image's.
        modality: For the card.
        intensity_unit: For the card.
        num_channels: For the card; None: 3 for colour images, 1 for others.
        spatial_dims: For the card; None: 2 or 3, as the first file has it.
    """

    labels: Mapping[int, str] = field(
        default_factory=lambda: {0: "background", 1: "foreground"}
    )
    merge: Mapping[int, int] = field(default_factory=dict)
    unlabelled: bool = False
    subject_pattern: re.Pattern[str] | None = None
    mask_suffixes: tuple[str, ...] = MASK_SUFFIXES
    modality: str = "unknown"
    intensity_unit: str = "arbitrary"
    num_channels: int | None = None
    spatial_dims: int | None = None


def card(root: Path | None = None, **options: Any) -> DatasetCard:
    """Describe the data set as the options and its first file say.

    Args:
        root: The data folder; None: nothing is read, 1 channel and 3D are assumed.
        options: Fields of `FolderOptions`.

    Returns:
        The card.
    """
    chosen = parse_options(FolderOptions, options)
    channels, dims = (1, 3) if root is None else first_layout(_all_images(root))
    return DatasetCard(
        name="folder",
        title="One folder per site",
        version="local",
        licence="as the owner says",
        source_url="",
        citation="",
        modality=chosen.modality,
        intensity_unit=chosen.intensity_unit,
        kind="segmentation",
        labels=chosen.labels,
        num_channels=chosen.num_channels or channels,
        spatial_dims=chosen.spatial_dims or dims,
        sites=() if root is None else tuple(_folders(root)),
    )


CARD = card()


def open_sites(root: Path, **options: Any) -> tuple[SourceSite, ...]:
    """List the cases of every site folder; no image is opened.

    Args:
        root: The data folder.
        options: Fields of `FolderOptions`.

    Returns:
        Sites in sorted order.

    Raises:
        ConfigError: If an option is unknown or does not fit.
        DataError: If there is no site folder, no image at all, or two files stand for
            one case.
    """
    chosen = parse_options(FolderOptions, options)
    opened = tuple(
        _open_site(site_id, folder, root=root, options=chosen)
        for site_id, folder in _folders(root).items()
    )
    if not any(site.cases or site.problems for site in opened):
        raise DataError(f"folder {root.name!r} has site folders but no image in them")
    return opened


def pair_files(
    images: Listing, masks: Listing, *, suffixes: tuple[str, ...], unlabelled: bool
) -> Pairs:
    """Give every image its mask by name.

    Args:
        images: The images.
        masks: The masks; a mask belongs to an image if its stem is the image's stem
            plus one of `suffixes`.
        suffixes: See `MASK_SUFFIXES`.
        unlabelled: Whether an image may have no mask.

    Returns:
        The pairs. Problems: images without a mask or with several, masks without an
        image, and the problems of both listings.
    """
    files: dict[str, tuple[Path, Path | None]] = {}
    problems = {**masks.problems, **images.problems}
    orphans = set(masks.files)
    for stem, image in images.files.items():
        found = [stem + end for end in suffixes if stem + end in masks.files]
        refused = [stem + end for end in suffixes if stem + end in masks.problems]
        orphans -= set(found)
        if len(found) == 1:
            files[stem] = (image, masks.files[found[0]])
        elif found:
            problems[stem] = f"{len(found)} masks fit this image: {', '.join(found)}"
        elif refused:
            problems[stem] = f"mask {masks.problems[refused[0]]}"
        elif unlabelled:
            files[stem] = (image, None)
        else:
            problems[stem] = "no mask with this name"
    problems.update(dict.fromkeys(orphans - set(files), "mask without an image"))
    return Pairs(files, problems)


def _all_images(root: Path) -> Iterator[Path]:
    for folder in _folders(root).values():
        yield from list_images(folder / "images", root).files.values()


def first_layout(paths: Iterable[Path]) -> tuple[int, int]:
    """Read the layout of the first image whose header can be read.

    A damaged scan costs itself its place in the study, not the data set its card.

    Args:
        paths: Images in order.

    Returns:
        As `image_layout`; 1 channel and 3 dimensions if there is no readable image.
    """
    for path in paths:
        with contextlib.suppress(DataError):
            return image_layout(path)
    return 1, 3


def image_layout(path: Path) -> tuple[int, int]:
    """Read channels and spatial dimensions from a file's header.

    Args:
        path: A NIfTI, PNG or JPEG file.

    Returns:
        Number of channels, 2 or 3.

    Raises:
        DataError: If the header cannot be read.
    """
    try:
        if split_ending(path.name)[1] in (".nii", ".nii.gz"):
            shape = _nibabel.load(path).shape
            channels = shape[3] if len(shape) > 3 else 1
            return int(channels), 3 if len(shape) > 2 and shape[2] > 1 else 2
        with Image.open(path) as image:
            return (1 if image.mode in ("1", "L", "I", "I;16", "F") else 3), 2
    except (OSError, EOFError, ValueError, _nibabel.filebasedimages.ImageFileError):
        raise DataError(f"{path.name} cannot be read as an image") from None


def write_miniature(root: Path, seed: int) -> None:
    """Write two tiny sites: NIfTI and grey PNG, with the traps this reader handles.

    Traps: suffixed masks, an image without a mask, a mask without an image, a hidden
    file, an axis order other than RAS.

    Args:
        root: Where to write.
        seed: Seed of the pixels.
    """
    for index in range(3):
        write_nifti_case(
            root / "alpha" / "images" / f"s{index}.nii.gz",
            root / "alpha" / "masks" / f"s{index}_seg.nii.gz",
            seed=seed + index,
            axes="RAS" if index else "LPS",
        )
        write_png_case(
            root / "beta" / "images" / f"p{index}.png",
            root / "beta" / "masks" / f"p{index}_mask.png",
            seed=seed + index,
        )
    (root / "alpha" / "masks" / "s2_seg.nii.gz").rename(
        root / "alpha" / "masks" / "s9_seg.nii.gz"
    )
    (root / "beta" / "images" / ".DS_Store").write_bytes(b"")


def _folders(root: Path) -> dict[str, Path]:
    return site_folders(root, holding="images", layout="<site>/images and <site>/masks")


def _open_site(
    site_id: str, folder: Path, *, root: Path, options: FolderOptions
) -> SourceSite:
    masks = folder / "masks"
    if not masks.is_dir() and not options.unlabelled:
        raise DataError(
            f"site {site_id} has no folder masks",
            hint="add one, or set unlabelled: true for images without labels",
        )
    pairs = pair_files(
        list_images(folder / "images", root),
        list_images(masks, root) if masks.is_dir() else Listing({}),
        suffixes=options.mask_suffixes,
        unlabelled=options.unlabelled,
    )
    version = reader_version("1", options)
    refs = [
        CaseRef(
            case_id=stem,
            subject_id=match_subject(options.subject_pattern, stem),
            files=(image,) if mask is None else (image, mask),
            read=partial(
                read_image_label,
                stem,
                image,
                mask,
                labels=options.labels,
                merge=options.merge,
            ),
            read_version=version,
        )
        for stem, (image, mask) in pairs.files.items()
    ]
    site_card = SiteCard(
        title=site_id, modality=options.modality, intensity_unit=options.intensity_unit
    )
    return make_site(site_id, refs, card=site_card, problems=pairs.problems)
