"""Overlays: a slice with the outlines of truth and prediction, as inline SVG.

The grey slice is a PNG inside the SVG; the outlines are vectors on top, sharp in any
size. Shown as radiologists hang axial slices: the patient's right is on the left of the
picture, the front at the top; height and width keep the proportions of the spacing.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import contour_generator
from markupsafe import Markup, escape
from PIL import Image

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import StorageError
from fedmed.report.wording import percent

TRUTH_COLOUR = "#56B4E9"
PREDICTION_COLOUR = "#F5A700"
CLASS_COLOURS = ("#56B4E9", "#F5A700", "#3DDC97", "#F0E442", "#FF9BD2", "#FF7043")
RANKS = ("worst", "median", "best")

_MIN_SIDE_MM = 40.0
_SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Overlay:
    """One slice as the engine wrote it.

    Attributes:
        image: (I, J) or (I, J, 3), any range.
        truth: uint8 (I, J), `UNKNOWN_LABEL` where nobody annotated.
        prediction: uint8 (I, J).
        spacing_mm: Of I and J.
        spacing_known: False for photographs: no scale bar, no left and right.
        rank: "worst", "median" or "best" of its site.
    """

    case_id: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing_mm: tuple[float, float]
    spacing_known: bool
    rank: str
    slice_index: int
    dice: float

    @property
    def classes(self) -> tuple[int, ...]:
        """Classes drawn on this slice."""
        found = set(np.unique(self.truth)) | set(np.unique(self.prediction))
        return tuple(sorted(int(c) for c in found if c not in {0, UNKNOWN_LABEL}))


def read_overlay(path: Path, *, is_photograph: bool = False) -> Overlay:
    """Read one slice with its truth and prediction.

    Args:
        path: A `.npz` with `image`, `truth`, `prediction` and the JSON text `facts`.
        is_photograph: What to believe where the facts do not say `spacing_known`.

    Returns:
        The slice.

    Raises:
        StorageError: If an array is missing or its shape differs from the image's.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            image, truth = arrays["image"], arrays["truth"]
            prediction = arrays["prediction"]
            facts = json.loads(str(arrays["facts"][()]))
        known = {"spacing_known": not is_photograph, **facts}
        return _overlay(image, truth, prediction, known)
    except Exception as error:
        raise StorageError(
            f"The overlay {path.name!r} cannot be read.",
            hint="The report can be made without it; run the study again to have it.",
        ) from error


def draw_overlay(overlay: Overlay, *, site: str, per_class: bool) -> Markup:
    """Draw one slice.

    Args:
        overlay: As read.
        site: For the alternative text.
        per_class: One colour a class. False: one colour for truth, one for prediction.

    Returns:
        An `<svg>` element in millimetres (or pixels, where there is no scale).
    """
    cropped = _crop(overlay)
    width_mm, height_mm = _size_mm(cropped)
    alt = (
        f"Site {site}, {overlay.rank} case {overlay.case_id}, slice "
        f"{overlay.slice_index}, Dice {percent(overlay.dice)} %: image with the "
        "outline of the truth (solid) and of the prediction (dashed)."
    )
    return Markup(
        f'<svg class="overlay" role="img" aria-label="{escape(alt)}" '
        f'viewBox="0 0 {width_mm:.4g} {height_mm:.4g}" '
        'xmlns="http://www.w3.org/2000/svg">'
        f'<image width="{width_mm:.4g}" height="{height_mm:.4g}" '
        f'preserveAspectRatio="none" href="{_png(_hang(cropped.image, overlay))}"/>'
        f"{_outlines(cropped, per_class)}{_marks(cropped)}</svg>"
    )


def is_cropped(overlay: Overlay) -> bool:
    """Tell whether only a part of the slice is shown."""
    return _crop(overlay).truth.shape != overlay.truth.shape


def _overlay(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, facts: Any
) -> Overlay:
    if not truth.shape == prediction.shape == image.shape[:2] or truth.ndim != 2:
        raise ValueError("image, truth and prediction differ in shape")
    spacing = [float(value) for value in facts.get("spacing_mm") or (1, 1)]
    if not all(np.isfinite(spacing)) or min(spacing[:2]) <= 0:
        raise ValueError("spacing must be positive")
    dice = facts.get("dice")
    return Overlay(
        str(facts.get("case_id", "?")),
        image,
        truth,
        prediction,
        (spacing[0], spacing[1]),
        bool(facts["spacing_known"]),
        str(facts.get("rank", "?")),
        int(facts.get("slice", 0)),
        float("nan") if dice is None else float(dice),
    )


def _crop(overlay: Overlay) -> Overlay:
    """Cut to about twice the organ, at least 40 mm, so that it can be seen."""
    shown = ((overlay.truth > 0) & (overlay.truth != UNKNOWN_LABEL)) | (
        overlay.prediction > 0
    )
    if not overlay.spacing_known or not shown.any():
        return overlay
    spans = [np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0)]
    lengths = [
        (span[-1] - span[0] + 1) * spacing
        for span, spacing in zip(spans, overlay.spacing_mm, strict=True)
    ]
    side_mm = max(_MIN_SIDE_MM, 2.2 * max(lengths))
    if side_mm > 0.85 * max(_size_mm(overlay)):
        return overlay
    parts = tuple(
        _window(span, side_mm / spacing, size)
        for span, spacing, size in zip(
            spans, overlay.spacing_mm, shown.shape, strict=True
        )
    )
    return _cut(overlay, parts)


def _window(span: np.ndarray, length: float, size: int) -> slice:
    """Place a window of `length` voxels around the organ, inside the slice."""
    wanted = min(size, int(np.ceil(length)))
    start = int(np.clip((span[0] + span[-1] + 1 - wanted) // 2, 0, size - wanted))
    return slice(start, start + wanted)


def _cut(overlay: Overlay, parts: tuple[slice, ...]) -> Overlay:
    return Overlay(
        overlay.case_id,
        overlay.image[parts],
        overlay.truth[parts],
        overlay.prediction[parts],
        overlay.spacing_mm,
        overlay.spacing_known,
        overlay.rank,
        overlay.slice_index,
        overlay.dice,
    )


def _size_mm(overlay: Overlay) -> tuple[float, float]:
    rows, columns = overlay.truth.shape
    return rows * overlay.spacing_mm[0], columns * overlay.spacing_mm[1]


def _hang(image: np.ndarray, overlay: Overlay) -> np.ndarray:
    """Turn (I, J) into picture rows from the top; photographs keep their sides."""
    turned = np.swapaxes(image, 0, 1)[::-1]
    return turned[:, ::-1] if overlay.spacing_known else turned


def _png(picture: np.ndarray) -> str:
    """Encode with the darkest 1 % black and the brightest 0.5 % white."""
    finite = np.nan_to_num(picture.astype(np.float32))
    low, high = np.percentile(finite, [1, 99.5])
    scaled = np.clip((finite - low) / max(float(high - low), 1e-12), 0, 1)
    buffer = io.BytesIO()
    Image.fromarray(np.rint(255 * scaled).astype(np.uint8)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _outlines(overlay: Overlay, per_class: bool) -> str:
    known = overlay.truth != UNKNOWN_LABEL
    pieces = []
    for index in overlay.classes:
        colour = CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]
        truth = _path(overlay, known & (overlay.truth == index))
        prediction = _path(overlay, overlay.prediction == index)
        truth_colour = colour if per_class else TRUTH_COLOUR
        prediction_colour = colour if per_class else PREDICTION_COLOUR
        pieces += _stroke(truth, truth_colour, dashes="")
        pieces += _stroke(prediction, prediction_colour, dashes="5 3")
    return "".join(pieces)


def _path(overlay: Overlay, mask: np.ndarray) -> str:
    """Trace a mask halfway between voxel centres, i.e. along voxel edges."""
    padded = np.pad(mask, 1).astype(float)
    lines = contour_generator(z=padded.T).lines(0.5)
    commands = []
    for line in lines:
        points = _to_picture(overlay, np.asarray(line) - 0.5)
        commands.append(
            "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z",
        )
    return "".join(commands)


def _to_picture(overlay: Overlay, points_IJ: np.ndarray) -> np.ndarray:
    points_mm: np.ndarray = points_IJ * np.array(overlay.spacing_mm)
    flipped: np.ndarray = np.array(_size_mm(overlay)) - points_mm
    if not overlay.spacing_known:
        flipped[:, 0] = points_mm[:, 0]
    return flipped


def _stroke(path: str, colour: str, *, dashes: str) -> list[str]:
    if not path:
        return []
    shared = f'<path d="{path}" fill="none" vector-effect="non-scaling-stroke"'
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    halo = (
        ""
        if dashes
        else f'{shared} stroke="#000" stroke-opacity=".5" stroke-width="3.4"/>'
    )
    return [halo, f'{shared} stroke="{colour}" stroke-width="1.8"{pattern}/>']


def _marks(overlay: Overlay) -> str:
    """Mark right and front, and the scale, where the image has them."""
    if not overlay.spacing_known:
        return ""
    width, height = _size_mm(overlay)
    text = min(width, height) / 15
    bar = max([b for b in _SCALE_BARS_MM if b <= width / 3], default=0)
    left, foot = 0.04 * width, height - 0.04 * height
    marks = [
        f'<text x="{0.02 * width:.4g}" y="{height / 2:.4g}">R</text>',
        f'<text x="{width / 2:.4g}" y="{1.15 * text:.4g}">A</text>',
    ]
    if bar:
        marks += [
            f'<path d="M{left:.4g} {foot:.4g}h{bar}" stroke="#fff" fill="none" '
            f'stroke-width="2.5" vector-effect="non-scaling-stroke"/>',
            f'<text x="{left:.4g}" y="{foot - 0.35 * text:.4g}">{bar} mm</text>',
        ]
    style = f'font-size="{text:.3g}" stroke-width="{text / 7:.2g}"'
    return f'<g class="marks" {style}>{"".join(marks)}</g>'


def sort_by_rank(overlays: Sequence[Overlay]) -> tuple[Overlay, ...]:
    """Put the worst first, then the median, then the best."""
    order: Mapping[str, int] = {rank: index for index, rank in enumerate(RANKS)}
    return tuple(sorted(overlays, key=lambda o: (order.get(o.rank, 9), o.case_id)))
