"""Retinal vessels: three cameras in three countries, colour photographs.

    <root>/<site>/images/<case>.jpg      <root>/<site>/masks/<case>.png
    <root>/chasedb1/fov/<case>.png

Traps, and what is done about them:

* The field of view (`Case.region`) is drawn for chasedb1 only, and there it is drawn
  the wrong way round: 1 outside the retina. The reader takes the side on which the
  image is brighter, whatever its value. For hrf and fives the field is what is
  brighter than `FIELD_THRESHOLD` in the strongest colour: its largest connected part,
  holes filled. That also leaves out the letters burnt into the corner of fives.
* chasedb1 shows both eyes of 14 children (01L, 01R): one child is one subject.
* hrf numbers its groups (h healthy, dr diabetic retinopathy, g glaucoma) separately:
  01_h, 01_dr and 01_g are different people, so each image is a subject. Whoever would
  rather be careful says `hrf_subjects: number`: then equal numbers are one subject.
* fives publishes no patient numbers: each image is a subject, except that 22_A and
  23_A are two photographs of one eye with one and the same mask.
* fives is all macular degeneration, so disease changes together with the camera.
* The masks were made smaller by area average, so the thinnest vessels are lost.

The files taken for hrf state CC BY 4.0. Those of chasedb1 and fives state no licence;
their publishers name CC BY 4.0 too, which is to be checked before passing them on.

Units:
    Intensities 0 to 255, red, green, blue. No physical spacing: `spacing_known` False.

Source:
    CHASE_DB1: Fraz et al., IEEE TBME 59, 2012. HRF: Budai et al., International
    Journal of Biomedical Imaging, 2013. FIVES: Jin et al., Scientific Data 9:475, 2022.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy  # loads its parts when they are first used: half a second

from fedmed.case import Case, CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import CaseError, DataError
from fedmed.imaging.pairs import read_image_label
from fedmed.seeds import numpy_rng
from sites.folder import pair_files
from sites.listing import Listing, list_images, make_site, site_folders
from sites.miniature import save_picture
from sites.options import parse_options, reader_version

FOLDER = "fundus_vessels"
"""Name of the data folder inside FEDMED_DATA."""

LABELS = {0: "background", 1: "vessel"}

FIELD_THRESHOLD = 20.0
"""Grey value of the strongest colour above which a pixel shows retina. On chasedb1,
10 to 30 all agree with the drawn field of view to a Dice of 0.99."""

SAME_EYE = {("fives", "23_A"): "22_A"}
"""(site, case) -> the subject it shares, beside what the file names say."""

SITE_FACTS = {
    "chasedb1": {"country": "United Kingdom", "camera": "Nidek NM-200-D"},
    "fives": {"country": "China", "disease": "age-related macular degeneration"},
    "hrf": {"country": "Germany"},
}

CARD = DatasetCard(
    name="fundus_vessels",
    title="Retinal vessels, three cameras",
    version="b50a9067-c758133b-3066afb4",
    licence="CC-BY-4.0",
    source_url="https://doi.org/10.1038/s41597-022-01564-3",
    citation="Fraz et al. 2012; Budai et al. 2013; Jin et al. 2022",
    modality="fundus photograph",
    intensity_unit="8-bit colour",
    kind="segmentation",
    labels=LABELS,
    num_channels=3,
    spatial_dims=2,
    sites=tuple(SITE_FACTS),
)


@dataclasses.dataclass(frozen=True)
class FundusOptions:
    """Options of this data set.

    Attributes:
        hrf_subjects: "separate": each hrf image is a subject. "number": images of one
            number (01_h, 01_dr, 01_g) are one subject.
    """

    hrf_subjects: Literal["separate", "number"] = "separate"


def card(root: Path | None = None, **options: Any) -> DatasetCard:  # noqa: ARG001
    """Give the card, which no option changes."""
    parse_options(FundusOptions, options)
    return CARD


def open_sites(root: Path, **options: Any) -> tuple[SourceSite, ...]:
    """List the photographs of the sites that are there; no image is opened.

    Args:
        root: The data set's folder.
        options: Fields of `FundusOptions`.

    Returns:
        Sites in sorted order, at most the three of the card.

    Raises:
        ConfigError: If an option is unknown or does not fit.
        DataError: If a folder is no site of the card, or none is there.
    """
    chosen = parse_options(FundusOptions, options)
    folders = site_folders(root, holding="images", layout="<site>/images, e.g. hrf")
    unknown = sorted(set(folders) - set(SITE_FACTS))
    if unknown:
        raise DataError(
            f"{unknown[0]!r} is no site of {CARD.name}",
            hint=f"known are {', '.join(SITE_FACTS)}; for your own data use folder",
        )
    return tuple(
        _open_site(site_id, folder, root=root, options=chosen)
        for site_id, folder in folders.items()
    )


def subject_of(site_id: str, case_id: str, *, hrf_subjects: str) -> str:
    """Find whose eye a photograph shows.

    Args:
        site_id: The camera.
        case_id: The photograph.
        hrf_subjects: As in `FundusOptions`.

    Returns:
        The subject id, unique within the site.

    Example:
        >>> subject_of("chasedb1", "Image_01L", hrf_subjects="separate")
        'Image_01'
        >>> subject_of("hrf", "01_dr", hrf_subjects="number")
        '01'
    """
    if site_id == "chasedb1":
        return re.sub(r"[LR]$", "", case_id)
    if site_id == "hrf" and hrf_subjects == "number":
        return case_id.partition("_")[0]
    return SAME_EYE.get((site_id, case_id), case_id)


def read_case(
    case_id: str, image_path: Path, label_path: Path, *, field_path: Path | None
) -> Case:
    """Read one photograph with its vessels and its field of view.

    Args:
        case_id: The photograph.
        image_path: JPEG.
        label_path: PNG with 0 and 1.
        field_path: PNG with the drawn field of view; None: derived from the image.

    Returns:
        The case, with `region`.

    Raises:
        CaseError: If a file cannot be used, or there is no field of view.
    """
    return read_image_label(
        case_id,
        image_path,
        label_path,
        labels=LABELS,
        region_path=field_path,
        post=with_field,
    )


def with_field(case: Case) -> Case:
    """Give a photograph its field of view, or turn a drawn one the right way round.

    Args:
        case: The photograph; `region`, if there is one, drawn either way round.

    Returns:
        The case with `region`.

    Raises:
        CaseError: If the photograph shows no field of view.
    """
    if case.region is None:
        region = find_field(case.image)
    else:
        region = brighter_side(case.image, case.region)
    if not region.any():
        raise CaseError("the photograph shows no field of view: it is dark throughout")
    return dataclasses.replace(case, region=region)


def find_field(image_CIJK: np.ndarray) -> np.ndarray:
    """Find the bright disc of a retina photograph.

    Args:
        image_CIJK: float32 (3, I, J, 1), 0 to 255.

    Returns:
        uint8 (I, J, 1): 1 in the largest connected part above `FIELD_THRESHOLD`,
        holes filled.
    """
    bright_IJ = image_CIJK.max(axis=0)[..., 0] > FIELD_THRESHOLD
    parts_IJ, num_parts = scipy.ndimage.label(bright_IJ)
    if num_parts == 0:
        return np.zeros((*bright_IJ.shape, 1), np.uint8)
    largest = 1 + int(np.argmax(np.bincount(parts_IJ.ravel())[1:]))
    disc_IJ: np.ndarray = scipy.ndimage.binary_fill_holes(parts_IJ == largest)
    return disc_IJ[..., None].astype(np.uint8)


def brighter_side(image_CIJK: np.ndarray, drawn_IJK: np.ndarray) -> np.ndarray:
    """Turn a drawn field of view the right way round.

    Args:
        image_CIJK: float32 (3, I, J, 1).
        drawn_IJK: uint8 (I, J, 1), 0 on one side of the border and 1 on the other.

    Returns:
        uint8 (I, J, 1): 1 on the side whose mean is brighter.
    """
    inside: np.ndarray = drawn_IJK == 1
    if inside.all() or not inside.any():
        return np.ones_like(drawn_IJK)
    grey_IJK = image_CIJK.mean(axis=0)
    if grey_IJK[inside].mean() < grey_IJK[~inside].mean():
        inside = ~inside
    return inside.astype(np.uint8)


def write_miniature(root: Path, seed: int) -> None:
    """Write three tiny sites in the real layout, with its traps.

    Args:
        root: Where to write.
        seed: Seed of the noise.
    """
    for site_id, (names, shape) in _MINIATURE.items():
        for name in names:
            drawing = "22_A" if name == "23_A" else name
            pixels, vessels, outside = _paint(shape, seed=seed, name=drawing)
            if site_id == "fives":
                pixels[0:2, 0:3] = 255
            if name == "23_A":
                pixels = (pixels * 0.99).astype(np.uint8)
            save_picture(pixels, root / site_id / "images" / f"{name}.jpg")
            save_picture(vessels, root / site_id / "masks" / f"{name}.png")
            if site_id == "chasedb1":
                save_picture(outside, root / site_id / "fov" / f"{name}.png")


_MINIATURE = {
    "chasedb1": (
        ("Image_01L", "Image_01R", "Image_02L", "Image_02R", "Image_03L"),
        (48, 50),
    ),
    "fives": (("2_A", "10_A", "22_A", "23_A"), (52, 52)),
    "hrf": (("01_dr", "01_g", "01_h", "02_h"), (40, 60)),
}


def _paint(
    shape: tuple[int, int], *, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = numpy_rng(seed, "fundus", name)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    radius = np.hypot(rows - shape[0] / 2, columns - shape[1] / 2)
    disc = radius < 0.46 * min(shape)
    wave = shape[0] / 2 + 6 * np.sin(columns / 6 + rng.uniform(0, 6))
    vessels = disc & (np.abs(rows - wave) < 1.5)
    colour = np.array([180.0, 90.0, 40.0]) - 60.0 * vessels[..., None]
    noise = rng.normal(0, 3, (*shape, 3))
    pixels = np.where(disc[..., None], colour + noise, 2.0).clip(0, 255)
    return pixels.astype(np.uint8), vessels.astype(np.uint8), (~disc).astype(np.uint8)


def _open_site(
    site_id: str, folder: Path, *, root: Path, options: FundusOptions
) -> SourceSite:
    pairs = pair_files(
        list_images(folder / "images", root),
        list_images(folder / "masks", root),
        suffixes=("",),
        unlabelled=False,
    )
    drawn = folder / "fov"
    fields = list_images(drawn, root) if drawn.is_dir() else Listing({})
    version = reader_version("1", options)
    refs = []
    for stem, (image, mask) in pairs.files.items():
        assert mask is not None  # unlabelled is False
        field_path = fields.files.get(stem)
        read = partial(read_case, stem, image, mask, field_path=field_path)
        refs.append(
            CaseRef(
                case_id=stem,
                subject_id=subject_of(site_id, stem, hrf_subjects=options.hrf_subjects),
                files=tuple(path for path in (image, mask, field_path) if path),
                read=read,
                read_version=version,
            )
        )
    site_card = SiteCard(
        title=site_id,
        modality=CARD.modality,
        intensity_unit=CARD.intensity_unit,
        facts=SITE_FACTS[site_id],
    )
    problems = {**pairs.problems, **fields.problems}
    return make_site(site_id, refs, card=site_card, problems=problems)
