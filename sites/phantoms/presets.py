"""The phantom cohorts: hospitals that image the same organ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sites.phantoms import (
    abdomen,
    brain,
    chest,
    heart,
    hospitals,
    mr_ct_hospitals,
    prostate,
)
from sites.phantoms.canvas import Anatomy
from sites.phantoms.hospitals import Hospital

ANATOMIES: Mapping[str, Anatomy] = {
    module.ANATOMY.name: module.ANATOMY
    for module in (prostate, brain, heart, abdomen, chest)
}


@dataclass(frozen=True)
class Preset:
    """A cohort of hospitals that image the same organ.

    Attributes:
        name: As a study names it.
        title: One line.
        anatomy: Name of the kind of body.
        hospitals: By site id, sorted.
        models: The publication whose cohort it imitates.
        kind: "segmentation" or "classification" (lesion or none).
    """

    name: str
    title: str
    anatomy: str
    hospitals: Mapping[str, Hospital]
    models: str
    kind: str = "segmentation"


_PREVALENCES = {"jsrt": 0.6, "montgomery": 0.4, "portable": 0.7}

_PRESETS = (
    Preset(
        "prostate_abc",
        "Prostate T2w MRI at three sites that train and test together",
        "prostate",
        {key: hospitals.PROSTATE_SITES[key] for key in "abc"},
        "Liu, Dou et al., MS-Net, IEEE TMI 2020",
    ),
    Preset(
        "prostate_af",
        "Prostate T2w MRI at six sites, one of them unseen",
        "prostate",
        hospitals.PROSTATE_SITES,
        "Liu, Dou and Heng, SAML, MICCAI 2020",
    ),
    Preset(
        "brain_abcd",
        "Brain tissues in T1w MRI at four hospitals",
        "brain",
        hospitals.BRAIN_SITES,
        "Dou et al., MASF, NeurIPS 2019",
    ),
    Preset(
        "brain_audit",
        "T1w brains of two studies whose scanners a classifier can tell apart",
        "brain",
        hospitals.AUDIT_SITES,
        "Glocker et al., Medical Imaging meets NeurIPS 2019",
    ),
    Preset(
        "brain_twins",
        "T1w brains of two hospitals that do not differ: the audit's control",
        "brain",
        {"twin-1": hospitals.TWIN, "twin-2": hospitals.TWIN},
        "none",
    ),
    Preset(
        "heart_mr_ct",
        "Heart structures in MRI and CT of different patients",
        "heart",
        hospitals.HEART_SITES,
        "Chen, Dou et al., SIFA, AAAI 2019 and IEEE TMI 2020",
    ),
    Preset(
        "abdomen_mr_ct",
        "Abdominal organs in MRI and CT of different patients",
        "abdomen",
        hospitals.ABDOMEN_SITES,
        "Chen, Dou et al., SIFA, IEEE TMI 2020",
    ),
    Preset(
        "heart_2mr_2ct",
        "Heart structures in MRI and CT, two unlike scanners for each",
        "heart",
        mr_ct_hospitals.HEART_FOUR_SITES,
        "Dou, Liu, Heng and Glocker, UMMKD, IEEE TMI 2020, with two sites more",
    ),
    Preset(
        "abdomen_2mr_2ct",
        "Abdominal organs in MRI and CT, two unlike scanners for each",
        "abdomen",
        mr_ct_hospitals.ABDOMEN_FOUR_SITES,
        "Dou, Liu, Heng and Glocker, UMMKD, IEEE TMI 2020, with two sites more",
    ),
    Preset(
        "chest_xray",
        "Lung fields in chest radiographs of three hospitals",
        "chest",
        hospitals.CHEST_SITES,
        "Chen, Dou et al., SeUDA, MLMI 2018",
    ),
    Preset(
        "chest_xray_findings",
        "Round opacity or none in chest radiographs; prevalence differs",
        "chest",
        {
            key: replace(site, dials=replace(site.dials, prevalence=_PREVALENCES[key]))
            for key, site in hospitals.CHEST_SITES.items()
        },
        "none",
        kind="classification",
    ),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _PRESETS}
"""Every cohort by name."""
