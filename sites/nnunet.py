"""A raw nnU-Net data set: imagesTr, labelsTr and dataset.json.

    <root>/<site>/imagesTr/<case>_0000.nii.gz, <case>_0001.nii.gz, ...
    <root>/<site>/labelsTr/<case>.nii.gz        <root>/<site>/dataset.json

or one such folder for all sites; the site of a case then comes from a table
`<root>/sites.csv` (columns case_id, site) or from `site_pattern`.

imagesTs is not read: its labels, where they exist at all, have no fixed place.

Units:
    Intensities as stored. Spacing in mm; PNG: none. All channels of a case must lie on
    one grid.

Source:
    Isensee et al., nnU-Net, Nature Methods 18, 2021; dataset.json of versions 1 and 2.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.case import (
    UNKNOWN_LABEL,
    Case,
    CaseRef,
    DatasetCard,
    SiteCard,
    SourceSite,
)
from fedmed.errors import CaseError, ConfigError, DataError
from fedmed.imaging.geometry import check_pair
from fedmed.imaging.pairs import read_image_label
from fedmed.imaging.pictures import read_picture
from fedmed.imaging.volume import Volume, read_volume
from fedmed.seeds import numpy_rng
from sites.folder import first_layout
from sites.listing import (
    Listing,
    as_site_id,
    list_images,
    make_site,
    match_subject,
    site_folders,
    split_ending,
)
from sites.miniature import box_label, write_nifti_case
from sites.options import parse_options, reader_version

LAYOUT = "imagesTr, labelsTr and dataset.json, in the folder or in one folder per site"


@dataclass(frozen=True)
class NnunetOptions:
    """Options of the nnU-Net reader.

    Attributes:
        site_pattern: For one folder with all sites: a regular expression, searched in
            the case id, whose group `site` (or first group) is the site.
        subject_pattern: As in `sites.listing.match_subject`.
        merge: Label value in the files -> label value of dataset.json.
        unlabelled: True: an image without a label is a case without a label.
        intensity_unit: For the card.
    """

    site_pattern: re.Pattern[str] | None = None
    subject_pattern: re.Pattern[str] | None = None
    merge: Mapping[int, int] = field(default_factory=dict)
    unlabelled: bool = False
    intensity_unit: str = "arbitrary"


@dataclass(frozen=True)
class Description:
    """What a dataset.json says.

    Attributes:
        name: Name of the data set, or "".
        channels: Names of the channels, in file order.
        labels: Label value -> class name.
        ignore: Label value of voxels that nobody annotated, or None.
    """

    name: str
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    ignore: int | None = None


def card(root: Path | None = None, **options: Any) -> DatasetCard:
    """Describe the data set as its dataset.json does.

    Args:
        root: The data folder; None: labels and channels are placeholders.
        options: Fields of `NnunetOptions`.

    Returns:
        The card.
    """
    chosen = parse_options(NnunetOptions, options)
    said = Description("", ("0",), {0: "background", 1: "foreground"})
    dims, names = 3, tuple[str, ...]()
    if root is not None:
        folders = _folders(root)
        said = _common_description(folders)
        opened = open_sites(root, **options)
        names = tuple(site.site_id for site in opened)
        dims = first_layout(c.files[0] for site in opened for c in site.cases)[1]
    return DatasetCard(
        name="nnunet",
        title=said.name or "A raw nnU-Net data set",
        version="local",
        licence="as the owner says",
        source_url="",
        citation="",
        modality="+".join(said.channels),
        intensity_unit=chosen.intensity_unit,
        kind="segmentation",
        labels=said.labels,
        num_channels=len(said.channels),
        spatial_dims=dims,
        sites=names,
    )


CARD = card()


def open_sites(root: Path, **options: Any) -> tuple[SourceSite, ...]:
    """List the training cases of every site; no image is opened.

    Args:
        root: The data folder.
        options: Fields of `NnunetOptions`.

    Returns:
        Sites in sorted order.

    Raises:
        ConfigError: If an option is unknown, or sites lie in one folder and neither
            sites.csv nor `site_pattern` tells them apart.
        DataError: If the layout is not there, two dataset.json disagree, or a case
            has no site.
    """
    chosen = parse_options(NnunetOptions, options)
    folders = _folders(root)
    said = _common_description(folders)
    if "" not in folders:
        return tuple(
            _site(site_id, *_list(folder, root, said, chosen), said, chosen)
            for site_id, folder in folders.items()
        )
    cases, problems = _list(folders[""], root, said, chosen)
    site_of = _site_lookup(root, chosen, {*cases, *problems})
    return tuple(
        _site(
            site_id,
            {name: value for name, value in cases.items() if site_of[name] == site_id},
            {n: why for n, why in problems.items() if site_of[n] == site_id},
            said,
            chosen,
        )
        for site_id in sorted(set(site_of.values()))
    )


def read_description(path: Path) -> Description:
    """Read a dataset.json of version 1 or 2.

    Args:
        path: The file.

    Returns:
        Channels and labels.

    Raises:
        DataError: If it is missing, no JSON, or says something that cannot be used
            (regions instead of labels, no background).
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        channels = said.get("channel_names") or said["modality"]
        pairs = [_label_pair(key, value) for key, value in said["labels"].items()]
        order = sorted(channels, key=int)
        names = tuple(str(channels[key]) for key in order)
    except FileNotFoundError:
        raise DataError(f"{path.name} is missing: expected {LAYOUT}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path.name} cannot be used",
            hint="it needs channel_names and labels, with one number per label "
            "(regions are not supported)",
        ) from None
    ignore = next((value for value, name in pairs if name == "ignore"), None)
    labels = {value: name for value, name in pairs if value != ignore}
    if 0 not in labels or len({value for value, _ in pairs}) < len(pairs):
        raise DataError(
            f"{path.name}: labels need a background of 0 and no value twice"
        )
    return Description(str(said.get("name", "")), names, labels, ignore)


def read_case(
    case_id: str,
    channel_paths: tuple[Path, ...],
    label_path: Path | None,
    *,
    labels: Mapping[int, str],
    merge: Mapping[int, int],
) -> Case:
    """Read one case and stack its channels.

    Args:
        case_id: The case.
        channel_paths: One file per channel, in order.
        label_path: The label map, or None.
        labels: Label value -> class name.
        merge: Stored value -> label value.

    Returns:
        The case, image (C, I, J, K).

    Raises:
        CaseError: If a file cannot be used, or two channels lie on different grids.
    """
    case = read_image_label(
        case_id, channel_paths[0], label_path, labels=labels, merge=merge
    )
    if len(channel_paths) == 1:
        return case
    volumes = []
    for number, path in enumerate(channel_paths):
        try:
            volumes.append(_read_channel(path))
            check_pair(volumes[0], volumes[-1])
        except CaseError as error:
            raise CaseError(
                f"case {case_id}, channel {number}: {error.message}", hint=error.hint
            ) from None
    return dataclasses.replace(
        case, image=np.concatenate([volume.array_CIJK for volume in volumes])
    )


def write_miniature(root: Path, seed: int) -> None:
    """Write two tiny sites with two channels, and the traps this reader handles.

    Traps: a case that lacks a channel, an image without a label, a label value that
    means "ignore".

    Args:
        root: Where to write.
        seed: Seed of the pixels.
    """
    said = {
        "name": "Miniature",
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "lesion": 1, "ignore": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    for site in ("alpha", "beta"):
        folder = root / site
        for index in range(3):
            stem = f"{site}_{index:03d}"
            label = _worn_label(seed, stem)
            for channel in range(2):
                write_nifti_case(
                    folder / "imagesTr" / f"{stem}_{channel:04d}.nii.gz",
                    folder / "labelsTr" / f"{stem}.nii.gz",
                    seed=seed + index,
                    label_IJK=label,
                )
        (folder / "dataset.json").write_text(json.dumps(said), encoding="utf-8")
    (root / "alpha" / "imagesTr" / "alpha_002_0001.nii.gz").unlink()
    (root / "beta" / "labelsTr" / "beta_002.nii.gz").unlink()


def _worn_label(seed: int, stem: str) -> np.ndarray:
    kept = numpy_rng(seed, "nnunet", stem).uniform(size=(8, 8, 4)) > 0.1
    label = (box_label((8, 8, 4)) * kept).astype(np.uint8)
    label[0, 0, 0] = 2
    return label


_Files = tuple[tuple[Path, ...], Path | None]


def _folders(root: Path) -> dict[str, Path]:
    """Site folders by site id; {"": root} if all sites lie in one folder."""
    if (root / "imagesTr").is_dir():
        return {"": root}
    return site_folders(root, holding="imagesTr", layout=LAYOUT)


def _common_description(folders: Mapping[str, Path]) -> Description:
    said = {
        site: read_description(folder / "dataset.json")
        for site, folder in folders.items()
    }
    first, *others = said
    for site in others:
        if dataclasses.replace(said[site], name="") != dataclasses.replace(
            said[first], name=""
        ):
            raise DataError(
                f"dataset.json of sites {first} and {site} disagree",
                hint="all sites need the same labels and the same channels",
            )
    return said[first]


def _label_pair(key: str, value: Any) -> tuple[int, str]:
    """Version 2 says {"tumour": 1}, version 1 says {"1": "tumour"}."""
    if isinstance(value, str):
        return int(key), value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(key)
    return value, key


def _list(
    folder: Path, root: Path, said: Description, options: NnunetOptions
) -> tuple[dict[str, _Files], dict[str, str]]:
    images = list_images(folder / "imagesTr", root)
    labels_dir = folder / "labelsTr"
    labels = list_images(labels_dir, root) if labels_dir.is_dir() else Listing({})
    channels: dict[str, dict[int, Path]] = {}
    problems = {**labels.problems}
    for stem, path in images.files.items():
        found = re.fullmatch(r"(.+)_(\d{4})", stem)
        if found is None:
            problems[stem] = "name does not end in a channel number such as _0000"
        else:
            channels.setdefault(found[1], {})[int(found[2])] = path
    for stem, why in images.problems.items():
        problems[re.sub(r"_\d{4}$", "", stem)] = why
    cases: dict[str, _Files] = {}
    for name, paths in channels.items():
        if sorted(paths) != list(range(len(said.channels))):
            problems.setdefault(
                name, f"channels {sorted(paths)}, expected {len(said.channels)}"
            )
        elif name not in labels.files and not options.unlabelled:
            problems.setdefault(name, "no label with this name")
        elif name not in problems:
            files = tuple(paths[number] for number in sorted(paths))
            cases[name] = (files, labels.files.get(name))
    orphans = set(labels.files) - set(channels)
    return cases, {**problems, **dict.fromkeys(orphans, "label without an image")}


def _site(
    site_id: str,
    cases: Mapping[str, _Files],
    problems: Mapping[str, str],
    said: Description,
    options: NnunetOptions,
) -> SourceSite:
    merge = dict(options.merge)
    if said.ignore is not None:
        merge.setdefault(said.ignore, UNKNOWN_LABEL)
    version = reader_version("1", options, *said.channels, repr(said.labels))
    refs = [
        CaseRef(
            case_id=name,
            subject_id=match_subject(options.subject_pattern, name),
            files=images if label is None else (*images, label),
            read=partial(
                read_case, name, images, label, labels=said.labels, merge=merge
            ),
            read_version=version,
        )
        for name, (images, label) in cases.items()
    ]
    site_card = SiteCard(
        title=site_id,
        modality="+".join(said.channels),
        intensity_unit=options.intensity_unit,
    )
    return make_site(site_id, refs, card=site_card, problems=problems)


def _site_lookup(root: Path, options: NnunetOptions, names: set[str]) -> dict[str, str]:
    table = root / "sites.csv"
    if options.site_pattern is not None:
        found = {name: _site_in(options.site_pattern, name) for name in names}
    elif table.is_file():
        found = _read_site_table(table)
    else:
        raise ConfigError(
            "nothing says which case comes from which site",
            hint="add sites.csv (columns case_id, site) beside imagesTr, or set "
            "site_pattern",
        )
    missing = sorted(name for name in names if not found.get(name))
    if missing:
        raise DataError(f"{len(missing)} case(s) have no site, first {missing[0]}")
    return {name: as_site_id(found[name]) for name in names}


def _site_in(pattern: re.Pattern[str], name: str) -> str:
    found = pattern.search(name)
    if found is None or not pattern.groups:
        return ""
    return str(found["site"] if "site" in pattern.groupindex else found[1])


def _read_site_table(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"case_id", "site"} <= rows[0].keys():
        raise DataError(f"{path.name}: expected the columns case_id, site")
    names = [row["case_id"] for row in rows]
    if len(set(names)) < len(names):
        raise DataError(f"{path.name} names a case twice")
    return {row["case_id"]: row["site"] for row in rows}


def _read_channel(path: Path) -> Volume:
    is_picture = split_ending(path.name)[1] not in (".nii", ".nii.gz")
    return read_picture(path) if is_picture else read_volume(path)
