"""Writing phantom hospitals as real NIfTI files, whole or not at all.

`phantom.json` holds what was asked for. A hospital's folder holds `site.json` (its card
and cases), `images/<case>.nii.gz` (int16) and `masks/<case>.nii.gz` (uint8).
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from fedmed.errors import StorageError
from sites.phantoms.dials import Dials
from sites.phantoms.patient import Scan, visit
from sites.phantoms.plan import Plan

_nibabel: Any = nibabel  # its functions carry no types

LOGGER = logging.getLogger(__name__)

MANIFEST = "phantom.json"
MODALITIES = {
    "t2w": "T2w MRI",
    "t1w": "T1w MRI",
    "bssfp": "bSSFP MRI",
    "t2_spir": "T2w fat-suppressed MRI",
    "ct": "CT",
    "xray": "radiograph",
}


def cached(plan: Plan, cache_dir: Path) -> Path:
    """Give a folder that holds the plan's hospitals, generating it if need be.

    Safe for several processes at once: each generates into a folder of its own and
    renames it; the first wins, the others take its folder.

    Args:
        plan: What to generate.
        cache_dir: Where; made if missing.

    Returns:
        The folder.

    Raises:
        StorageError: If the folder cannot be written.
    """
    target = cache_dir / f"{plan.preset.name}-{plan.fingerprint}"
    if (target / MANIFEST).is_file():
        return target
    LOGGER.info("generating phantom %s", target.name)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=cache_dir))
    except OSError as error:
        raise _not_writable(error) from error
    try:
        write_hospitals(plan, draft)
        _publish(draft, target)
    except OSError as error:
        raise _not_writable(error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _publish(draft: Path, target: Path) -> None:
    draft.chmod(0o755)  # mkdtemp makes it private
    try:
        draft.rename(target)
    except OSError:
        if not (target / MANIFEST).is_file():
            raise


def _not_writable(error: OSError) -> StorageError:
    return StorageError(
        f"The phantom's cache folder cannot be written: {error.strerror}.",
        hint="Name another one with the option cache_dir, or set FEDMED_CACHE.",
    )


def default_cache_dir() -> Path:
    """`$FEDMED_CACHE/phantom`, or `~/.cache/fedmed/phantom`."""
    named = os.environ.get("FEDMED_CACHE", "")
    return (Path(named) if named else Path.home() / ".cache" / "fedmed") / "phantom"


def write_hospitals(plan: Plan, root: Path) -> None:
    """Write every hospital of a plan; the manifest comes last."""
    for site_id in plan.dials:
        _write_hospital(plan, site_id, root / site_id)
    manifest = {"fingerprint": plan.fingerprint, **plan.as_json()}
    (root / MANIFEST).write_text(_as_text(manifest), encoding="utf-8")


def _write_hospital(plan: Plan, site_id: str, folder: Path) -> None:
    dials = plan.dials[site_id]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    cases = {}
    for index in range(plan.num_cases[site_id]):
        case_id = f"{site_id}_{index:04d}"
        scan = visit(plan.anatomy, dials, plan.request(site_id, index))
        for name, voxels in (("images", scan.image), ("masks", scan.label)):
            path = folder / name / f"{case_id}.nii.gz"
            path.write_bytes(nifti_bytes(voxels, scan, dials))
        subject = f"patient_{index:04d}" if plan.same_patients else case_id
        cases[case_id] = {"subject_id": subject, "has_lesion": scan.has_lesion}
    text = _as_text({**_card(plan, site_id), "cases": cases})
    (folder / "site.json").write_text(text, encoding="utf-8")


def _card(plan: Plan, site_id: str) -> dict[str, Any]:
    hospital, dials = plan.preset.hospitals[site_id], plan.dials[site_id]
    is_mr = dials.modality not in ("ct", "xray")
    facts: dict[str, Any] = {"phantom": True, "vendor": hospital.vendor}
    if is_mr:
        facts |= {"field_t": dials.field_t, "coil": dials.coil}
    return {
        "site_id": site_id,
        "title": f"Phantom of {hospital.title}",
        "modality": MODALITIES[dials.modality],
        "intensity_unit": "HU" if dials.modality == "ct" else "arbitrary",
        "facts": facts,
        "dials": dataclasses.asdict(dials),
    }


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def nifti_bytes(voxels: np.ndarray, scan: Scan, dials: Dials) -> bytes:
    """Pack voxels in RAS+ order as the hospital stores them: turned, tilted, gzipped.

    Args:
        voxels: (I, J, K).
        scan: For its voxel size.
        dials: For orientation and tilt.

    Returns:
        The file's bytes; equal input gives equal bytes.
    """
    image = _nibabel.Nifti1Image(voxels, affine_of(voxels.shape, scan, dials))
    orientations = _nibabel.orientations
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(dials.orientation)
    )
    turned = image.as_reoriented(turn)
    # as_reoriented gives a view; the header must follow the turned affine.
    stored = _nibabel.Nifti1Image(np.ascontiguousarray(turned.dataobj), turned.affine)
    stored.header.set_xyzt_units("mm")
    stored.set_qform(turned.affine, code=1)
    stored.set_sform(turned.affine, code=1)
    return gzip.compress(stored.to_bytes(), compresslevel=1, mtime=0)


def affine_of(shape: tuple[int, ...], scan: Scan, dials: Dials) -> np.ndarray:
    """Voxel indices to RAS+ mm: slices tilted about x, the field's centre at 0."""
    angle = np.deg2rad(dials.oblique_deg)
    cosine, sine = np.cos(angle), np.sin(angle)
    tilt = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag(scan.spacing_mm)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine
