import json

import numpy as np
import pytest

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import CaseError, ConfigError, DataError
from sites import nnunet
from sites.miniature import write_nifti_case


@pytest.fixture
def root(tmp_path):
    nnunet.write_miniature(tmp_path, seed=0)
    return tmp_path


@pytest.fixture
def shared(tmp_path):
    """All sites in one folder."""
    for name in ("rumc_01", "rumc_02", "bmc_01"):
        write_nifti_case(
            tmp_path / "imagesTr" / f"{name}_0000.nii.gz",
            tmp_path / "labelsTr" / f"{name}.nii.gz",
            seed=0,
        )
    describe(tmp_path, {"modality": {"0": "CT"}, "labels": {"0": "air", "1": "organ"}})
    return tmp_path


def describe(folder, said):
    (folder / "dataset.json").write_text(json.dumps(said))


def by_id(root, **options):
    return {site.site_id: site for site in nnunet.open_sites(root, **options)}


def test_channels_are_stacked_and_ignore_is_unknown(root):
    opened = by_id(root)
    case = opened["alpha"].cases[0].read()
    assert case.image.shape == (2, 8, 8, 4)
    assert case.image.dtype == np.float32
    assert not np.array_equal(case.image[0], case.image[1])
    assert case.label[0, 0, 0] == UNKNOWN_LABEL
    assert set(np.unique(case.label)) == {0, 1, UNKNOWN_LABEL}


def test_the_card_is_what_dataset_json_says(root):
    card = nnunet.card(root)
    assert card.labels == {0: "background", 1: "lesion"}
    assert (card.num_channels, card.modality) == (2, "T2+ADC")
    assert (card.sites, card.spatial_dims) == (("alpha", "beta"), 3)
    assert card.title == "Miniature"


def test_cases_that_lack_something_are_problems(root):
    opened = by_id(root)
    assert opened["alpha"].problems == {"alpha_002": "channels [0], expected 2"}
    assert opened["beta"].problems == {"beta_002": "no label with this name"}
    unlabelled = by_id(root, unlabelled=True)["beta"].cases[2]
    assert unlabelled.read().label is None


def test_channels_on_different_grids_are_quarantined(root):
    write_nifti_case(
        root / "alpha" / "imagesTr" / "alpha_000_0001.nii.gz",
        None,
        seed=0,
        spacing_mm=(0.6, 0.5, 3.0),
    )
    with pytest.raises(CaseError, match="alpha_000, channel 1"):
        by_id(root)["alpha"].cases[0].read()


def test_one_folder_needs_to_be_told_the_sites(shared):
    with pytest.raises(ConfigError, match="which case comes from which site"):
        by_id(shared)
    opened = by_id(shared, site_pattern=r"^(?P<site>[a-z]+)_")
    assert {name: len(site.cases) for name, site in opened.items()} == {
        "bmc": 1,
        "rumc": 2,
    }
    assert nnunet.card(shared, site_pattern="^([a-z]+)").labels[1] == "organ"


def test_a_table_tells_the_sites(shared):
    table = shared / "sites.csv"
    table.write_text("case_id,site\nrumc_01,A\nrumc_02,B\nbmc_01,B\n")
    assert [ref.case_id for ref in by_id(shared)["b"].cases] == ["bmc_01", "rumc_02"]
    table.write_text("case_id,site\nrumc_01,A\n")
    with pytest.raises(DataError, match=r"2 case\(s\) have no site, first bmc_01"):
        by_id(shared)
    table.write_text("case_id,site\nrumc_01,A\nrumc_01,B\n")
    with pytest.raises(DataError, match="names a case twice"):
        by_id(shared)


def test_a_site_pattern_that_misses_a_case_is_refused(shared):
    with pytest.raises(DataError, match=r"1 case\(s\) have no site, first bmc_01"):
        by_id(shared, site_pattern="^(rumc)")


@pytest.mark.parametrize(
    "said",
    [
        {"labels": {"background": 0}},
        {"channel_names": {"0": "CT"}, "labels": {"background": 0, "both": [1, 2]}},
        {"channel_names": {"0": "CT"}, "labels": {"organ": 1}},
        {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 1}},
        [],
    ],
)
def test_a_description_that_cannot_be_used_is_refused(shared, said):
    describe(shared, said)
    with pytest.raises(DataError, match=r"dataset.json"):
        by_id(shared, site_pattern="^([a-z]+)")


def test_a_missing_description_is_refused(shared):
    (shared / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset.json is missing"):
        by_id(shared, site_pattern="^([a-z]+)")


def test_sites_that_disagree_on_labels_are_refused(root):
    said = json.loads((root / "beta" / "dataset.json").read_text())
    describe(root / "beta", {**said, "labels": {"background": 0, "tumour": 1}})
    with pytest.raises(DataError, match="sites alpha and beta disagree"):
        by_id(root)


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="imagesTr"):
        by_id(tmp_path)
