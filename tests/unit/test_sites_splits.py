from pathlib import Path

import pytest

from fedmed.case import Case, CaseRef
from fedmed.errors import ConfigError, DataError
from sites.splits import SPLITS, count_subjects, read_assignment, split_by_subject

THIRDS = {"train": 0.6, "validation": 0.2, "test": 0.2}


def never_read() -> Case:
    raise AssertionError("splitting must not open a case")


def ref(case_id, subject_id):
    return CaseRef(case_id, subject_id, (), never_read)


def refs(num_subjects, sessions=1):
    return [
        ref(f"s{number:02d}v{session}", f"s{number:02d}")
        for number in range(num_subjects)
        for session in range(sessions)
    ]


def names(splits):
    return {name: [case.case_id for case in splits[name]] for name in splits}


@pytest.mark.parametrize("seed", range(20))
def test_no_subject_is_on_two_sides_and_no_case_is_lost(seed):
    cases = refs(7, sessions=3)
    splits = split_by_subject(cases, THIRDS, seed=seed, site_id="a")
    sides = [{case.subject_id for case in splits[name]} for name in SPLITS]
    assert [len(side) for side in sides] == [4, 1, 2]
    assert len(set().union(*sides)) == 7
    divided = [case.case_id for name in SPLITS for case in splits[name]]
    assert sorted(divided) == sorted(case.case_id for case in cases)


def test_the_order_of_the_files_does_not_matter():
    cases = refs(9, sessions=2)
    forward = split_by_subject(cases, THIRDS, seed=3, site_id="a")
    backward = split_by_subject(cases[::-1], THIRDS, seed=3, site_id="a")
    assert names(forward) == names(backward)


def test_seed_and_site_decide_who_goes_where():
    cases = refs(12)
    drawn = {
        str(names(split_by_subject(cases, THIRDS, seed=seed, site_id=site)))
        for seed in (0, 1)
        for site in ("a", "b")
    }
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("num", "fractions", "expected"),
    [
        (0, THIRDS, (0, 0, 0)),
        (1, THIRDS, (1, 0, 0)),
        (2, THIRDS, (1, 0, 1)),
        (3, THIRDS, (1, 1, 1)),
        (10, THIRDS, (6, 2, 2)),
        (1, {"test": 1.0}, (0, 0, 1)),
        (5, {"test": 1.0}, (0, 0, 5)),
        (5, {"train": 1.0}, (5, 0, 0)),
        (2, {"train": 0.01, "validation": 0.98, "test": 0.01}, (1, 0, 1)),
        (2, {"train": 0.5, "validation": 0.4999, "test": 0.0001}, (1, 0, 1)),
        (30, {"train": 0.7, "validation": 0.1, "test": 0.2}, (21, 3, 6)),
    ],
)
def test_subjects_are_shared_out_as_promised(num, fractions, expected):
    counts = count_subjects(num, fractions)
    assert tuple(counts[name] for name in SPLITS) == expected


@pytest.mark.parametrize("num", range(40))
def test_counts_always_add_up(num):
    for train in (0.0, 0.1, 1 / 3, 0.55, 0.8):
        for test in (0.0, 0.1, 0.2):
            fractions = {
                "train": train,
                "test": test,
                "validation": 1 - train - test,
            }
            counts = count_subjects(num, fractions)
            assert sum(counts.values()) == num
            assert min(counts.values()) >= 0
            assert all(counts[name] == 0 for name in SPLITS if fractions[name] == 0)


def test_sessions_of_the_only_subject_all_go_to_train(caplog):
    with caplog.at_level("INFO"):
        splits = split_by_subject(refs(1, sessions=2), THIRDS, seed=0, site_id="milan")
    assert names(splits) == {
        "train": ["s00v0", "s00v1"],
        "validation": [],
        "test": [],
    }
    assert "milan has 1 subject(s): its validation and test split" in caplog.text


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.5, "test": 0.4}, "sum to 1, seen 0.9"),
        ({"train": 1.5, "test": -0.5}, "must lie in"),
        ({"training": 1.0}, "unknown split 'training'"),
    ],
)
def test_impossible_fractions_are_refused(fractions, message):
    with pytest.raises(ConfigError, match=message):
        split_by_subject(refs(4), fractions, seed=0, site_id="a")


def test_a_fixed_split_is_followed(tmp_path: Path):
    table = tmp_path / "split.csv"
    table.write_text(
        "site,case_id,split\na,s00v0,test\na,s01v0,train\nb,s00v0,train\n"
        "a,s99v0,validation\n"
    )
    assignment = read_assignment(table, site_id="a")
    splits = split_by_subject(
        refs(2), THIRDS, seed=0, site_id="a", assignment=assignment
    )
    assert names(splits) == {"train": ["s01v0"], "validation": [], "test": ["s00v0"]}


def test_a_fixed_split_that_divides_a_subject_is_refused():
    assignment = {"s00v0": "train", "s00v1": "test"}
    with pytest.raises(DataError, match="one subject into test and train"):
        split_by_subject(
            refs(1, sessions=2), THIRDS, seed=0, site_id="a", assignment=assignment
        )


def test_a_fixed_split_that_leaves_out_a_case_is_refused():
    with pytest.raises(DataError, match=r"leaves out 1 of 2 case\(s\), first s01v0"):
        split_by_subject(
            refs(2), THIRDS, seed=0, site_id="a", assignment={"s00v0": "train"}
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,split\na,train\n", "no split table"),
        ("", "no split table"),
        ("case_id,split\na,training\n", "split 'training' of case a is unknown"),
        ("case_id,split\na,train\na,train\n", "names case a twice"),
    ],
)
def test_a_damaged_split_table_is_refused(tmp_path, text, message):
    table = tmp_path / "split.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=message):
        read_assignment(table, site_id="a")
