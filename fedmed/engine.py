"""The engine: rounds, retries, checks, evaluation and checkpoints.

It drives a strategy's server half over a transport. It knows no hospital and no named
algorithm; every published idea lives in a strategy.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedmed import seeds
from fedmed.checkpoint import Checkpoint, Checkpoints
from fedmed.correspondence import Correspondence, RoundLog, Stamp, failures, told
from fedmed.errors import QuorumError, ResumeError
from fedmed.gate import Expectation, UsualNorms, screen
from fedmed.message import Message, SiteFailure, SiteId
from fedmed.participation import draw
from fedmed.replies import Replies
from fedmed.round_end import RoundEnd
from fedmed.runfolder import Observer, RunFolder
from fedmed.selection import Best, Selected, Selection, Standing, better
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
from fedmed.unseen import Newcomers

logger = logging.getLogger(__name__)


class RoundFailedError(Exception):
    """Too few sites were left in one attempt at a round."""


@dataclass(frozen=True)
class Ended:
    """A round that is over.

    Attributes:
        server: The server after it.
        record: Its line in rounds.jsonl.
        rows: Its rows in cases.csv.
        unseen: Its rows in unseen.csv.
        filed: Whether the sites filed what they keep, so that it can be checkpointed.
        standing: How it did on validation cases, if it was validated.
        selected: After the last round, what validation picked, if the study wants it.
    """

    server: Server
    record: dict[str, Any]
    rows: list[Mapping[str, Any]]
    unseen: list[Mapping[str, Any]]
    filed: bool
    standing: Standing | None = None
    selected: Selected | None = None


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
        cards: Public card of each of them.
        public: The public site, which only a strategy's own exchanges ask.
        usual_norms: By action, what its updates measured in the rounds so far.
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
    cards: Mapping[SiteId, Mapping[str, Any]] = field(default_factory=dict)
    public: Member | None = None
    usual_norms: dict[str, UsualNorms] = field(default_factory=dict)
    _first_steps: list[int] = field(default_factory=lambda: [0])
    _best: Best | None = None

    def __post_init__(self) -> None:
        """Open the correspondence with the sites, and the checkpoints."""
        self._post = Correspondence(self.transport, self.study.tolerance.timeout_s)
        self._checkpoints = self.checkpoints or Checkpoints(self.folder.checkpoints)

    def run(self, server: Server, best: Best | None = None) -> tuple[Server, bool]:
        """Run all rounds after `server.round`; returns the server and "finished"."""
        self._best = best
        if server.round == 0 and self._checkpoints.is_empty():
            self._save(server)
        is_saved = True
        while server.round < self.study.rounds:
            if is_saved and self.should_stop():
                return server, False
            ended = self._round(server)
            server, is_saved = ended.server, ended.filed
            self.folder.append_cases(self.columns, ended.rows, sync=is_saved)
            self.folder.append_unseen(self.columns, ended.unseen, sync=is_saved)
            if ended.selected is not None:
                self.folder.write_selected(self.columns, ended.selected.rows)
            self.folder.append_round(ended.record, sync=is_saved)
            if is_saved:
                self._best = better(self._best, server.round, ended.standing)
                self._save(server)
            self.observer.round_finished(ended.record)
        return server, True

    def _save(self, server: Server) -> None:
        states = {"shared": server.shared, "memory": server.memory}
        best, score = self._best, None
        if best is not None and best.round == server.round:
            score = (float(best.standing.num_sites), best.standing.score)
        # Told apart from the scores of the files: the best one may be damaged by now.
        facts = {"best": best.fact if best else None, "usual_norms": self.usual_norms}
        self._checkpoints.save(server.round, states, facts, score=score)

    def _files(self, number: int) -> bool:
        """Whether a round is checkpointed: by its number, or because it is the last."""
        every = self.study.checkpoint.every
        if number == self.study.rounds or number % every == 0:
            return True
        evaluate = self.study.evaluate
        if evaluate.selected and number % evaluate.every == 0:
            return True  # else what comes out would depend on `checkpoint.every`
        return self.should_stop()

    def _round(self, server: Server) -> Ended:
        number = server.round + 1
        started = time.monotonic()
        self.observer.round_started(number)
        known = copy.deepcopy(self.usual_norms)
        for attempt in range(self.study.tolerance.retries + 1):
            log = RoundLog()
            # What a failed attempt measured is forgotten, as a resumed run would.
            self.usual_norms = copy.deepcopy(known)
            self._post.tokens = {}
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
        stamp = self._stamp(number, attempt, log)
        newcomers = Newcomers(
            self.study,
            self.strategy,
            self._post,
            members=self.members,
            cards=self.cards,
            columns=self.columns,
        )
        apart = newcomers.apart(after, number)
        evaluated = tuple(site for site in self.evaluated if site not in apart)
        selects = self.study.evaluate.selected
        best = self._best.round if selects and self._best else None
        ending = RoundEnd(self.study, self._post, evaluated, self.columns, best)
        rows = ending.run(after, stamp, log, files=filed)
        found = newcomers.run(after, stamp, log)
        rows = sorted([*rows, *found.result], key=lambda row: str(row["site"]))
        validation, standing = self._validated(rows)
        selected = None
        if selects and number == self.study.rounds:
            stamp = self._stamp(number, attempt, log)
            picked = better(self._best, number, standing)
            selected = self._selection.run(picked, rows, stamp=stamp, log=log)
        score = standing.score if standing else None
        record = self._record(number, attempt, log, validation, score)
        if selected is not None:
            record["selected"] = selected.record
        record["seconds"] = round(time.monotonic() - started, 3)
        return Ended(after, record, rows, found.by_rule, filed, standing, selected)

    @property
    def _selection(self) -> Selection:
        return Selection(
            self._post,
            self._checkpoints,
            self.evaluated,
            self.columns,
            self.study.tolerance.retries,
        )

    def _attempt(
        self, server: Server, number: int, attempt: int, log: RoundLog
    ) -> Server:
        cohort = self._cohort(number)
        alive = cohort.site_ids
        half: ServerHalf = self.strategy.run_round(server, cohort)
        try:
            request = next(half)
            while True:
                usable = {*alive, *self._public_ids}
                targets = tuple(s for s in request.site_ids if s in usable)
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
            num_rounds=self.study.rounds,
            public=self.public,
        )

    @property
    def _public_ids(self) -> tuple[SiteId, ...]:
        return (self.public.site_id,) if self.public else ()

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
        for site in self._public_ids:
            if why := log.failed.get(site) or log.refused.get(site):
                raise RoundFailedError(f"the public site {site} is needed ({why})")
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
        tried: tuple[int, int],
        server: Server,
        log: RoundLog,
    ) -> Replies:
        number, attempt = tried
        stamp = self._stamp(number, attempt, log)
        sent = self._post.messages(request, targets, stamp)
        answers = self._post.deliver(sent, server.shared)
        log.count(sent, answers)
        log.failed.update(failures(answers))
        log.is_hopeless |= any(
            isinstance(answer, SiteFailure) and answer.fatal
            for answer in answers.values()
        )
        messages = {s: a for s, a in answers.items() if isinstance(a, Message)}
        per_round = self._first_step(number + 1) - self._first_step(number)
        steps = 1 if self.strategy.sync == "step" else per_round
        accepted, refused = self._screen(messages, server, request, steps)
        log.refused.update(refused)
        for site, message in accepted.items():
            self._post.accept(site, message, stamp)
            loss = message.header.get("values", {}).get("loss")
            if loss is not None:
                log.losses[site] = float(loss)
        log.exchanges += 1
        self.observer.exchanged(number, log.exchanges, log.losses)
        return Replies(accepted)

    def _stamp(self, number: int, attempt: int, log: RoundLog) -> Stamp:
        """Name the next exchange of a round."""
        return Stamp(number, attempt, log.exchanges, self._first_step(number))

    def _screen(
        self,
        messages: Mapping[SiteId, Message],
        server: Server,
        request: Exchange,
        steps: int,
    ) -> tuple[dict[SiteId, Message], dict[SiteId, str]]:
        expectation = Expectation(
            reference=server.shared,
            registered={
                member.site_id: member.num_examples
                for member in (*self.members, *([self.public] if self.public else []))
            },
            norm_factor=self.study.tolerance.norm_factor,
            alike=request.alike,
            comparable=request.comparable,
            roles=request.roles,
            steps=steps,
            checks=request.checks,
            sends=request.sends,
        )
        usual = self.usual_norms.setdefault(request.action, {})
        accepted, refused = screen(messages, expectation, usual)
        for site, why in refused.items():
            logger.warning("the reply of site %s was refused: %s", site, why)
        return dict(accepted), dict(refused)

    def _validated(
        self, rows: list[Mapping[str, Any]]
    ) -> tuple[dict[SiteId, float], Standing | None]:
        """Give each site's validation score, and the round's, which selects."""
        validation: dict[SiteId, float] = {}
        for site in sorted({row["site"] for row in rows}):
            own = [r for r in rows if r["site"] == site and r["split"] == "validation"]
            if own:
                validation[site] = self.score(own)
        # Model selection never looks at the held-out site.
        held_out = set(self.study.split.held_out)
        values = [v for site, v in validation.items() if site not in held_out]
        known = [v for v in values if math.isfinite(v)]
        if not known:
            return validation, None
        return validation, Standing(len(known), sum(known) / len(known))

    def _record(
        self,
        number: int,
        attempt: int,
        log: RoundLog,
        validation: Mapping[SiteId, float],
        score: float | None,
    ) -> dict[str, Any]:
        return {
            "round": number,
            "seconds": 0.0,
            "loss": dict(sorted(log.losses.items())),
            "bytes_down": dict(sorted(log.bytes_down.items())),
            "bytes_up": dict(sorted(log.bytes_up.items())),
            "answered": sorted(
                {*self._post.tokens} - {*log.refused, *log.failed, *self._public_ids}
            ),
            "refused": dict(sorted(log.refused.items())),
            "failed": dict(sorted(log.failed.items())),
            "validation": dict(validation) or None,
            "score": score,
            "exchanges": log.exchanges,
            "retries": attempt,
            **({"not_shared": log.not_shared} if log.not_shared else {}),
        }


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


def _below_quorum(number: int, reason: str) -> QuorumError:
    kept = "The last checkpoint is intact: mend" if number > 1 else "Mend"
    return QuorumError(
        f"round {number}: {reason}",
        hint=f"{kept} the cause, then go on with --resume; or lower tolerance.quorum.",
    )
