"""The made-up tables: lazy, equal for equal seeds, and a task that can be learned."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fedmed.errors import ConfigError
from sites.catalogue import open_dataset

NAME = "benchmarks.synthetic_sites"
SMALL = {"num_sites": 3, "num_rows": 5, "num_features": 4, "num_classes": 2}


def test_lists_what_the_options_ask_for() -> None:
    card, sites = open_dataset(NAME, None, SMALL)
    assert card.sites == tuple(site.site_id for site in sites)
    assert (card.num_channels, len(card.labels)) == (4, 2)
    assert [len(site.cases) for site in sites] == [5, 5, 5]


def test_rows_are_a_function_of_the_seed_and_the_site() -> None:
    def rows(**changes: int) -> list[np.ndarray]:
        _, sites = open_dataset(NAME, None, SMALL | changes)
        return [ref.read().image for site in sites for ref in site.cases]

    np.testing.assert_array_equal(rows(), rows())
    np.testing.assert_array_equal(rows()[:5], rows(num_sites=1))
    assert not np.array_equal(rows(), rows(seed=1))
    assert len(np.unique(rows(), axis=0)) == 15


def test_a_site_survives_the_way_to_another_process() -> None:
    _, sites = open_dataset(NAME, None, SMALL)
    sent = pickle.loads(pickle.dumps(sites[1]))
    assert sent.site_id == "site00001"
    np.testing.assert_array_equal(
        sent.cases[2].read().image, sites[1].cases[2].read().image
    )


def test_refuses_what_cannot_be_made() -> None:
    with pytest.raises(ConfigError):
        open_dataset(NAME, None, {"num_classes": 1})
