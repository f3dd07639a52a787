from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np

from fedmed.report.figures import Curve, draw_cases, draw_curves


def _curves(label: str = "a") -> list[Curve]:
    rounds = tuple(range(1, 6))
    values = (0.9, 0.5, float("nan"), 0.3, 0.2)
    return [Curve(label, rounds, values), Curve("b", rounds, values[::-1])]


def test_figures_are_well_formed_and_say_what_they_show() -> None:
    svg = draw_curves(_curves(), name="loss", y_label="Loss", alt='fell "much"')
    root = ElementTree.fromstring(str(svg))
    assert root.attrib["aria-label"] == 'fell "much"'
    assert root.attrib["role"] == "img"
    texts = "".join(root.itertext())
    for word in ("Loss", "Round", "a", "b"):
        assert word in texts


def test_ids_are_unique_between_figures_and_every_reference_is_met() -> None:
    one = str(draw_curves(_curves(), name="one", y_label="y", alt="x"))
    two = str(draw_curves(_curves(), name="two", y_label="y", alt="x"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', one))
    assert used
    assert used <= ids[0]


def test_hostile_labels_stay_text() -> None:
    evil = "<script>$x_$&"
    svg = str(draw_cases({evil: [50.0, 60.0]}, name="n", x_label=evil, alt=evil))
    assert "<script" not in svg
    assert evil in "".join(ElementTree.fromstring(svg).itertext())


def test_equal_figures_are_equal_bytes() -> None:
    groups = {"a": [50.0, 70.0, float("nan")], "b": [], "c": [1.0]}
    drawn = [draw_cases(groups, name="n", x_label="x", alt="x") for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_every_case_has_its_dot() -> None:
    values = list(np.linspace(10, 90, 17))
    svg = str(draw_cases({"a": values}, name="n", x_label="x", alt="x"))
    dots = re.search(r'<g id="n-PathCollection_1">(.*?)</g>\s*</g>', svg, re.DOTALL)
    assert dots is not None
    assert dots.group(1).count("<use") == len(values)


def test_global_settings_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    draw_curves(_curves(), name="n", y_label="y", alt="x")
    assert dict(matplotlib.rcParams) == before
