"""What a study asks of the phantom, checked and complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed.errors import ConfigError
from sites.phantoms.canvas import Anatomy
from sites.phantoms.dials import Dials, demand_known, turn
from sites.phantoms.patient import Request
from sites.phantoms.presets import ANATOMIES, PRESETS, Preset

GENERATOR_VERSION = "1"
"""Bump when equal options give other voxels."""

DEFAULT_CASES = 8


@dataclass(frozen=True)
class PhantomOptions:
    """Options of the phantom, as a study writes them.

    Attributes:
        preset: Cohort, a name of `sites.phantoms.presets.PRESETS`.
        cases_per_site: One number, or site id -> number; sites not named have 8.
        size: Matrix (I, J, K) of every scan; None: the anatomy's default.
        seed: Equal seeds and options give equal bytes.
        dials: Site id -> dial -> value, over the preset's.
        fit_organ: Enlarge a hospital's voxels until the organ fits into the matrix.
            False: voxels stay as the dials say, and the organ may be cut.
        same_patients: Patient n is the same person at every hospital.
        cache_dir: Where generated hospitals are kept if the study names no folder;
            None: `$FEDMED_CACHE/phantom` or `~/.cache/fedmed/phantom`.
    """

    preset: str = "prostate_abc"
    cases_per_site: int | Mapping[str, int] = DEFAULT_CASES
    size: tuple[int, int, int] | None = None
    seed: int = 0
    dials: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fit_organ: bool = True
    same_patients: bool = False
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of a phantom folder.

    Attributes:
        preset: The cohort.
        dials: By site id, overrides applied.
        num_cases: By site id.
        size: Matrix.
        seed: The data set's seed.
        fit_organ: See `PhantomOptions`.
        same_patients: See `PhantomOptions`.
    """

    preset: Preset
    dials: Mapping[str, Dials]
    num_cases: Mapping[str, int]
    size: tuple[int, int, int]
    seed: int
    fit_organ: bool
    same_patients: bool

    @property
    def anatomy(self) -> Anatomy:
        """The kind of body."""
        return ANATOMIES[self.preset.anatomy]

    def request(self, site_id: str, index: int) -> Request:
        """Which patient is number `index` of a site."""
        home = "everywhere" if self.same_patients else site_id
        return Request(
            seed=self.seed,
            patient=(self.preset.anatomy, home, index),
            scan=(site_id, index),
            size=self.size,
            fit_organ=self.fit_organ,
        )

    def as_json(self) -> dict[str, Any]:
        """All that decides the bytes, as plain values."""
        return {
            "generator_version": GENERATOR_VERSION,
            "preset": self.preset.name,
            "dials": {k: dataclasses.asdict(v) for k, v in self.dials.items()},
            "num_cases": dict(self.num_cases),
            "size": list(self.size),
            "seed": self.seed,
            "fit_organ": self.fit_organ,
            "same_patients": self.same_patients,
        }

    @property
    def fingerprint(self) -> str:
        """Name of these bytes: 16 hexadecimal digits."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make_plan(options: PhantomOptions) -> Plan:
    """Check options and complete them from the preset.

    Args:
        options: What the study says.

    Returns:
        The plan.

    Raises:
        ConfigError: If a preset, site or dial is unknown (the nearest known name is
            given), or a value is impossible.
    """
    demand_known(options.preset, PRESETS, what="phantom preset")
    preset = PRESETS[options.preset]
    known = list(preset.hospitals)
    for site_id in options.dials:
        demand_known(site_id, known, what=f"site of preset {preset.name!r}")
    anatomy = ANATOMIES[preset.anatomy]
    dials = {
        site_id: turn(hospital.dials, options.dials.get(site_id, {}), site_id=site_id)
        for site_id, hospital in sorted(preset.hospitals.items())
    }
    for site_id, turned in dials.items():
        _check_fit(anatomy, turned, site_id)
    return Plan(
        preset=preset,
        dials=dials,
        num_cases=_num_cases(options.cases_per_site, preset),
        size=_size(options.size, anatomy),
        seed=options.seed,
        fit_organ=options.fit_organ,
        same_patients=options.same_patients,
    )


def _check_fit(anatomy: Anatomy, dials: Dials, site_id: str) -> None:
    is_chest, is_xray = anatomy.name == "chest", dials.modality == "xray"
    claims = {
        "modality": is_chest == is_xray,
        "coil": anatomy.name == "prostate" or dials.coil != "endorectal",
        "prevalence": anatomy.has_lesions or dials.prevalence == 0,
    }
    for name, holds in claims.items():
        if not holds:
            raise ConfigError(
                f"Dial {name!r} of site {site_id!r} cannot be {getattr(dials, name)!r}"
                f" for the anatomy {anatomy.name!r}.",
                hint="X-rays are for the chest, endorectal coils for the prostate; "
                "the heart has no lesions.",
            )


def _num_cases(asked: int | Mapping[str, int], preset: Preset) -> dict[str, int]:
    known = sorted(preset.hospitals)
    if isinstance(asked, int):
        counts = dict.fromkeys(known, asked)
    else:
        for site_id in asked:
            demand_known(site_id, known, what=f"site of preset {preset.name!r}")
        counts = {site_id: asked.get(site_id, DEFAULT_CASES) for site_id in known}
    for site_id, count in counts.items():
        if not 1 <= count <= 9999:
            raise ConfigError(
                f"cases_per_site of site {site_id!r} is {count}.",
                hint="Expected: from 1 to 9999.",
            )
    return counts


def _size(asked: tuple[int, int, int] | None, anatomy: Anatomy) -> tuple[int, int, int]:
    size = anatomy.default_size if asked is None else asked
    is_flat = anatomy.default_size[2] == 1
    smallest = (16, 16, 1 if is_flat else 4)
    fits = all(n >= least for n, least in zip(size, smallest, strict=True))
    if not fits or (is_flat and size[2] != 1) or size[0] * size[1] * size[2] > 2**27:
        raise ConfigError(
            f"Phantom size {tuple(size)} is impossible for {anatomy.name}.",
            hint="Expected: I and J at least 16, K = 1 for radiographs and at least 4 "
            "otherwise, fewer than 2**27 voxels.",
        )
    return size
