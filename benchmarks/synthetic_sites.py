"""Many made-up hospitals with a small table each: work that costs next to nothing.

What is left when such a study is timed is what the framework itself costs per site:

    sites: {dataset: benchmarks.synthetic_sites, num_sites: 1000}

Every class has a centre that all sites share, every site a shift of its own (another
laboratory), every row noise. A site's rows are a function of the seed and of the
site's name, and are drawn only when they are read.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import numpy as np

from fedmed.case import Case, CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import ConfigError
from fedmed.seeds import numpy_rng

SITE_CARD = SiteCard(title="Synthetic", modality="table")

SITE_SHIFT = 0.3
NOISE = 2.0


class SyntheticSite(SourceSite):
    """A site that lists its cases when somebody asks for them.

    A thousand sites are then listed in the time of a few.
    """

    def __init__(self, site_id: str, options: dict[str, int]) -> None:
        for name, value in (
            ("site_id", site_id),
            ("card", SITE_CARD),
            ("problems", {}),
            ("_options", options),
        ):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Make the cases at their first use; everything else is there."""
        if name != "cases":
            raise AttributeError(name)
        return tuple(
            CaseRef(
                case_id=f"row{row:04d}",
                subject_id=f"row{row:04d}",
                files=(),
                read=partial(read_case, self.site_id, row, self._options),
            )
            for row in range(self._options["num_rows"])
        )


def card(
    *,
    num_sites: int = 1000,
    num_rows: int = 16,
    num_features: int = 64,
    num_classes: int = 10,
    seed: int = 0,  # noqa: ARG001
) -> DatasetCard:
    """Describe the data set as the options make it."""
    if min(num_sites, num_rows, num_features, num_classes - 1) < 1:
        raise ConfigError("synthetic_sites needs sites, rows, features and two classes")
    return DatasetCard(
        name="synthetic_sites",
        title="Made-up tables",
        version="1",
        licence="Apache-2.0",
        source_url="",
        citation="Generated.",
        modality="table",
        intensity_unit="arbitrary",
        kind="classification",
        labels={number: f"class {number}" for number in range(num_classes)},
        num_channels=num_features,
        spatial_dims=0,
        sites=tuple(site_name(number) for number in range(num_sites)),
    )


def open_sites(
    root: None = None,  # noqa: ARG001
    *,
    num_sites: int = 1000,
    num_rows: int = 16,
    num_features: int = 64,
    num_classes: int = 10,
    seed: int = 0,
) -> tuple[SourceSite, ...]:
    """List the sites; no row is drawn yet."""
    options = {
        "num_rows": num_rows,
        "num_features": num_features,
        "num_classes": num_classes,
        "seed": seed,
    }
    return tuple(SyntheticSite(site_name(n), options) for n in range(num_sites))


def site_name(number: int) -> str:
    """Name site `number`: names sort as numbers do."""
    return f"site{number:05d}"


def read_case(site_id: str, row: int, options: dict[str, int]) -> Case:
    """Read one row."""
    features, labels = _table(site_id, **options)
    return Case(
        case_id=f"row{row:04d}",
        image=features[row],
        label=labels[row],
        spacing_mm=(),
        spacing_known=False,
    )


@functools.lru_cache(maxsize=4)
def _table(
    site_id: str, *, num_rows: int, num_features: int, num_classes: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = numpy_rng(seed, "synthetic", site_id)
    labels = rng.integers(num_classes, size=num_rows)
    shift = SITE_SHIFT * rng.standard_normal(num_features)
    noise = NOISE * rng.standard_normal((num_rows, num_features))
    centres = _centres(num_classes, num_features, seed)
    features = (centres[labels] + shift + noise).astype(np.float32)
    return features, [np.array(label, np.int64) for label in labels]


@functools.cache
def _centres(num_classes: int, num_features: int, seed: int) -> np.ndarray:
    rng = numpy_rng(seed, "synthetic", "centres")
    return rng.standard_normal((num_classes, num_features))


CARD = card()
