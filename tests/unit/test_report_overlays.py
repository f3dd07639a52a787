from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import StorageError
from fedmed.report.overlays import draw_overlay, is_cropped, read_overlay, sort_by_rank


def _write(folder: Path, shape: tuple[int, int] = (10, 8), **changes: Any) -> Path:
    facts = {"dice": 0.5, "rank": "worst", "slice": 3, "case_id": "case_1"}
    facts |= {"spacing_mm": [2.0, 3.0]} | changes.pop("facts", {})
    arrays: dict[str, Any] = {
        "image": np.zeros(shape, np.float32),
        "truth": np.zeros(shape, np.uint8),
        "prediction": np.zeros(shape, np.uint8),
        "facts": json.dumps(facts),
    }
    path = folder / "overlay.npz"
    np.savez(path, **(arrays | changes))
    return path


def _draw(path: Path, **options: Any) -> str:
    overlay = read_overlay(path, **options)
    return str(draw_overlay(overlay, site="a", per_class=False))


def _picture(svg: str) -> np.ndarray:
    found = re.search(r"base64,([^\"]+)", svg)
    assert found is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found.group(1)))))


def _points(svg: str, colour: str) -> np.ndarray:
    """Read the outline of one colour."""
    found = re.search(rf'<path d="M([^"]+)Z"[^>]* stroke="{colour}"', svg)
    assert found is not None
    pairs = [pair.split() for pair in found.group(1).split("L")]
    return np.array(pairs, dtype=float)


def test_right_is_left_and_front_is_up(tmp_path: Path) -> None:
    image = np.zeros((10, 8), np.float32)
    image[9, 7] = 1  # the right front corner of RAS+
    picture = _picture(_draw(_write(tmp_path, image=image)))
    assert picture.shape == (8, 10)
    assert np.argwhere(picture == 255).tolist() == [[0, 0]]


def test_a_photograph_keeps_its_sides(tmp_path: Path) -> None:
    image = np.zeros((10, 8), np.float32)
    image[9, 7] = 1  # the upper right corner of a picture read bottom row first
    path = _write(tmp_path, image=image, facts={"spacing_mm": [1, 1, 1]})
    svg = _draw(path, is_photograph=True)
    assert np.argwhere(_picture(svg) == 255).tolist() == [[0, 9]]
    assert "mm<" not in svg
    assert ">R<" not in svg
    known = _write(tmp_path, image=image, facts={"spacing_known": True})
    assert ">R<" in _draw(known, is_photograph=True)


def test_proportions_are_those_of_the_spacing(tmp_path: Path) -> None:
    assert 'viewBox="0 0 20 24"' in _draw(_write(tmp_path))


@pytest.mark.parametrize("photograph", [False, True])
def test_outlines_run_around_the_voxels_they_mean(
    tmp_path: Path, photograph: bool
) -> None:
    truth, prediction = np.zeros((2, 10, 8), np.uint8)
    truth[2:5, 1:3] = 1
    prediction[9, 7] = 1
    path = _write(tmp_path, truth=truth, prediction=prediction)
    svg = _draw(path, is_photograph=photograph)
    points = _points(svg, "#56B4E9")
    left_right = (4, 10) if photograph else (20 - 10, 20 - 4)
    assert (points[:, 0].min(), points[:, 0].max()) == left_right
    assert (points[:, 1].min(), points[:, 1].max()) == (24 - 9, 24 - 3)
    assert 'stroke="#F5A700" stroke-width="1.8" stroke-dasharray' in svg


def test_outline_and_picture_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = np.zeros((60, 50), np.uint8)
    i, j = rng.integers(10, 40, 2)
    truth[i : i + 6, j : j + 4] = 1
    facts = {"spacing_mm": [1.0, 2.0]}
    image = truth.astype(np.float32)
    svg = _draw(_write(tmp_path, (60, 50), truth=truth, image=image, facts=facts))
    rows, columns = np.nonzero(_picture(svg) > 128)
    points = _points(svg, "#56B4E9")
    assert points[:, 0].min() == columns.min()
    assert points[:, 0].max() == columns.max() + 1
    assert points[:, 1].min() == 2 * rows.min()
    assert points[:, 1].max() == 2 * (rows.max() + 1)


def test_small_organs_are_enlarged_and_large_ones_are_not(tmp_path: Path) -> None:
    small, large = np.zeros((2, 200, 200), np.uint8)
    small[100:104, 60:64] = 1
    large[20:190, 20:190] = 1
    facts = {"spacing_mm": [1.0, 1.0]}
    path = _write(tmp_path, (200, 200), truth=small, facts=facts)
    assert is_cropped(read_overlay(path))
    assert 'viewBox="0 0 40 40"' in _draw(path)
    small[small == 0] = UNKNOWN_LABEL
    assert is_cropped(read_overlay(_write(tmp_path, (200, 200), truth=small)))
    path = _write(tmp_path, (200, 200), truth=large, facts=facts)
    assert not is_cropped(read_overlay(path))


def test_unknown_voxels_have_no_outline(tmp_path: Path) -> None:
    truth = np.full((10, 8), UNKNOWN_LABEL, np.uint8)
    truth[4:6, 4:6] = 1
    overlay = read_overlay(_write(tmp_path, truth=truth))
    assert overlay.classes == (1,)
    points = _points(str(draw_overlay(overlay, site="a", per_class=False)), "#56B4E9")
    assert points[:, 0].max() - points[:, 0].min() == 4


def test_the_label_says_what_is_shown(tmp_path: Path) -> None:
    svg = _draw(_write(tmp_path, facts={"case_id": '"><b>'}))
    assert "worst case &#34;&gt;&lt;b&gt;, slice 3, Dice 50.00 %" in svg


@pytest.mark.parametrize(
    "changes",
    [
        {"truth": np.zeros((3, 3), np.uint8)},
        {"facts": {"spacing_mm": [0.0, 1.0]}},
        {"image": np.array([None, {}], dtype=object)},
    ],
)
def test_a_damaged_overlay_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = _write(tmp_path, **changes)
    with pytest.raises(StorageError, match=r"overlay.npz"):
        read_overlay(path)


def test_worst_comes_first(tmp_path: Path) -> None:
    ranks = ("best", "worst", "median")
    found = [read_overlay(_write(tmp_path, facts={"rank": rank})) for rank in ranks]
    assert [o.rank for o in sort_by_rank(found)] == ["worst", "median", "best"]
