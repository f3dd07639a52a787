from __future__ import annotations

import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedmed.errors import StorageError
from fedmed.report.page import build_report

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")

VOID = {"meta", "link", "br", "img"}


class _Page(HTMLParser):
    """Text of the page, and a check that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.links += [found[k] for k in ("href", "src", "xlink:href") if k in found]

    def handle_startendtag(self, tag: str, attrs: list[Any]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def _page(folder: Path) -> _Page:
    return _Page(build_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("p") / "compare"
    plan = folders.Plan(num_rounds=6)
    folders.write_comparison(folder, ("fedavg", "ms_net"), (0, 1), plan=plan)
    build_report(folder)
    return folder


def test_a_comparison_says_what_it_should(compared: Path) -> None:
    page = _Page((compared / "report.html").read_text(encoding="utf-8"))
    for words in (
        "It ran 2 training strategies (fedavg and ms_net), each with 2 random seeds.",
        "The highest overall Dice is that of ms_net",
        "1 of 52 organs",
        "University hospital A",
        "endorectal",
        "1.5",
        "Wilcoxon",
        "update holds NaN in 'enc1.weight' 4 to 6 every run",
        "case_17 image and label differ in spacing",
        "8.75 MB",
        "fedmed compare fedavg-0/study.lock.yaml --strategies fedavg,ms_net "
        "--seeds 0,1",
        "2.13.0",
        "Empty in both",
    ):
        assert words in page.text, words


def test_the_page_needs_nothing_else(compared: Path) -> None:
    html = (compared / "report.html").read_text(encoding="utf-8")
    links = _Page(html).links
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<script" not in html
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<)]+", html)) == namespaces
    assert str(compared) not in html
    assert "@import" not in html


def test_equal_folders_give_equal_pages(compared: Path) -> None:
    first = (compared / "report.html").read_bytes()
    assert build_report(compared).read_bytes() == first
    assert sorted(path.name for path in compared.iterdir()) == [
        "compare.json",
        "report.html",
        "runs",
    ]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    for name in ("rounds.jsonl", "cases.csv", "summary.json"):
        (folder / name).unlink()
    lock = "name: bare\nseed: 3\nstrategy: {name: fedavg}\n"
    (folder / "study.lock.yaml").write_text(lock)
    text = _page(folder).text
    for words in (
        "No case has been scored yet.",
        "There are no pictures in this folder.",
        "No learning curves were recorded.",
        "No traffic was recorded.",
        "No software versions were recorded.",
        "There is no summary.json: the run has not finished.",
    ):
        assert words in text, words


def test_a_damaged_picture_costs_only_itself(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan())
    damaged = sorted((folder / "sites" / "a" / "overlays").glob("*.npz"))[0]
    damaged.write_bytes(b"nothing")
    html = build_report(folder).read_text(encoding="utf-8")
    assert html.count('class="overlay"') == 8
    assert f"The overlay &#39;{damaged.name}&#39; cannot be read." in html


def test_markup_in_any_name_stays_text(tmp_path: Path) -> None:
    evil = "<b onclick=x>\"'{{ 7 * 7 }}</b>"
    plan = folders.Plan(
        name=evil, strategy=evil, classes=(evil, "two"), quarantined={evil: evil}
    )
    folder = folders.write_run(tmp_path / "run", plan)
    rounds = folder / "rounds.jsonl"
    line = {"round": 21, "loss": {evil: 1.0}, "refused": {evil: evil}}
    with rounds.open("a") as file:
        file.write(json.dumps(line) + "\n")
    page = _page(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<b" not in html.replace("<body", "")
    assert page.text.count("{{ 7 * 7 }}") >= 6


def test_a_failed_write_keeps_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    before = build_report(folder).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        build_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".report*"))


def test_leaving_sites_out_is_explained(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4)
    out = ("a", "b", "c")
    folder = folders.write_comparison(
        tmp_path / "c", ("fedavg", "fedbn"), (0,), leave_out=out, plan=plan
    )
    text = _page(folder).text
    assert "each site in turn was left out" in text
    assert "left out in turn" in text
    assert "held out, never trained on" not in text
    assert "--leave-one-site-out" in text
    assert "fedbn (site unseen)" in text
    command = "compare fedavg-0-without-a/study.lock.yaml --strategies fedavg,fedbn"
    assert f"fedmed {command} --seeds 0 --leave-one-site-out" in text


def test_repeating_names_the_lock_that_says_most(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=2)
    folder = folders.write_comparison(
        tmp_path / "c", ("separate", "fedavg"), (0,), leave_out=(None, "b"), plan=plan
    )
    index = json.loads((folder / "compare.json").read_text())
    lock = folder / "runs/fedavg-0-without-b/study.lock.yaml"
    lock.write_text(lock.read_text().replace("lr: 0.001", "lr: 0.001\n  mu: 0.5"))
    runs = [run for run in index["runs"] if run["folder"] != "runs/fedavg-0"]
    runs = [run for run in runs if run["folder"] != "runs/separate-0-without-b"]
    (folder / "compare.json").write_text(json.dumps({**index, "runs": runs}))
    command = "compare fedavg-0-without-b/study.lock.yaml 'split.held_out=[]'"
    options = "--strategies separate,fedavg --seeds 0 --leave-one-site-out"
    assert f"fedmed {command} {options}" in _page(folder).text
    (folder / "compare.json").write_text(json.dumps(index))
    text = _page(folder).text
    assert "separate-0/study.lock.yaml --strategies separate,fedavg --seeds 0" in text
    assert "fedavg-0-without-b/study.lock.yaml --strategies separate,fedavg" in text


def test_public_images_are_told(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    assert "public images" not in _page(folder).text
    lock = folder / "study.lock.yaml"
    with lock.open("a") as file:
        file.write("sites: {public: z}\npublic: {fingerprint: '1'}\n")
    assert "also learned from the public images of site z" in _page(folder).text


def test_slices_of_one_patient_on_both_sides_are_confessed(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    with (folder / "study.lock.yaml").open("a") as file:
        file.write("split: {by: slices}\n")
    assert "no evidence for new patients" in _page(folder).text


def test_a_classification_has_its_own_words(tmp_path: Path) -> None:
    folder = folders.write_comparison(
        tmp_path / "c",
        ("separate", "fedavg"),
        (0,),
        plan=folders.Plan(overlays=False, num_rounds=4),
    )
    columns = ("round", "split", "site", "case_id", "label", "prediction", "score")
    for strategy, right in (("separate", 6), ("fedavg", 10)):
        rows = [
            {
                **{"round": 4, "split": "test", "site": "a", "case_id": f"{i:02d}"},
                **{"label": i % 2, "score": 0.1 + 0.05 * i},
                "prediction": i % 2 if i < right else 1 - i % 2,
            }
            for i in range(12)
        ]
        path = folder / f"runs/{strategy}-0"
        folders.write_rows(path / "cases.csv", columns, rows)
        lock = path / "study.lock.yaml"
        lock.write_text(lock.read_text().replace("segmentation", "classification"))
    text = _page(folder).text
    assert "Balanced accuracy in per cent" in text
    assert "Share of cases recognised" in text
    assert "HD95" not in text
    assert "83.33" in text


def test_a_difference_that_some_seed_denies_is_not_sold(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4, missed_case=None)
    folder = folders.write_comparison(
        tmp_path / "c", ("fedavg", "ms_net"), (0, 1), plan=plan
    )
    assert "unlikely to be chance" in _page(folder).text
    cases = folder / "runs/ms_net-1/cases.csv"
    header, *lines = cases.read_text().splitlines()
    worse = [line.split(",") for line in lines]
    for cells in worse:
        cells[5] = f"{float(cells[5]) - 0.03:.6f}"
    cases.write_text("\n".join([header, *(",".join(cells) for cells in worse)]))
    text = _page(folder).text
    assert "but not with every seed" in text
