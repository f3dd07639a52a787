"""The public site: images that every hospital may open, and labels that nobody reads.

A study names it (`sites.public`). It neither trains nor is it evaluated. Methods that
distil predict its images: inside each hospital, from the hospital's own copy, or at the
public site, which is a host like any other, run by whoever runs the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedmed.case import UNKNOWN_LABEL, SourceSite
from fedmed.errors import ConfigError
from fedmed.seeds import derive
from fedmed.spelling import did_you_mean
from fedmed.study import Study
from fedmed.training.examples import Batch, ExampleIndex

PUBLIC = "public"
"""Name of the only split of a public site that holds cases."""

_MAPS = ("slice", "patch")
"""Modes of examples that have a label in every voxel."""


def find_public(study: Study, found: Sequence[SourceSite]) -> SourceSite | None:
    """Find the site that the study calls public; None if it calls none.

    Raises:
        ConfigError: If there is no such site, or it is to be tested too.
    """
    name = study.sites.public
    if name is None:
        return None
    by_id = {site.site_id: site for site in found}
    if name not in by_id:
        raise ConfigError(
            f"sites.public names {name!r}, which the data set does not have"
            f"{did_you_mean(name, by_id)}",
            hint=f"Its sites: {', '.join(sorted(by_id)[:20])}.",
        )
    if name in study.split.held_out:
        raise ConfigError(
            f"site {name!r} is named in sites.public and in split.held_out",
            hint="Predictions on public images are trained on: hold out another site.",
        )
    return by_id[name]


def public_splits(cases: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """Put all cases where nobody trains on their labels and nobody is evaluated."""
    nothing: dict[str, tuple[Any, ...]] = {"train": (), "validation": (), "test": ()}
    return {**nothing, PUBLIC: tuple(cases)}


@dataclass(frozen=True, slots=True)
class ImageView:
    """A case without its label: every slice, patch or row of it is an example.

    The label is 0 everywhere, which `PublicImages` takes out of the batches again.

    Attributes:
        case: A prepared case, or a view of one; may have a label.
        has_map: Whether the task is to label voxels; else the case has one class.
    """

    case: Any
    has_map: bool

    known_slices: ClassVar[None] = None

    def __getattr__(self, name: str) -> Any:
        """Everything else is the case's."""
        return getattr(self.case, name)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of the label that stands in for the case's own."""
        return tuple(self.case.image_shape[1:]) if self.has_map else ()

    @property
    def label_IJK(self) -> np.ndarray:
        """0 in every voxel, or as the case's class."""
        return np.zeros(self.label_shape, np.uint8)

    @property
    def label(self) -> int:
        """0, of a table's row."""
        return 0


class PublicImages:
    """Batches of a public site's images, the same in every hospital and every run.

    Args:
        study: The study.
        cases: Prepared cases of the public site.
    """

    def __init__(self, study: Study, cases: Sequence[Any]) -> None:
        model = study.model
        self._seed = derive(study.seed, "public")
        self._batch_size = study.train.batch_size
        self._index = ExampleIndex(
            [ImageView(case, has_map=model.mode in _MAPS) for case in cases],
            model.mode,
            num_slices=model.slices,
            patch_size=model.patch_size,
            patches_per_case=model.patches_per_case,
        )

    def __len__(self) -> int:
        return len(self._index)

    def batch(self, number: int) -> Batch:
        """Draw a batch; batches are numbered over all rounds, from 0.

        Returns:
            Images as in training but without augmentation, every label unknown.
        """
        drawn = self._index.batch(self._seed, number, self._batch_size)
        unknown = torch.full_like(drawn.labels, UNKNOWN_LABEL)
        return Batch(drawn.images, unknown)
