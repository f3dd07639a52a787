"""The workbench: what a site says about its data."""

import numpy as np
import pytest

from fedmed.study import study_from_dict
from sites import phantom
from sites.context import Workbench


@pytest.fixture
def folder(tmp_path):
    phantom.write_miniature(tmp_path / "data", seed=0)
    return tmp_path


def fingerprints(folder, **split):
    study = study_from_dict(
        {
            "name": "s",
            "sites": {"dataset": "phantom", "root": str(folder / "data")},
            "split": {"train": 0.4, "validation": 0.2, "test": 0.4, **split},
            "preprocess": {"size": [32, 32]},
        }
    )
    site = sorted(path.name for path in (folder / "data").iterdir() if path.is_dir())[0]
    card = Workbench(study, site, folder / "cache").card()
    return card["data_fingerprint"], card["fingerprints"]


def test_a_changed_mask_or_split_is_other_data_though_the_images_are_the_same(folder):
    before = fingerprints(folder)
    assert fingerprints(folder) == before
    moved = {fingerprints(folder, seed=seed)[0] for seed in range(8)}
    assert len(moved) > 1
    mask = sorted((folder / "data").glob("*/masks/*.nii.gz"))[0]
    import nibabel as nib

    image = nib.load(mask)
    rolled = np.roll(np.asarray(image.dataobj), 1, axis=0)
    nib.save(nib.Nifti1Image(rolled, image.affine, image.header), mask)
    after = fingerprints(folder)
    assert after[0] != before[0]
    assert after[1] == before[1]
