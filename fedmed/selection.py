"""The round that validation picks; its results stand beside those of the last one.

After the last round the server sends the shared entries of the checkpoint that scored
best on the validation cases of the sites that trained. Every site evaluates them with
what it kept for itself after that round. Hospitals held out have no say in the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmed.checkpoint import Checkpoints
from fedmed.correspondence import Correspondence, RoundLog, Stamp
from fedmed.errors import StorageError
from fedmed.message import SiteId
from fedmed.round_end import FINAL_SPLITS, Columns, deliver_again, rows_of
from fedmed.strategy import Exchange

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selected:
    """What validation picked.

    Attributes:
        round: Number of the round; None if no round has a score.
        score: Its score, see `fedmed.summary.score_rows`.
        rows: Its rows of selected.csv.
    """

    round: int | None
    score: float | None
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Selection:
    """Evaluates the best round after the last one.

    Attributes:
        post: Writes to the sites.
        checkpoints: Of the run, with the scores of earlier rounds.
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
        last: Sequence[Mapping[str, Any]],
        score: float | None,
        *,
        stamp: Stamp,
        log: RoundLog,
    ) -> Selected:
        """Pick a round, and evaluate it unless it is the last.

        Args:
            last: Rows of the last round in cases.csv.
            score: Its score; the earlier of two equal rounds is picked.
            stamp: Of the next exchange.
            log: Of the last round.
        """
        best = self.checkpoints.best()
        if best is None:
            return Selected(None if score is None else stamp.round, score, tuple(last))
        try:
            checkpoint = self.checkpoints.load(best)
        except StorageError as error:
            logger.error("validation picks round %d, but %s", best, error.message)
            return Selected(None, None, ())
        if _beats(score, checkpoint.score):
            return Selected(stamp.round, score, tuple(last))
        content = {
            "selected": best,
            "splits": list(FINAL_SPLITS),
            "weights": checkpoint.states.get("shared", {}),
        }
        request = Exchange("evaluate_selected", self.evaluated, content)
        sent = self.post.messages(request, self.evaluated, stamp)
        answers = deliver_again(
            self.post, sent, self.evaluated, log=log, retries=self.retries
        )
        log.exchanges += 1
        columns = Columns(self.columns, FINAL_SPLITS, best)
        rows = [row for site in answers for row in rows_of(
            site, answers[site], columns, log
        )]  # fmt: skip
        rows.sort(key=lambda row: str(row["site"]))
        return Selected(best, checkpoint.score, tuple(rows))


def _beats(score: float | None, other: float | None) -> bool:
    return score is not None and (other is None or score > other)
