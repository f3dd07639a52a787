r"""Scanning a body: signal, coil, partial volume, shading, noise, grey values.

Source:
    Spin echo, inversion recovery and balanced SSFP signals: Bernstein, King and Zhou,
    Handbook of MRI Pulse Sequences, 2004. Noise of magnitude images: Gudbjartsson and
    Patz, MRM 1995.
"""

from __future__ import annotations

import numpy as np
import scipy  # loads its parts when they are first used: half a second

from sites.phantoms import tissues
from sites.phantoms.canvas import Body, CoilPlace
from sites.phantoms.dials import Dials
from sites.phantoms.space import Grid, smooth_noise

REFERENCE_FIELD_T = 3.0
ENDORECTAL_DEPTH_MM = 18.0
"""Distance from the balloon at which the endorectal signal has halved."""
GAIN_SPREAD = 0.15
TISSUE_SPREAD = 0.05
"""Relative standard deviation between patients of T1 and T2."""
TISSUE_SPREAD_HU = 6.0
_FATTY = [tissues.CODE[name] for name in ("fat", "scalp", "marrow")]


def acquire(
    body: Body,
    grid: Grid,
    dials: Dials,
    *,
    patient: np.random.Generator,
    scan: np.random.Generator,
) -> np.ndarray:
    """Scan one body.

    Args:
        body: Maps on a grid that is a whole refinement of `grid`.
        grid: The scanner's voxels.
        dials: The hospital's dials.
        patient: Draws what belongs to the patient (tissue contrast).
        scan: Draws what belongs to the scan (shading, noise, gain).

    Returns:
        int16 (I, J, K); Hounsfield units for CT, arbitrary grey values otherwise.
    """
    fine = _signal(body, dials, patient)
    image = _point_spread(box_average(fine, grid.size), dials.blur)
    is_tissue = box_average(body.tissue != tissues.CODE["air"], grid.size) > 0.5
    if dials.modality == "ct":
        image = image + _ct_noise(image.shape, scan, dials.noise)
        return _stored(image, -1024, 3071)
    image = image * _coil_profile(grid, dials.coil, body.coil)
    image = image * np.exp(dials.bias_field * _shading(grid, scan))
    mean = float(image[is_tissue].mean()) if is_tissue.any() else 1.0
    image = add_noise(image, scan, sigma=mean * _relative_noise(dials), dials=dials)
    image = image / np.float32(mean)
    image = _grey_curve(image, dials.contrast)
    gain = dials.gain * float(np.exp(GAIN_SPREAD * np.clip(scan.normal(), -2, 2)))
    return _stored(image * gain, 0, 32767)


def _stored(image: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.asarray(np.clip(np.rint(image), low, high), np.int16)


def _signal(body: Body, dials: Dials, patient: np.random.Generator) -> np.ndarray:
    count = len(tissues.NAMES)
    t1_scale, t2_scale = np.exp(TISSUE_SPREAD * patient.standard_normal((2, count)))
    shift_hu = TISSUE_SPREAD_HU * patient.standard_normal(count)
    if dials.modality == "xray":
        return radiograph(body, dials.tube_kvp)
    if dials.modality == "ct":
        solid = tissues.column("texture_hu") > 0
        level = hounsfield(dials) + shift_hu * solid
        spread = tissues.column("texture_hu")
        return _paint(level, spread, body)
    t1 = tissues.relaxation_ms("t1_ms", dials.field_t) * t1_scale
    t2 = tissues.relaxation_ms("t2_ms", dials.field_t) * t2_scale
    level = mr_signal(dials, t1_ms=t1, t2_ms=t2)
    spread = level * tissues.column("texture")
    return np.asarray(np.maximum(_paint(level, spread, body), 0))


def _paint(level: np.ndarray, spread: np.ndarray, body: Body) -> np.ndarray:
    values: np.ndarray = level.astype(np.float32)[body.tissue]
    values += spread.astype(np.float32)[body.tissue] * body.texture
    return values


def mr_signal(dials: Dials, *, t1_ms: np.ndarray, t2_ms: np.ndarray) -> np.ndarray:
    r"""Signal of every tissue for one pulse sequence.

    "t2w": $\rho (1 - e^{-TR/T_1}) e^{-TE/T_2}$.
    "t2_spir": the same, fat and fatty marrow inverted and nulled to 12 %.
    "t1w": $\rho |1 - 2 e^{-TI/T_1} + e^{-TR/T_1}| e^{-TE/T_2}$.
    "bssfp": $\rho \sin\alpha / ((T_1/T_2)(1-\cos\alpha) + 1 + \cos\alpha)$.

    Args:
        dials: Modality and sequence times.
        t1_ms: (T,) by tissue code.
        t2_ms: (T,) by tissue code.

    Returns:
        float64 (T,), proton density 1 without relaxation = 1.
    """
    density = tissues.column("density")
    blood = (tissues.ARTERIAL, tissues.VENOUS)
    for names, flow in zip(blood, tissues.FLOW[dials.modality], strict=True):
        density[[tissues.CODE[name] for name in names]] *= flow
    decay = np.exp(-dials.te_ms / t2_ms)
    recovery = np.exp(-dials.tr_ms / t1_ms)
    if dials.modality == "t1w":
        inverted = np.abs(1 - 2 * np.exp(-dials.ti_ms / t1_ms) + recovery)
        return np.asarray(density * inverted * decay)
    if dials.modality == "bssfp":
        t2_ms = t2_ms.copy()
        t2_ms[_FATTY] *= 0.5  # the tabulated T2 of fat is that of fast spin echoes
        cosine, sine = (f(np.deg2rad(dials.flip_deg)) for f in (np.cos, np.sin))
        return np.asarray(density * sine / (t1_ms / t2_ms * (1 - cosine) + 1 + cosine))
    signal = density * (1 - recovery) * decay
    if dials.modality == "t2_spir":
        signal[_FATTY] *= 0.12
    return np.asarray(signal)


def hounsfield(dials: Dials) -> np.ndarray:
    """Hounsfield units of every tissue, float64 (T,).

    Iodine attenuates more at low tube voltage, close to its K-edge: about as
    kVp ** -1.4 between 80 and 140 kVp.
    """
    iodine = dials.contrast_agent * (120 / dials.tube_kvp) ** 1.4
    return np.asarray(tissues.column("hu") + iodine * tissues.column("agent_hu"))


def radiograph(body: Body, tube_kvp: float) -> np.ndarray:
    """Logarithm of the rays' attenuation, so that bone is bright, float32."""
    total = np.zeros(body.grid.size, np.float32)
    share = (tube_kvp - 70) / 55
    for name, (at_70, at_125) in tissues.ATTENUATION_PER_CM.items():
        attenuation = at_70 + (at_125 - at_70) * share
        total += np.float32(attenuation) * body.thickness_cm[name]
    return total


def box_average(fine: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """Average blocks of fine voxels: the partial volume of thick slices, float32."""
    total = fine.view(np.uint8) if fine.dtype == bool else fine  # 8 pieces at most
    for axis in (2, 1, 0):
        total = _sum_neighbours(total, axis, fine.shape[axis] // size[axis])
    return np.asarray(total * np.float32(total.size / fine.size), np.float32)


def _sum_neighbours(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    first: list[slice] = [slice(None)] * 3
    first[axis] = slice(0, None, count)
    total = array[tuple(first)]
    for start in range(1, count):
        other = list(first)
        other[axis] = slice(start, None, count)
        total = total + array[tuple(other)]
    return total


def _point_spread(image: np.ndarray, width: float) -> np.ndarray:
    sigma = width / 2.355
    return np.asarray(
        scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), truncate=3)
    )


def _coil_profile(grid: Grid, coil: str, place: CoilPlace | None) -> np.ndarray:
    x, y = grid.axis_mm(0)[:, None, None], grid.axis_mm(1)[:, None]
    z = grid.axis_mm(2)
    if coil == "endorectal" and place is not None:
        return endorectal_profile(x, y, z, place=place)
    if coil == "surface":  # an array in front and behind: weakest half-way
        return np.asarray(0.82 + 0.18 * (y / 60) ** 2 + 0 * x + 0 * z, np.float32)
    return np.ones((1, 1, 1), np.float32)


def endorectal_profile(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, *, place: CoilPlace
) -> np.ndarray:
    r"""Sensitivity of an endorectal coil: $1 / (1 + (r / r_0)^2)$ from its surface.

    Args:
        x: Position, mm; `y`, `z` alike; broadcast against each other.
        y: See `x`.
        z: See `x`.
        place: The balloon.

    Returns:
        float32; 1 at the balloon, 1/2 at `ENDORECTAL_DEPTH_MM`.
    """
    across = np.hypot(x - place.centre_mm[0], y - place.centre_mm[1])
    r = np.maximum(across - place.radius_mm, 0)
    beyond = np.maximum(np.abs(z) - place.half_length_mm, 0)
    distance = np.hypot(r, beyond)
    return np.asarray(1 / (1 + (distance / ENDORECTAL_DEPTH_MM) ** 2), np.float32)


def _shading(grid: Grid, scan: np.random.Generator) -> np.ndarray:
    scale = 0.5 * max(grid.field_mm)
    return smooth_noise(grid, scan, scale_mm=scale)


def _relative_noise(dials: Dials) -> float:
    if dials.modality == "xray":
        return dials.noise
    return dials.noise * REFERENCE_FIELD_T / dials.field_t


def add_noise(
    image: np.ndarray, scan: np.random.Generator, *, sigma: float, dials: Dials
) -> np.ndarray:
    """Add Rician noise (MR: magnitude of a complex image) or Gaussian (X-ray)."""
    real = scan.standard_normal(image.shape, dtype=np.float32) * np.float32(sigma)
    if dials.modality == "xray":
        return np.asarray(np.maximum(image + real, 0))
    imaginary = scan.standard_normal(image.shape, dtype=np.float32) * np.float32(sigma)
    return np.asarray(np.hypot(image + real, imaginary), np.float32)


def _ct_noise(
    shape: tuple[int, ...], scan: np.random.Generator, sigma_hu: float
) -> np.ndarray:
    white = scan.standard_normal(shape, dtype=np.float32)
    grain = scipy.ndimage.gaussian_filter(white, (0.6, 0.6, 0), mode="wrap")
    return np.asarray(grain * np.float32(sigma_hu / grain.std()))


def _grey_curve(image: np.ndarray, exponent: float) -> np.ndarray:
    if exponent == 1:
        return image
    white = np.float32(np.percentile(image, 99))
    return np.asarray(white * (image / white) ** np.float32(exponent), np.float32)
