"""The dials of a phantom hospital: what its scanner and its annotators do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedmed.errors import ConfigError
from fedmed.spelling import nearest
from sites.phantoms.tissues import FIELDS_T

MODALITIES = ("t2w", "t1w", "bssfp", "t2_spir", "ct", "xray")
COILS = ("surface", "endorectal", "none")
Range = tuple[float, float]


@dataclass(frozen=True)
class LabelStyle:
    """How the hospital's annotators draw.

    Attributes:
        offset_mm: Outlines lie this far outside the truth (negative: inside).
        smooth_mm: Details smaller than this are rounded off.
    """

    offset_mm: float = 0.0
    smooth_mm: float = 0.0


@dataclass(frozen=True)
class Dials:
    """Everything in which one phantom hospital may differ from another.

    Attributes:
        modality: "t2w" (fast spin echo), "t1w" (inversion-prepared gradient echo),
            "bssfp", "t2_spir" (fat-suppressed T2w), "ct" or "xray".
        field_t: 1.5, 3 or 7. Sets T1 and T2, and the noise falls as 1 / B0.
        coil: "surface" (array outside), "endorectal" (bright near field, distended
            rectum) or "none" (body coil, flat).
        tr_ms: Repetition time.
        te_ms: Echo time; effective for fast spin echoes.
        ti_ms: Inversion time, "t1w" only.
        flip_deg: Flip angle, "bssfp" only.
        bias_field: Standard deviation of the logarithm of the smooth shading.
        noise: MR and X-ray: standard deviation relative to the mean tissue signal, at
            3 T; CT: Hounsfield units.
        resolution_mm: (in-plane, through-plane), each a range of voxel sizes from
            which every patient draws; a single number is a range of no width.
        blur: Point spread in-plane, full width at half maximum in voxels.
        contrast: Exponent of the grey curve (vendor's display curve); 1 = linear. CT
            is calibrated: 1.
        gain: Grey value of the mean tissue; arbitrary, ±15 % per patient. CT: 1.
        contrast_agent: CT only: iodine, relative to a standard dose.
        tube_kvp: CT and X-ray: tube voltage.
        orientation: Order of the stored voxel axes, e.g. "LPS".
        oblique_deg: Tilt of the slices about the left-right axis.
        label_style: How the annotators draw.
        prevalence: Share of patients with a lesion.
        lesion: Range of the lesion's diameter, mm.
    """

    modality: str = "t2w"
    field_t: float = 3.0
    coil: str = "none"
    tr_ms: float = 4000.0
    te_ms: float = 100.0
    ti_ms: float = 0.0
    flip_deg: float = 60.0
    bias_field: float = 0.0
    noise: float = 0.03
    resolution_mm: tuple[Range, Range] = ((0.6, 0.6), (3.0, 3.0))
    blur: float = 1.0
    contrast: float = 1.0
    gain: float = 300.0
    contrast_agent: float = 1.0
    tube_kvp: float = 120.0
    orientation: str = "RAS"
    oblique_deg: float = 0.0
    label_style: LabelStyle = LabelStyle()
    prevalence: float = 0.0
    lesion: Range = (8.0, 14.0)


def turn(dials: Dials, overrides: Mapping[str, Any], *, site_id: str) -> Dials:
    """Turn some dials of one hospital.

    Args:
        dials: The preset's dials.
        overrides: Dial name -> value, as a study writes it (lists for tuples, a
            mapping for `label_style`, a number for a range without width).
        site_id: For the error's sake.

    Returns:
        New, checked dials.

    Raises:
        ConfigError: If a dial is unknown or its value impossible.
    """
    known = [f.name for f in dataclasses.fields(Dials)]
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        demand_known(name, known, what=f"dial of site {site_id!r}")
        changes[name] = _converted(name, value, dials)
    turned = dataclasses.replace(dials, **changes)
    check(turned, site_id=site_id)
    return turned


def demand_known(name: str, known: Iterable[str], *, what: str) -> None:
    """Raise a ConfigError that names the nearest known name, if `name` is unknown."""
    names = sorted(known)
    if name in names:
        return
    folded = {candidate.lower(): candidate for candidate in names}
    near = nearest(str(name).lower(), folded, cutoff=0.0)
    raise ConfigError(
        f"Unknown {what}: {name!r}. The nearest known one is "
        f"{folded[near] if near else 'none'!r}.",
        hint=f"Known: {', '.join(names)}.",
    )


def _converted(name: str, value: Any, dials: Dials) -> Any:
    try:
        if name == "label_style":
            return _label_style(value, dials.label_style)
        if name == "resolution_mm":
            in_plane, through_plane = value
            return (_range(in_plane), _range(through_plane))
        if name == "lesion":
            return _range(value)
        if isinstance(getattr(dials, name), str):
            return str(value)
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"Dial {name!r} cannot be {value!r}.",
            hint=f"It looks like this: {getattr(dials, name)!r}.",
        ) from error


def _label_style(value: Any, style: LabelStyle) -> LabelStyle:
    if isinstance(value, LabelStyle):
        return value
    known = [f.name for f in dataclasses.fields(LabelStyle)]
    for name in dict(value):
        demand_known(name, known, what="part of the dial 'label_style'")
    return dataclasses.replace(style, **{k: float(v) for k, v in dict(value).items()})


def _range(value: Any) -> Range:
    if isinstance(value, int | float):
        return (float(value), float(value))
    low, high = value
    return (float(low), float(high))


def check(dials: Dials, *, site_id: str) -> None:
    """Raise a ConfigError if a dial's value is impossible."""
    for name, (holds, expected) in {**_choices(dials), **_ranges(dials)}.items():
        if not holds:
            raise ConfigError(
                f"Dial {name!r} of site {site_id!r} is {getattr(dials, name)!r}.",
                hint=f"Expected: {expected}.",
            )


_Claims = dict[str, tuple[bool, str]]


def _choices(dials: Dials) -> _Claims:
    claims: _Claims = {
        "modality": (dials.modality in MODALITIES, f"one of {', '.join(MODALITIES)}"),
        "field_t": (dials.field_t in FIELDS_T, "1.5, 3 or 7"),
        "coil": (dials.coil in COILS, f"one of {', '.join(COILS)}"),
        "orientation": (_is_orientation(dials.orientation), "axis codes such as LPS"),
    }
    return claims


def _ranges(dials: Dials) -> _Claims:
    is_ct = dials.modality == "ct"
    limits: dict[str, tuple[float, float]] = {
        "noise": (0, 1000 if is_ct else 10),
        "bias_field": (0, 3),
        "blur": (0, 20),
        "contrast": (1, 1) if is_ct else (0.05, 20),
        "gain": (1, 1) if is_ct else (1, 4000),
        "contrast_agent": (0, 10),
        "tube_kvp": (60, 150),
        "tr_ms": (1, 1e5),
        "te_ms": (0, 1e4),
        "ti_ms": (0, 1e5),
        "flip_deg": (1, 180),
        "oblique_deg": (-40, 40),
        "prevalence": (0, 1),
    }
    claims: _Claims = {
        name: (low <= getattr(dials, name) <= high, f"from {low:g} to {high:g}")
        for name, (low, high) in limits.items()
    }
    style = dials.label_style
    holds = abs(style.offset_mm) <= 20 and 0 <= style.smooth_mm <= 50
    claims["label_style"] = (holds, "offset_mm within 20, smooth_mm from 0 to 50")
    voxels = all(0.01 <= low <= high <= 50 for low, high in dials.resolution_mm)
    claims["resolution_mm"] = (voxels, "0.01 <= low <= high <= 50, in-plane, through")
    holds = 0 < dials.lesion[0] <= dials.lesion[1] <= 100
    claims["lesion"] = (holds, "0 < low <= high <= 100")
    return claims


def _is_orientation(codes: str) -> bool:
    sides = ("LR", "AP", "IS")
    return len(codes) == 3 and all(sum(c in s for c in codes) == 1 for s in sides)
