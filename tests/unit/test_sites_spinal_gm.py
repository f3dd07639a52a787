import nibabel as nib
import numpy as np
import pytest

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import CaseError, ConfigError, DataError
from sites import spinal_gm


@pytest.fixture
def root(tmp_path):
    spinal_gm.write_miniature(tmp_path, seed=0)
    return tmp_path


def by_id(root):
    return {site.site_id: site for site in spinal_gm.open_sites(root)}


def test_six_sites_six_people(root):
    opened = by_id(root)
    assert tuple(opened) == spinal_gm.CARD.sites
    assert sum(len(site.cases) for site in opened.values()) == 8
    subjects = {ref.subject_id for site in opened.values() for ref in site.cases}
    assert len(subjects) == 6
    assert {ref.subject_id for ref in opened["milan"].cases} == {"sub-9709"}
    assert opened["milan"].card.facts["field_T"] == 1.5


def test_undrawn_slices_of_chum_are_unknown_with_their_stray_voxel(root):
    case = by_id(root)["chum"].cases[0].read()
    assert (case.label[:, :, 4:] == UNKNOWN_LABEL).all()
    assert set(np.unique(case.label[:, :, :4])) == {0, 1, 2}


def test_other_sites_have_no_unknown_slice(root):
    opened = by_id(root)
    for site_id in set(opened) - {"chum"}:
        for ref in opened[site_id].cases:
            assert UNKNOWN_LABEL not in ref.read().label


def test_swapped_axes_show_the_same_anatomy(root):
    """The cord lies at the same place in RAS+, whatever axes the file has."""
    opened = by_id(root)
    image_path = opened["chum"].cases[0].files[0]
    assert nib.aff2axcodes(nib.load(image_path).affine) == ("L", "P", "S")
    chum, ucl = opened["chum"].cases[0].read(), opened["ucl"].cases[0].read()
    np.testing.assert_array_equal(chum.label[..., 0] == 2, ucl.label[..., 0] == 2)
    assert chum.image[0, 5:7, 4:7, 0].mean() > 170
    assert ucl.image[0, 5:7, 4:7, 0].mean() > 170


def test_a_label_without_any_cord_is_quarantined(root):
    ref = by_id(root)["ucl"].cases[0]
    stored = nib.load(ref.files[1])
    empty = np.zeros(stored.shape, np.uint8)
    nib.save(nib.Nifti1Image(empty, stored.affine), ref.files[1])
    with pytest.raises(CaseError, match=r"sub-9418.*no slice of the label"):
        ref.read()


def test_label_outside_the_card_is_quarantined(root):
    ref = by_id(root)["ucl"].cases[0]
    stored = nib.load(ref.files[1])
    label = np.asanyarray(stored.dataobj).copy()
    label[0, 0, 0] = 3
    nib.save(nib.Nifti1Image(label, stored.affine), ref.files[1])
    with pytest.raises(CaseError, match="sub-9418"):
        ref.read()


def test_label_on_another_grid_is_quarantined(root):
    ref = by_id(root)["ucl"].cases[0]
    stored = nib.load(ref.files[1])
    moved = stored.affine.copy()
    moved[2, 3] += 3.0
    nib.save(nib.Nifti1Image(np.asanyarray(stored.dataobj), moved), ref.files[1])
    with pytest.raises(CaseError, match="mm apart"):
        ref.read()


def test_truncated_gzip_is_quarantined(root):
    ref = by_id(root)["ucl"].cases[0]
    content = ref.files[0].read_bytes()
    ref.files[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(CaseError, match="sub-9418"):
        ref.read()


def test_a_missing_mask_is_a_problem(root):
    by_id(root)["nwu"].cases[0].files[1].unlink()
    site = by_id(root)["nwu"]
    assert site.cases == ()
    assert site.problems == {"sub-9584_T2starw": "no mask with this name"}


def test_a_foreign_site_and_a_foreign_option_are_refused(root):
    with pytest.raises(ConfigError, match="unknown dataset option 'spacing'"):
        spinal_gm.open_sites(root, spacing=1)
    (root / "oxford" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="'oxford' is no site of spinal_gm"):
        spinal_gm.open_sites(root)
