"""Whether a single hospital taught or judged in a method that learns by episodes."""

from __future__ import annotations

from collections.abc import Mapping

from fedmed.episodes import default_meta_test
from fedmed.report.rows import row_label
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.wording import listing

EPISODIC = ("masf", "meta_reg", "mldg", "saml")
"""Strategies in which some sites of a step judge what the others taught."""


def judges_notes(comparison: Comparison) -> tuple[str, ...]:
    """Say which methods let one site alone judge a step, or teach in it.

    What that site sends is the gradient of its own images and of nobody else's, from
    which images can be inferred; of two or more only the mean need be known.

    Args:
        comparison: The runs.

    Returns:
        One sentence, or none.
    """
    by_part: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for part in _played_alone(entry):
            by_part.setdefault(part, []).append(row_label(entry))
    return tuple(
        f"{listing(list(dict.fromkeys(labels)))}: in each step one site alone {part}"
        for part, labels in by_part.items()
    )


_TRAVELS = (
    ", so its gradient travels alone, and images could be inferred from it. In a "
    "deployment let two sites or more play each part."
)
_JUDGES = f"judges what the others taught (strategy.num_meta_test){_TRAVELS}"
_TEACHES = f"teaches what the others judge (strategy.num_meta_train){_TRAVELS}"
_TEACHES_A_HEAD = (
    "teaches the head that others judge, as the method has it: a few steps of its own "
    "on that head travel alone, and its images could in part be inferred from them."
)


def _played_alone(entry: Entry) -> tuple[str, ...]:
    """The parts of an episode that one site has to itself."""
    study = entry.run.study
    section = study.get("strategy")
    options = section if isinstance(section, Mapping) else {}
    if options.get("name") not in EPISODIC:
        return ()
    num_sites = len(study.get("data") or {}) - len(entry.run.held_out)
    drawn = study.get("sites_per_round")
    num_sites = min(num_sites, drawn) if isinstance(drawn, int) else num_sites
    if num_sites < 2:
        return ()
    judging = options.get("num_meta_test") or default_meta_test(num_sites)
    teaching = options.get("num_meta_train") or num_sites - judging
    if options.get("name") == "meta_reg":
        judges = (_JUDGES,) if min(judging, num_sites - 1) == 1 else ()
        return (*judges, _TEACHES_A_HEAD)
    parts = {_JUDGES: judging, _TEACHES: teaching}
    return tuple(part for part, number in parts.items() if number == 1)
