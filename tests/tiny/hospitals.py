"""Three made-up hospitals in memory, opened as a data set by its module's name.

Hospitals differ in size, in contrast and in prevalence, so that a method that ignores
where a case comes from gets other numbers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.case import Case, CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.seeds import numpy_rng

NUM_CASES = {"a": 6, "b": 5, "c": 3}
PUBLIC, NUM_PUBLIC, PUBLIC_SIZE = "p", 5, 8
NUM_FEATURES = 4


def card(root: Path | None = None, **options: Any) -> DatasetCard:
    is_table = options.get("kind", "table") == "table"
    return DatasetCard(
        name="tiny_hospitals",
        title="Made up",
        version="1",
        licence="none",
        source_url="",
        citation="",
        modality="table" if is_table else "picture",
        intensity_unit="none",
        kind="classification" if is_table else "segmentation",
        labels={0: "no", 1: "yes"},
        num_channels=NUM_FEATURES if is_table else 1,
        spatial_dims=0 if is_table else 2,
        sites=tuple(NUM_CASES),
    )


def open_sites(
    root: Path | None = None,
    *,
    kind: str = "table",
    size: int = 8,
    alike: bool = False,
    backwards: bool = False,
    with_public: bool = False,
    public_copies: bool = False,
) -> tuple[SourceSite, ...]:
    """List the hospitals.

    Args:
        root: Not used.
        kind: "table" or "image".
        size: Pixels of an image along I and J.
        alike: Every hospital has the same cases, up to a feature too small to count.
        backwards: List the hospitals in the other order.
        with_public: List one more, whose images everybody may see; of one size.
        public_copies: It has the images of hospital c.
    """
    names = sorted(NUM_CASES, reverse=backwards)
    hospitals = [_site(name, kind=kind, size=size, alike=alike) for name in names]
    if with_public:
        public = _site(PUBLIC, kind=kind, size=PUBLIC_SIZE, alike=False)
        copied = _site("c", kind=kind, size=size, alike=False).cases
        cases = copied if public_copies else public.cases
        hospitals.append(SourceSite(PUBLIC, public.card, cases))
    return tuple(hospitals)


def _site(name: str, *, kind: str, size: int, alike: bool) -> SourceSite:
    count = 6 if alike else NUM_CASES.get(name, NUM_PUBLIC)
    make = partial(_row, alike=alike) if kind == "table" else partial(_image, size=size)
    cases = tuple(
        CaseRef(f"case{n}", f"case{n}", (), partial(make, name, n))
        for n in range(count)
    )
    return SourceSite(name, SiteCard(title=name), cases)


def _row(name: str, number: int, *, alike: bool) -> Case:
    rng = numpy_rng(5, "row", "everywhere" if alike else name, number)
    shift = 0.0 if alike else "abcp".index(name) - 1.0
    features = rng.normal(shift, 1, NUM_FEATURES).astype(np.float32)
    label = np.array(int(features[:2].sum() > shift), np.int64)
    if alike:  # the same image at two sites is refused; 1e-30 is lost in any sum
        features[3] = 1e-30 * ("abc".index(name) + 1)
    return Case(f"case{number}", features, label, (), spacing_known=False)


def _image(name: str, number: int, *, size: int) -> Case:
    rng = numpy_rng(5, "image", name, number)
    i, j = np.mgrid[:size, :size]
    centre = rng.uniform(0.3, 0.7, 2) * size
    disc = (i - centre[0]) ** 2 + (j - centre[1]) ** 2 < (size / 4) ** 2
    contrast = 1.0 + "abcp".index(name)
    image = contrast * disc + rng.normal(0, 0.3, (size, size))
    return Case(
        f"case{number}",
        image[None, :, :, None].astype(np.float32),
        disc[:, :, None].astype(np.uint8),
        (1.0, 1.0, 1.0),
        spacing_known=False,
    )
