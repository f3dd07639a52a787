"""What every dataset module in `sites` promises, found by walking the package."""

import pickle

import numpy as np
import pytest

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError
from sites.catalogue import list_datasets, load_dataset_module, open_dataset


@pytest.fixture(params=list(list_datasets()))
def miniature(request, tmp_path):
    load_dataset_module(request.param).write_miniature(tmp_path, seed=0)
    return request.param, tmp_path


def test_sites_and_cases_are_sorted_and_named_once(miniature):
    name, root = miniature
    card, opened = open_dataset(name, root, {})
    sites = [site.site_id for site in opened]
    assert sites == sorted(set(sites))
    assert len(sites) >= 2
    assert set(sites) <= set(card.sites)
    for site in opened:
        cases = [ref.case_id for ref in site.cases]
        assert cases == sorted(set(cases))
        assert cases


def test_cases_keep_the_promises_of_case(miniature):
    name, root = miniature
    card, opened = open_dataset(name, root, {})
    for ref in (ref for site in opened for ref in site.cases):
        case = ref.read()
        assert case.case_id == ref.case_id
        assert case.image.dtype == np.float32
        assert case.image.shape[0] == card.num_channels
        assert case.image.ndim == (1 if card.spatial_dims == 0 else 4)
        assert len(case.spacing_mm) == (0 if card.spatial_dims == 0 else 3)
        assert set(np.unique(case.label)) <= {*card.labels, UNKNOWN_LABEL}
        if card.kind == "segmentation":
            assert case.label.dtype == np.uint8
            assert case.label.shape == case.image.shape[1:]
        else:
            assert case.label.dtype == np.int64
            assert case.label.shape == ()
        if case.region is not None:
            assert case.region.dtype == np.uint8
            assert case.region.shape == case.image.shape[1:]
            assert set(np.unique(case.region)) <= {0, 1}


def test_a_case_read_by_another_process_is_the_same(miniature):
    """A worker gets the case as bytes and must read what the owner reads."""
    name, root = miniature
    ref = open_dataset(name, root, {})[1][0].cases[0]
    here, there = ref.read(), pickle.loads(pickle.dumps(ref)).read()
    np.testing.assert_array_equal(here.image, there.image)
    np.testing.assert_array_equal(here.label, there.label)


def test_the_miniature_depends_on_its_seed_alone(miniature, tmp_path_factory):
    name, root = miniature
    module = load_dataset_module(name)

    def image(folder, seed):
        module.write_miniature(folder, seed)
        return open_dataset(name, folder, {})[1][0].cases[0].read().image

    again = image(tmp_path_factory.mktemp("again"), 0)
    other = image(tmp_path_factory.mktemp("other"), 1)
    first = open_dataset(name, root, {})[1][0].cases[0].read().image
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(other, first, equal_nan=True)


def test_the_card_and_unknown_options(miniature):
    name, root = miniature
    module = load_dataset_module(name)
    assert name == module.CARD.name
    assert module.card().labels == module.CARD.labels
    assert module.CARD.labels.keys() >= {0, 1}
    for field in ("title", "version", "licence", "modality", "intensity_unit"):
        assert getattr(module.CARD, field)
    with pytest.raises(ConfigError, match="unknown dataset option 'no_such_option'"):
        open_dataset(name, root, {"no_such_option": 1})


def test_names_hold_no_path(miniature):
    name, root = miniature
    for site in open_dataset(name, root, {})[1]:
        for text in (*site.problems, *site.problems.values()):
            assert str(root) not in text
        for ref in site.cases:
            assert "/" not in ref.case_id + ref.subject_id
