"""The sites of `workload` as a data set of fedmed: the same numbers, no copies of code.

sites: {dataset: benchmarks.workload_sites, workload: W2, num_sites: 1000}
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks import workload
from fedmed.case import Case, CaseRef, DatasetCard, SiteCard, SourceSite

SITE_CARD = SiteCard(title="Synthetic", modality="synthetic")


class LazySite(SourceSite):
    """A site that lists its cases when somebody asks: a thousand cost as few do."""

    def __init__(self, name: str, number: int) -> None:
        for key, value in (
            ("site_id", f"site{number:05d}"),
            ("card", SITE_CARD),
            ("problems", {}),
            ("_which", (name, number)),
        ):
            object.__setattr__(self, key, value)

    def __getattr__(self, key: str) -> Any:
        """Make the cases at their first use; everything else is there."""
        if key != "cases":
            raise AttributeError(key)
        name, number = self._which
        count = 1 if name == "W1" else workload.WORKLOADS[name].num_examples
        return tuple(
            CaseRef(
                case_id=f"case{case:04d}",
                subject_id=f"case{case:04d}",
                files=(),
                read=partial(read_case, name, number, case),
                read_version=name,
            )
            for case in range(count)
        )


def card(*, workload: str = "W2", num_sites: int = 8) -> DatasetCard:
    """Describe the data set as the options make it."""
    is_image = workload == "W1"
    return DatasetCard(
        name="workload_sites",
        title="Made-up sites",
        version="1",
        licence="Apache-2.0",
        source_url="",
        citation="Generated.",
        modality="image" if is_image else "table",
        intensity_unit="arbitrary",
        kind="segmentation" if is_image else "classification",
        labels={n: f"class {n}" for n in range(2 if is_image else 10)},
        num_channels=1 if is_image else 64,
        spatial_dims=3 if is_image else 0,
        sites=tuple(f"site{number:05d}" for number in range(num_sites)),
    )


def open_sites(
    root: None = None,  # noqa: ARG001
    *,
    workload: str = "W2",
    num_sites: int = 8,
) -> tuple[SourceSite, ...]:
    """List the sites; nothing is drawn yet."""
    return tuple(LazySite(workload, number) for number in range(num_sites))


def read_case(name: str, number: int, case: int) -> Case:
    """Read one row, or the volume of a site's slices."""
    inputs, targets = workload.site_data(name, number)
    if name == "W1":
        image = inputs.permute(1, 2, 3, 0).numpy()
        label = targets.permute(1, 2, 0).numpy().astype(np.uint8)
        spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)
    else:
        image, label = inputs[case].numpy(), targets[case].numpy()
        spacing_mm = ()
    return Case(
        case_id=f"case{case:04d}",
        image=np.array(image, order="C"),
        label=np.array(label, order="C"),
        spacing_mm=spacing_mm,
        spacing_known=bool(spacing_mm),
    )


CARD = card()
