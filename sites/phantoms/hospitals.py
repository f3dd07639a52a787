"""The phantom hospitals: what each one's scanner and annotators do.

Read beside `docs/phantom.md`, which gives the reason for every number and says which
are published facts and which are estimates. What is not set here is the default of
`Dials`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sites.phantoms.dials import Dials, LabelStyle


@dataclass(frozen=True)
class Hospital:
    """One phantom hospital.

    Attributes:
        title: What it is modelled on.
        vendor: The scanner's maker.
        published_cases: Cases of the real site, 0 if unknown; for information.
        dials: Its scanner and annotators.
    """

    title: str
    vendor: str
    published_cases: int
    dials: Dials


_PROSTATE = Dials(modality="t2w", prevalence=0.3, lesion=(7.0, 14.0))

PROSTATE_SITES = {
    "a": Hospital(
        "Nijmegen, NCI-ISBI 2013 / Prostate-3T",
        "Siemens",
        30,
        replace(
            _PROSTATE,
            field_t=3.0,
            coil="surface",
            resolution_mm=((0.6, 0.625), (3.6, 4.0)),
            tr_ms=4000.0,
            te_ms=101.0,
            noise=0.035,
            bias_field=0.10,
            gain=280.0,
            orientation="LPS",
            label_style=LabelStyle(0.0, 0.5),
        ),
    ),
    "b": Hospital(
        "Boston, NCI-ISBI 2013 / PROSTATE-DIAGNOSIS",
        "Philips",
        30,
        replace(
            _PROSTATE,
            field_t=1.5,
            coil="endorectal",
            resolution_mm=((0.4, 0.4), (3.0, 3.0)),
            tr_ms=3200.0,
            te_ms=120.0,
            noise=0.025,
            bias_field=0.15,
            gain=620.0,
            orientation="LAS",
            oblique_deg=6.0,
            label_style=LabelStyle(0.5, 1.0),
        ),
    ),
    "c": Hospital(
        "Dijon, I2CVB",
        "Siemens",
        19,
        replace(
            _PROSTATE,
            field_t=3.0,
            coil="none",
            resolution_mm=((0.67, 0.79), (1.25, 1.25)),
            tr_ms=3600.0,
            te_ms=143.0,
            noise=0.06,
            bias_field=0.20,
            gain=160.0,
            orientation="LPS",
            label_style=LabelStyle(-0.5, 0.8),
        ),
    ),
    "d": Hospital(
        "London, PROMISE12",
        "Siemens",
        13,
        replace(
            _PROSTATE,
            field_t=1.5,
            coil="none",
            resolution_mm=((0.325, 0.625), (3.0, 3.6)),
            tr_ms=3500.0,
            te_ms=90.0,
            noise=0.035,
            bias_field=0.10,
            gain=420.0,
            orientation="LPS",
            oblique_deg=10.0,
            label_style=LabelStyle(0.3, 0.5),
        ),
    ),
    "e": Hospital(
        "Boston, PROMISE12",
        "GE",
        12,
        replace(
            _PROSTATE,
            field_t=3.0,
            coil="endorectal",
            resolution_mm=((0.25, 0.25), (2.2, 3.0)),
            tr_ms=4500.0,
            te_ms=110.0,
            noise=0.03,
            bias_field=0.20,
            contrast=0.8,
            gain=1500.0,
            orientation="RPI",
            oblique_deg=4.0,
            label_style=LabelStyle(-0.6, 0.5),
        ),
    ),
    "f": Hospital(
        "Bergen, PROMISE12",
        "Siemens",
        12,
        replace(
            _PROSTATE,
            field_t=1.5,
            coil="endorectal",
            resolution_mm=((0.625, 0.625), (3.6, 3.6)),
            tr_ms=3500.0,
            te_ms=96.0,
            noise=0.035,
            bias_field=0.12,
            gain=350.0,
            orientation="LPS",
            label_style=LabelStyle(0.6, 1.5),
        ),
    ),
}

_BRAIN = Dials(modality="t1w", te_ms=3.0, flip_deg=9.0)

BRAIN_SITES = {
    "set-a": Hospital(
        "Set-A: 1.5 T, coarse, noisy",
        "unknown",
        0,
        replace(
            _BRAIN,
            field_t=1.5,
            tr_ms=1900.0,
            ti_ms=780.0,
            noise=0.030,
            bias_field=0.08,
            resolution_mm=((1.0, 1.0), (1.5, 1.5)),
            gain=200.0,
            orientation="LPS",
        ),
    ),
    "set-b": Hospital(
        "Set-B: 3 T, standard",
        "unknown",
        0,
        replace(
            _BRAIN,
            field_t=3.0,
            tr_ms=2000.0,
            ti_ms=1000.0,
            noise=0.030,
            bias_field=0.15,
            resolution_mm=((1.0, 1.0), (1.2, 1.2)),
            gain=400.0,
            orientation="RAS",
            label_style=LabelStyle(0.2, 0.5),
        ),
    ),
    "set-c": Hospital(
        "Set-C: 1.5 T, as Set-A with longer inversion",
        "unknown",
        0,
        replace(
            _BRAIN,
            field_t=1.5,
            tr_ms=2100.0,
            ti_ms=850.0,
            noise=0.022,
            bias_field=0.06,
            resolution_mm=((1.0, 1.0), (1.2, 1.2)),
            gain=650.0,
            orientation="LAS",
        ),
    ),
    "set-d": Hospital(
        "Set-D: 3 T, strong shading, steep grey curve",
        "unknown",
        0,
        replace(
            _BRAIN,
            field_t=3.0,
            tr_ms=1700.0,
            ti_ms=1150.0,
            noise=0.050,
            bias_field=0.30,
            blur=1.6,
            contrast=1.5,
            resolution_mm=((0.95, 0.95), (2.0, 2.0)),
            gain=1100.0,
            orientation="RPI",
            oblique_deg=8.0,
            label_style=LabelStyle(0.5, 0.8),
        ),
    ),
}

AUDIT_SITES = {
    "camcan": Hospital(
        "Cam-CAN: 3 T TIM Trio, MPRAGE 1 mm",
        "Siemens",
        296,
        replace(
            _BRAIN,
            tr_ms=2250.0,
            te_ms=2.99,
            ti_ms=900.0,
            noise=0.030,
            bias_field=0.15,
            gain=300.0,
            resolution_mm=((1.0, 1.0), (1.0, 1.0)),
            orientation="RAS",
        ),
    ),
    "ukbb": Hospital(
        "UK Biobank: 3 T Skyra, MPRAGE 1 mm, shading corrected on the scanner",
        "Siemens",
        296,
        replace(
            _BRAIN,
            tr_ms=2000.0,
            te_ms=2.01,
            ti_ms=880.0,
            noise=0.025,
            bias_field=0.06,
            blur=1.2,
            gain=450.0,
            resolution_mm=((1.0, 1.0), (1.0, 1.0)),
            orientation="LAS",
        ),
    ),
}

TWIN = Hospital(
    "3 T, one of two equal hospitals", "none", 0, BRAIN_SITES["set-b"].dials
)

HEART_SITES = {
    "ct": Hospital(
        "Shanghai, MM-WHS CT angiography",
        "Philips",
        20,
        Dials(
            modality="ct",
            resolution_mm=((0.35, 0.60), (0.5, 1.5)),
            noise=22.0,
            gain=1.0,
            tube_kvp=120.0,
            contrast_agent=1.0,
            orientation="LPS",
        ),
    ),
    "mr": Hospital(
        "London, MM-WHS whole-heart bSSFP",
        "Philips and Siemens",
        20,
        Dials(
            modality="bssfp",
            field_t=1.5,
            coil="surface",
            flip_deg=70.0,
            resolution_mm=((0.8, 1.2), (1.6, 2.0)),
            noise=0.020,
            bias_field=0.20,
            gain=350.0,
            orientation="LAS",
            label_style=LabelStyle(0.5, 1.0),
        ),
    ),
}

ABDOMEN_SITES = {
    "ct": Hospital(
        "Nashville, BTCV portal-venous CT",
        "several",
        30,
        Dials(
            modality="ct",
            resolution_mm=((0.59, 0.98), (2.5, 5.0)),
            noise=14.0,
            gain=1.0,
            tube_kvp=120.0,
            contrast_agent=1.0,
            orientation="LAS",
            prevalence=0.2,
            lesion=(10.0, 25.0),
        ),
    ),
    "mr": Hospital(
        "Izmir, CHAOS T2-SPIR",
        "Philips",
        20,
        Dials(
            modality="t2_spir",
            field_t=1.5,
            coil="surface",
            tr_ms=1600.0,
            te_ms=70.0,
            resolution_mm=((1.36, 1.89), (5.5, 9.0)),
            noise=0.030,
            bias_field=0.20,
            gain=320.0,
            orientation="LPS",
            label_style=LabelStyle(0.8, 1.5),
            prevalence=0.2,
            lesion=(10.0, 25.0),
        ),
    ),
}

_XRAY = Dials(modality="xray", prevalence=0.5, lesion=(18.0, 36.0))

CHEST_SITES = {
    "jsrt": Hospital(
        "Japan, JSRT digitised film",
        "Konica",
        247,
        replace(
            _XRAY,
            tube_kvp=125.0,
            noise=0.025,
            contrast=1.25,
            blur=1.4,
            resolution_mm=((0.175, 0.175), (1.0, 1.0)),
            gain=1900.0,
            label_style=LabelStyle(0.0, 2.0),
        ),
    ),
    "montgomery": Hospital(
        "Maryland, Montgomery County stationary computed radiography",
        "Eureka",
        138,
        replace(
            _XRAY,
            tube_kvp=110.0,
            noise=0.012,
            contrast=1.0,
            resolution_mm=((0.0875, 0.0875), (1.0, 1.0)),
            gain=1200.0,
            label_style=LabelStyle(1.0, 1.0),
        ),
    ),
    "portable": Hospital(
        "Bedside radiographs, no real counterpart",
        "several",
        0,
        replace(
            _XRAY,
            tube_kvp=80.0,
            noise=0.040,
            contrast=0.8,
            bias_field=0.20,
            blur=1.8,
            resolution_mm=((0.15, 0.15), (1.0, 1.0)),
            gain=800.0,
            label_style=LabelStyle(-1.5, 3.0),
        ),
    ),
}
