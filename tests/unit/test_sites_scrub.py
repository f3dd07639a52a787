"""S1: no patient, path or identifier in what a site says about an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmed import storage
from fedmed.errors import (
    CaseError,
    ConfigError,
    DataError,
    FedMedError,
    PolicyError,
    StorageError,
    WireError,
)
from fedmed.storage import write_atomic
from sites.scrub import MAX_LENGTH, describe, scrub, scrub_text

SENTINELS = (
    "SMITH", "Smith", "smith", "John", "JANE", "Doe", "DOE", "4711", "1970",
    "0012345", "hospital", "1.2.840", "charite",
)  # fmt: skip

LEAKS = [
    "/data/hospital/SMITH_John/t2.nii.gz is cut off",
    "cannot read /data/hospital/John Smith/t2 axial.nii.gz: truncated",
    "cannot read '/data/hospital/John Smith/t2 axial.nii.gz': truncated",
    'cannot read "hospital/John Smith/scan"',
    "hospital/smith/scan.nii.gz and mask differ",
    "mask of ../hospital/smith differs",
    "C:\\hospital\\Smith\\scan.dcm is broken",
    "\\\\server\\hospital\\Smith is broken",
    "~/hospital/smith/x",
    "$HOME/hospital/smith",
    "see file:///hospital/smith",
    "/hospital/DOE/John Smith",
    "file smith_john_19700101.nii.gz is no image",
    "file John Smith.nii.gz is no image",
    "smith.dcm: no pixel data",
    "Smith.NII.GZ: no pixel data",
    "DOE^JANE^^ is in the header",
    "the header says 'John Smith'",
    "the header says 'Smith, John'",
    "UID 1.2.840.113619.2.55.3 occurs twice",
    "MRN 0012345 occurs twice",
    "MRN0012345 occurs twice",
    "patient_id=P4711 occurs twice",
    "Patient ID: 4711 occurs twice",
    "born 1970-01-31, seen 31.01.1970 and 01/31/1970",
    "number 00123456 occurs twice",
    "ask smith@charite.example",
    "smith.backup.nii.gz and a.smith.dcm differ",
    "line one\n/hospital/smith\nline three",
]


@pytest.mark.parametrize("text", LEAKS)
def test_sentinels_do_not_leave(text: str) -> None:
    for kind in (CaseError, DataError, WireError, StorageError, FedMedError):
        out = scrub(kind(text, hint="/hospital/smith"))
        assert not [word for word in SENTINELS if word in out], out
        assert "\n" not in out


@pytest.mark.parametrize(
    "text",
    [
        "label 3 is not in the card",
        "2 channel(s), the card says 1",
        "a Weights message may not leave: rule 'allowed_kinds' of the site's policy",
        "spacing is 0.625 x 0.625 x 3.6 mm, expected 0.123456789",
        "its norm is 1.23e+09; at most 3/4",
        "did you mean 'Weights'? Known: Weights, Gradient, Metrics",
        "round-000012.safetensors is damaged: its checksum does not fit",
        "participants.tsv has no column 'site'",
        "case12.nii.gz and policy.yaml are there",
        "12 of 40 cases are unusable",
        "version 1.2.3 is too old, 2.13.0 is not",
    ],
)
def test_what_helps_stays(text: str) -> None:
    assert scrub(CaseError(text)) == text


def test_what_stands_around_a_file_stays() -> None:
    out = scrub_text("cannot read smith.dcm: 3 of 4 slices")
    assert out == "cannot read <file>.dcm: 3 of 4 slices"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("case Ann-Lee: empty", "case <removed>: empty"),
        ("case ann-lee_2: empty", "case <removed>_2: empty"),
        ("case ann\tlee: empty", "case <removed>: empty"),
        ("site ann: 7 of 17 cases", "site ann: <removed> of 17 cases"),
        ("x" * 1995 + " ann-lee", "x" * (MAX_LENGTH - 3) + "..."),
    ],
)
def test_names_go_however_they_are_written(text: str, expected: str) -> None:
    names = ["ann-lee", "ann\tlee", "7", "ann"]
    assert scrub_text(text, keep=["ann"], remove=names) == expected


def test_where_nobody_knows_the_names_our_words_stay_inside() -> None:
    error = DataError("two files stand for jane_doe")
    told = describe(error, remove=None)
    assert told.detail == "DataError outside our code"
    assert told.reason == "raised"


def test_words_to_keep_and_words_to_remove() -> None:
    error = CaseError("site prostate/rumc: entry enc/conv.w of case17 at x/enc/conv.w")
    out = scrub(error, keep=["prostate/rumc", "enc/conv.w"], remove=["case17"])
    assert out == "site prostate/rumc: entry enc/conv.w of <removed> at <path>"


def test_a_kept_word_does_not_save_a_longer_path() -> None:
    out = scrub_text("/prostate/rumc/smith", keep=["prostate/rumc"])
    assert out == "<path>"


def test_a_long_text_is_cut() -> None:
    assert len(scrub(CaseError("word " * 1000))) == MAX_LENGTH


def test_the_place_is_the_innermost_line_of_ours(tmp_path: Path) -> None:
    def chunks():  # type: ignore[no-untyped-def]
        yield b"x"
        raise KeyError("smith")

    with pytest.raises(KeyError) as caught:
        write_atomic(tmp_path / "x", chunks())
    out = scrub(caught.value)
    assert out.startswith("KeyError in fedmed.storage:")
    number = int(out.rpartition(":")[2])
    line = Path(storage.__file__).read_text().splitlines()[number - 1]
    assert "for chunk in chunks" in line
    assert "smith" not in out


def test_an_exception_from_elsewhere_gives_its_type_only() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Path("/hospital/smith").read_text()
    assert scrub(caught.value) == "FileNotFoundError outside our code"


def test_an_exception_whose_text_raises_is_described() -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("smith")

    assert scrub(OddError()) == "OddError outside our code"


@pytest.mark.parametrize(
    ("error", "reason", "fatal"),
    [
        (PolicyError("kind 'x' at /hospital/smith"), "refused", True),
        (ConfigError("unknown key in /hospital/smith"), "raised", True),
        (WireError("damaged at /hospital/smith"), "wire", False),
        (CaseError("/hospital/smith"), "raised", False),
        (KeyError("/hospital/smith"), "raised", False),
        (SystemExit("/hospital/smith"), "raised", False),
    ],
)
def test_describe_gives_a_failure(
    error: BaseException, reason: str, fatal: bool
) -> None:
    failure = describe(error)
    assert (failure.reason, failure.fatal) == (reason, fatal)
    assert "smith" not in failure.detail
