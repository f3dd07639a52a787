import pytest

from fedmed.errors import ConfigError, DataError
from sites import bids
from sites.miniature import write_nifti_case


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    bids.write_miniature(root, seed=0)
    return root


def by_id(root, **options):
    return {site.site_id: site for site in bids.open_sites(root, **options)}


def test_the_table_tells_the_sites(root):
    opened = by_id(root)
    alpha, beta = ([ref.case_id for ref in site.cases] for site in opened.values())
    assert tuple(opened) == ("alpha", "beta")
    assert alpha == ["sub-01_ses-1", "sub-01_ses-2", "sub-03"]
    assert beta == ["sub-02_run-1", "sub-02_run-2"]
    assert [ref.subject_id for ref in opened["alpha"].cases] == [
        "sub-01",
        "sub-01",
        "sub-03",
    ]
    assert all(not site.problems for site in opened.values())


def test_each_run_has_its_own_label(root):
    for ref in by_id(root)["beta"].cases:
        image, label = (path.name.split("_T2w")[0] for path in ref.files)
        assert image == label
        case = ref.read()
        assert case.image[0][case.label == 1].mean() > 140


def test_the_suffix_chooses_the_kind_of_image(root):
    site = by_id(root, suffix="T1w", unlabelled=True)["alpha"]
    assert [ref.case_id for ref in site.cases] == ["sub-03"]
    assert site.card.modality == "T1w"
    assert by_id(root, suffix="T1w")["alpha"].problems == {
        "sub-03": "no label fits this image"
    }
    with pytest.raises(DataError, match="no image ends in _FLAIR"):
        by_id(root, suffix="FLAIR")


def test_the_table_is_needed_and_complete(root):
    table = root / "participants.tsv"
    table.write_text("participant_id\tsite\nsub-01\tA\nsub-02\tn/a\nsub-03\tA\n")
    with pytest.raises(DataError, match="gives subject sub-02 no site"):
        by_id(root)
    table.write_text("participant_id\tsite\nsub-01\tA\nsub-01\tB\n")
    with pytest.raises(DataError, match="gives sub-01 two sites"):
        by_id(root)
    table.write_text("participant_id\tsex\nsub-01\tF\n")
    with pytest.raises(DataError, match="needs the columns participant_id and site"):
        by_id(root)
    table.unlink()
    with pytest.raises(DataError, match=r"participants.tsv is missing"):
        by_id(root)


def test_one_data_set_per_site(root, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    root.rename(both / "Alpha")
    bids.write_miniature(both / "Beta", seed=1)
    opened = by_id(both)
    assert [len(opened[site].cases) for site in ("alpha", "beta")] == [5, 5]
    assert bids.card(both).sites == ("alpha", "beta")
    assert bids.card(both).spatial_dims == 3


def test_several_pipelines_have_to_be_told_apart(root):
    (root / "derivatives" / "other").mkdir()
    with pytest.raises(ConfigError, match="several folders"):
        by_id(root)
    assert len(by_id(root, pipeline="labels")["alpha"].cases) == 3
    assert not by_id(root, pipeline="other")["alpha"].cases


def test_two_labels_for_one_image_are_a_problem(root):
    folder = root / "derivatives" / "labels" / "sub-03" / "anat"
    write_nifti_case(root / "x.nii.gz", folder / "sub-03_desc-b_seg.nii.gz", seed=0)
    problem = by_id(root)["alpha"].problems["sub-03"]
    assert problem == "2 labels fit this image: sub-03_T2w_seg, sub-03_desc-b_seg"


def test_a_link_out_of_the_data_folder_is_refused(root, tmp_path):
    label = (
        root / "derivatives" / "labels" / "sub-03" / "anat" / "sub-03_T2w_seg.nii.gz"
    )
    label.rename(tmp_path / "away.nii.gz")
    label.symlink_to(tmp_path / "away.nii.gz")
    assert by_id(root)["alpha"].problems == {
        "sub-03": "sub-03_T2w_seg.nii.gz is a link out of the data folder"
    }


def test_no_other_column_of_the_table_is_kept(root):
    """Sex and age of the participants must not travel with the cases."""
    opened = by_id(root)
    assert "sex" not in repr(opened)
    assert all(not site.card.facts for site in opened.values())


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no site found"):
        by_id(tmp_path)
