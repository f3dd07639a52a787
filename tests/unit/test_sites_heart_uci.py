import numpy as np
import pytest

from fedmed.errors import CaseError, ConfigError, DataError
from sites import heart_uci
from sites.heart_uci import FIXED_SCALES, NUMBERS, feature_names

CHOL = NUMBERS.index("chol")
TRESTBPS = NUMBERS.index("trestbps")


@pytest.fixture
def root(tmp_path):
    heart_uci.write_miniature(tmp_path, seed=0)
    return tmp_path


def features(root, site_id, **options):
    sites = {site.site_id: site for site in heart_uci.open_sites(root, **options)}
    return np.stack([ref.read().image for ref in sites[site_id].cases])


def rewrite(root, site_id, row, **cells):
    path = root / site_id / "data.csv"
    lines = path.read_text().splitlines()
    values = lines[row + 1].split(",")
    for name, text in cells.items():
        values[heart_uci.COLUMNS.index(name)] = text
    lines[row + 1] = ",".join(values)
    path.write_text("\n".join(lines) + "\n")


def test_features_and_label_of_one_patient(root):
    rewrite(
        root, "cleveland", 0, age="63", sex="1", cp="1", trestbps="145", chol="233",
        fbs="1", restecg="2", thalach="150", exang="0", oldpeak="2.3", slope="3",
        ca="", thal="6", num="3",
    )  # fmt: skip
    case = heart_uci.open_sites(root)[0].cases[0].read()
    expected = {
        "age": 0.8, "sex": 1, "trestbps": 0.75, "chol": -0.14, "fbs": 1,
        "thalach": 0.4, "exang": 0, "oldpeak": 1.3, "ca": np.nan,
        "cp=1": 1, "cp=2": 0, "cp=3": 0, "cp=4": 0,
        "restecg=0": 0, "restecg=1": 0, "restecg=2": 1,
        "slope=1": 0, "slope=2": 0, "slope=3": 1,
        "thal=3": 0, "thal=6": 1, "thal=7": 0,
    }  # fmt: skip
    assert tuple(expected) == feature_names()
    assert case.image.dtype == np.float32
    np.testing.assert_allclose(case.image, list(expected.values()), rtol=1e-6)
    assert case.label.shape == ()
    assert case.label.dtype == np.int64
    assert case.label == 1
    assert case.spacing_mm == ()
    graded = heart_uci.open_sites(root, target="grade")[0].cases[0].read()
    assert graded.label == 3


def test_zeros_that_were_not_measured_are_missing(root):
    assert np.isnan(features(root, "switzerland")[:, CHOL]).all()
    va = features(root, "va")
    assert np.flatnonzero(np.isnan(va[:, CHOL])).tolist() == [0, 3]
    assert np.flatnonzero(np.isnan(va[:, TRESTBPS])).tolist() == [4]


def test_a_missing_code_is_missing_in_all_its_columns(root):
    thal = [i for i, name in enumerate(feature_names()) if name.startswith("thal=")]
    assert np.isnan(features(root, "va")[:, thal]).all()
    assert (features(root, "cleveland")[:, thal].sum(axis=1) == 1).all()


def test_ordinal_codes_lie_between_0_and_1(root):
    rewrite(root, "cleveland", 0, cp="4", restecg="1", slope="1", thal="6")
    table = features(root, "cleveland", encoding="ordinal")
    np.testing.assert_allclose(table[0, -4:], [1, 0.5, 0, 0.5])
    assert heart_uci.card(encoding="ordinal").num_channels == table.shape[1] == 13


def test_fixed_scaling_does_not_look_at_the_data(root):
    before = features(root, "va")[0]
    rewrite(root, "va", 5, age="99", thalach="60")
    np.testing.assert_array_equal(features(root, "va")[0], before)


def test_site_scaling_has_mean_0_and_spread_1_where_measured(root):
    table = features(root, "va", scaling="site").astype(np.float64)
    raw = features(root, "va", scaling="none")
    for column in range(len(NUMBERS)):
        known = ~np.isnan(raw[:, column])
        if known.any() and np.ptp(raw[known, column]):
            assert abs(table[known, column].mean()) < 1e-6
            assert abs(table[known, column].std() - 1) < 1e-6
    np.testing.assert_array_equal(np.isnan(table), np.isnan(raw))


def test_unscaled_and_fixed_agree(root):
    raw = features(root, "cleveland", scaling="none")
    scaled = features(root, "cleveland")
    for name, (centre, scale) in FIXED_SCALES.items():
        column = NUMBERS.index(name)
        expected = (raw[:, column] - centre) / scale
        np.testing.assert_allclose(scaled[:, column], expected, rtol=1e-5, atol=1e-6)


def test_equal_rows_are_one_subject(root):
    site = heart_uci.open_sites(root)[1]
    assert site.site_id == "hungarian"
    assert len(site.cases) == 12
    assert len({ref.subject_id for ref in site.cases}) == 11
    assert site.cases[5].subject_id == site.cases[7].subject_id


def test_equal_findings_with_another_grade_are_one_subject(root):
    rewrite(root, "hungarian", 7, num="0")
    cases = heart_uci.open_sites(root)[1].cases
    assert cases[5].subject_id == cases[7].subject_id


def test_a_table_that_lies_outside_is_refused(root, tmp_path_factory):
    table = root / "va" / "data.csv"
    outside = tmp_path_factory.mktemp("outside") / "data.csv"
    table.rename(outside)
    table.symlink_to(outside)
    with pytest.raises(DataError, match=r"va/data.csv is a link out"):
        heart_uci.open_sites(root)


def test_grade_leaves_out_the_hospital_that_does_not_grade(root):
    sites = heart_uci.open_sites(root, target="grade")
    assert [site.site_id for site in sites] == ["cleveland", "switzerland", "va"]
    card = heart_uci.card(target="grade")
    assert card.sites == ("cleveland", "switzerland", "va")
    assert tuple(card.labels) == (0, 1, 2, 3, 4)


def test_options_are_part_of_the_version(root):
    versions = {
        heart_uci.open_sites(root, **options)[0].cases[0].read_version
        for options in ({}, {"scaling": "site"}, {"encoding": "ordinal"})
    }
    assert len(versions) == 3


def test_a_patient_without_a_target_is_a_problem(root):
    rewrite(root, "cleveland", 2, num="")
    site = heart_uci.open_sites(root)[0]
    assert site.problems == {"row0003": "no target"}
    assert len(site.cases) == 11


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"age": "old"}, "row0001: age is no number"),
        ({"age": "nan"}, "row0001: age is no number"),
        ({"cp": "0"}, "row0001: cp is 0, known codes"),
        ({"thal": "2"}, "row0001: thal is 2, known codes"),
        ({"num": "5"}, "row0001: num must be 0 to 4"),
    ],
)
def test_an_impossible_cell_is_quarantined(root, cells, message):
    rewrite(root, "cleveland", 0, **cells)
    with pytest.raises(CaseError, match=message):
        heart_uci.open_sites(root)[0].cases[0].read()


def test_one_bad_row_does_not_spoil_the_others_when_scaling_by_site(root):
    rewrite(root, "cleveland", 0, cp="0")
    assert heart_uci.open_sites(root, scaling="site")[0].cases[1].read() is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age,sex\n1,2\n", "expected the columns"),
        ("", "expected the columns"),
        (",".join(heart_uci.COLUMNS) + "\n1,2,3\n", "row 1 has not 14 cells"),
    ],
)
def test_another_table_is_refused(root, text, message):
    (root / "cleveland" / "data.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        heart_uci.open_sites(root)


def test_a_wrong_option_value_is_refused(root):
    with pytest.raises(ConfigError, match="target"):
        heart_uci.open_sites(root, target="grades")
