"""Heart disease at four hospitals: 13 findings of 920 patients, a table.

    <root>/<site>/data.csv      13 findings and `num`; an empty cell is missing

Traps, and what is done about them:

* A cholesterol or a blood pressure of 0 was not measured: missing. That is all of
  switzerland's cholesterol and 49 rows of va, and one blood pressure of va.
* `ca`, `thal` and `slope` are mostly missing outside Cleveland: NaN, never a guess.
* hungarian says only 0 or 1, the others grade disease from 1 to 4. With
  `target: grade` hungarian is therefore left out.
* hungarian and va each hold one row twice. Rows with equal findings are one subject,
  so they never fall into different splits.
* `oldpeak` (ST depression) below 0 is an elevation and stays as it is.

The files themselves state no licence; the repository they come from names CC BY 4.0,
which is to be checked before passing them on.

Units:
    Before scaling: age in years, trestbps in mmHg, chol in mg/dl, thalach in beats per
    minute, oldpeak in mm. After `scaling: fixed`: see `FIXED_SCALES`.

Source:
    Detrano et al., American Journal of Cardiology 64, 1989; UCI Machine Learning
    Repository, Heart Disease. Principal investigators: Janosi, Steinbrunn, Pfisterer,
    Detrano.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedmed.case import Case, CaseRef, DatasetCard, SiteCard, SourceSite
from fedmed.errors import CaseError, DataError
from fedmed.seeds import numpy_rng
from sites.listing import OUTSIDE, is_inside, make_site, site_folders
from sites.options import parse_options, reader_version

FOLDER = "heart_uci"
"""Name of the data folder inside FEDMED_DATA."""

NUMBERS = (
    "age",
    "sex",
    "trestbps",
    "chol",
    "fbs",
    "thalach",
    "exang",
    "oldpeak",
    "ca",
)
"""Findings that are numbers, or 0 and 1."""

CATEGORIES: dict[str, tuple[int, ...]] = {
    "cp": (1, 2, 3, 4),
    "restecg": (0, 1, 2),
    "slope": (1, 2, 3),
    "thal": (3, 6, 7),
}
"""Findings that are codes: chest pain, resting ECG, ST slope, thallium scan."""

ZERO_IS_MISSING = ("chol", "trestbps")

FIXED_SCALES = {
    "age": (55.0, 10.0),
    "trestbps": (130.0, 20.0),
    "chol": (240.0, 50.0),
    "thalach": (140.0, 25.0),
    "oldpeak": (1.0, 1.0),
    "ca": (1.0, 1.0),
}
"""Finding -> (centre, scale): round clinical numbers, not computed from this data, so
that they carry nothing from one hospital to another. `sex`, `fbs` and `exang` stay 0
and 1, one-hot columns too."""

COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"),
)

SITES = ("cleveland", "hungarian", "switzerland", "va")

COUNTRIES = {
    "cleveland": "United States",
    "hungarian": "Hungary",
    "switzerland": "Switzerland",
    "va": "United States",
}


@dataclass(frozen=True)
class HeartOptions:
    """Options of this data set.

    Attributes:
        target: "binary": disease or not, all sites. "grade": 0 to 4, without
            hungarian, which does not grade.
        encoding: "one_hot": a column for each code, all NaN if missing. "ordinal": one
            column for each finding, its codes spread evenly over [0, 1] in the order
            of the code book (for thal and cp that order means little).
        scaling: "fixed": `FIXED_SCALES`. "site": mean 0 and standard deviation 1 over
            all rows of the site, labels unseen; a column without values or without
            spread is only centred. "none": as in the file.
    """

    target: Literal["binary", "grade"] = "binary"
    encoding: Literal["one_hot", "ordinal"] = "one_hot"
    scaling: Literal["fixed", "site", "none"] = "fixed"


def card(root: Path | None = None, **options: Any) -> DatasetCard:  # noqa: ARG001
    """Describe the data set as the options make it.

    Args:
        root: Not needed.
        options: Fields of `HeartOptions`.

    Returns:
        The card; `num_channels` is the number of features.
    """
    chosen = parse_options(HeartOptions, options)
    binary = {0: "no disease", 1: "disease"}
    grades = {0: "no disease", **{grade: f"grade {grade}" for grade in range(1, 5)}}
    return DatasetCard(
        name="heart_uci",
        title="Heart disease, four hospitals",
        version="1988",
        licence="CC-BY-4.0",
        source_url="https://archive.ics.uci.edu/dataset/45/heart+disease",
        citation="Detrano et al., Am J Cardiol 64:304-310, 1989",
        modality="table",
        intensity_unit="mixed",
        kind="classification",
        labels=binary if chosen.target == "binary" else grades,
        num_channels=len(feature_names(chosen.encoding)),
        spatial_dims=0,
        sites=_sites_of(chosen),
    )


def feature_names(encoding: str = "one_hot") -> tuple[str, ...]:
    """Name the features in the order in which `Case.image` holds them.

    Args:
        encoding: As in `HeartOptions`.

    Returns:
        The numbers first, then the codes.

    Example:
        >>> feature_names("ordinal")[-4:]
        ('cp', 'restecg', 'slope', 'thal')
        >>> len(feature_names("one_hot"))
        22
    """
    if encoding == "ordinal":
        return (*NUMBERS, *CATEGORIES)
    columns = (f"{name}={code}" for name, codes in CATEGORIES.items() for code in codes)
    return (*NUMBERS, *columns)


def open_sites(root: Path, **options: Any) -> tuple[SourceSite, ...]:
    """List the patients of the hospitals that are there.

    Args:
        root: The data set's folder.
        options: Fields of `HeartOptions`.

    Returns:
        Sites in sorted order. A row without a target is a problem.

    Raises:
        ConfigError: If an option is unknown or does not fit.
        DataError: If no hospital is there, a folder is none of the four, or a table
            has other columns.
    """
    chosen = parse_options(HeartOptions, options)
    folders = site_folders(root, holding="data.csv", layout="<site>/data.csv")
    unknown = sorted(set(folders) - set(SITES))
    if unknown:
        raise DataError(
            f"{unknown[0]!r} is no site of heart_uci", hint=f"known: {', '.join(SITES)}"
        )
    return tuple(
        _open_site(site_id, _table_inside(folder, root), options=chosen)
        for site_id, folder in folders.items()
        if site_id in _sites_of(chosen)
    )


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a hospital's table.

    Args:
        path: Its data.csv.

    Returns:
        Rows by column name, cells as text.

    Raises:
        DataError: If the columns are not the 14 known ones, or a row is cut short.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = tuple(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{where} is no table of text") from None
    if columns != COLUMNS:
        raise DataError(f"{where}: expected the columns {', '.join(COLUMNS)}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{where}: row {number} has not {len(COLUMNS)} cells")
    return rows


def read_case(case_id: str, path: Path, row: int, *, options: HeartOptions) -> Case:
    """Read one patient.

    Args:
        case_id: Name of the case.
        path: The hospital's data.csv.
        row: Row of the table, from 0.
        options: Encoding, scaling and target.

    Returns:
        float32 features (F,), NaN where missing, and a 0-d int64 label.

    Raises:
        CaseError: If a cell is no number or no known code.
    """
    rows = read_table(path)
    if row >= len(rows):
        raise CaseError(f"case {case_id}: the table has only {len(rows)} rows")
    label = _grade(case_id, rows[row]["num"])
    features_F = encode(case_id, rows[row], encoding=options.encoding)
    if options.scaling == "fixed":
        features_F = _standardise(features_F, *_fixed_scales(len(features_F)))
    elif options.scaling == "site":
        features_F = _standardise(features_F, *_site_scales(rows, options.encoding))
    return Case(
        case_id=case_id,
        image=features_F.astype(np.float32),
        label=np.array(label if options.target == "grade" else min(label, 1), np.int64),
        spacing_mm=(),
        spacing_known=False,
    )


def encode(case_id: str, row: dict[str, str], *, encoding: str) -> np.ndarray:
    """Turn a row into numbers, unscaled.

    Args:
        case_id: For error messages.
        row: Cells by column name.
        encoding: As in `HeartOptions`.

    Returns:
        float64 (F,), in the order of `feature_names`, NaN where missing.

    Raises:
        CaseError: If a cell is no number or no known code.
    """
    values = [_number(case_id, name, row[name]) for name in NUMBERS]
    for name, codes in CATEGORIES.items():
        code = _number(case_id, name, row[name])
        if not np.isnan(code) and code not in codes:
            raise CaseError(f"case {case_id}: {name} is {code:g}, known codes {codes}")
        if encoding == "one_hot":
            hits = [float(code == known) for known in codes]
            values += [np.nan] * len(codes) if np.isnan(code) else hits
        else:
            values.append(
                np.nan if np.isnan(code) else codes.index(int(code)) / (len(codes) - 1)
            )
    return np.array(values, np.float64)


def write_miniature(root: Path, seed: int) -> None:
    """Write four tables of twelve made-up patients, with the traps of the real ones.

    Args:
        root: Where to write.
        seed: Seed of the values.
    """
    for site_id in SITES:
        rng = numpy_rng(seed, "heart", site_id)
        rows = [_made_up_patient(rng, site_id, sick=i % 2 == 1) for i in range(12)]
        if site_id == "hungarian":
            rows[7] = dict(rows[5])
        if site_id == "va":
            rows[0]["chol"] = rows[3]["chol"] = rows[4]["trestbps"] = "0"
        path = root / site_id / "data.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _made_up_patient(
    rng: np.random.Generator, site_id: str, *, sick: bool
) -> dict[str, str]:
    graded = str(int(rng.integers(1, 5))) if site_id != "hungarian" else "1"
    row = {
        "age": f"{rng.integers(30, 76)}",
        "sex": f"{rng.integers(0, 2)}",
        "cp": "4" if sick else f"{rng.integers(1, 5)}",
        "trestbps": f"{rng.integers(95, 190)}",
        "chol": "0" if site_id == "switzerland" else f"{rng.integers(130, 400)}",
        "fbs": f"{rng.integers(0, 2)}",
        "restecg": f"{rng.integers(0, 3)}",
        "thalach": f"{rng.integers(80, 140) if sick else rng.integers(120, 195)}",
        "exang": "1" if sick else "0",
        "oldpeak": "-0.5" if site_id == "switzerland" else f"{rng.uniform(0, 4):.1f}",
        "slope": f"{rng.integers(1, 4)}",
        "ca": f"{rng.integers(0, 4)}",
        "thal": "7" if sick else "3",
        "num": graded if sick else "0",
    }
    missing = ("ca", "thal", "slope") if site_id != "cleveland" else ()
    return {**row, **dict.fromkeys(missing, "")}


def _sites_of(options: HeartOptions) -> tuple[str, ...]:
    ungraded = options.target == "grade"
    return tuple(site for site in SITES if not (ungraded and site == "hungarian"))


def _open_site(site_id: str, path: Path, *, options: HeartOptions) -> SourceSite:
    refs, problems = [], {}
    subjects: dict[tuple[str, ...], str] = {}
    version = reader_version("1", options)
    for index, row in enumerate(read_table(path)):
        case_id = f"row{index + 1:04d}"
        if not row["num"].strip():
            problems[case_id] = "no target"
            continue
        refs.append(
            CaseRef(
                case_id=case_id,
                subject_id=subjects.setdefault(_findings(row), case_id),
                files=(path,),
                read=partial(read_case, case_id, path, index, options=options),
                read_version=version,
            )
        )
    site_card = SiteCard(
        title=site_id.capitalize(),
        modality="table",
        intensity_unit="mixed",
        facts={"country": COUNTRIES[site_id]},
    )
    return make_site(site_id, refs, card=site_card, problems=problems)


def _table_inside(folder: Path, root: Path) -> Path:
    path = folder / "data.csv"
    if not is_inside(path, root):
        raise DataError(f"{folder.name}/{path.name} {OUTSIDE}")
    return path


def _findings(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(text for name, text in row.items() if name != "num")


def _number(case_id: str, name: str, text: str) -> float:
    if not text.strip():
        return np.nan
    try:
        value = float(text)
    except ValueError:
        value = np.inf
    if not np.isfinite(value):
        raise CaseError(f"case {case_id}: {name} is no number")
    return np.nan if name in ZERO_IS_MISSING and value == 0 else value


def _grade(case_id: str, text: str) -> int:
    if text.strip() not in {"0", "1", "2", "3", "4"}:
        raise CaseError(f"case {case_id}: num must be 0 to 4")
    return int(text)


def _standardise(
    values_F: np.ndarray, centre_F: np.ndarray, scale_F: np.ndarray
) -> np.ndarray:
    scaled_F: np.ndarray = (values_F - centre_F) / scale_F
    return scaled_F


def _fixed_scales(num_features: int) -> tuple[np.ndarray, np.ndarray]:
    centre_F, scale_F = np.zeros(num_features), np.ones(num_features)
    for index, name in enumerate(NUMBERS):
        centre_F[index], scale_F[index] = FIXED_SCALES.get(name, (0.0, 1.0))
    return centre_F, scale_F


def _encodable(rows: list[dict[str, str]], encoding: str) -> Iterator[np.ndarray]:
    """Give the rows that can be used; the others are quarantined one by one."""
    for row in rows:
        with contextlib.suppress(CaseError):
            yield encode("", row, encoding=encoding)


def _site_scales(
    rows: list[dict[str, str]], encoding: str
) -> tuple[np.ndarray, np.ndarray]:
    table = np.stack(list(_encodable(rows, encoding)))
    known = np.isfinite(table)
    count_F = np.maximum(known.sum(axis=0), 1)
    centre_F = np.where(known, table, 0).sum(axis=0) / count_F
    spread = np.where(known, table - centre_F, 0)
    scale_F = np.sqrt((spread**2).sum(axis=0) / count_F)
    return centre_F, np.where(scale_F > 0, scale_F, 1.0)


CARD = card()
