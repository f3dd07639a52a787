from __future__ import annotations

import torch

from fedmed.training.statistic_bank import banked, banked_sites, updated_bank


def told(rows, present):
    return {"rows": torch.tensor(rows), "present": torch.tensor(present)}


def test_rows_blend_where_they_are_present_and_stay_where_they_are_not():
    bank = updated_bank(
        {}, {"p/a": told([[1.0, 0.0], [9.0, 9.0]], [1.0, 0.0])}, momentum=0.75
    )
    assert banked_sites(bank) == ("p/a",)
    first = banked(bank, "p/a")
    assert first["rows"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert first["present"].tolist() == [1.0, 0.0]
    more = {
        "p/a": told([[0.0, 1.0], [0.5, 0.5]], [1.0, 1.0]),
        "b": told([[0.2, 0.8], [0.0, 0.0]], [1.0, 0.0]),
    }
    later = updated_bank(bank, more, momentum=0.75)
    assert banked_sites(later) == ("b", "p/a")
    # The known row blends; the row that is new is taken as it came.
    assert banked(later, "p/a")["rows"].tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert banked(later, "p/a")["present"].tolist() == [1.0, 1.0]
    absent = {"p/a": told([[7.0, 7.0], [7.0, 7.0]], [0.0, 0.0])}
    last = updated_bank(later, absent, momentum=0.75)
    assert banked(last, "p/a")["rows"].tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert banked(last, "p/a")["present"].tolist() == [1.0, 1.0]
    assert banked(last, "b").keys() == {"rows", "present"}
    assert banked(last, "c") == {}


def test_a_bank_is_a_value():
    bank = updated_bank({}, {"a": told([[1.0]], [1.0])}, momentum=0.5)
    noted = {name: tensor.clone() for name, tensor in bank.items()}
    updated_bank(bank, {"a": told([[3.0]], [1.0])}, momentum=0.5)
    torch.testing.assert_close(bank, noted, rtol=0, atol=0)


def test_momentum_zero_keeps_the_latest_and_any_rank_of_rows_works():
    rows = torch.arange(8.0).reshape(2, 2, 2)
    state = {"rows": rows, "present": torch.ones(2)}
    bank = updated_bank({}, {"a": state}, momentum=0.0)
    later = updated_bank(bank, {"a": {**state, "rows": 2 * rows}}, momentum=0.0)
    torch.testing.assert_close(banked(later, "a")["rows"], 2 * rows)
