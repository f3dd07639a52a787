"""Hearts and abdomens at four hospitals: two scanners for each modality.

The hospitals "ct" and "mr" are those of `hospitals.py`, with the same patients. The
others differ from them as scanners of one modality do; `docs/phantom.md` gives the
reason for every number.
"""

from __future__ import annotations

from dataclasses import replace

from sites.phantoms.dials import LabelStyle
from sites.phantoms.hospitals import ABDOMEN_SITES, HEART_SITES, Hospital

HEART_FOUR_SITES = {
    "ct": HEART_SITES["ct"],
    "ct-low": Hospital(
        "Low-dose CT angiography at 100 kVp, smooth kernel",
        "Siemens",
        0,
        replace(
            HEART_SITES["ct"].dials,
            resolution_mm=((0.5, 0.7), (0.75, 2.0)),
            noise=32.0,
            blur=1.5,
            tube_kvp=100.0,
            contrast_agent=0.7,
            orientation="RPI",
            label_style=LabelStyle(-0.3, 0.8),
        ),
    ),
    "mr": HEART_SITES["mr"],
    "mr-3t": Hospital(
        "Whole-heart bSSFP at 3 T, flip angle limited by heating",
        "GE",
        0,
        replace(
            HEART_SITES["mr"].dials,
            field_t=3.0,
            flip_deg=45.0,
            resolution_mm=((1.0, 1.5), (2.0, 3.2)),
            noise=0.030,
            bias_field=0.30,
            gain=900.0,
            orientation="LPS",
            label_style=LabelStyle(0.0, 1.5),
        ),
    ),
}

ABDOMEN_FOUR_SITES = {
    "ct": ABDOMEN_SITES["ct"],
    "ct-plain": Hospital(
        "CT without contrast agent",
        "GE",
        0,
        replace(
            ABDOMEN_SITES["ct"].dials,
            resolution_mm=((0.70, 0.95), (3.0, 5.0)),
            noise=11.0,
            blur=1.3,
            contrast_agent=0.0,
            orientation="LPS",
            label_style=LabelStyle(0.5, 1.0),
        ),
    ),
    "mr": ABDOMEN_SITES["mr"],
    "mr-3t": Hospital(
        "Single-shot T2w at 3 T, fat not suppressed",
        "Siemens",
        0,
        replace(
            ABDOMEN_SITES["mr"].dials,
            modality="t2w",
            field_t=3.0,
            tr_ms=4000.0,
            te_ms=90.0,
            resolution_mm=((1.2, 1.6), (5.0, 6.0)),
            noise=0.040,
            bias_field=0.30,
            blur=1.8,
            gain=700.0,
            orientation="LAS",
            label_style=LabelStyle(0.0, 1.0),
        ),
    ),
}
