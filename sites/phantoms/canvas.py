"""Painting a body: shapes laid over each other, later ones on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sites.phantoms.space import Grid, Number, Space, Triple
from sites.phantoms.tissues import CODE

Keep = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""A condition on x, y, z (mm) that a shape must also fulfil."""


@dataclass(frozen=True)
class Blob:
    """A (super-)ellipsoid.

    Attributes:
        centre_mm: Centre.
        radius_mm: Semi-axes; `inf` makes a cylinder.
        axes: Rows are the unit vectors of the semi-axes; None: x, y, z.
        power: 2 = ellipsoid, 4 = boxier.
    """

    centre_mm: Triple
    radius_mm: Triple
    axes: np.ndarray | None = None
    power: int = 2

    def grown(self, by_mm: Number) -> Blob:
        """The blob with all semi-axes longer by `by_mm`, at least 0.1 mm."""
        a, b, c = (max(radius + by_mm, 0.1) for radius in self.radius_mm)
        return Blob(self.centre_mm, (a, b, c), self.axes, self.power)

    @property
    def bounds_mm(self) -> Triple:
        """Half the size of the box about the blob, along x, y, z."""
        if self.axes is None:
            return self.radius_mm
        radius = np.array(self.radius_mm, np.float64)[:, None]
        axes = self.axes.astype(np.float64)
        scaled = np.multiply(axes, radius, out=np.zeros((3, 3)), where=axes != 0)
        i, j, k = np.sqrt((scaled**2).sum(axis=0)).tolist()
        return (i, j, k)

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Normalised radius to the power 2 (or `power`): below 1 inside."""
        parts = [
            position - np.float32(centre)
            for position, centre in zip((x, y, z), self.centre_mm, strict=True)
        ]
        if self.axes is not None:
            parts = [
                part if np.isinf(radius) else _dot(row, parts)
                for row, part, radius in zip(
                    self.axes, parts, self.radius_mm, strict=True
                )
            ]
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), np.float32)
        for part, radius in zip(parts, self.radius_mm, strict=True):
            if np.isinf(radius):
                continue
            np.multiply(part, np.float32(1 / radius), out=part)
            for _ in range(self.power // 2):
                np.square(part, out=part)
            total += part
        return total

    def holds_box(self, half_mm: Triple) -> bool:
        """Whether the whole box of the given half size about the origin is inside."""
        signs = np.array([-1.0, 1.0], np.float32)
        x, y, z = np.meshgrid(*(np.float32(half) * signs for half in half_mm))
        return bool((self.level(x, y, z) < 1).all())


def _dot(row: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    total: np.ndarray = row[0] * parts[0]
    for weight, part in zip(row[1:], parts[1:], strict=True):
        if weight != 0:
            total += weight * part
    return total


@dataclass(frozen=True)
class CoilPlace:
    """Where an endorectal coil lies: a cylinder along z.

    Attributes:
        centre_mm: (x, y) of its axis.
        radius_mm: Of the balloon; sensitivity falls from its surface.
        half_length_mm: Along z.
    """

    centre_mm: tuple[Number, Number]
    radius_mm: Number
    half_length_mm: Number = 35.0


@dataclass(frozen=True)
class Body:
    """One patient, before any scanner: what each point is made of.

    Attributes:
        grid: The (fine) grid of the maps.
        tissue: uint8 (I, J, K), codes of `tissues.CODE`.
        label: uint8 (I, J, K), the truth that an annotator sees.
        texture: float32 (I, J, K), mean 0, standard deviation about 1.
        coil: Place of an endorectal coil, if the anatomy has one.
        thickness_cm: Radiographs only: tissue name -> path length of the ray.
    """

    grid: Grid
    tissue: np.ndarray
    label: np.ndarray
    texture: np.ndarray
    coil: CoilPlace | None = None
    thickness_cm: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Visit:
    """What the hospital does to the body, or sends home with it.

    Attributes:
        balloon: An endorectal balloon distends the rectum.
        lesion_mm: Diameter of the patient's lesion, 0 = none.
    """

    balloon: bool = False
    lesion_mm: float = 0.0


@dataclass(frozen=True)
class Anatomy:
    """A kind of body.

    Attributes:
        name: "prostate"...
        labels: Label value -> class name.
        core_mm: In-plane and through-plane field that holds the organ; `inf`-free.
        build: Draws a patient from a generator on a grid.
        has_lesions: Whether `lesion_mm` means anything here.
        default_size: Matrix used if a study names none.
    """

    name: str
    labels: Mapping[int, str]
    core_mm: tuple[Triple, Number]
    build: Callable[[Grid, np.random.Generator, Visit], Body]
    has_lesions: bool
    default_size: tuple[int, int, int]


class Canvas:
    """Tissue and label maps under construction."""

    def __init__(self, space: Space, background: str) -> None:
        self.space = space
        self.tissue = np.full(space.grid.size, CODE[background], np.uint8)
        self.label = np.zeros(space.grid.size, np.uint8)

    def blob(
        self, tissue: str, blob: Blob, *, label: int = 0, keep: Keep | None = None
    ) -> None:
        """Paint a blob; whatever it covers loses its label."""
        space = self.space
        half = [f / 2 + space.reach_mm for f in space.grid.field_mm]
        if keep is None and blob.holds_box((half[0], half[1], half[2])):
            self.tissue[...], self.label[...] = CODE[tissue], label
            return
        window = space.window(blob.centre_mm, blob.bounds_mm)
        x, y, z = (c[window] for c in (space.x, space.y, space.z))
        mask = blob.level(x, y, z) < 1
        if keep is not None:
            mask &= keep(x, y, z)
        np.copyto(self.tissue[window], np.uint8(CODE[tissue]), where=mask)
        np.copyto(self.label[window], np.uint8(label), where=mask)

    def walled(
        self, wall: str, content: str, blob: Blob, *, wall_mm: Number, label: int = 0
    ) -> None:
        """Paint a blob of `content` inside a wall; `blob` is the outer surface."""
        self.blob(wall, blob)
        self.blob(content, blob.grown(-wall_mm), label=label)

    def mask(self, tissue: str, mask: np.ndarray, *, label: int = 0) -> None:
        """Paint wherever `mask` holds."""
        np.copyto(self.tissue, np.uint8(CODE[tissue]), where=mask)
        np.copyto(self.label, np.uint8(label), where=mask)

    def mirrored(self, tissue: str, blob: Blob, **options: int) -> None:
        """Paint a blob and its mirror image on the other side of the body."""
        x, y, z = blob.centre_mm
        other = Blob((-x, y, z), blob.radius_mm, _flip(blob.axes), blob.power)
        self.blob(tissue, blob, **options)  # type: ignore[arg-type]
        self.blob(tissue, other, **options)  # type: ignore[arg-type]


def _flip(axes: np.ndarray | None) -> np.ndarray | None:
    return None if axes is None else axes * np.array([-1, 1, 1], axes.dtype)


def turned(angle_deg: Number, *, about: str = "z") -> np.ndarray:
    """Axes of a blob turned about one body axis, right-handed.

    Example:
        >>> turned(90.0).round()[0].tolist()
        [0.0, 1.0, 0.0]
    """
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[about]
    axes = np.eye(3, dtype=np.float32)
    axes[first, first] = axes[second, second] = c
    axes[first, second], axes[second, first] = s, -s
    return axes + np.float32(0)


def along(direction: Triple) -> np.ndarray:
    """Axes of a blob whose third semi-axis points along a direction."""
    third = np.asarray(direction, np.float64)
    third /= np.linalg.norm(third)
    helper = np.eye(3)[np.argmin(np.abs(third))]
    first = np.cross(helper, third)
    first /= np.linalg.norm(first)
    axes = np.stack([first, np.cross(third, first), third])
    return axes.astype(np.float32)
