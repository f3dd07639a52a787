"""What tissues look like to a scanner: relaxation times, Hounsfield units.

Relaxation times are round values in the middle of published ranges (Stanisz et al.,
MRM 2005; de Bazelaire et al., Radiology 2004; Rooney et al., MRM 2007; Bojorquez et
al., MRI 2017); T1 grows and T2 falls with the field. Fat and marrow carry an
*effective* T2, longer than the true one, because fast spin echoes keep fat bright.
Hounsfield units are textbook values. `docs/phantom.md` says which are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sites.phantoms.space import Number, Triple

FIELDS_T = (1.5, 3.0, 7.0)
"""Field strengths with tabulated relaxation times."""


@dataclass(frozen=True)
class Tissue:
    """One tissue.

    Attributes:
        density: Proton density, water = 1.
        t1_ms: T1 at `FIELDS_T`.
        t2_ms: T2 at `FIELDS_T`.
        hu: Hounsfield units without contrast agent, 120 kVp.
        agent_hu: Added by iodine in the phase in which the organ is imaged.
        texture: Relative standard deviation of the MR signal inside the tissue.
        texture_hu: The same for CT, in Hounsfield units.
    """

    density: Number
    t1_ms: Triple
    t2_ms: Triple
    hu: Number
    agent_hu: Number = 0.0
    texture: Number = 0.05
    texture_hu: Number = 4.0


_NONE = (1000.0, 1000.0, 1000.0)

TISSUES: dict[str, Tissue] = {
    "air": Tissue(0.0, _NONE, _NONE, -1000, texture=0, texture_hu=0),
    "lung": Tissue(0.12, (1200, 1400, 1600), (40, 30, 20), -840, 20, 0.3, 25),
    "gas": Tissue(0.0, _NONE, _NONE, -950, texture=0, texture_hu=0),
    "fat": Tissue(0.90, (290, 370, 450), (165, 140, 115), -100, 0, 0.05, 6),
    "scalp": Tissue(0.55, (330, 410, 500), (130, 110, 90), -60, 0, 0.05, 6),
    "marrow": Tissue(0.80, (330, 390, 480), (130, 105, 80), 220, 0, 0.12, 40),
    "cortical_bone": Tissue(0.08, (500, 500, 500), (8, 6, 4), 900, 0, 0.1, 60),
    "muscle": Tissue(0.80, (1010, 1410, 1850), (44, 38, 28), 52, 10, 0.08, 5),
    "skin": Tissue(0.60, (800, 950, 1200), (50, 40, 30), 20, 10, 0.05, 5),
    "fluid": Tissue(1.00, (3800, 4300, 4500), (1100, 900, 600), 5, 0, 0.02, 2),
    "stool": Tissue(0.60, (1000, 1200, 1500), (75, 65, 50), 10, 0, 0.35, 40),
    "wall": Tissue(0.82, (1050, 1400, 1700), (65, 58, 45), 42, 25, 0.08, 5),
    "perfluorocarbon": Tissue(0.02, _NONE, _NONE, 60, texture=0),
    "blood": Tissue(0.95, (1440, 1800, 2300), (250, 170, 70), 45, 310, 0.04, 6),
    "venous_blood": Tissue(0.95, (1440, 1800, 2300), (200, 110, 50), 45, 150, 0.05, 8),
    "portal_artery": Tissue(0.95, (1440, 1800, 2300), (250, 170, 70), 45, 105, 0.04, 6),
    "portal_vein": Tissue(0.95, (1440, 1800, 2300), (200, 110, 50), 45, 120, 0.05, 6),
    # prostate
    "peripheral_zone": Tissue(0.92, (1300, 1600, 2000), (165, 145, 100), 40, 20, 0.10),
    "central_gland": Tissue(0.88, (1150, 1450, 1800), (100, 88, 65), 42, 35, 0.22),
    "stroma": Tissue(0.80, (1050, 1400, 1800), (58, 50, 38), 45, 20, 0.08),
    "vesicle": Tissue(0.95, (1600, 2000, 2400), (190, 165, 110), 30, 15, 0.30),
    "prostate_lesion": Tissue(0.85, (1150, 1450, 1800), (88, 78, 58), 45, 45, 0.06),
    # brain
    "white_matter": Tissue(0.70, (640, 850, 1200), (76, 68, 47), 28, 3, 0.025, 2),
    "grey_matter": Tissue(0.82, (1000, 1350, 1900), (95, 85, 58), 38, 6, 0.035, 2),
    "deep_grey": Tissue(0.79, (870, 1150, 1650), (82, 70, 45), 37, 6, 0.03, 2),
    "white_lesion": Tissue(0.85, (1100, 1450, 2000), (150, 130, 90), 20, 8, 0.05, 2),
    # heart
    "myocardium": Tissue(0.82, (1000, 1220, 1500), (52, 45, 33), 45, 55, 0.06, 6),
    # abdomen
    "liver": Tissue(0.75, (590, 810, 1200), (46, 36, 25), 58, 52, 0.06, 6),
    "spleen": Tissue(0.90, (1050, 1330, 1700), (88, 68, 45), 48, 72, 0.04, 5),
    "kidney_cortex": Tissue(0.90, (970, 1150, 1500), (90, 76, 52), 32, 165, 0.05, 8),
    "kidney_medulla": Tissue(0.92, (1400, 1550, 1900), (95, 82, 58), 30, 110, 0.06, 8),
    "bowel": Tissue(0.82, (1000, 1250, 1600), (85, 68, 48), 35, 40, 0.25, 20),
    "liver_lesion": Tissue(0.88, (1100, 1350, 1700), (80, 66, 45), 38, 22, 0.05, 5),
}

FLOW: dict[str, tuple[float, float]] = {
    "t2w": (0.1, 0.8),
    "t2_spir": (0.1, 0.8),
    "t1w": (1.0, 1.0),
    "bssfp": (1.35, 1.3),
}
"""What flow does to arterial and venous blood: voids in spin echoes, fresh inflow."""

ARTERIAL, VENOUS = ("blood", "portal_artery"), ("venous_blood", "portal_vein")

NAMES: tuple[str, ...] = tuple(TISSUES)
CODE: dict[str, int] = {name: code for code, name in enumerate(NAMES)}
"""Tissue name -> value in a tissue map."""


def column(attribute: str) -> np.ndarray:
    """One attribute of all tissues by code, float64 (T,)."""
    return np.array([getattr(TISSUES[name], attribute) for name in NAMES], np.float64)


def relaxation_ms(attribute: str, field_t: float) -> np.ndarray:
    """`t1_ms` or `t2_ms` of all tissues at one field strength, float64 (T,)."""
    values = [getattr(TISSUES[name], attribute) for name in NAMES]
    return np.array(values, np.float64)[:, FIELDS_T.index(field_t)]


ATTENUATION_PER_CM: dict[str, tuple[float, float]] = {
    "soft": (0.225, 0.190),
    "bone": (0.62, 0.42),
    "lung": (0.060, 0.050),
}
"""Effective linear attenuation for radiographs at 70 and 125 kVp, 1/cm."""
