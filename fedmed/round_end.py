"""The end of a round: sites file what they keep and are evaluated, in one exchange."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedmed.correspondence import Correspondence, RoundLog, Stamp, failures, told
from fedmed.errors import QuorumError, WireError
from fedmed.message import Answer, Message, SiteFailure, SiteId
from fedmed.payload import Metrics, expect, from_message
from fedmed.strategy import Exchange, Server
from fedmed.study import Study

logger = logging.getLogger(__name__)

FINAL_SPLITS = ("validation", "test")
"""What is evaluated after the last round."""


@dataclass(frozen=True)
class RoundEnd:
    """Ends the rounds of one study.

    Attributes:
        study: The study.
        post: Writes to the sites.
        evaluated: Every real site that is evaluated, training or held out.
        columns: Columns of cases.csv.
        best: The round that validation has picked so far, if the study wants it:
            sites then do not delete what they kept after it.
    """

    study: Study
    post: Correspondence
    evaluated: tuple[SiteId, ...]
    columns: tuple[str, ...]
    best: int | None = None

    def run(
        self, server: Server, stamp: Stamp, log: RoundLog, *, files: bool
    ) -> list[Mapping[str, Any]]:
        """Let the sites file their private state and evaluate, in one exchange.

        Asked are the sites that took part and keep something, at a checkpoint also
        those that have not filed what they kept earlier, and all that are evaluated.

        Args:
            server: After the round.
            stamp: Of this exchange.
            log: Of the round.
            files: Whether the round is checkpointed.

        Returns:
            Rows of cases.csv.

        Raises:
            QuorumError: If a site that took part, or has to file, cannot do so.
        """
        number, post = stamp.round, self.post
        splits = self._splits(number)
        # A site that was lost on the way has nothing to file: it is evaluated as it
        # was before the round, and its failure costs nobody the round.
        for site in {*log.refused, *log.failed}:
            post.tokens.pop(site, None)
        keeping = {site for site in post.tokens if post.kept.tells[site]}
        owing = post.kept.unfiled if files else set()
        targets = sorted({*keeping, *owing, *(self.evaluated if splits else ())})
        content: dict[str, Any] = {
            "splits": splits,
            "overlays": number == self.study.rounds,
            "file": files,
            "weights": server.shared if splits else {},
        }
        if self.best is not None:
            content["best"] = self.best
        request = Exchange("end_round", tuple(targets), content)
        sent = post.messages(request, targets, stamp)
        needed = {*post.tokens, *owing}
        retries = self.study.tolerance.retries
        answers = deliver_again(post, sent, needed, log=log, retries=retries)
        rows: list[Mapping[str, Any]] = []
        for site in sorted(answers):
            if site in needed:
                _require_answer(site, answers[site], number)
            columns = Columns(self.columns, tuple(splits), number)
            rows += rows_of(site, answers[site], columns, log)
        post.kept.note(number, keeping, filed=files)
        log.exchanges += bool(sent)
        return rows

    def _splits(self, number: int) -> list[str]:
        """What is evaluated after a round."""
        if number == self.study.rounds:
            return list(FINAL_SPLITS)
        return [] if number % self.study.evaluate.every else ["validation"]


@dataclass(frozen=True)
class Columns:
    """What the rows of an evaluation must look like.

    Attributes:
        names: Columns of cases.csv.
        splits: What was asked for.
        round: Its number.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    round: int


def deliver_again(
    post: Correspondence,
    sent: Mapping[SiteId, Message],
    needed: Container[SiteId],
    *,
    log: RoundLog,
    retries: int,
) -> dict[SiteId, Answer]:
    """Deliver what follows the training of a round; ask again where that may help.

    A site may file the same state twice, or be evaluated twice, so asking again is
    harmless.

    Args:
        post: Writes to the sites.
        sent: Message by site.
        needed: Sites that are asked again if they fail.
        log: Of the round; bytes are counted.
        retries: How often.
    """
    answers = post.deliver(sent)
    log.count(sent, answers)
    for _ in range(retries):
        again = {
            site: sent[site]
            for site, answer in answers.items()
            if isinstance(answer, SiteFailure) and not answer.fatal and site in needed
        }
        if not again:
            break
        logger.warning(
            "asking again for the end of the round: %s",
            told(failures({site: answers[site] for site in again})),
        )
        more = post.deliver(again)
        log.count(again, more)
        answers.update(more)
    return answers


def rows_of(
    site: SiteId, answer: Answer, columns: Columns, log: RoundLog
) -> list[Mapping[str, Any]]:
    """Give the checked rows of one site; none, with the reason noted, if it failed."""
    number = columns.round
    if isinstance(answer, SiteFailure):
        why = f"{answer.reason} while evaluating: {answer.detail}"
        logger.error("round %d: site %s has no result: %s", number, site, why)
        if site not in log.refused:
            log.failed.setdefault(site, why)
        return []
    try:
        rows = expect(from_message(answer), Metrics).rows
        check_rows(rows, columns.names, columns.splits)
    except WireError as error:
        why = f"its results: {error.message}"
        logger.error("round %d: site %s has no result: %s", number, site, why)
        log.refused.setdefault(site, why)
        return []
    return [{**row, "round": number, "site": site} for row in rows]


def check_rows(
    rows: Iterable[Any], columns: Iterable[str], splits: tuple[str, ...]
) -> None:
    """Check what a site says about its cases before it becomes a result.

    Args:
        rows: As they came.
        columns: Of cases.csv; all but "round" and "site" must be there, no others.
        splits: What was asked for.

    Raises:
        WireError: If a row has other columns, is of another split, or has a Dice
            outside [0, 1]. Never says what a row holds beyond that.
    """
    expected = set(columns) - {"round", "site"}
    for row in rows:
        if not isinstance(row, Mapping):
            raise WireError("a row is no mapping")
        if set(row) != expected:
            wrong = sorted(str(name)[:40] for name in set(row) ^ expected)
            raise WireError(f"a row has other columns than expected: {wrong[:3]}")
        if row["split"] not in splits:
            seen = str(row["split"])[:40]
            raise WireError(f"a row is of split {seen!r}, which was not asked for")
        if "dice" in expected and not _is_dice(row["dice"]):
            seen = str(row["dice"])[:40]
            raise WireError(f"a Dice is {seen}, which does not lie in [0, 1]")


def _is_dice(value: Any) -> bool:
    """NaN stands for a class that neither the label nor the prediction shows."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isnan(value) or 0 <= value <= 1


def _require_answer(site: SiteId, answer: Answer, number: int) -> None:
    """End the run if a site that took part, or still has to file, cannot do so."""
    if isinstance(answer, SiteFailure):
        raise QuorumError(
            f"round {number}: site {site} could not end the round "
            f"({answer.reason}: {answer.detail})",
            hint="The last checkpoint is intact; go on with --resume.",
        )
