"""What lies in a data folder: site folders, image files, pairs, nothing from outside.

No file is opened here. A link that leads out of the data folder is refused, because
what a site may read is decided by the folder that was given to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedmed.case import CaseRef, SiteCard, SourceSite
from fedmed.errors import DataError

ENDINGS = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg")
"""Image files that can be read; upper case is as good."""

COMPANIONS = (".json", ".txt", ".md", ".csv", ".tsv", ".yaml", ".yml", ".html")
"""Files that commonly lie beside images and are passed over."""

OUTSIDE = "is a link out of the data folder"


@dataclass(frozen=True)
class Listing:
    """Image files of one folder by stem, and what could not be listed, with why."""

    files: Mapping[str, Path]
    problems: Mapping[str, str] = field(default_factory=dict)


def split_ending(name: str) -> tuple[str, str]:
    """Split a file name into stem and image ending.

    Args:
        name: A bare file name.

    Returns:
        The stem, and the ending in lower case; "" if it is no image file.

    Example:
        >>> split_ending("sub-01.T2w.nii.gz")
        ('sub-01.T2w', '.nii.gz')
        >>> split_ending("a.JPG"), split_ending("a.dcm")
        (('a', '.jpg'), ('a.dcm', ''))
    """
    for ending in ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)], ending
    return name, ""


def is_inside(path: Path, root: Path) -> bool:
    """Say whether a path, all links followed, lies in the data folder."""
    return path.resolve().is_relative_to(root.resolve())


def list_images(folder: Path, root: Path) -> Listing:
    """List the image files directly in a folder.

    Hidden files and companions (tables, notes, JSON) are passed over. Other files that
    are no images are problems: they may be scans in a format that is not read.

    Args:
        folder: E.g. `<site>/images`.
        root: The data folder; links must not leave it.

    Returns:
        Files by stem, in sorted order.

    Raises:
        DataError: If two files have one stem.
    """
    files: dict[str, Path] = {}
    problems: dict[str, str] = {}
    # Following all links costs a system call per folder above a file: once is enough.
    folder_is_inside = is_inside(folder, root)
    for path in sorted(folder.iterdir()):
        stem, ending = split_ending(path.name)
        if path.name.startswith(".") or path.name.lower().endswith(COMPANIONS):
            continue
        if not (is_inside(path, root) if path.is_symlink() else folder_is_inside):
            problems[stem] = f"{path.name} {OUTSIDE}"
        elif path.is_dir():
            continue
        elif not ending:
            problems[stem] = f"file type not read; read are {', '.join(ENDINGS)}"
        elif stem in files:
            raise DataError(
                f"two files stand for one case in {folder.parent.name}/{folder.name}: "
                f"{files[stem].name} and {path.name}",
                hint="give every case one file, or another name",
            )
        else:
            files[stem] = path
    return Listing(files, problems)


def site_folders(root: Path, *, holding: str, layout: str) -> dict[str, Path]:
    """Find the site folders of a data set.

    Args:
        root: The data folder.
        holding: Glob that matches something in every site folder, e.g. "images".
        layout: What is expected, for the error message.

    Returns:
        Folders by site id (folder name in lower case), sorted.

    Raises:
        DataError: If there is none, if one is a link out of `root`, if two folders
            have one site id, or if a name cannot be a site id.
    """
    folders: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if not any(path.glob(holding)):
            continue
        if not is_inside(path, root):
            raise DataError(
                f"site folder {path.name} {OUTSIDE}",
                hint="put the files into the data folder, or name the real folder",
            )
        site_id = as_site_id(path.name)
        if site_id in folders:
            raise DataError(f"two folders stand for site {site_id}")
        folders[site_id] = path
    if not folders:
        raise DataError(f"no site found in folder {root.name!r}: expected {layout}")
    return dict(sorted(folders.items()))


def as_site_id(name: str) -> str:
    """Turn a folder's or a table's word for a site into a site id.

    Args:
        name: E.g. "RUNMC" or "Mount Sinai".

    Returns:
        Lower case, blanks as "_".

    Raises:
        DataError: If other characters than letters, digits, "_", "." and "-" remain.

    Example:
        >>> as_site_id("Mount Sinai")
        'mount_sinai'
    """
    site_id = re.sub(r"\s+", "_", name.strip().lower())
    if not re.fullmatch(r"[a-z0-9_.-]+", site_id):
        raise DataError(
            f"{name!r} cannot name a site",
            hint="use letters, digits, '_', '.' and '-'",
        )
    return site_id


def make_site(
    site_id: str,
    refs: Iterable[CaseRef],
    *,
    card: SiteCard,
    problems: Mapping[str, str],
) -> SourceSite:
    """Put one site's cases in order.

    Args:
        site_id: The site.
        refs: Its cases, in any order.
        card: What is publicly said of it.
        problems: Cases that could not be listed.

    Returns:
        The site, cases in sorted `case_id` order.

    Raises:
        DataError: If a `case_id` appears twice.
    """
    cases = tuple(sorted(refs, key=lambda ref: ref.case_id))
    counts = Counter(ref.case_id for ref in cases)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise DataError(
            f"site {site_id} has {len(twice)} case id(s) twice: {', '.join(twice[:3])}",
            hint="every case of a site needs its own name",
        )
    return SourceSite(site_id, card, cases, dict(sorted(problems.items())))


def match_subject(pattern: re.Pattern[str] | None, case_id: str) -> str:
    r"""Find the subject that a case belongs to.

    Args:
        pattern: Searched in the case id; its group `subject`, or else its first group,
            or else the whole match is the subject. None: every case is one subject.
        case_id: The case.

    Returns:
        The subject id.

    Raises:
        DataError: If the pattern does not match.

    Example:
        >>> match_subject(re.compile(r"(.+)Ses\d"), "sub-1Ses2")
        'sub-1'
    """
    if pattern is None:
        return case_id
    found = pattern.search(case_id)
    if found is None:
        raise DataError(
            f"subject pattern {pattern.pattern!r} does not match case {case_id}",
            hint="every case needs a subject, or subjects could fall into two splits",
        )
    return found["subject"] if "subject" in pattern.groupindex else _first(found)


def _first(found: re.Match[str]) -> str:
    return str(found[1] if found.re.groups else found[0])
