from __future__ import annotations

from typing import Any

import pytest

from fedmed.errors import ConfigError
from fedmed.profile import Profile, check_profile, profile_of
from fedmed.study import study_from_dict


def study(mode: str = "slice", **evaluate: Any) -> dict[str, Any]:
    content = {
        "name": "x",
        "sites": {"dataset": "phantom"},
        "model": {"name": "unet", "mode": mode},
        "evaluate": evaluate,
    }
    return study_from_dict(content).to_dict()


def test_strict_is_the_default_and_what_old_runs_were() -> None:
    assert profile_of(study()) == profile_of({}) == Profile()
    assert Profile().name == "strict"


def test_legacy_is_all_habits_and_each_can_be_switched_alone() -> None:
    assert profile_of(study(profile="legacy")) == Profile(True, True, True)
    without = profile_of(study(profile="legacy", oracle_slice_range=False))
    assert without == Profile(True, False, True)
    assert without.name == "strict but skip_end_slices and batch1_at_test"
    alone = profile_of(study(bn_at_test="batch1"))
    assert alone == Profile(batch1_at_test=True)
    assert profile_of(study(profile="legacy", bn_at_test="running")) == Profile(
        True, True, False
    )


def test_the_checkpoint_that_is_best_at_the_target_is_refused_with_a_reason() -> None:
    with pytest.raises(ConfigError, match="selection on the test set"):
        study(best_on_target=True)


def test_what_a_network_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="a single row of a table"):
        check_profile(study("row", bn_at_test="batch1"))
    with pytest.raises(ConfigError, match="leaves out slices"):
        check_profile(study("image", skip_end_slices=True))
    check_profile(study("image", bn_at_test="batch1"))
    check_profile(study(profile="legacy"))
