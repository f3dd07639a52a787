import subprocess
import sys

import pytest

from fedmed.case import DatasetCard
from fedmed.errors import ConfigError, DataError, MissingDependencyError
from sites import heart_uci
from sites.catalogue import find_root, list_datasets, load_dataset_module, open_dataset

OURS = {"bids", "folder", "fundus_vessels", "heart_uci", "nnunet", "spinal_gm"}


def test_data_sets_are_found_and_other_modules_are_not():
    found = list_datasets()
    assert found.keys() >= OURS
    assert not found.keys() & {"catalogue", "check", "listing", "options", "splits"}
    assert found["heart_uci"].startswith("Heart disease at four hospitals")


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from sites.catalogue import list_datasets; list_datasets();"
        "heavy = {'torch', 'nibabel', 'scipy', 'PIL', 'flwr'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_open_dataset_gives_card_and_sites(tmp_path):
    heart_uci.write_miniature(tmp_path, seed=0)
    card, opened = open_dataset("heart_uci", tmp_path, {"encoding": "ordinal"})
    assert isinstance(card, DatasetCard)
    assert card.num_channels == 13
    assert tuple(site.site_id for site in opened) == card.sites
    by_module_name = open_dataset("sites.heart_uci", str(tmp_path), {})
    assert by_module_name[0].num_channels == 22


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("heart_uic", "did you mean 'heart_uci'"),
        ("splits", "Known: "),
        ("../folder", "Known: "),
        ("nowhere.at_all", "Known: "),
        ("sites.splits", "open_sites"),
        ("", "Known: "),
    ],
)
def test_an_unknown_name_is_explained(name, hint):
    with pytest.raises(ConfigError) as caught:
        load_dataset_module(name)
    assert hint in caught.value.hint


def test_a_module_that_lacks_a_package_says_which(tmp_path, monkeypatch):
    (tmp_path / "my_hospital_data.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "data.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="not_installed_anywhere"):
        load_dataset_module("my_package.data")


def test_a_module_of_ones_own_can_need_no_folder(tmp_path, monkeypatch):
    (tmp_path / "my_phantoms").mkdir()
    (tmp_path / "my_phantoms" / "data.py").write_text(
        "from pathlib import Path\n"
        "from sites import folder\n"
        "def open_sites(root: Path | None, *, preset: str = 'a'):\n"
        "    assert root is None\n"
        "    return ()\n"
        "def card(*, preset: str = 'a'):\n"
        "    return folder.card(modality=preset)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("FEDMED_DATA", raising=False)
    card, opened = open_dataset("my_phantoms.data", None, {"preset": "b"})
    assert (card.modality, opened) == ("b", ())
    with pytest.raises(ConfigError, match="did you mean 'preset'"):
        open_dataset("my_phantoms.data", None, {"prset": "b"})


def test_a_missing_folder_points_to_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDMED_DATA", raising=False)
    with pytest.raises(DataError, match="no data folder given") as caught:
        open_dataset("heart_uci", None, {})
    assert "FEDMED_DATA" in caught.value.hint
    with pytest.raises(DataError, match="no data folder 'gone'") as caught:
        open_dataset("heart_uci", tmp_path / "gone", {})
    assert "FEDMED_DATA" in caught.value.hint
    assert str(tmp_path) not in str(caught.value)


def test_the_variable_and_the_usual_name_are_used(tmp_path, monkeypatch):
    (tmp_path / "heart_uci").mkdir()
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    expected = tmp_path / "heart_uci"
    assert find_root(None, usual_name="heart_uci") == expected
    assert find_root(tmp_path, usual_name="heart_uci") == expected
    assert find_root("$FEDMED_DATA/heart_uci", usual_name="heart_uci") == expected
    assert find_root(None, usual_name="other") == tmp_path
