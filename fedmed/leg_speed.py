"""How much of the ideal speed-up runs side by side reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedmed.leg_process import Verdict
from fedmed.report.wording import count, duration


@dataclass(frozen=True)
class Speed:
    """What legs cost, and how long they took together.

    Processor time stands for what the legs would have taken one after the other. It
    grows where processes are in each other's way (memory, a full machine), so it is no
    measure of that; a run with `--jobs 1` is.

    Attributes:
        num_legs: Legs that were run.
        jobs: Legs at a time.
        wall_s: From the start of the first to the end of the last.
        processor_s: Of all legs together, with the processes that they started.
    """

    num_legs: int
    jobs: int
    wall_s: float
    processor_s: float

    @property
    def ideal(self) -> int:
        """The largest factor that there could be."""
        return max(1, min(self.jobs, self.num_legs))

    @property
    def factor(self) -> float:
        """How many times faster than one after the other.

        Example:
            >>> Speed(num_legs=8, jobs=4, wall_s=10.0, processor_s=36.0).factor
            3.6
        """
        return self.processor_s / self.wall_s if self.wall_s > 0 else float("nan")

    @property
    def share(self) -> float:
        """The factor as a share of the ideal one."""
        return self.factor / self.ideal

    def __str__(self) -> str:
        return (
            f"{count(self.num_legs, 'run')} with --jobs {self.jobs}: "
            f"{duration(self.processor_s)} of processor time in "
            f"{duration(self.wall_s)}, {self.factor:.2f} times, {100 * self.share:.0f} "
            f"% of the ideal {self.ideal}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "runs": self.num_legs,
            "jobs": self.jobs,
            "wall_s": self.wall_s,
            "processor_s": self.processor_s,
            "speed_up": self.factor,
            "share_of_ideal": self.share,
        }


def speed_of(verdicts: Iterable[Verdict], *, jobs: int, wall_s: float) -> Speed:
    """Add up what ended legs cost.

    Args:
        verdicts: How they ended.
        jobs: Legs at a time.
        wall_s: From start to end.
    """
    spent = [verdict.processor_s for verdict in verdicts]
    return Speed(len(spent), jobs, wall_s, float(sum(spent)))
