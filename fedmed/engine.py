"""The engine: rounds, retries, checks, evaluation and checkpoints.

It drives a strategy's server half over a transport. It knows no hospital and no named
algorithm; every published idea lives in a strategy.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedmed import seeds
from fedmed.checkpoint import Checkpoint, Checkpoints
from fedmed.errors import QuorumError, ResumeError, SiteError, WireError
from fedmed.gate import Expectation, screen
from fedmed.message import Answer, Message, SiteFailure, SiteId, State
from fedmed.participation import draw
from fedmed.payload import Metrics, expect, from_message
from fedmed.replies import Replies
from fedmed.runfolder import Observer, RunFolder
from fedmed.strategy import (
    Cohort,
    Exchange,
    Member,
    Server,
    ServerHalf,
    Strategy,
)
from fedmed.study import Study
from fedmed.transports.transport import Transport

logger = logging.getLogger(__name__)


@dataclass
class RoundLog:
    """What happened in one attempt at a round."""

    losses: dict[SiteId, float] = field(default_factory=dict)
    bytes_down: dict[SiteId, int] = field(default_factory=dict)
    bytes_up: dict[SiteId, int] = field(default_factory=dict)
    refused: dict[SiteId, str] = field(default_factory=dict)
    failed: dict[SiteId, str] = field(default_factory=dict)
    exchanges: int = 0
    is_hopeless: bool = False

    def count(self, sent: Mapping[SiteId, Message], came: Mapping[SiteId, Any]) -> None:
        """Add the bytes of one exchange."""
        for site, message in sent.items():
            self.bytes_down[site] = self.bytes_down.get(site, 0) + message.num_bytes
        for site, answer in came.items():
            if isinstance(answer, Message):
                self.bytes_up[site] = self.bytes_up.get(site, 0) + answer.num_bytes


class RoundFailedError(Exception):
    """Too few sites were left in one attempt at a round."""


@dataclass(frozen=True)
class Ended:
    """A round that is over.

    Attributes:
        server: The server after it.
        record: Its line in rounds.jsonl.
        rows: Its rows in cases.csv.
        filed: Whether the sites filed what they keep, so that it can be checkpointed.
    """

    server: Server
    record: dict[str, Any]
    rows: list[Mapping[str, Any]]
    filed: bool


@dataclass
class Kept:
    """What the server knows of what the sites keep: after which round, and where.

    Attributes:
        rounds: Site -> the last round after which it kept something new.
        unfiled: Sites whose newest state is in memory only.
        tells: Site -> whether its last reply said that it keeps something.
    """

    rounds: dict[SiteId, int] = field(default_factory=dict)
    unfiled: set[SiteId] = field(default_factory=set)
    tells: dict[SiteId, bool] = field(default_factory=dict)

    def note(self, number: int, sites: Iterable[SiteId], *, filed: bool) -> None:
        """Note which sites kept something new after a round."""
        for site in sites:
            self.rounds[site] = number
            self.unfiled.add(site)
        if filed:
            self.unfiled.clear()


@dataclass
class Engine:
    """Runs the rounds of one study.

    Attributes:
        study: The study.
        strategy: Its method.
        transport: Open transport to the hosts.
        folder: Where results go.
        members: Training sites and their registered numbers of examples; a round is
            for a draw of them if the study says so.
        evaluated: Every real site that is evaluated, training or held out.
        observer: Sees progress.
        columns: Columns of cases.csv.
        score: Turns one site's validation rows into its score.
        should_stop: Asked between rounds; True ends the run, resumable.
        checkpoints: Of the run folder, if they were opened before.
    """

    study: Study
    strategy: Strategy
    transport: Transport
    folder: RunFolder
    members: tuple[Member, ...]
    evaluated: tuple[SiteId, ...]
    observer: Observer
    columns: tuple[str, ...]
    score: Callable[[list[Mapping[str, Any]]], float]
    should_stop: Callable[[], bool] = lambda: False
    checkpoints: Checkpoints | None = None
    _tokens: dict[SiteId, str] = field(default_factory=dict)
    _kept: Kept = field(default_factory=Kept)
    _first_steps: list[int] = field(default_factory=lambda: [0])

    def run(self, server: Server, best: float | None = None) -> tuple[Server, bool]:
        """Run all rounds after `server.round`; returns the server and "finished"."""
        checkpoints = self.checkpoints or Checkpoints(self.folder.checkpoints)
        if server.round == 0 and checkpoints.is_empty():
            self._save(checkpoints, server, None)
        is_saved = True
        while server.round < self.study.rounds:
            if is_saved and self.should_stop():
                return server, False
            ended = self._round(server)
            server, is_saved = ended.server, ended.filed
            self.folder.append_cases(self.columns, ended.rows, sync=is_saved)
            self.folder.append_round(ended.record, sync=is_saved)
            if is_saved:
                value = ended.record["score"]
                is_best = value is not None and (best is None or value > best)
                best = value if is_best else best
                self._save(checkpoints, server, best, is_best=is_best)
            self.observer.round_finished(ended.record)
        return server, True

    def _save(
        self,
        checkpoints: Checkpoints,
        server: Server,
        best: float | None,
        *,
        is_best: bool = False,
    ) -> None:
        states = {"shared": server.shared, "memory": server.memory}
        checkpoints.save(
            server.round, states, {"best": best}, score=best if is_best else None
        )

    def _files(self, number: int) -> bool:
        """Whether a round is checkpointed: by its number, or because it is the last."""
        every = self.study.checkpoint.every
        if number == self.study.rounds or number % every == 0:
            return True
        return self.should_stop()

    def _round(self, server: Server) -> Ended:
        number = server.round + 1
        started = time.monotonic()
        self.observer.round_started(number)
        for attempt in range(self.study.tolerance.retries + 1):
            log = RoundLog()
            self._tokens = {}
            try:
                after = self._attempt(server, number, attempt, log)
                break
            except RoundFailedError as error:
                logger.warning("round %d, attempt %d: %s", number, attempt + 1, error)
                reason = str(error)
                if log.is_hopeless:
                    raise _below_quorum(number, reason) from None
        else:
            raise _below_quorum(number, reason)
        after = replace(after, round=number)
        filed = self._files(number)
        rows = self._end_round(after, (number, attempt), log, files=filed)
        record = self._record(number, attempt, log, rows)
        record["seconds"] = round(time.monotonic() - started, 3)
        return Ended(after, record, rows, filed)

    def _attempt(
        self, server: Server, number: int, attempt: int, log: RoundLog
    ) -> Server:
        cohort = self._cohort(number)
        alive = cohort.site_ids
        half: ServerHalf = self.strategy.run_round(server, cohort)
        try:
            request = next(half)
            while True:
                targets = tuple(s for s in request.site_ids if s in alive)
                replies = self._exchange(
                    request, targets, (number, attempt), server, log
                )
                lost = {*log.refused, *log.failed}
                alive = tuple(site for site in alive if site not in lost)
                self._require_quorum(len(alive), len(cohort.members), log)
                request = half.send(replies)
        except StopIteration as end:
            result: Server = end.value
            return result

    def _cohort(self, number: int) -> Cohort:
        """The sites of a round: all that train, or the study's draw of them."""
        drawn = self._drawn(number)
        return Cohort(
            drawn,
            steps=self._steps(drawn),
            round=number,
            rng_seed=seeds.derive(self.study.seed, "strategy", number),
            num_sites=len(self.members),
            first_step=self._first_step(number),
        )

    def _drawn(self, number: int) -> tuple[Member, ...]:
        study = self.study
        return draw(self.members, study.sites_per_round, seed=study.seed, number=number)

    def _first_step(self, number: int) -> int:
        """Count the steps of all rounds before; rounds may differ in length."""
        found = self._first_steps
        while len(found) < number:
            found.append(found[-1] + self._steps(self._drawn(len(found))))
        return found[number - 1]

    def _steps(self, members: tuple[Member, ...]) -> int:
        train = self.study.train
        if train.local_steps is not None:
            return train.local_steps
        largest = max(member.num_examples for member in members)
        return max(1, math.ceil((train.local_epochs or 1) * largest / train.batch_size))

    def _require_quorum(self, num_alive: int, num_asked: int, log: RoundLog) -> None:
        needed = math.ceil(self.study.tolerance.quorum * num_asked - 1e-9)
        if num_alive < max(1, needed):
            problems = {**log.failed, **log.refused}
            raise RoundFailedError(
                f"{num_alive} of {num_asked} sites are usable, the quorum is "
                f"{needed} ({told(problems)})"
            )

    def _exchange(
        self,
        request: Exchange,
        targets: tuple[SiteId, ...],
        stamp: tuple[int, int],
        server: Server,
        log: RoundLog,
    ) -> Replies:
        sent = self._messages(request, targets, stamp, log.exchanges)
        answers = self._deliver(sent, server.shared)
        log.count(sent, answers)
        log.failed.update(failures(answers))
        log.is_hopeless |= any(
            isinstance(answer, SiteFailure) and answer.fatal
            for answer in answers.values()
        )
        messages = {s: a for s, a in answers.items() if isinstance(a, Message)}
        accepted, refused = self._screen(messages, server, request)
        log.refused.update(refused)
        for site, message in accepted.items():
            self._tokens[site] = str(sent[site].header["token"])
            self._kept.tells[site] = bool(message.header.get("keeps", True))
            loss = message.header.get("values", {}).get("loss")
            if loss is not None:
                log.losses[site] = float(loss)
        log.exchanges += 1
        self.observer.exchanged(stamp[0], log.exchanges, log.losses)
        return Replies(accepted)

    def _messages(
        self,
        request: Exchange,
        targets: Iterable[SiteId],
        stamp: tuple[int, int],
        exchange: int,
    ) -> dict[SiteId, Message]:
        """Write the messages; sites that are told the same share one object."""
        common = flattened(request.content)
        number, attempt = stamp
        first_step = self._first_step(number)
        alike: dict[tuple[str, int], Message] = {}
        sent = {}
        for site in targets:
            token = self._tokens.get(site, "")
            # Who keeps nothing has staged nothing to go on from.
            after = token if self._kept.tells.get(site, True) else ""
            version = self._kept.rounds.get(site, 0)
            content = content_for(site, request, common)
            if content is common and (after, version) in alike:
                sent[site] = alike[after, version]
                continue
            header = {
                "round": number,
                "token": f"{number}.{attempt}.{exchange}",
                "after": after,
                "version": version,
                "first_step": first_step,
                "values": content.values,
                "states": content.states,
            }
            sent[site] = Message(request.action, header, content.tensors)
            if content is common:
                alike[after, version] = sent[site]
        return sent

    def _deliver(
        self, sent: Mapping[SiteId, Message], reference: State | None = None
    ) -> dict[SiteId, Answer]:
        if not sent:
            return {}
        return self.transport.exchange(
            sent, timeout_s=self.study.tolerance.timeout_s, reference=reference
        )

    def _screen(
        self, messages: Mapping[SiteId, Message], server: Server, request: Exchange
    ) -> tuple[dict[SiteId, Message], dict[SiteId, str]]:
        expectation = Expectation(
            reference=server.shared,
            registered={m.site_id: m.num_examples for m in self.members},
            norm_factor=self.study.tolerance.norm_factor,
            alike=request.alike,
            sends=request.sends,
        )
        accepted, refused = screen(messages, expectation)
        for site, why in refused.items():
            logger.warning("the reply of site %s was refused: %s", site, why)
        return dict(accepted), dict(refused)

    def _end_round(
        self, server: Server, stamp: tuple[int, int], log: RoundLog, *, files: bool
    ) -> list[Mapping[str, Any]]:
        """Let the sites file their private state and evaluate, in one exchange.

        Asked are the sites that took part and keep something, at a checkpoint also
        those that have not filed what they kept earlier, and all that are evaluated.
        """
        number = stamp[0]
        splits = self._splits(number)
        # A site that was lost on the way has nothing to file: it is evaluated as it
        # was before the round, and its failure costs nobody the round.
        for site in {*log.refused, *log.failed}:
            self._tokens.pop(site, None)
        keeping = {site for site in self._tokens if self._kept.tells[site]}
        owing = self._kept.unfiled if files else set()
        targets = sorted({*keeping, *owing, *(self.evaluated if splits else ())})
        content: dict[str, Any] = {
            "splits": splits,
            "overlays": number == self.study.rounds,
            "file": files,
            "weights": server.shared if splits else {},
        }
        request = Exchange("end_round", tuple(targets), content)
        sent = self._messages(request, targets, stamp, log.exchanges)
        needed = {*self._tokens, *owing}
        answers = self._deliver_again(sent, needed, log)
        rows: list[Mapping[str, Any]] = []
        for site in sorted(answers):
            if site in needed:
                _require_answer(site, answers[site], number)
            rows += self._rows(site, answers[site], tuple(splits), number, log)
        self._kept.note(number, keeping, filed=files)
        log.exchanges += bool(sent)
        return rows

    def _splits(self, number: int) -> list[str]:
        """What is evaluated after a round."""
        if number == self.study.rounds:
            return ["validation", "test"]
        return [] if number % self.study.evaluate.every else ["validation"]

    def _deliver_again(
        self, sent: Mapping[SiteId, Message], needed: set[SiteId], log: RoundLog
    ) -> dict[SiteId, Answer]:
        """Deliver the end of a round; ask again those that are needed and failed.

        A site may file the same state twice, so asking again is harmless.
        """
        answers = self._deliver(sent)
        log.count(sent, answers)
        for _ in range(self.study.tolerance.retries):
            again = {
                site: sent[site]
                for site, answer in answers.items()
                if isinstance(answer, SiteFailure)
                and not answer.fatal
                and site in needed
            }
            if not again:
                break
            logger.warning(
                "asking again for the end of the round: %s",
                told(failures({site: answers[site] for site in again})),
            )
            more = self._deliver(again)
            log.count(again, more)
            answers.update(more)
        return answers

    def _rows(
        self,
        site: SiteId,
        answer: Answer,
        splits: tuple[str, ...],
        number: int,
        log: RoundLog,
    ) -> list[Mapping[str, Any]]:
        """The checked rows of one site; none, with the reason noted, if it failed."""
        if isinstance(answer, SiteFailure):
            why = f"{answer.reason} while evaluating: {answer.detail}"
            logger.error("round %d: site %s has no result: %s", number, site, why)
            if site not in log.refused:
                log.failed.setdefault(site, why)
            return []
        try:
            rows = expect(from_message(answer), Metrics).rows
            check_rows(rows, self.columns, splits)
        except WireError as error:
            why = f"its results: {error.message}"
            logger.error("round %d: site %s has no result: %s", number, site, why)
            log.refused.setdefault(site, why)
            return []
        return [{**row, "round": number, "site": site} for row in rows]

    def _record(
        self,
        number: int,
        attempt: int,
        log: RoundLog,
        rows: list[Mapping[str, Any]],
    ) -> dict[str, Any]:
        validation: dict[SiteId, float] = {}
        for site in sorted({row["site"] for row in rows}):
            own = [r for r in rows if r["site"] == site and r["split"] == "validation"]
            if own:
                validation[site] = self.score(own)
        # Model selection never looks at the held-out site.
        held_out = set(self.study.split.held_out)
        values = [v for site, v in validation.items() if site not in held_out]
        known = [v for v in values if math.isfinite(v)]
        return {
            "round": number,
            "seconds": 0.0,
            "loss": dict(sorted(log.losses.items())),
            "bytes_down": dict(sorted(log.bytes_down.items())),
            "bytes_up": dict(sorted(log.bytes_up.items())),
            "answered": sorted({*self._tokens} - {*log.refused, *log.failed}),
            "refused": dict(sorted(log.refused.items())),
            "failed": dict(sorted(log.failed.items())),
            "validation": validation or None,
            "score": sum(known) / len(known) if known else None,
            "exchanges": log.exchanges,
            "retries": attempt,
        }


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


def failures(answers: Mapping[SiteId, Answer]) -> dict[SiteId, str]:
    """Name the sites without a reply and why."""
    return {
        site: f"{answer.reason}: {answer.detail}"
        for site, answer in answers.items()
        if isinstance(answer, SiteFailure)
    }


@dataclass(frozen=True)
class Content:
    """What a server's message says, as it travels.

    Attributes:
        values: The JSON values by name.
        states: Names of the states.
        tensors: Of all states, under joined names.
    """

    values: dict[str, Any]
    states: list[str]
    tensors: dict[str, torch.Tensor]


def flattened(content: Mapping[str, Any]) -> Content:
    """Tell JSON values and states apart, and join the names of nested tensors."""
    flat = Content({}, [], {})
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.states.append(name)
            flat.tensors.update({f"{name}/{key}": t for key, t in value.items()})
        else:
            flat.values[name] = value
    return flat


def content_for(site: SiteId, request: Exchange, common: Content) -> Content:
    """What one site is told: what all are told, unless there is more for it."""
    if site not in request.content_by_site:
        return common
    own = request.content_by_site[site]
    content = flattened({**request.content, **own})
    if content.states == common.states and not any(
        isinstance(value, Mapping) for value in own.values()
    ):
        content = replace(content, tensors=common.tensors)
    return content


def restored(server: Server, checkpoint: Checkpoint) -> Server:
    """Put a checkpoint's states into a freshly made server.

    Raises:
        ResumeError: If the checkpoint holds another network than the study.
    """
    shared = checkpoint.states.get("shared", {})
    if set(shared) != set(server.shared):
        raise ResumeError("the checkpoint holds another network than the study")
    memory = {**server.memory, **checkpoint.states.get("memory", {})}
    return replace(server, shared=shared, memory=memory, round=checkpoint.round)


def raise_first(answers: Mapping[SiteId, Answer], doing: str) -> None:
    """Raise if any site failed, naming all of them.

    Raises:
        SiteError: With every reason once, and the sites that gave it.
    """
    problems = failures(answers)
    if problems:
        raise SiteError(f"{doing}: {told(problems)}")


def told(problems: Mapping[SiteId, str]) -> str:
    """Put the problems of sites into one line, equal ones together.

    Example:
        >>> told({"b": "died: in step 3", "a": "died: in step 3", "c": "refused: NaN"})
        'a, b: died: in step 3; c: refused: NaN'
    """
    by_reason: dict[str, list[SiteId]] = {}
    for site, why in sorted(problems.items()):
        plain = why.removeprefix("raised: ").removeprefix(f"site {site}: ")
        by_reason.setdefault(plain, []).append(site)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())


def _require_answer(site: SiteId, answer: Answer, number: int) -> None:
    """End the run if a site that took part, or still has to file, cannot do so."""
    if isinstance(answer, SiteFailure):
        raise QuorumError(
            f"round {number}: site {site} could not end the round "
            f"({answer.reason}: {answer.detail})",
            hint="The last checkpoint is intact; go on with --resume.",
        )


def _below_quorum(number: int, reason: str) -> QuorumError:
    return QuorumError(
        f"round {number}: {reason}",
        hint="The last checkpoint is intact: mend the cause, then go on with --resume; "
        "or lower tolerance.quorum.",
    )
