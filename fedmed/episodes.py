"""Episodes: which sites play meta-train and which meta-test in one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
from fedmed.reduce import weighted_mean
from fedmed.replies import states_of
from fedmed.seeds import numpy_rng
from fedmed.strategy import Cohort, Replies


@dataclass(frozen=True)
class Episode:
    """One draw of two disjoint groups of sites.

    Attributes:
        meta_train: Sites whose gradient makes the inner step; at least one.
        meta_test: Sites that judge it; at least one.
    """

    meta_train: Cohort
    meta_test: Cohort

    @property
    def both(self) -> Cohort:
        """The sites of both groups."""
        members = (*self.meta_train.members, *self.meta_test.members)
        ordered = sorted(members, key=lambda member: member.site_id)
        return replace(self.meta_train, members=tuple(ordered))


def check_groups(num_meta_train: int | None, num_meta_test: int | None) -> None:
    """Refuse groups of no site.

    Raises:
        ConfigError: Naming the group.
    """
    groups = {"num_meta_train": num_meta_train, "num_meta_test": num_meta_test}
    for name, count in groups.items():
        if count is not None and count < 1:
            raise ConfigError(
                f"strategy.{name} must be >= 1 (seen: {count})",
                hint="Leave it out for the default.",
            )


def draw_episode(
    cohort: Cohort,
    index: int,
    *,
    num_meta_train: int | None = None,
    num_meta_test: int | None = None,
) -> Episode:
    """Draw meta-train and meta-test sites, anew for each step.

    The gradient of a group of one site is alone on the wire, where it can be inverted
    into images; groups have two sites where the cohort has enough.

    Args:
        cohort: The sites of the round; its seed decides, with `index`.
        index: Number of the step within the round.
        num_meta_train: Sites of the first group; None = all that are left.
        num_meta_test: Sites of the second; None = a third of the sites, at least two
            of four or more.

    Raises:
        ConfigError: If the cohort has fewer sites than are asked for.
    """
    names = cohort.site_ids
    test = num_meta_test or default_meta_test(len(names))
    train = num_meta_train or len(names) - test
    if min(train, test) < 1 or train + test > len(names):
        more = "train at more sites"
        if cohort.num_sites > len(names):
            more = f"raise sites_per_round ({cohort.num_sites} sites train)"
        raise ConfigError(
            f"an episode of {max(train, 1)} meta-train and {test} meta-test sites, "
            f"drawn from {len(names)} training site(s)",
            hint=f"Lower strategy.num_meta_test or strategy.num_meta_train, or {more}.",
        )
    order = numpy_rng(cohort.rng_seed, "episode", index).permutation(len(names))
    drawn = [names[position] for position in order]
    return Episode(
        cohort.select(tuple(sorted(drawn[:train]))),
        cohort.select(tuple(sorted(drawn[train : train + test]))),
    )


def default_meta_test(num_sites: int) -> int:
    """Meta-test sites if the study says nothing.

    Example:
        >>> [default_meta_test(n) for n in (2, 3, 4, 6, 9)]
        [1, 1, 2, 2, 3]
    """
    return 1 if num_sites < 4 else max(2, num_sites // 3)


def mean_over(
    replies: Replies, weights: Mapping[SiteId, float], section: str = "state"
) -> State | None:
    """Average what one group of an episode answered.

    Returns:
        The weighted mean; None if no site of the group is left, or none has a weight.
    """
    here = {site: weights[site] for site in replies if weights[site] > 0}
    if not here:
        return None
    states = states_of({site: replies[site] for site in here}, section)
    return weighted_mean(states, here)
