"""Phantom hospitals: generated patients, scanners and annotators, real NIfTI files.

Patients of all hospitals come from one distribution; hospitals differ in what their
scanner and annotators do. `docs/phantom.md` gives every number's reason.

Units:
    MRI and radiographs: arbitrary grey values; CT: Hounsfield units. Spacing in mm.
    Files are stored in each hospital's orientation, some tilted.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.case import Case, CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.pairs import read_image_label
from sites.listing import OUTSIDE, is_inside
from sites.options import parse_options
from sites.phantoms.plan import GENERATOR_VERSION, PhantomOptions, Plan, make_plan
from sites.phantoms.presets import ANATOMIES, PRESETS
from sites.phantoms.writing import (
    MANIFEST,
    MODALITIES,
    cached,
    default_cache_dir,
    write_hospitals,
)

FINDINGS = {0: "no_finding", 1: "opacity"}
MINIATURE = {"preset": "prostate_abc", "cases_per_site": 3, "size": (32, 32, 8)}


def card(root: Path | None = None, **options: Any) -> DatasetCard:
    """Describe the data set that the options make, or that lies in a folder.

    Args:
        root: A phantom folder, whose own preset counts if the options name none.
        options: Fields of `PhantomOptions`.

    Returns:
        The card; labels and modality follow the preset.

    Raises:
        ConfigError: If an option is unknown or impossible.
        DataError: If `root` is given and holds no phantom.
    """
    if root is not None and "preset" not in options:
        options = {**options, "preset": _manifest(root)["preset"]}
    plan = make_plan(parse_options(PhantomOptions, options))
    preset, anatomy = plan.preset, plan.anatomy
    kinds = sorted({dials.modality for dials in plan.dials.values()})
    is_finding = preset.kind == "classification"
    return DatasetCard(
        name="phantom",
        title=preset.title,
        version=GENERATOR_VERSION,
        licence="Apache-2.0",
        source_url="",
        citation=f"Generated; imitates the cohort of: {preset.models}",
        modality=" and ".join(MODALITIES[kind] for kind in kinds),
        intensity_unit="HU" if kinds == ["ct"] else "arbitrary",
        kind=preset.kind,
        labels=FINDINGS if is_finding else anatomy.labels,
        num_channels=1,
        spatial_dims=2 if plan.size[2] == 1 else 3,
        sites=tuple(plan.dials),
    )


CARD = card()


def open_sites(root: Path | None, **options: Any) -> tuple[SourceSite, ...]:
    """Open the phantom hospitals, generating them first if no folder is named.

    Args:
        root: A folder that was generated earlier; None: the cache.
        options: Fields of `PhantomOptions`. With `root` they must not contradict
            what the folder was generated with.

    Returns:
        Sites in sorted order; no image is opened.

    Raises:
        ConfigError: If an option is unknown, impossible or contradicts `root`.
        DataError: If `root` holds no phantom.
        StorageError: If the cache cannot be written.
    """
    chosen = parse_options(PhantomOptions, options)
    if root is None:
        plan = make_plan(chosen)
        root = cached(plan, chosen.cache_dir or default_cache_dir())
    else:
        _demand_agreement(root, options)
    preset = PRESETS[_manifest(root)["preset"]]
    return tuple(_open_site(root / name, preset.name) for name in _site_ids(root))


def write_miniature(root: Path, seed: int) -> None:
    """Write a tiny cohort: three hospitals, three patients each, 32 x 32 x 8 voxels."""
    write_hospitals(_miniature_plan(seed), root)


def _miniature_plan(seed: int) -> Plan:
    return make_plan(parse_options(PhantomOptions, {**MINIATURE, "seed": seed}))


def _site_ids(root: Path) -> list[str]:
    return sorted(_manifest(root)["num_cases"])


def _manifest(root: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((root / MANIFEST).read_text("utf-8"))
        hospitals = PRESETS[manifest["preset"]].hospitals
        is_known = set(manifest["num_cases"]) == set(hospitals)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_manifest(root) from error
    if not is_known:
        raise _no_manifest(root)
    return manifest


def _no_manifest(root: Path) -> DataError:
    return DataError(
        f"Folder {root.name!r} holds no readable {MANIFEST}.",
        hint="Leave the study's root empty, and the phantom is generated.",
    )


def _demand_agreement(root: Path, options: dict[str, Any]) -> None:
    """Refuse options that would have made other images than those in the folder."""
    manifest = _manifest(root)
    if not set(options) - {"cache_dir"}:
        return
    have = {name: manifest[name] for name in ("preset", "size", "seed", "fit_organ")}
    have["cases_per_site"] = manifest["num_cases"]
    have["dials"] = manifest["dials"]
    have["same_patients"] = manifest["same_patients"]
    asked = make_plan(parse_options(PhantomOptions, {**have, **options}))
    if asked.fingerprint != manifest["fingerprint"]:
        raise ConfigError(
            f"Folder {root.name!r} was generated with other options than the study's.",
            hint="Leave the study's root empty, or drop the options that differ from "
            f"those in {MANIFEST}.",
        )


def _open_site(folder: Path, preset_name: str) -> SourceSite:
    try:
        facts = json.loads((folder / "site.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"Site folder {folder.name!r} holds no readable site.json.",
            hint="The folder was changed after it was generated; remove it.",
        ) from error
    refs, problems = [], {}
    for case_id, about in sorted(facts["cases"].items()):
        ref = _case_ref(folder, case_id, about, preset_name)
        if not all(path.is_file() for path in ref.files):
            problems[case_id] = "image or mask is missing"
        elif not all(is_inside(path, folder) for path in ref.files):
            problems[case_id] = OUTSIDE
        else:
            refs.append(ref)
    site_card = SiteCard(
        title=facts["title"],
        modality=facts["modality"],
        intensity_unit=facts["intensity_unit"],
        facts=facts["facts"],
    )
    return SourceSite(facts["site_id"], site_card, tuple(refs), problems)


def _case_ref(
    folder: Path, case_id: str, about: dict[str, Any], preset_name: str
) -> CaseRef:
    preset = PRESETS[preset_name]
    image, mask = (folder / n / f"{case_id}.nii.gz" for n in ("images", "masks"))
    if preset.kind == "classification":
        read = partial(_read_finding, case_id, image, finding=about["has_lesion"])
    else:
        labels = ANATOMIES[preset.anatomy].labels
        read = partial(read_image_label, case_id, image, mask, labels=labels)
    return CaseRef(
        case_id=case_id,
        subject_id=about["subject_id"],
        files=(image, mask),
        read=read,
        read_version=f"{GENERATOR_VERSION}-{preset.kind}-{about['has_lesion']:d}",
        facts={"has_lesion": about["has_lesion"]},
    )


def _read_finding(case_id: str, image: Path, *, finding: bool) -> Case:
    case = read_image_label(case_id, image, None, labels=FINDINGS)
    return dataclasses.replace(case, label=np.array(int(finding), np.int64))
