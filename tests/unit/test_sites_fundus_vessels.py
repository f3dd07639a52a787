import numpy as np
import pytest
from PIL import Image

from fedmed.errors import CaseError, ConfigError
from sites import fundus_vessels


@pytest.fixture
def root(tmp_path):
    fundus_vessels.write_miniature(tmp_path, seed=0)
    return tmp_path


def by_id(root, **options):
    return {site.site_id: site for site in fundus_vessels.open_sites(root, **options)}


def test_three_sites_of_colour_photographs(root):
    opened = by_id(root)
    assert tuple(opened) == fundus_vessels.CARD.sites
    for site in opened.values():
        case = site.cases[0].read()
        assert case.image.shape[0] == 3
        assert case.image.shape[1:] == case.label.shape == case.region.shape
        assert case.label.shape[2] == 1
        assert not case.spacing_known
        assert set(np.unique(case.label)) == {0, 1}


def test_both_eyes_of_a_child_are_one_subject(root):
    cases = by_id(root)["chasedb1"].cases
    subjects = {ref.case_id: ref.subject_id for ref in cases}
    assert subjects["Image_01L"] == subjects["Image_01R"] == "Image_01"
    assert len(set(subjects.values())) == 3


def test_two_photographs_of_one_eye_are_one_subject(root):
    subjects = {ref.case_id: ref.subject_id for ref in by_id(root)["fives"].cases}
    assert subjects["22_A"] == subjects["23_A"]
    assert len(set(subjects.values())) == 3


def test_hrf_numbers_are_people_only_on_request(root):
    separate = {ref.subject_id for ref in by_id(root)["hrf"].cases}
    careful = {
        ref.subject_id for ref in by_id(root, hrf_subjects="number")["hrf"].cases
    }
    assert separate == {"01_dr", "01_g", "01_h", "02_h"}
    assert careful == {"01", "02"}
    with pytest.raises(ConfigError, match="hrf_subjects"):
        by_id(root, hrf_subjects="none")


@pytest.mark.parametrize("drawn_inside_out", [True, False])
def test_the_drawn_field_of_view_is_turned_right(root, drawn_inside_out):
    ref = by_id(root)["chasedb1"].cases[0]
    drawn = np.asarray(Image.open(ref.files[2]))
    assert drawn[0, 0] == 1, "the real files hold 1 outside the retina"
    if not drawn_inside_out:
        Image.fromarray((1 - drawn).astype(np.uint8)).save(ref.files[2])
    case = ref.read()
    middle, corner = case.region[25, 24, 0], case.region[0, 0, 0]
    assert (middle, corner) == (1, 0)
    assert (case.region[case.label == 1] == 1).all()


def test_the_derived_field_leaves_out_burnt_in_letters(root):
    case = by_id(root)["fives"].cases[0].read()
    assert case.image[:, 0:3, -2:].min() > 150, "letters in the corner"
    assert case.region[0:3, -2:].max() == 0
    assert case.region[26, 26, 0] == 1
    assert (case.region[case.label == 1] == 1).mean() > 0.95


def test_find_field_fills_dark_vessels():
    image = np.full((3, 9, 9, 1), 200.0, np.float32)
    image[:, 4, 4] = 0
    assert fundus_vessels.find_field(image).all()


def test_a_black_photograph_is_quarantined(root):
    ref = by_id(root)["hrf"].cases[0]
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(ref.files[0], format="JPEG")
    with pytest.raises(CaseError, match=r"01_dr.*dark throughout"):
        ref.read()


def test_a_mask_of_0_and_255_is_quarantined_not_taken_as_unknown(root):
    ref = by_id(root)["hrf"].cases[0]
    mask = np.asarray(Image.open(ref.files[1])) * np.uint8(255)
    Image.fromarray(mask).save(ref.files[1])
    with pytest.raises(CaseError, match="255"):
        ref.read()
