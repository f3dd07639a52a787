from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedmed.errors import ConfigError
from fedmed.report.page import build_report
from fedmed.report.published import (
    SideBySide,
    known_tables,
    read_published,
    side_by_side,
)
from fedmed.report.run_folder import read_comparison
from fedmed.report.tables import make_table
from fedmed.report.wording import NO_VALUE

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")

METHODS = ("ms_net", "separate", "fedavg")


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    plan = folders.Plan(overlays=False, num_rounds=2)
    folders.write_comparison(tmp_path / "c", METHODS, (0, 1), plan=plan)
    return tmp_path / "c"


def tell(folder: Path, **report: Any) -> None:
    for lock in folder.glob("runs/*/study.lock.yaml"):
        content = yaml.safe_load(lock.read_text())
        sites = {"dataset": "phantom"}
        lock.write_text(yaml.safe_dump({**content, "report": report, "sites": sites}))


def read(folder: Path) -> SideBySide | None:
    comparison = read_comparison(folder)
    return side_by_side(comparison, make_table(comparison))


@pytest.mark.parametrize("name", known_tables())
def test_the_last_column_is_the_mean_over_the_others(name: str) -> None:
    """A wrong digit anywhere in a row with an overall value shows here."""
    table = read_published(name)
    checked = [row for row in table.rows if row.overall]
    assert len(checked) >= 8 or not table.overall
    for row in checked:
        for place, what in enumerate(table.values):
            values = [row.cells[column][place] for column in table.columns]
            if what == "std":  # how the publication merged them is not known
                assert min(values) <= row.overall[place] <= max(values)
                continue
            # Cells and mean are both rounded to two digits.
            assert np.mean(values) == pytest.approx(row.overall[place], abs=0.0101)


@pytest.mark.parametrize("name", known_tables())
def test_columns_strategies_and_words_are_whole(name: str) -> None:
    table = read_published(name)
    assert table.citation
    assert table.data
    assert table.values[0] == "mean"
    for row in table.rows:
        assert set(row.cells) <= set(table.columns)
        sizes = {len(values) for values in row.cells.values()}
        assert sizes <= {1, len(table.values)}
        assert row.trained_on in {"", *table.columns}
    named = [(row.strategy, row.trained_on) for row in table.rows if row.strategy]
    assert len(set(named)) == len(named)


def test_ours_and_published_stand_side_by_side(compared: Path) -> None:
    tell(compared, published="prostate_multi_site")
    found = read(compared)
    assert found is not None
    assert found.header[:3] == ("Method", "A here", "A published")
    rows = {row[0]: row[1:] for row in found.text_rows()}
    # The publication's order and names first, then what only we have.
    order = list(rows)
    assert order.index("Separate") < order.index("MS-Net") < order.index("fedavg")
    ours = {row.label: row for row in make_table(read_comparison(compared)).rows}
    a = 100 * ours["ms_net"].cells["a"].mean
    assert rows["MS-Net"][0].startswith(f"{a:.2f} ±")
    assert rows["MS-Net"][1] == "91.54 ± 2.01"
    assert rows["MS-Net"][-2].startswith(f"{100 * ours['ms_net'].overall.mean:.2f}")
    assert rows["MS-Net"][-1] == "91.66 ± 1.95"
    assert rows["DSBN"][0] == NO_VALUE
    assert rows["DSBN"][1] == "90.98 ± 2.69"
    assert rows["fedavg"][1] == NO_VALUE
    assert rows["Tian et al."] == (
        NO_VALUE,
        "88.23",
        NO_VALUE,
        "88.23",
        *[NO_VALUE] * 4,
    )
    assert all(len(row) == len(found.header) for row in found.text_rows())


def test_the_page_says_which_number_is_whose(compared: Path) -> None:
    tell(compared, published="prostate_multi_site")
    html = build_report(compared).read_text()
    assert "measured on phantoms" in html
    assert "published, other data" in html
    assert "<small>published 91.54 ± 2.01</small>" in html
    assert "arXiv:2002.03366" in html


def test_without_the_key_nothing_is_shown(compared: Path) -> None:
    assert read(compared) is None
    assert "published" not in build_report(compared).read_text()


def test_sites_of_other_names_are_mapped(compared: Path) -> None:
    tell(compared, published="prostate_multi_site", columns={"A": "c", "B": "nowhere"})
    found = read(compared)
    assert found is not None
    ours = {row.label: row for row in make_table(read_comparison(compared)).rows}
    row = {row[0]: row for row in found.text_rows()}["Separate"]
    assert row[1].startswith(f"{100 * ours['separate'].cells['c'].mean:.2f}")
    assert row[3] == NO_VALUE
    assert "No site of this study stands for B." in found.marks


def test_a_method_with_options_takes_the_row_where_it_is_alone(compared: Path) -> None:
    index = compared / "compare.json"
    index.write_text(index.read_text().replace('"ms_net"', '"ms_net[kd_weight=1]"'))
    tell(compared, published="prostate_multi_site")
    found = read(compared)
    assert found is not None
    rows = {method: ours for method, ours, _ in found.rows}
    ms_net = rows["MS-Net"]
    assert ms_net is not None
    assert ms_net.label == "ms_net[kd_weight=1]"
    assert math.isfinite(ms_net.overall.mean)


def test_surface_distances_take_the_place_of_deviations(compared: Path) -> None:
    tell(compared, published="prostate_unseen_site")
    found = read(compared)
    assert found is not None
    row = {row[0]: row for row in found.text_rows()}["Intra-site"]
    assert row[1].endswith(" mm)")
    assert row[2] == "89.27 (1.41 mm)"
    assert "No site of this study stands for D, E, F." in found.marks


def test_what_cannot_be_read_stays_empty() -> None:
    """The square table: three cells were lost, the diagonal is its largest."""
    table = read_published("brain_unseen_site")
    lost = [(r.trained_on, c) for r in table.rows for c in table.columns
            if c not in r.cells]  # fmt: skip
    assert lost == [(f"Set-{x}", "Set-A") for x in "ABD"]
    for column in ("Set-B", "Set-C", "Set-D"):
        values = {row.method: row.cells[column][0] for row in table.rows}
        assert max(values, key=lambda name: values[name]) == f"Train {column}"
        assert values["MASF"] > values["DeepAll"]


def write_brain(folder: Path) -> None:
    """Trained on one site each, and leaving each out; sites b, c are Set-B, Set-C."""
    runs = []
    for strategy, kind in (
        ("joint", "only"),
        ("joint", "without"),
        ("masf", "without"),
    ):
        for site in ("b", "c"):
            name = f"{strategy}-{kind}-{site}"
            out = ("c" if site == "b" else "b") if kind == "only" else site
            plan = folders.Plan(
                strategy, sites=("b", "c"), held_out=(out,), overlays=False,
                num_rounds=2, seed=len(runs),
            )  # fmt: skip
            folders.write_run(folder / name, plan)
            held = {"held_out": None, "trained_on": None}
            held["trained_on" if kind == "only" else "held_out"] = site
            runs.append({"strategy": strategy, "seed": 0, "folder": name, **held})
    (folder / "compare.json").write_text(json.dumps({"study": "brain", "runs": runs}))
    for lock in folder.glob("*/study.lock.yaml"):
        content = yaml.safe_load(lock.read_text())
        columns = {"Set-B": "b", "Set-C": "c"}
        content["report"] = {"published": "brain_unseen_site", "columns": columns}
        lock.write_text(yaml.safe_dump(content))


def test_the_square_table_stands_with_its_test_sites_downwards(tmp_path: Path) -> None:
    write_brain(tmp_path)
    found = read(tmp_path)
    assert found is not None
    assert found.header[:3] == (
        "Tested on",
        "Train Set-A here",
        "Train Set-A published",
    )
    assert [row[0] for row in found.text_rows()] == ["Set-A", "Set-B", "Set-C", "Set-D"]
    cells = dict(zip(found.header, found.text_rows()[1], strict=True))
    rows = {row.label: row for row in make_table(read_comparison(tmp_path)).rows}

    def mean(label: str) -> str:
        return f"{100 * rows[label].cells['b'].mean:.2f}"

    assert cells["Train Set-B published"] == "94.22"
    assert cells["Train Set-B here"].startswith(mean("joint (trained on b)"))
    assert cells["Train Set-C here"].startswith(mean("joint (trained on c)"))
    assert cells["DeepAll here"].startswith(mean("joint (site unseen)"))
    assert cells["MASF here"].startswith(mean("masf (site unseen)"))
    assert cells["Train Set-A here"] == NO_VALUE
    html = build_report(tmp_path).read_text()
    assert "<small>published 94.22</small>" in html
    assert "Trained on one site, tested on each" in html


def test_a_model_that_saw_the_site_takes_no_place_of_one_that_did_not(
    compared: Path,
) -> None:
    tell(compared, published="prostate_unseen_site")
    index = compared / "compare.json"
    index.write_text(index.read_text().replace('"ms_net"', '"joint"'))
    found = read(compared)
    assert found is not None
    assert {m: o for m, o, _ in found.rows}["DeepAll"] is None


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"published": "prostate_multisite"}, "mean.*prostate_multi_site"),
        (
            {"published": "prostate_multi_site", "columns": {"Z": "a"}},
            "no column 'Z'",
        ),
    ],
)
def test_unknown_names_are_refused(
    compared: Path, report: dict[str, Any], told: str
) -> None:
    tell(compared, **report)
    with pytest.raises(ConfigError, match=told):
        read(compared)
