"""The hospital most like another, by public cards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fedmed.site_cards import likeness, nearest_site


def _card(modality: str = "MRI", **facts: Any) -> dict[str, Any]:
    return {"modality": modality, "facts": facts}


def test_no_facts_outweigh_the_modality() -> None:
    own = _card("CT", vendor="GE", field_T=3.0)
    others = {"a": _card("MRI", vendor="GE", field_T=3.0), "b": _card("ct")}
    assert nearest_site(own, others) == "b"


@pytest.mark.parametrize(
    ("others", "nearest"),
    [
        ({"a": _card(vendor="GE"), "b": _card(vendor="Siemens")}, "b"),
        ({"a": _card(vendor="GE", field_T=1.5), "b": _card(vendor="GE")}, "a"),
        ({"a": _card(field_T=0.5), "b": _card(field_T=1.5)}, "b"),
        ({"b": _card(vendor=" siemens"), "a": _card(vendor="SIEMENS")}, "a"),
        ({"b": _card(), "a": _card()}, "a"),
        (
            {
                "a": _card(vendor="Siemens", coil="x", country="y"),
                "b": _card(vendor="Siemens"),
            },
            "b",
        ),
        ({"a": {}, "b": {"modality": "MRI"}}, "b"),
        ({}, None),
    ],
)
def test_facts_decide_among_equals(others: dict[str, Any], nearest: str | None) -> None:
    own = _card(vendor="Siemens", field_T=3.0)
    assert nearest_site(own, others) == nearest
    for names in itertools.permutations(others):
        assert nearest_site(own, {name: others[name] for name in names}) == nearest


def test_likeness_by_hand() -> None:
    # vendor agrees, field_T by half, coil and country on one card only
    first = {"vendor": "GE", "field_T": 3.0, "coil": "endorectal"}
    second = {"vendor": "ge", "field_T": 1.5, "country": "NL"}
    assert likeness(first, second) == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert likeness(second, first) == likeness(first, second)
    assert likeness({}, None) == 0
    assert likeness({"n": 0}, {"n": 0}) == 1
    assert likeness({"n": -1.0}, {"n": 1.0}) == 0
    assert likeness({"flag": True}, {"flag": 1}) == 0
