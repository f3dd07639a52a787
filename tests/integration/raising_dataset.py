"""A data set whose reader fails, with a patient's path in its words."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from fedmed.case import CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import CaseError

SENTINEL = "DOE^JANE"
PATH = f"/archive/{SENTINEL}/1975-03-14/t2.nii.gz"
NUM_CASES = 4
CARD = DatasetCard(
    name="raising",
    title="Raising",
    version="1",
    licence="",
    source_url="",
    citation="",
    modality="MRI",
    intensity_unit="arbitrary",
    kind="segmentation",
    labels={0: "background", 1: "organ"},
    num_channels=1,
    spatial_dims=3,
    sites=("a", "b"),
)


def card(**options: Any) -> DatasetCard:
    return CARD


def open_sites(
    root: str | None = None, how: str = "", site: str = "a"
) -> tuple[SourceSite, ...]:
    """Both sites are phantoms' size; the cases of one fail in the way named."""
    return tuple(
        SourceSite(
            name,
            SiteCard(name, "MRI", "arbitrary"),
            tuple(_ref(f"{name}{k}", how if name == site else "") for k in range(4)),
            {},
        )
        for name in CARD.sites
    )


def _ref(case_id: str, how: str) -> CaseRef:
    read = functools.partial(_read, how or "nothing")
    return CaseRef(case_id, case_id, (Path(__file__),), read, "1", {})


def _read(how: str) -> Any:
    if how == "file":
        raise FileNotFoundError(2, "No such file or directory", PATH)
    if how == "key":
        raise KeyError(PATH)
    if how == "own":
        raise CaseError(f"{PATH}: the spacing is 0")
    if how == "exit":
        raise SystemExit(PATH)
    if how == "noise":
        warnings.warn(PATH, stacklevel=1)
        logging.getLogger("foreign").error(PATH)
    if how == "die":
        os._exit(3)
    raise ValueError(PATH)
