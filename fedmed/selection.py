"""The round that validation picks; its results stand beside those of the last one.

After the last round the server sends the shared entries of the checkpoint that scored
best on the validation cases of the sites that trained. Every site evaluates them with
what it kept for itself after that round. Hospitals held out have no say in the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmed.checkpoint import Checkpoints
from fedmed.correspondence import Correspondence, RoundLog, Stamp
from fedmed.errors import StorageError
from fedmed.message import SiteId
from fedmed.round_end import FINAL_SPLITS, Columns, deliver_again, rows_of
from fedmed.strategy import Exchange

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Standing:
    """How a round did on validation cases; the larger is the better.

    A mean over fewer sites is of another question, and higher where it is the weak
    site that failed, so rounds that more sites could score come first.

    Attributes:
        num_sites: Sites that trained and have a score.
        score: Mean over them, see `fedmed.summary.score_rows`.
    """

    num_sites: int
    score: float


@dataclass(frozen=True)
class Best:
    """The best round so far; of equal ones the earliest.

    Attributes:
        round: Its number.
        standing: How it did.
    """

    round: int
    standing: Standing

    @classmethod
    def read(cls, fact: Any) -> Best | None:
        """Read what `fact` gave a checkpoint; None if it knows none."""
        if not isinstance(fact, list):
            return None
        number, num_sites, score = fact
        return cls(int(number), Standing(int(num_sites), float(score)))

    @property
    def fact(self) -> list[int | float]:
        """For a checkpoint."""
        return [self.round, self.standing.num_sites, self.standing.score]


def better(best: Best | None, number: int, standing: Standing | None) -> Best | None:
    """Give the best of the best so far and another round.

    Example:
        >>> first = better(None, 1, Standing(2, 0.9))
        >>> better(first, 2, Standing(3, 0.5)).round
        2
        >>> better(first, 2, Standing(2, 0.9)).round
        1
    """
    if standing is None or (best is not None and best.standing >= standing):
        return best
    return Best(number, standing)


@dataclass(frozen=True)
class Selected:
    """What validation picked.

    Attributes:
        round: Number of the round; None if no round has a score, or the one picked
            can no longer be read.
        score: Its score.
        rows: Its rows of selected.csv.
        missing: Site -> why it has no rows.
    """

    round: int | None = None
    score: float | None = None
    rows: tuple[Mapping[str, Any], ...] = ()
    missing: Mapping[SiteId, str] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """For the last round's line in rounds.jsonl."""
        found: dict[str, Any] = {"round": self.round, "score": self.score}
        return found | ({"missing": dict(self.missing)} if self.missing else {})


@dataclass(frozen=True)
class Selection:
    """Evaluates the best round after the last one.

    Attributes:
        post: Writes to the sites.
        checkpoints: Of the run.
        evaluated: Sites that are asked.
        columns: Columns of cases.csv.
        retries: How often a site that fails is asked again.
    """

    post: Correspondence
    checkpoints: Checkpoints
    evaluated: tuple[SiteId, ...]
    columns: tuple[str, ...]
    retries: int

    def run(
        self,
        best: Best | None,
        last: Sequence[Mapping[str, Any]],
        *,
        stamp: Stamp,
        log: RoundLog,
    ) -> Selected:
        """Evaluate the best round, unless it is the last.

        Args:
            best: Of all rounds.
            last: Rows of the last round in cases.csv.
            stamp: Of the next exchange.
            log: Of the last round; bytes are counted.
        """
        if best is None:
            return Selected()
        number, score = best.round, best.standing.score
        if number == stamp.round:
            missing = {**log.refused, **log.failed}
            there = {row["site"] for row in last}
            missing = {s: why for s, why in missing.items() if s not in there}
            return Selected(number, score, tuple(last), missing)
        try:
            states = self.checkpoints.load(number).states
        except StorageError as error:
            logger.error("validation picks round %d, but %s", number, error.message)
            return Selected()
        content = {
            "selected": number,
            "splits": list(FINAL_SPLITS),
            "weights": states.get("shared", {}),
        }
        request = Exchange("evaluate_selected", self.evaluated, content)
        sent = self.post.messages(request, self.evaluated, stamp)
        answers = deliver_again(
            self.post, sent, self.evaluated, log=log, retries=self.retries
        )
        log.exchanges += 1
        # A site that fails here took part in the last round all the same.
        own = RoundLog()
        columns = Columns(self.columns, FINAL_SPLITS, number)
        rows = [
            row
            for site in sorted(answers)
            for row in rows_of(site, answers[site], columns, own)
        ]
        return Selected(number, score, tuple(rows), {**own.refused, **own.failed})
