import gzip

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import CaseError, ConfigError, DataError
from sites import folder
from sites.listing import Listing
from sites.miniature import save_picture, write_nifti_case, write_png_case


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    folder.write_miniature(root, seed=0)
    return root


def by_id(root, **options):
    return {site.site_id: site for site in folder.open_sites(root, **options)}


def test_images_find_their_masks(root):
    opened = by_id(root)
    assert tuple(opened) == ("alpha", "beta")
    assert [ref.case_id for ref in opened["alpha"].cases] == ["s0", "s1"]
    assert [ref.case_id for ref in opened["beta"].cases] == ["p0", "p1", "p2"]
    assert opened["alpha"].problems == {
        "s2": "no mask with this name",
        "s9_seg": "mask without an image",
    }
    assert opened["beta"].problems == {}


def test_grey_pictures_and_volumes_are_read(root):
    opened = by_id(root)
    volume, picture = (opened[site].cases[0].read() for site in ("alpha", "beta"))
    assert volume.image.shape == (1, 8, 8, 4)
    assert volume.spacing_mm == pytest.approx((0.5, 0.5, 3.0))
    assert picture.image.shape == (1, 10, 12, 1)
    assert not picture.spacing_known
    for case in (volume, picture):
        assert case.image[0][case.label == 1].mean() > 140
        assert case.image[0][case.label == 0].mean() < 110


def test_an_image_without_a_mask_is_a_case_if_asked_for(root):
    case = by_id(root, unlabelled=True)["alpha"].cases[2]
    assert (case.case_id, len(case.files)) == ("s2", 1)
    assert case.read().label is None


def test_a_mask_in_black_and_white_needs_a_merge(root):
    path = root / "beta" / "masks" / "p0_mask.png"
    Image.fromarray(np.asarray(Image.open(path)) * np.uint8(255)).save(path)
    with pytest.raises(CaseError, match="255"):
        by_id(root)["beta"].cases[0].read()
    label = by_id(root, merge={255: 1})["beta"].cases[0].read().label
    assert set(np.unique(label)) == {0, 1}


def test_a_value_can_be_declared_unknown(root):
    options = {"labels": {0: "background"}, "merge": {1: UNKNOWN_LABEL}}
    label = by_id(root, **options)["beta"].cases[0].read().label
    assert set(np.unique(label)) == {0, UNKNOWN_LABEL}


def test_a_pattern_finds_the_subject(root):
    def subjects(pattern):
        cases = by_id(root, subject_pattern=pattern)["beta"].cases
        return [ref.subject_id for ref in cases]

    assert subjects(None) == ["p0", "p1", "p2"]
    assert subjects(r"^([ps])\d") == ["p", "p", "p"]
    assert subjects(r"([ps])(?P<subject>\d)") == ["0", "1", "2"]
    with pytest.raises(DataError, match="does not match case s0"):
        subjects("x")
    with pytest.raises(ConfigError, match="subject_pattern"):
        subjects("(")


@pytest.mark.parametrize("suffix", folder.MASK_SUFFIXES)
def test_every_mask_suffix_is_understood(tmp_path, suffix):
    images, masks = tmp_path / "a" / "images", tmp_path / "a" / "masks"
    write_png_case(images / "x.png", masks / f"x{suffix}.png", seed=0)
    assert [ref.case_id for ref in by_id(tmp_path)["a"].cases] == ["x"]


def test_colour_jpeg_and_the_card(tmp_path):
    pixels = np.full((6, 8, 3), 90, np.uint8)
    save_picture(pixels, tmp_path / "a" / "images" / "x.JPG")
    save_picture(np.zeros((6, 8), np.uint8), tmp_path / "a" / "masks" / "x.png")
    assert by_id(tmp_path)["a"].cases[0].read().image.shape == (3, 8, 6, 1)
    card = folder.card(tmp_path, modality="photograph")
    assert (card.num_channels, card.spatial_dims) == (3, 2)
    assert (card.modality, card.sites) == ("photograph", ("a",))
    assert folder.card(tmp_path, num_channels=4).num_channels == 4


def test_two_masks_for_one_image_are_a_problem(root):
    write_png_case(
        root / "beta" / "spare.png", root / "beta" / "masks" / "p0_seg.png", seed=0
    )
    assert by_id(root)["beta"].problems == {
        "p0": "2 masks fit this image: p0_seg, p0_mask"
    }


def test_two_files_for_one_case_are_refused(root):
    write_png_case(root / "beta" / "images" / "p0.jpg", None, seed=0)
    with pytest.raises(DataError, match=r"beta/images: p0.jpg and p0.png"):
        by_id(root)


def test_a_link_out_of_the_data_folder_is_refused(root, tmp_path):
    outside = tmp_path / "outside"
    write_png_case(outside / "q.png", outside / "q_mask.png", seed=0)
    (root / "beta" / "images" / "q.png").symlink_to(outside / "q.png")
    (root / "beta" / "masks" / "q.png").symlink_to(outside / "q_mask.png")
    (root / "beta" / "masks" / "p0_mask.png").unlink()
    (root / "beta" / "masks" / "p0_mask.png").symlink_to(outside / "q_mask.png")
    site = by_id(root)["beta"]
    assert [ref.case_id for ref in site.cases] == ["p1", "p2"]
    assert site.problems == {
        "p0": "mask p0_mask.png is a link out of the data folder",
        "p0_mask": "p0_mask.png is a link out of the data folder",
        "q": "q.png is a link out of the data folder",
    }


def test_a_link_inside_the_data_folder_is_followed(root):
    image = root / "beta" / "images" / "p0.png"
    image.rename(root / "store.png")
    image.symlink_to(root / "store.png")
    assert by_id(root)["beta"].cases[0].read().image.shape == (1, 10, 12, 1)


def test_a_site_folder_that_leads_outside_is_refused(root, tmp_path):
    (tmp_path / "far" / "images").mkdir(parents=True)
    (root / "gamma").symlink_to(tmp_path / "far")
    with pytest.raises(DataError, match="site folder gamma is a link out"):
        by_id(root)


def test_a_format_that_is_not_read_is_a_problem(root):
    (root / "beta" / "images" / "x.dcm").write_bytes(b"")
    (root / "beta" / "images" / "notes.txt").write_text("")
    assert list(by_id(root)["beta"].problems) == ["x.dcm"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _: None, "no site found in folder 'data'"),
        (lambda root: (root / "a" / "masks").mkdir(parents=True), "no site found"),
        (lambda root: (root / "a" / "images").mkdir(parents=True), "no folder masks"),
    ],
)
def test_an_empty_folder_is_refused(tmp_path, spoil, message):
    (tmp_path / "data").mkdir()
    spoil(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        by_id(tmp_path / "data")


def test_site_folders_without_any_image_are_refused(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "a" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="no image in them"):
        by_id(tmp_path)


def test_folder_names_become_site_ids(tmp_path):
    for name in ("Mount Sinai", "RUMC"):
        site = tmp_path / name
        write_png_case(site / "images" / "x.png", site / "masks" / "x.png", seed=0)
    assert tuple(by_id(tmp_path)) == ("mount_sinai", "rumc")
    (tmp_path / "rumc" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="two folders stand for site rumc"):
        by_id(tmp_path)


def test_a_folder_that_cannot_name_a_site_is_refused(tmp_path):
    (tmp_path / "höri" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="cannot name a site"):
        by_id(tmp_path)


def test_damaged_files_are_quarantined_by_name(root):
    ref = by_id(root)["alpha"].cases[1]
    good = ref.files[0].read_bytes()
    for bad in (good[:60], b"", b"not a scan"):
        ref.files[0].write_bytes(bad)
        with pytest.raises(CaseError, match="s1"):
            ref.read()
    raw = gzip.decompress(good)
    ref.files[0].write_bytes(gzip.compress(raw[: len(raw) // 2]))
    with pytest.raises(CaseError, match="s1"):
        ref.read()


def test_a_damaged_first_file_does_not_hide_the_others(root):
    first = by_id(root)["alpha"].cases[0].files[0]
    first.write_bytes(b"not a scan")
    shown = folder.card(root, labels=folder.card().labels)
    assert (shown.num_channels, shown.spatial_dims) == (1, 3)


def test_an_impossible_affine_is_quarantined(root):
    ref = by_id(root)["alpha"].cases[1]
    image = nib.load(ref.files[0])
    values = np.asanyarray(image.dataobj)
    image.header.set_sform(np.diag([0.0, 1, 1, 1]), 1)
    broken = nib.Nifti1Image(values, None, image.header)
    nib.save(broken, ref.files[0])
    with pytest.raises(CaseError, match="s1"):
        ref.read()


def test_unknown_options_name_the_nearest(root):
    with pytest.raises(ConfigError, match="did you mean 'unlabelled'"):
        by_id(root, unlabeled=True)
    with pytest.raises(ConfigError, match="dataset option unlabelled"):
        by_id(root, unlabelled="perhaps")


def test_errors_and_problems_hold_no_path(root):
    write_nifti_case(
        root / "alpha" / "images" / "s3.nii.gz",
        root / "alpha" / "masks" / "s3.nii.gz",
        seed=0,
        label_IJK=np.full((8, 8, 4), 7, np.uint8),
    )
    with pytest.raises(CaseError) as caught:
        by_id(root)["alpha"].cases[2].read()
    assert str(root) not in str(caught.value)


def test_pairs_keep_the_problems_of_both_listings(tmp_path):
    pairs = folder.pair_files(
        Listing({"a": tmp_path}, {"b": "bad image"}),
        Listing({}, {"c": "bad mask"}),
        suffixes=("",),
        unlabelled=True,
    )
    assert pairs.files == {"a": (tmp_path, None)}
    assert pairs.problems == {"b": "bad image", "c": "bad mask"}
