"""Profiles of evaluation: how published tables were measured, and how ours are.

The public code of several publications leaves the first and last slice of a scan
unpredicted, cuts scans to the slices that show the organ, and normalises each test
slice by its own statistics. `legacy` does the same, to see how much of a published
number is due to it; `strict`, the default, does none of it. Each habit can be switched
alone. That code also reports the checkpoint that scores best at the hospital it tests
on: that is selection on the test set, and no profile does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmed.errors import ConfigError

STRICT = "strict"
LEGACY = "legacy"


@dataclass(frozen=True)
class Profile:
    """Which habits an evaluation has.

    Attributes:
        skip_end_slices: The first and the last slice are not predicted. Networks that
            see three adjacent slices were run so, where others pad.
        oracle_slice_range: Predictions count between the first and the last slice that
            the label shows an organ on. A hospital does not know that range.
        batch1_at_test: Batch normalisation takes mean and variance from each single
            test slice (patch, image) instead of those learned in training.
    """

    skip_end_slices: bool = False
    oracle_slice_range: bool = False
    batch1_at_test: bool = False

    @property
    def name(self) -> str:
        """Give "strict", "legacy", or the habits by name.

        Example:
            >>> Profile().name, Profile(True, True, True).name
            ('strict', 'legacy')
            >>> Profile(oracle_slice_range=True).name
            'strict but oracle_slice_range'
        """
        on = [habit for habit, is_on in vars(self).items() if is_on]
        if len(on) == len(vars(self)):
            return LEGACY
        return " but ".join(filter(None, (STRICT, " and ".join(on))))

    @property
    def cuts(self) -> bool:
        """Whether some slices do not count."""
        return self.skip_end_slices or self.oracle_slice_range


def profile_of(study: Mapping[str, Any]) -> Profile:
    """Read the profile of a study, or of a run's lock file.

    Args:
        study: Its mapping; runs of versions that knew no profile were strict.
    """
    section = study.get("evaluate") or {}
    is_legacy = section.get("profile") == LEGACY

    def asked(key: str, legacy: Any) -> bool:
        value = section.get(key)
        return is_legacy if value is None else bool(value == legacy)

    return Profile(
        asked("skip_end_slices", True),
        asked("oracle_slice_range", True),
        asked("bn_at_test", "batch1"),
    )


def check_profile(study: Mapping[str, Any]) -> None:
    """Refuse habits that a study's network or task cannot have.

    Raises:
        ConfigError: If there are no slices, or a table's row has no variance.
    """
    profile = profile_of(study)
    mode = study["model"]["mode"]
    if profile.batch1_at_test and mode == "row":
        raise ConfigError(
            "evaluate.bn_at_test: a single row of a table has no variance"
        )
    if profile.cuts and mode in {"row", "image"}:
        raise ConfigError(
            f"evaluate.profile {profile.name!r} leaves out slices, and model.mode "
            f"{mode!r} knows none"
        )
