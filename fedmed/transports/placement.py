"""Which worker plays which sites, exchange by exchange.

Sites in sorted order are cut into runs of neighbours, one per worker. A site that
keeps something in the memory of its worker stays there; others may move.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping

from fedmed.message import Answer, Message, SiteId

PROBATION = 3
"""Answers that a suspect must give alone before it shares a message again."""

UNEVEN = 1.25
"""How many times its fair share a worker may get before sites move."""

Wave = dict[int, tuple[SiteId, ...]]
"""Worker -> the sites whose messages travel to it together."""


class Placement:
    """The places of a study's sites.

    Args:
        site_ids: All of them.
        num_workers: At least 1.
    """

    def __init__(self, site_ids: Collection[SiteId], num_workers: int) -> None:
        self._order = tuple(sorted(site_ids))
        self._num_workers = num_workers
        self._place = _even(self._order, num_workers)
        self._bound: set[SiteId] = set()
        self._suspects: dict[SiteId, int] = {}

    def in_waves(
        self,
        addressed: Collection[SiteId],
        run: Callable[[Wave, float | None], Mapping[SiteId, Answer]],
        *,
        timeout_s: float | None,
    ) -> dict[SiteId, Answer]:
        """Run an exchange wave by wave, and note what its answers tell.

        Args:
            addressed: Sites that get a message.
            run: Runs one wave until a moment of `time.monotonic`; None = no limit.
            timeout_s: Each wave has its own time: a suspect that hangs costs the
                others nothing.

        Returns:
            The answers, in sorted order of the sites.
        """
        answers: dict[SiteId, Answer] = {}
        for wave in self.waves(addressed):
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            answers.update(run(wave, deadline))
        for site_id, answer in answers.items():
            self.note(site_id, answer)
        return {site_id: answers[site_id] for site_id in sorted(answers)}

    def waves(self, addressed: Collection[SiteId]) -> list[Wave]:
        """Give the sites that share a message: one group per worker and wave.

        Suspects come last, each alone, when the others' answers are safely here.
        """
        sites = [site for site in self._order if site in addressed]
        self._balance(sites)
        waves: list[Wave] = [{}]
        for worker in range(self._num_workers):
            mine = [site for site in sites if self._place[site] == worker]
            trusted = tuple(s for s in mine if s not in self._suspects)
            if trusted:
                waves[0][worker] = trusted
            suspects = [s for s in mine if s in self._suspects]
            waves += [{} for _ in suspects[len(waves) - 1 :]]
            for wave, site in zip(waves[1:], suspects, strict=False):
                wave[worker] = (site,)
        return waves

    def _balance(self, sites: list[SiteId]) -> None:
        """Move free sites from workers that others would wait long for.

        Not for little, and no more than are too many: a site that moves is opened anew.
        """
        groups: list[list[SiteId]] = [[] for _ in range(self._num_workers)]
        for site in sites:
            groups[self._place[site]].append(site)
        fair = math.ceil(len(sites) / self._num_workers)
        if max(map(len, groups)) <= UNEVEN * fair:
            return
        spare: list[SiteId] = []
        for group in groups:
            free = [site for site in group if site not in self._bound]
            surplus = max(0, len(group) - fair)
            spare += free[len(free) - min(surplus, len(free)) :]
        for worker, group in enumerate(groups):
            room = max(0, fair - len(group))
            self._place.update(dict.fromkeys(spare[:room], worker))
            spare = spare[room:]

    def note(self, site_id: SiteId, answer: Answer) -> None:
        """Note whether a site is bound to its worker from now on, and its innocence."""
        if isinstance(answer, Message):
            if site_id in self._suspects:
                self._suspects[site_id] -= 1
                if not self._suspects[site_id]:
                    del self._suspects[site_id]
            if not answer.header.get("keeps", True):
                self._bound.discard(site_id)
                return
        self._bound.add(site_id)

    def suspect(self, site_ids: Collection[SiteId]) -> None:
        """Note that one of these sites ended their worker, or let it hang."""
        self._suspects.update(dict.fromkeys(site_ids, PROBATION))


def _even(sites: Collection[SiteId], num_workers: int) -> dict[SiteId, int]:
    """Cut sites into runs of neighbours whose lengths differ by at most 1.

    Example:
        >>> _even(("a", "b", "c", "d", "e"), 2)
        {'a': 0, 'b': 0, 'c': 0, 'd': 1, 'e': 1}
    """
    return {s: k * num_workers // len(sites) for k, s in enumerate(sites)}
