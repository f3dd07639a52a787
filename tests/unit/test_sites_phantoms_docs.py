"""The tables in docs/phantom.md are those of the code."""

import re
from pathlib import Path

import pytest

from sites.phantoms.acquisition import hounsfield, mr_signal
from sites.phantoms.presets import PRESETS
from sites.phantoms.tissues import CODE, relaxation_ms

DOCUMENT = Path(__file__).parents[2] / "docs" / "phantom.md"


def span(low, high):
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def timing(dials):
    return {
        "t2w": f"{dials.tr_ms:g} / {dials.te_ms:g}",
        "t2_spir": f"{dials.tr_ms:g} / {dials.te_ms:g}",
        "t1w": f"{dials.tr_ms:g} / {dials.te_ms:g} / {dials.ti_ms:g}",
        "bssfp": f"flip {dials.flip_deg:g}",
    }.get(dials.modality, f"{dials.tube_kvp:g} kVp")


def row(site_id, dials):
    is_mr = dials.modality not in ("ct", "xray")
    cells = [
        site_id,
        f"{dials.field_t:g}" if is_mr else "-",
        dials.coil if is_mr else "-",
        span(*dials.resolution_mm[0]),
        "-" if dials.modality == "xray" else span(*dials.resolution_mm[1]),
        timing(dials),
        *(f"{v:g}" for v in (dials.noise, dials.bias_field, dials.blur)),
        *(f"{v:g}" for v in (dials.contrast, dials.gain)),
        dials.orientation,
        f"{dials.oblique_deg:g}",
        f"{dials.label_style.offset_mm:g} / {dials.label_style.smooth_mm:g}",
        f"{dials.prevalence:g}",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"chest_xray_findings"}))
def test_every_hospital_stands_in_the_document(preset):
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for site_id, hospital in PRESETS[preset].hospitals.items():
        assert row(site_id, hospital.dials) in lines
    assert any(f"`{preset}`" in line for line in lines)


def test_the_findings_preset_differs_in_prevalence_only():
    text = DOCUMENT.read_text(encoding="utf-8")
    shares = [
        hospital.dials.prevalence
        for hospital in PRESETS["chest_xray_findings"].hospitals.values()
    ]
    assert "{:g}, {:g}\nand {:g}".format(*shares) in text


TISSUE_OF = {
    "bone": "cortical_bone",
    "blood of the left side": "blood",
    "blood of the right side": "venous_blood",
    "cortex of the kidney": "kidney_cortex",
}


def brightness(dials):
    if dials.modality == "ct":
        return hounsfield(dials)
    t1, t2 = (relaxation_ms(name, dials.field_t) for name in ("t1_ms", "t2_ms"))
    return mr_signal(dials, t1_ms=t1, t2_ms=t2)


@pytest.mark.parametrize("anatomy", ["heart", "abdomen"])
def test_tissues_are_as_bright_as_the_document_orders_them(anatomy):
    hospitals = PRESETS[f"{anatomy}_2mr_2ct"].hospitals
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = text.split(f"| hospital | {anatomy} |")[1].split("\n\n")[0].splitlines()
    told = set()
    for line in rows[2:]:
        sites, names = (cell.strip() for cell in line.strip("|").split("|"))
        tissues = [name.strip("* ") for name in names.split(",")]
        codes = [CODE[TISSUE_OF.get(name, name)] for name in tissues]
        for site_id in re.split(", ", sites):
            levels = brightness(hospitals[site_id].dials)[codes].tolist()
            assert levels == sorted(levels, reverse=True), site_id
            told.add(site_id)
    assert told == set(hospitals)
