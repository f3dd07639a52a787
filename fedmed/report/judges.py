"""Whether a single hospital judged the steps of a method that learns by episodes."""

from __future__ import annotations

from collections.abc import Mapping

from fedmed.report.rows import row_label
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.wording import listing

EPISODIC = ("masf", "meta_reg", "mldg", "saml")
"""Strategies in which some sites of a step judge what the others taught."""

FEW_SITES = 4
"""Below this number of training sites one of them judges, unless the study says more;
see `fedmed.episodes.default_meta_test`."""


def judges_notes(comparison: Comparison) -> tuple[str, ...]:
    """Say which methods let one site alone judge a step.

    What that site sends is the gradient of its own images and of nobody else's, from
    which images can be inferred; of two or more only the mean need be known.

    Args:
        comparison: The runs.

    Returns:
        One sentence, or none.
    """
    found = [entry for entry in comparison.entries if _has_one_judge(entry)]
    labels = list(dict.fromkeys(map(row_label, found)))
    if not labels:
        return ()
    return (
        f"{listing(labels)}: in each step one site alone judges what the others taught "
        "(strategy.num_meta_test), so its gradient travels alone, and images could be "
        "inferred from it. In a deployment let two judge.",
    )


def _has_one_judge(entry: Entry) -> bool:
    study = entry.run.study
    section = study.get("strategy")
    options = section if isinstance(section, Mapping) else {}
    if options.get("name") not in EPISODIC:
        return False
    asked = options.get("num_meta_test")
    if asked is not None:
        return bool(asked == 1)
    num_sites = len(study.get("data") or {}) - len(entry.run.held_out)
    return 0 < num_sites < FEW_SITES
