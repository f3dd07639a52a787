"""A server component that marks the end of each round."""

from __future__ import annotations

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_event_type import AppEventType

from benchmarks import workload


class Clock(FLComponent):
    """A round ends when its model is on disk, which is NVFlare's own last step."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: workload.Rounds | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        del fl_ctx
        if event_type == EventType.START_RUN:
            self.rounds = workload.Rounds()
        elif event_type == AppEventType.AFTER_LEARNABLE_PERSIST and self.rounds:
            self.rounds.done()
