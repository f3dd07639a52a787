"""Made-up hospitals with a few slices of a disc each: a U-Net's usual work.

    sites: {dataset: benchmarks.synthetic_slices, num_sites: 8, num_slices: 32}

Each site has one volume to train on and one to test on. A slice shows a bright disc in
noise; discs move and grow from slice to slice.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedmed.case import Case, CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.seeds import numpy_rng

SITE_CARD = SiteCard(title="Synthetic", modality="image")
CASES = ("test", "train")


def card(
    *,
    num_sites: int = 8,
    num_slices: int = 32,  # noqa: ARG001
    side: int = 96,  # noqa: ARG001
    seed: int = 0,  # noqa: ARG001
) -> DatasetCard:
    """Describe the data set as the options make it."""
    return DatasetCard(
        name="synthetic_slices",
        title="Made-up discs",
        version="1",
        licence="Apache-2.0",
        source_url="",
        citation="Generated.",
        modality="image",
        intensity_unit="arbitrary",
        kind="segmentation",
        labels={0: "background", 1: "disc"},
        num_channels=1,
        spatial_dims=3,
        sites=tuple(f"site{number}" for number in range(num_sites)),
    )


def open_sites(
    root: None = None,  # noqa: ARG001
    *,
    num_sites: int = 8,
    num_slices: int = 32,
    side: int = 96,
    seed: int = 0,
) -> tuple[SourceSite, ...]:
    """List the sites; no image is drawn yet."""
    return tuple(
        SourceSite(
            site_id=f"site{number}",
            card=SITE_CARD,
            cases=tuple(
                CaseRef(
                    case_id=name,
                    subject_id=name,
                    files=(),
                    read=partial(
                        read_case, f"site{number}", name, num_slices, side, seed
                    ),
                    read_version=f"{num_slices}.{side}.{seed}",
                )
                for name in CASES
            ),
        )
        for number in range(num_sites)
    )


def read_case(site_id: str, name: str, num_slices: int, side: int, seed: int) -> Case:
    """Draw one volume."""
    rng = numpy_rng(seed, "discs", site_id, name)
    centre = side * rng.uniform(0.3, 0.7, (2, num_slices))
    radius = side * rng.uniform(0.1, 0.3, num_slices)
    i, j = np.mgrid[:side, :side][..., None]
    label_IJK = np.hypot(i - centre[0], j - centre[1]) < radius
    noise_IJK = rng.standard_normal((side, side, num_slices))
    return Case(
        case_id=name,
        image=(label_IJK + 0.5 * noise_IJK).astype(np.float32)[None],
        label=label_IJK.astype(np.uint8),
        spacing_mm=(1.0, 1.0, 1.0),
    )


CARD = card()
