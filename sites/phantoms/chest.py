"""A chest radiograph: path lengths of the rays through body, lungs, bones, heart.

A radiograph has no third axis: I runs to the patient's right, J to the head, K = 1.
Label 1 is the lung fields as radiologists outline them, without what hides behind
the heart and below the domes of the diaphragm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sites.phantoms.canvas import Anatomy, Body, Visit
from sites.phantoms.space import Grid, Space, deform, smooth_noise
from sites.phantoms.tissues import CODE


@dataclass(frozen=True)
class _Chest:
    """One patient's measures, mm, and the visible lung fields' soft mask."""

    half_width: float
    depth_cm: float
    heart: float
    breath: float
    pitch: float


def _measure(rng: np.random.Generator) -> _Chest:
    draw = rng.uniform(size=6)
    return _Chest(
        half_width=float(132 + 18 * draw[0]),
        depth_cm=float(19 + 6 * draw[1]),
        heart=float(44 + 16 * draw[2]),
        breath=float(-88 - 22 * draw[3]),
        pitch=float(24 + 4 * draw[4]),
    )


def build(grid: Grid, rng: np.random.Generator, visit: Visit) -> Body:
    """Draw one chest and the rays' path lengths.

    Args:
        grid: Fine grid with one slice; I across the patient, J towards the head.
        rng: The patient's generator.
        visit: `lesion_mm` puts one round opacity into a lung.

    Returns:
        The body with `thickness_cm` of "soft", "bone" and "lung".
    """
    chest = _measure(rng)
    space = deform(grid, rng, amplitude_mm=3.5, scale_mm=60, position_mm=5.0)
    texture = smooth_noise(grid, rng, scale_mm=4.0)
    markings = smooth_noise(grid, rng, scale_mm=9.0)
    place = rng.uniform(-1, 1, size=2)
    x, y = space.x, space.y
    trunk = _soft_step(1 - (x / (chest.half_width + 32)) ** 2 * _shoulder(y), 0.06)
    lungs = [_lung_field(space, chest, side) for side in (1, -1)]
    visible = np.maximum(lungs[0], lungs[1])
    behind = np.exp(-((x / 90) ** 2) - (((y + 150) / 60) ** 2))
    air_cm = visible * (0.62 * chest.depth_cm) * (1 + 0.03 * markings) + 2 * behind
    heart_cm = _heart(x, y, chest)
    soft_cm = trunk * chest.depth_cm * 0.92 - air_cm + 0.25 * heart_cm
    vessels = visible * np.clip(1.2 - np.abs(markings) * 6, 0, None) * _hilum(x, y)
    soft_cm = soft_cm + 0.9 * vessels
    if visit.lesion_mm > 0:
        soft_cm = soft_cm + _opacity(x, y, place, visit.lesion_mm)
    thickness = {
        "soft": np.maximum(soft_cm, 0).astype(np.float32),
        "bone": (_bones(x, y, chest) * trunk).astype(np.float32),
        "lung": np.maximum(air_cm, 0).astype(np.float32),
    }
    tissue = np.where(trunk > 0.5, CODE["muscle"], CODE["air"]).astype(np.uint8)
    label = (visible > 0.5).astype(np.uint8)
    return Body(grid, tissue, label, texture, thickness_cm=thickness)


def _soft_step(value: np.ndarray, width: float) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(value / width)), np.float32)


def _shoulder(y: np.ndarray) -> np.ndarray:
    return np.asarray(1 + 2.2 * np.clip((y - 125) / 60, 0, None) ** 1.5, np.float32)


def _lung_field(space: Space, chest: _Chest, side: int) -> np.ndarray:
    x, y = space.x * side, space.y
    height = (y - chest.breath) / (148 - chest.breath)
    outer = chest.half_width * np.clip(1 - np.clip(height, 0, 1) ** 2.6, 0.0, 1) ** 0.5
    inner = 16 + 10 * (1 - np.clip(height, 0, 1))
    if side < 0:  # the heart's shadow
        bulge = np.exp(-((np.abs(y + 58) / 50) ** 3))
        inner = inner + chest.heart * bulge
    else:
        inner = inner + 12 * np.exp(-(((y + 50) / 45) ** 2))
    dome = chest.breath + (12 if side > 0 else 0) - ((x - 68) / 62) ** 2 * 26
    edges = np.minimum(np.minimum(outer - x, x - inner), y - dome)
    return _soft_step(edges, 3.0)


def _heart(x: np.ndarray, y: np.ndarray, chest: _Chest) -> np.ndarray:
    level = ((x + 18) / (chest.heart + 22)) ** 2 + ((y + 55) / 58) ** 2
    heart = 9 * np.sqrt(np.clip(1 - level, 0, None))
    arch = 3 * np.exp(-(((x + 22) / 14) ** 2) - ((y - 58) / 18) ** 2)
    return np.asarray(heart + arch, np.float32)


def _hilum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-(((np.abs(x) - 38) / 32) ** 2) - ((y - 2) / 42) ** 2))


def _bones(x: np.ndarray, y: np.ndarray, chest: _Chest) -> np.ndarray:
    across = np.abs(x) / chest.half_width
    cage = _soft_step(1.04 - across, 0.03) * _soft_step((y + 118) / 20, 0.5)
    cage = cage * _soft_step((150 - y) / 20, 0.5)
    back = np.cos((y + 42 * across**2) * (2 * np.pi / chest.pitch))
    front = np.cos((y - 75 * across) * (2 * np.pi / chest.pitch) + 1.0)
    rim = 1 + 1.4 * np.clip(across, 0, 1) ** 4
    ribs = 0.55 * _soft_step(back - 0.45, 0.25) * rim
    ribs = ribs + 0.30 * _soft_step(front - 0.55, 0.3) * _soft_step(across - 0.35, 0.1)
    spine = 1.7 * np.exp(-((x / 15) ** 4)) * (1 + 0.12 * np.cos(y * 2 * np.pi / 26))
    collar_y = 128 + 0.16 * np.abs(x) - 0.0006 * x**2
    collar = 1.3 * np.exp(-(((y - collar_y) / 6) ** 4)) * _soft_step(1.1 - across, 0.05)
    return np.asarray(ribs * cage + spine + collar * (np.abs(x) > 18), np.float32)


def _opacity(
    x: np.ndarray, y: np.ndarray, place: np.ndarray, diameter_mm: float
) -> np.ndarray:
    side = 1.0 if place[0] > 0 else -1.0
    centre_x, centre_y = side * (78 + 14 * abs(place[0])), 20 + 70 * place[1]
    level = ((x - centre_x) ** 2 + (y - centre_y) ** 2) / (diameter_mm / 2) ** 2
    return np.asarray(0.1 * diameter_mm * np.exp(-(level**1.5)), np.float32)


ANATOMY = Anatomy(
    name="chest",
    labels={0: "background", 1: "lungs"},
    core_mm=((340.0, 320.0, 0.0), 0.0),
    build=build,
    has_lesions=True,
    default_size=(128, 128, 1),
)
